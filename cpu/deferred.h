// Gated-delta-rule decode on the host that leaves the states as they are.
#ifndef JAX_GDN_CPU_DEFERRED_H_
#define JAX_GDN_CPU_DEFERRED_H_

#include <cstdint>

#include "common/decode_params.h"

namespace jax_gdn {

// As `DecodeStates`, of a call with pending tokens and one decay a head.
void DecodeDeferredStates(const DecodeParams& params, int64_t begin, int64_t end);

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_DEFERRED_H_
