// How the blocks of a large grid follow one another, and how a gate warp ends.
#ifndef JAX_GDN_CUDA_WAVES_CUH_
#define JAX_GDN_CUDA_WAVES_CUH_

#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {

// Of H100 SXM and H200. Where there are more or fewer, as where a multiprocessor runs
// more or fewer blocks than is said below, only speed differs.
constexpr unsigned kMultiprocessors = 132;

// Number of the block among all, which start in this order.
__device__ __forceinline__ unsigned BlockNumber() {
  return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// Lets the first blocks of a multiprocessor, which runs kBlocks at once, start one
// after another. Started together they load together and then compute together, and so
// do those that take their places. A grid of few waves would only wait.
template <unsigned kBlocks>
__device__ __forceinline__ void StartApart() {
  constexpr unsigned kWave = kMultiprocessors * kBlocks;
  const unsigned block = BlockNumber();
  if (block < kWave && gridDim.x * gridDim.y * gridDim.z > 3 * kWave) {
    __nanosleep(block / kMultiprocessors * 1000);
  }
}

// Asks the L2 cache for what a block reads that starts about when this one ends, kAhead
// blocks of a multiprocessor later: that one then waits for its rows a little less.
// Measured at K = 128, where a block too far ahead costs 10 to 25 %. The blocks of a
// state ask for equal shares of a later one, which are contiguous also where what each
// of them reads is not. For V = K.
template <typename T, Ask kNow>
__device__ __forceinline__ void PrefetchLater(const DecodeParams& p, int lane) {
  if constexpr (T::kAhead > 0 && T::kAsk == kNow) {
    const unsigned block = BlockNumber() + T::kAhead * kMultiprocessors;
    const unsigned head = block / gridDim.x, n = head / gridDim.y;
    if (lane != 0 || n >= gridDim.z) return;
    const int32_t slot = ReadSlot(p, n);
    if (slot == kNoSlot) return;
    constexpr uint32_t kShare = T::K * T::VT * kStateBytes<T::kState>;
    const int64_t share =
        HeadOfSlot(p, slot, head % gridDim.y) * gridDim.x + block % gridDim.x;
    PrefetchBulk(static_cast<const char*>(p.state.data) + share * kShare, kShare);
  }
}

// Of the thread's warp in its block; a gate warp is the first. From lane 0, so that the
// compiler sees that no warp diverges; else it keeps a second copy of what follows.
__device__ __forceinline__ int WarpNumber() {
  return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// The end of a gate warp: the gates go to the warps that have rows, which wait for them
// with WaitForArrivals.
template <typename T>
__device__ __forceinline__ void HandOn(const DecodeParams& p, const Gates& gates,
                                       int lane, Gates& shared) {
  if (lane == 0) shared = gates;
  __syncwarp();  // A warp arrives as one.
  Arrive<T::kThreads>();
  PrefetchLater<T, Ask::kAfterGates>(p, lane);
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_WAVES_CUH_
