// In-place passes over a buffer: the bandwidth roofline of the benchmarks.
#ifndef JAX_GDN_BENCHMARKS_ROOFLINE_H_
#define JAX_GDN_BENCHMARKS_ROOFLINE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

namespace jax_gdn {

// The passes by number: threads of a block, accesses of a thread, cache policies.
std::vector<std::string> PassNames();

// Changes the sign of every entry of `entry_bytes`, 2 or 4. `bytes` is a multiple of
// kPassBytes, and `pass` an index into PassNames().
inline constexpr int64_t kPassBytes = 8192;
cudaError_t LaunchPass(int pass, void* data, int64_t bytes, int entry_bytes,
                       cudaStream_t stream);

}  // namespace jax_gdn

#endif  // JAX_GDN_BENCHMARKS_ROOFLINE_H_
