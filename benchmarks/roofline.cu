#include "benchmarks/roofline.h"

namespace jax_gdn {
namespace {

// Cache policies; kL2Of256 also loads the 256 bytes around an address into L2.
enum Caching { kPlain, kStreaming, kL2Of256 };
constexpr const char* kCachingNames[] = {"plain", "streaming", "256 B of L2"};

template <Caching kCaching>
__device__ __forceinline__ uint4 LoadAs(const uint4* from) {
  if constexpr (kCaching == kStreaming) return __ldcs(from);
  uint4 x;
  if constexpr (kCaching == kL2Of256) {
    asm volatile("ld.global.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
  }
  return x;
}

// Grid: one block for kThreads * kEach accesses of 16 bytes.
template <int kThreads, int kEach, Caching kLoads, Caching kStores>
__global__ void __launch_bounds__(kThreads) FlipSigns(uint4* data, uint32_t signs) {
  uint4* const mine = data + int64_t{blockIdx.x} * kThreads * kEach + threadIdx.x;
  uint4 x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    x[i] = LoadAs<kLoads>(mine + i * kThreads);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint4 y =
        make_uint4(x[i].x ^ signs, x[i].y ^ signs, x[i].z ^ signs, x[i].w ^ signs);
    if constexpr (kStores == kStreaming) {
      __stcs(mine + i * kThreads, y);
    } else {
      mine[i * kThreads] = y;
    }
  }
}

struct Pass {
  void (*kernel)(uint4*, uint32_t);
  int threads, each;
  Caching loads, stores;
};

template <int kThreads, int kEach, Caching kLoads, Caching kStores>
constexpr Pass PassOf() {
  static_assert(kPassBytes % (16 * kThreads * kEach) == 0);
  return {FlipSigns<kThreads, kEach, kLoads, kStores>, kThreads, kEach, kLoads,
          kStores};
}

// Those that were the fastest for some size on an H200 or an H100.
constexpr Pass kPasses[] = {
    PassOf<256, 1, kPlain, kPlain>(),         PassOf<256, 1, kStreaming, kPlain>(),
    PassOf<256, 1, kStreaming, kStreaming>(), PassOf<256, 1, kL2Of256, kStreaming>(),
    PassOf<256, 2, kL2Of256, kStreaming>(),   PassOf<128, 1, kStreaming, kStreaming>(),
    PassOf<128, 2, kStreaming, kPlain>(),     PassOf<32, 4, kStreaming, kPlain>(),
};

}  // namespace

std::vector<std::string> PassNames() {
  std::vector<std::string> names;
  for (const Pass& pass : kPasses) {
    names.push_back(std::to_string(pass.threads) + " x " + std::to_string(pass.each) +
                    ", loads " + kCachingNames[pass.loads] + ", stores " +
                    kCachingNames[pass.stores]);
  }
  return names;
}

cudaError_t LaunchPass(int pass, void* data, int64_t bytes, int entry_bytes,
                       cudaStream_t stream) {
  const Pass& as = kPasses[pass];
  const uint32_t signs = entry_bytes == 4 ? 0x80000000u : 0x80008000u;
  const auto blocks = static_cast<unsigned>(bytes / (16 * as.threads * as.each));
  as.kernel<<<blocks, as.threads, 0, stream>>>(static_cast<uint4*>(data), signs);
  return cudaGetLastError();
}

}  // namespace jax_gdn
