// The operands of one decode call as a runtime hands them over, and their checks,
// the same for every platform.
//
// Python has checked the call already, with better words; these checks stand
// between a wrong program (an edited export, say) and memory.
#ifndef JAX_GDN_FFI_OPERANDS_H_
#define JAX_GDN_FFI_OPERANDS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "common/decode_params.h"

namespace jax_gdn {

struct Tensor {
  void* data;
  std::optional<DType> dtype;  // none: something else
  bool is_int32;
  const int64_t* sizes;
  size_t rank;
};

struct DecodeOperands {
  Tensor q, k, v, state, A_log, a, dt_bias, b;
  Tensor out, new_state;
  std::optional<Tensor> output, state_indices, output_state_indices;
  float scale;
  bool use_qk_l2norm;
  int32_t state_layout;  // a `Layout`, if the program is right
};

// The parameters, or what is wrong with the operands. What is updated in place, the
// states and out, may have more leading axes: reshaped, XLA's host code would copy it.
//
// XLA may give a result a buffer of its own, where it drops an alias. Whoever launches
// first calls `BytesToCopy`.
std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& operands);

// Bytes of a pool whose new states have a buffer of their own; else 0. They have to be
// copied there first, for the slots that no row writes, and `params.state` becomes that
// buffer. States that are no pool are all written, so no copy is needed.
size_t BytesToCopy(const DecodeParams& params);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_OPERANDS_H_
