#include "cuda/pass.h"

#include "cuda/state.cuh"

namespace jax_gdn {
namespace {

enum class In { kPlain, kStreaming, kAround };

template <int kThreads, int kEach, In kIn, bool kStreamOut>
__global__ void __launch_bounds__(kThreads) FlipSigns(uint4* data, uint32_t signs) {
  constexpr Caching kOut = kStreamOut ? Caching::kStreaming : Caching::kPlain;
  uint4* const mine = data + int64_t{blockIdx.x} * kThreads * kEach + threadIdx.x;
  uint4 x[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if constexpr (kIn == In::kAround) {
      asm volatile("ld.global.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i].x), "=r"(x[i].y), "=r"(x[i].z), "=r"(x[i].w)
                   : "l"(mine + i * kThreads));
    } else {
      x[i] = LoadState<kIn == In::kPlain ? Caching::kPlain : Caching::kStreaming>(mine + i * kThreads);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const uint4 y =
        make_uint4(x[i].x ^ signs, x[i].y ^ signs, x[i].z ^ signs, x[i].w ^ signs);
    StoreState<kOut>(mine + i * kThreads, y);
  }
}

struct Shape {
  void (*kernel)(uint4*, uint32_t);
  int threads, each;
};

// Those that were the fastest for some size on an H200 or an H100.
constexpr Shape kShapes[] = {
    {FlipSigns<256, 1, In::kPlain, false>, 256, 1},
    {FlipSigns<256, 1, In::kStreaming, false>, 256, 1},
    {FlipSigns<256, 1, In::kStreaming, true>, 256, 1},
    {FlipSigns<256, 1, In::kAround, true>, 256, 1},
    {FlipSigns<256, 2, In::kAround, true>, 256, 2},
    {FlipSigns<128, 1, In::kStreaming, true>, 128, 1},
    {FlipSigns<128, 2, In::kStreaming, false>, 128, 2},
    {FlipSigns<32, 4, In::kStreaming, false>, 32, 4},
};

}  // namespace

const int kPassShapes = sizeof(kShapes) / sizeof(kShapes[0]);

cudaError_t LaunchPass(void* data, int64_t count, int entry_bytes, int shape,
                       cudaStream_t stream) {
  const Shape& as = kShapes[shape];
  const uint32_t signs = entry_bytes == 4 ? 0x80000000u : 0x80008000u;
  as.kernel<<<static_cast<unsigned>(count / (as.threads * as.each)), as.threads, 0,
              stream>>>(static_cast<uint4*>(data), signs);
  return cudaGetLastError();
}

}  // namespace jax_gdn
