// How the blocks of a large grid follow one another.
#ifndef JAX_GDN_CUDA_WAVES_CUH_
#define JAX_GDN_CUDA_WAVES_CUH_

#include <cuda_runtime.h>

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

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_WAVES_CUH_
