// Storage types to float32 and back, on the host.
#ifndef JAX_GDN_CPU_CONVERT_H_
#define JAX_GDN_CPU_CONVERT_H_

#include <cstdint>

#include "ffi/decode_params.h"

namespace jax_gdn {

// Widens elements [first, first + count) of `x`, exactly.
void Widen(const Input& x, int64_t first, int64_t count, float* values);

// Rounds to nearest even, once, into elements [first, first + count) of `x`.
void Round(const float* values, int64_t first, int64_t count, const Output& x);

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_CONVERT_H_
