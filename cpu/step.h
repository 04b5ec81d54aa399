// All tokens of one state: the passes over memory that the host kernel is made of.
//
// step.cc is compiled once an instruction set.
#ifndef JAX_GDN_CPU_STEP_H_
#define JAX_GDN_CPU_STEP_H_

#include <cstdint>
#include <vector>

#include "ffi/decode_params.h"

namespace jax_gdn {

// A state in memory.
struct StateView {
  void* data;  // null: the new state is not wanted
  DType dtype;
};

// What one token brings to one state, normalised and activated; the state that it
// reads and the one that it leaves, which may be the same memory. If their dtypes
// differ, one is float32.
struct Token {
  const float* decayed_q;  // [K], scaled and times decay
  const float* decayed_k;  // [K], times decay
  const float* k;          // [K]
  const float* decay;      // [K], exp(g)
  const float* v;          // [V]
  float* out;              // [V]
  float beta;
  float qk;  // q.k, scaled
  StateView from, to;
};

// What is compiled for an instruction set.
struct Kernels {
  const char* name;  // of the instruction set
  // Applies tokens to a state in order; each reads what the one before it left.
  // Meanwhile asks for `ahead`, which is read next, unless its data is null.
  void (*decode)(Layout layout, const Token* tokens, int64_t count, int32_t K,
                 int32_t V, StateView ahead);
  // Elements [first, first + count) of a buffer to float32, and from it, rounded once.
  void (*widen)(const Input& x, int64_t first, int64_t count, float* values);
  void (*round)(const float* values, int64_t first, int64_t count, const Output& x);
  float (*dot)(const float* x, const float* y, int32_t size);
};

// Those that this processor can run, the best first.
std::vector<const Kernels*> UsableKernels();

// Those that calls use: the best, unless others were chosen.
const Kernels& ChosenKernels();

// Returns false if this processor cannot run them or there are none of this name.
bool ChooseKernels(const char* name);

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_STEP_H_
