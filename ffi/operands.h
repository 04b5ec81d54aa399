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
#include <vector>

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
  kPendingK,
  kPendingU,
  kPendingDecay,
  kCursors,  // of `decode_deferred` alone
  kOutput,
  kStateIndices,
  kOutputStateIndices,  // optional
  kFold,                // optional in `decode_deferred`
  kOut,
  kNewState,  // the results
  kNewPendingK,
  kNewPendingU,
  kNewPendingDecay,  // of `decode_deferred` alone
  kNumOperands
};
inline constexpr int kFirstOptional = kOutput;

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
// is no pool. Of two shapes, the layout chooses for states, `a` for `dt_bias` and the
// pending decays, else the number of axes.
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
    {"pending.k", {"N H R K", Kind::kVectors}},
    {"pending.u", {"N HV R V", Kind::kVectors}},
    {"pending.decay", {"N HV R", Kind::kFloats}, {"N HV R K", Kind::kVectors}},
    {"cursors", {"N 2", Kind::kIndices}},
    {"output", {"B T HV V", Kind::kFloats}},
    {"state_indices", {"B", Kind::kIndices}},
    {"output_state_indices", {"B", Kind::kIndices}, {"B T", Kind::kIndices}},
    {"fold", {"B", Kind::kIndices}},
    {"out", {"B T HV V", Kind::kVectors}},
    {"the new state", {"N HV K V", Kind::kVectors}, {"N HV V K", Kind::kVectors}},
    {"the new pending.k", {"N H R K", Kind::kVectors}},
    {"the new pending.u", {"N HV R V", Kind::kVectors}},
    {"the new pending.decay", {"N HV R", Kind::kFloats}, {"N HV R K", Kind::kVectors}},
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
  int32_t window = 0;  // of `decode_deferred`; 0: the call is `decode`
};

// Whether an operand or a result is part of every call with such gates.
inline bool IsRequired(int operand, int32_t gates, bool deferred) {
  const bool weight = operand == kALog || operand == kDtBias;
  if (weight && gates == static_cast<int32_t>(GateForm::kGiven)) return false;
  const bool pending = kPendingK <= operand && operand < kFirstOptional;
  if (pending || operand > kNewState) return deferred;
  return operand < kFirstOptional || operand >= kOut;
}

// XLA may give a result a buffer of its own, where it drops an alias. What a call does
// not write whole has to be copied there before: pools, stacks, what is pending.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// What to launch, after the copies.
struct Launchable {
  DecodeParams params;
  std::vector<Copy> copies;
};

// That, or what is wrong with the operands. What is updated in place, the states, `out`
// and what is pending, may have more leading axes: reshaped, XLA's host code would copy
// it.
std::variant<Launchable, std::string> MakeParams(const DecodeOperands& operands);

}  // namespace jax_gdn

#endif  // JAX_GDN_FFI_OPERANDS_H_
