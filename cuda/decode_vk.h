// Gated-delta-rule decode of states laid out [.., V, K] ("VK").
#ifndef JAX_GDN_CUDA_DECODE_VK_H_
#define JAX_GDN_CUDA_DECODE_VK_H_

#include <vector>

#include "cuda/plan.h"

namespace jax_gdn {

// Every compiled instance.
const std::vector<Kernel>& DecodeVKKernels();

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DECODE_VK_H_
