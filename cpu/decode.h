// Gated-delta-rule decode on the host, for any K and V.
#ifndef JAX_GDN_CPU_DECODE_H_
#define JAX_GDN_CPU_DECODE_H_

#include <cstdint>

#include "common/decode_params.h"

namespace jax_gdn {

// Decodes states [begin, end) of the B HV states of a call. Calls on disjoint
// ranges may run at the same time.
void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end);

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_DECODE_H_
