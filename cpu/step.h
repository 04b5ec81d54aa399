// One token of one state: the passes over memory that the host kernel is made of.
//
// step.cc is compiled once an instruction set; `BestStep` picks when it is asked.
#ifndef JAX_GDN_CPU_STEP_H_
#define JAX_GDN_CPU_STEP_H_

#include <cstdint>

#include "ffi/decode_params.h"

namespace jax_gdn {

// What one token brings to one state, normalised and activated.
struct Token {
  const float* decayed_q;  // [K], scaled and times decay
  const float* decayed_k;  // [K], times decay
  const float* k;          // [K]
  const float* decay;      // [K], exp(g)
  const float* v;          // [V]
  float beta;
  float qk;    // q.k, scaled
  float* out;  // [V]
  float* u;    // [V], scratch
  float* p;    // [V], scratch
};

// A state in memory.
struct StateView {
  void* data;  // null: the new state is not wanted
  DType dtype;
};

// Reads `from`, writes the token's output and `to`, which may be the same memory. If
// their dtypes differ, one is float32.
using Step = void (*)(Layout layout, StateView from, StateView to, const Token& token,
                      int32_t K, int32_t V);

Step BestStep();

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_STEP_H_
