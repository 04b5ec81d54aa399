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

#include "ffi/decode_params.h"

namespace jax_gdn {

struct Tensor {
  void* data;
  std::optional<DType> dtype;  // none: 32-bit integers
  const int64_t* sizes;
  size_t rank;
};

struct DecodeOperands {
  Tensor q, k, v, state, A_log, a, dt_bias, b;
  Tensor out, new_state;
  std::optional<Tensor> state_indices, output_state_indices;
  float scale;
  bool use_qk_l2norm;
  Layout layout;
};

// The parameters, or what is wrong with the operands. What is updated in place, the
// states and out, may have more leading axes: reshaped, XLA's host code would copy it.
std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& operands);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_OPERANDS_H_
