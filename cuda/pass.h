// In-place passes over a buffer: the limit that timings are held against.
#ifndef JAX_GDN_CUDA_PASS_H_
#define JAX_GDN_CUDA_PASS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_gdn {

// Of every 16 bytes, this many ways to spread them over blocks and threads.
extern const int kPassShapes;

// Changes the sign of every entry, of 4 or 2 bytes. `count` is in 16 bytes and a
// multiple of kPassMultiple; 0 <= shape < kPassShapes.
inline constexpr int64_t kPassMultiple = 512;
cudaError_t LaunchPass(void* data, int64_t count, int entry_bytes, int shape,
                       cudaStream_t stream);

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_PASS_H_
