// Jobs on one state: the passes over memory that the host kernel is made of.
//
// state_kernel.cc is compiled once an instruction set.
#ifndef JAX_GDN_CPU_STATE_KERNEL_H_
#define JAX_GDN_CPU_STATE_KERNEL_H_

#include <cstdint>
#include <vector>

#include "common/decode_params.h"

namespace jax_gdn {

// What one token brings to one state, normalised and activated.
struct Token {
  const float* decayed_q;  // [K], scaled and times decay
  const float* decayed_k;  // [K], times decay
  const float* k;          // [K]
  const float* decay;      // [K], exp(g)
  const float* v;          // [V]
  float* out;              // [V]
  float beta;
  float qk;  // q.k, scaled
  void* to;  // the slot for the state after it; null: not wanted
};

// Entries of a part, a row or a column of K, that the tile has room for.
constexpr int32_t kTileWidth = 32;

// What every job has.
struct StateJob {
  Layout layout;
  DType dtype;  // of the state
  int32_t K, V;
  const void* from;   // the state, which the job may be about to write
  float* tile;        // [kTileWidth, K], aligned: a part of the state between passes
  const void* ahead;  // a state that is read next and prefetched meanwhile, or null
};

// All tokens of one state.
struct DecodeJob : StateJob {
  const Token* tokens;
  int64_t count;
};

// Two vectors, and where their products with a state go.
struct Query {
  const float *k, *q;  // [K]
  float *p, *r;        // [V], k^T S and q^T S
};

// What folds into a state: decay S + sum of k u^T over `count` entries.
struct Fold {
  void* to;        // the slot for the result; null: nothing folds
  const float* k;  // [count, K]
  const float* u;  // [count, V]
  int32_t count;
  float decay;
};

// All queries of one state, and then what folds into it.
struct QueryJob : StateJob {
  const Query* queries;
  int64_t count;
  Fold fold;
};

// What is compiled for an instruction set.
struct Kernels {
  const char* name;  // of the instruction set
  void (*decode)(const DecodeJob& job);
  void (*query)(const QueryJob& job);
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

#endif  // JAX_GDN_CPU_STATE_KERNEL_H_
