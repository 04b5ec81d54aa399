// The operands of one decode call as a runtime hands them over, and their checks,
// the same for every platform.
//
// Python has checked the call already, with better words; these checks stand
// between a wrong program (an edited export, say) and memory.
#ifndef JAX_GDN_FFI_OPERANDS_H_
#define JAX_GDN_FFI_OPERANDS_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>

#include "common/decode_params.h"

namespace jax_gdn {

// In the order in which a call has them; of the optional ones, those that are there.
enum Operand {
  kQ,
  kK,
  kV,
  kState,
  kALog,  // not there if gates are given
  kA,
  kDtBias,  // likewise
  kB,       // all but these two are always there
  kOutput,
  kStateIndices,
  kOutputStateIndices,  // optional
  kOut,
  kNewState,  // the results
  kNumOperands
};
inline constexpr int kNumRequired = kOutput;
inline constexpr int kNumOptional = kOut - kNumRequired;

// Kernels read and write vectors 16 bytes at a time.
enum class Kind { kVectors, kFloats, kIndices };

// Axes, of which HV is 'G' here (its heads come in groups), read from text when
// compiled.
struct Shape {
  std::array<char, 4> axes = {};
  size_t rank = 0;
  Kind kind = Kind::kFloats;

  constexpr Shape() = default;
  constexpr Shape(std::string_view text, Kind kind_) : kind(kind_) {
    for (size_t i = 0; i < text.size(); i += 2) {
      const bool heads = text.substr(i, 2) == "HV";
      axes[rank++] = heads ? 'G' : text[i];
      if (heads) ++i;
    }
  }
};

// The argument table, which reads as that of jax_gdn/_operands.py; N is B where there
// is no pool. Of two shapes, the layout chooses for states, `a` for `dt_bias`, else the
// number of axes.
struct Argument {
  const char* name;
  Shape shape, other_shape = {};
};
inline constexpr Argument kArguments[kNumOperands] = {
    {"q", {"B T H K", Kind::kVectors}},
    {"k", {"B T H K", Kind::kVectors}},
    {"v", {"B T HV V", Kind::kVectors}},
    {"state", {"N HV K V", Kind::kVectors}, {"N HV V K", Kind::kVectors}},
    {"A_log", {"HV", Kind::kFloats}},
    {"a", {"B T HV", Kind::kFloats}, {"B T HV K", Kind::kVectors}},
    {"dt_bias", {"HV", Kind::kFloats}, {"HV K", Kind::kVectors}},
    {"b", {"B T HV", Kind::kFloats}},
    {"output", {"B T HV V", Kind::kFloats}},
    {"state_indices", {"B", Kind::kIndices}},
    {"output_state_indices", {"B", Kind::kIndices}, {"B T", Kind::kIndices}},
    {"out", {"B T HV V", Kind::kVectors}},
    {"the new state", {"N HV K V", Kind::kVectors}, {"N HV V K", Kind::kVectors}},
};

struct Tensor {
  void* data;
  std::optional<DType> dtype;  // none: something else
  bool is_int32;
  const int64_t* sizes;
  size_t rank;
};

struct DecodeOperands {
  std::array<std::optional<Tensor>, kNumOperands> tensors;
  float scale;
  bool use_qk_l2norm;
  int32_t state_layout;  // a `Layout`, if the program is right
  int32_t gates = 0;     // likewise, a `GateForm`
  float lower_bound = 0, beta_scale = 1;
  int32_t layer = -1;  // of a stack of states, [L, N, ...]; -1: there is none
};

// Whether an operand or a result is part of every call with such gates.
inline bool IsRequired(int operand, int32_t gates) {
  const bool weight = operand == kALog || operand == kDtBias;
  if (weight && gates == static_cast<int32_t>(GateForm::kGiven)) return false;
  return operand < kNumRequired || operand >= kOut;
}

// The parameters, or what is wrong with the operands. What is updated in place, the
// states and out, may have more leading axes: reshaped, XLA's host code would copy it.
//
// XLA may give a result a buffer of its own, where it drops an alias. Whoever launches
// first copies as `CopyOf` says.
std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& operands);

// A pool or a stack whose new states have a buffer of their own has to be copied there
// first, for the slots that no row writes, and `params.state` becomes `new_state`.
// Other states are all written: no bytes.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
Copy CopyOf(const DecodeParams& params);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_OPERANDS_H_
