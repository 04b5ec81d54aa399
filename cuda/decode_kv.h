// Gated-delta-rule decode of states laid out [.., K, V] ("KV").
#ifndef JAX_GDN_CUDA_DECODE_KV_H_
#define JAX_GDN_CUDA_DECODE_KV_H_

#include <vector>

#include "cuda/plan.h"

namespace jax_gdn {

// Every compiled instance.
const std::vector<Kernel>& DecodeKVKernels();

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DECODE_KV_H_
