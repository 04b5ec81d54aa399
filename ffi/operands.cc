#include "ffi/operands.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace jax_gdn {
namespace {

constexpr uintptr_t kVectorAlignment = 16;

std::string ShapeText(const int64_t* sizes, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

uintptr_t ElementBytes(const Tensor& x) {
  return x.dtype && *x.dtype != DType::kFloat32 ? 2 : 4;
}

uintptr_t Bytes(const Tensor& x) {
  uintptr_t bytes = ElementBytes(x);
  for (size_t i = 0; i < x.rank; ++i) bytes *= static_cast<uintptr_t>(x.sizes[i]);
  return bytes;
}

// Sizes by axis: those of q and v, and the state's first.
struct Sizes {
  int64_t B, T, H, HV, K, V, N, R;

  int64_t operator[](char axis) const {
    switch (axis) {
      case 'B':
        return B;
      case 'T':
        return T;
      case 'H':
        return H;
      case 'G':
        return HV;
      case 'K':
        return K;
      case 'V':
        return V;
      case 'R':
        return R;
      case '2':
        return 2;
      default:
        return N;
    }
  }
};

// Collects the first thing that is wrong. A text is made only where it is needed.
class Checker {
 public:
  // Whether an operand fits its row of the table.
  void Fits(const char* name, const Tensor& x, const Shape& shape, const Sizes& sizes) {
    std::array<int64_t, 4> want;
    for (size_t i = 0; i < shape.rank; ++i) want[i] = sizes[shape.axes[i]];
    const auto end = want.begin() + shape.rank;
    Require(std::equal(want.begin(), end, x.sizes, x.sizes + x.rank), [&] {
      return std::string(name) + " must have shape " +
             ShapeText(want.data(), shape.rank) + ", got " + ShapeText(x.sizes, x.rank);
    });
    const bool indices = shape.kind == Kind::kIndices;
    Require(indices ? x.is_int32 : x.dtype.has_value(), [&] {
      return std::string(name) + " must be " +
             (indices ? "int32" : "float32, bfloat16 or float16");
    });
    const uintptr_t alignment =
        shape.kind == Kind::kVectors ? kVectorAlignment : ElementBytes(x);
    Require(reinterpret_cast<uintptr_t>(x.data) % alignment == 0, [&] {
      return std::string(name) + " must lie at a multiple of " +
             std::to_string(alignment) + " bytes";
    });
  }

  // Two buffers of which one is written: apart, or one and the same if that is allowed.
  void Apart(const char* written, const Tensor& x, const char* other, const Tensor& y,
             bool may_be_same) {
    const auto first = reinterpret_cast<uintptr_t>(x.data);
    const auto second = reinterpret_cast<uintptr_t>(y.data);
    const bool apart = Bytes(x) == 0 || Bytes(y) == 0 || first + Bytes(x) <= second ||
                       second + Bytes(y) <= first;
    Require(apart || (may_be_same && first == second),
            [&] { return std::string(written) + " must not overlap " + other; });
  }

  template <typename F>
  void Require(bool holds, F otherwise) {
    if (!holds && error_.empty())
      error_ = "jax_gdn.decode: " + std::string(otherwise());
  }

  const std::string& error() const { return error_; }

 private:
  std::string error_;
};

using Tensors = std::array<std::optional<Tensor>, kNumOperands>;

// Whether an operand has the second of its shapes.
bool HasOtherShape(int operand, const Tensors& x, int32_t state_layout) {
  const Shape& other = kArguments[operand].other_shape;
  if (other.rank == 0) return false;
  if (operand == kState || operand == kNewState) {
    return state_layout == static_cast<int32_t>(Layout::kVK);
  }
  if (operand == kDtBias || operand == kPendingDecay || operand == kNewPendingDecay) {
    operand = kA;
  }
  return x[operand]->rank == kArguments[operand].other_shape.rank;
}

// Results are written while operands are still read. But for the operands that they are
// to share a buffer with, they lie apart from all.
void CheckBuffers(const Tensors& x, Checker& check) {
  for (const auto& [result, donor] : {std::pair(kNewState, kState),
                                      {kOut, kOutput},
                                      {kNewPendingK, kPendingK},
                                      {kNewPendingU, kPendingU},
                                      {kNewPendingDecay, kPendingDecay}}) {
    for (int other = 0; other < result; ++other) {
      if (!x[result] || !x[other]) continue;
      check.Apart(kArguments[result].name, *x[result], kArguments[other].name,
                  *x[other],
                  /*may_be_same=*/other == donor);
    }
  }
}

// The first thing that is wrong with the operands, or nothing.
std::string Check(const Tensors& x, int32_t state_layout) {
  Checker check;
  check.Require(state_layout == 0 || state_layout == 1, [&] {
    return "state_layout must be 0 (KV) or 1 (VK), got " + std::to_string(state_layout);
  });
  check.Require(x[kQ]->rank == 4, [] { return "q must have rank 4"; });
  check.Require(x[kV]->rank == 4, [] { return "v must have rank 4"; });
  check.Require(x[kState]->rank == 4, [] { return "state must have rank 4 or more"; });
  if (!check.error().empty()) return check.error();
  const int64_t *q = x[kQ]->sizes, *v = x[kV]->sizes;
  const Sizes n = {
      .B = q[0],
      .T = q[1],
      .H = q[2],
      .HV = v[2],
      .K = q[3],
      .V = v[3],
      .N = x[kStateIndices] ? x[kState]->sizes[0] : q[0],
      .R = x[kPendingK] && x[kPendingK]->rank == 4 ? x[kPendingK]->sizes[2] : 0};
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  check.Require(n.B >= 0 && n.N >= 0,
                [] { return "q and state must have no axis below 0"; });
  check.Require(n.T > 0 && n.K > 0, [] { return "q must have T and K of at least 1"; });
  check.Require(n.HV > 0 && n.V > 0,
                [] { return "v must have HV and V of at least 1"; });
  check.Require(n.H > 0 && n.HV % n.H == 0,
                [] { return "v must have HV, a multiple of q's H"; });
  check.Require(n.HV <= kMaxSize && n.K <= kMaxSize && n.V <= kMaxSize,
                [] { return "q and v must have HV, K and V that fit 32 bits"; });
  if (!check.error().empty()) return check.error();
  for (int i = 0; i < kNumOperands; ++i) {
    const Argument& argument = kArguments[i];
    const bool other = x[i] && HasOtherShape(i, x, state_layout);
    if (x[i]) {
      check.Fits(argument.name, *x[i], other ? argument.other_shape : argument.shape,
                 n);
    }
  }
  check.Require(!x[kOutput] || x[kOutput]->dtype == x[kOut]->dtype,
                [] { return "output must have out's dtype"; });
  check.Require(!x[kOutputStateIndices] || x[kStateIndices],
                [] { return "output_state_indices needs state_indices"; });
  check.Require(!x[kALog] || x[kALog]->dtype == DType::kFloat32,
                [] { return "A_log must be float32"; });
  check.Require(x[kNewState]->dtype == x[kState]->dtype,
                [] { return "the new state must have the state's dtype"; });
  for (const Operand i : {kPendingU, kPendingDecay, kNewPendingU, kNewPendingDecay}) {
    check.Require(!x[i] || x[i]->dtype == DType::kFloat32,
                  [&] { return std::string(kArguments[i].name) + " must be float32"; });
  }
  for (const Operand i : {kPendingK, kNewPendingK}) {
    check.Require(!x[i] || x[i]->dtype == x[kK]->dtype, [&] {
      return std::string(kArguments[i].name) + " must have k's dtype";
    });
  }
  if (check.error().empty()) CheckBuffers(x, check);
  return check.error();
}

// What a call updates in place beside `out`, and the results that are to share its
// buffers.
constexpr std::pair<Operand, Operand> kUpdated[] = {{kState, kNewState},
                                                    {kPendingK, kNewPendingK},
                                                    {kPendingU, kNewPendingU},
                                                    {kPendingDecay, kNewPendingDecay}};

// What is wrong with the attributes, or nothing.
std::string CheckAttributes(const DecodeOperands& x) {
  Checker check;
  check.Require(0 <= x.gates && x.gates <= 2, [&] {
    return "gates must be 0 (softplus), 1 (sigmoid) or 2 (given), got " +
           std::to_string(x.gates);
  });
  const Tensor& state = *x.tensors[kState];
  if (const auto& pending = x.tensors[kPendingK]) {
    const int64_t rank = pending->rank, T = x.tensors[kQ]->sizes[1];
    const int64_t R = rank < 4 ? 0 : pending->sizes[rank - 2];
    check.Require(x.window > 0 && T <= x.window && x.window <= R - T, [&] {
      return "pending.k must have window + T entries or more, and window be T or more; "
             "got " +
             std::to_string(R) + " entries, window " + std::to_string(x.window) +
             ", T " + std::to_string(T);
    });
    for (const auto& [i, to] : kUpdated) {
      const bool same = x.layer == -1 || x.tensors[i]->sizes[0] == state.sizes[0];
      check.Require(same && x.tensors[i]->rank == x.tensors[to]->rank, [i = i] {
        return std::string(kArguments[i].name) + " must have the state's layers";
      });
    }
  }
  check.Require(
      x.layer == -1 || (state.rank == 5 && state.rank == x.tensors[kNewState]->rank &&
                        0 <= x.layer && x.layer < state.sizes[0]),
      [&] {
        return "layer must be one of a stack [L, N, ...], or -1; got " +
               std::to_string(x.layer) + " of " + ShapeText(state.sizes, state.rank);
      });
  return check.error();
}

// A layer of a stack, [L, N, ...].
Tensor LayerOf(const Tensor& x, int32_t layer) {
  Tensor result = {x.data, x.dtype, x.is_int32, x.sizes + 1, x.rank - 1};
  result.data = static_cast<char*>(x.data) + layer * Bytes(result);
  return result;
}

// The same tensor of `rank` axes, the first in place of all that were before the
// others; `sizes` keeps its shape.
Tensor WithOneLeadingAxis(const Tensor& x, size_t rank, std::array<int64_t, 4>& sizes) {
  if (x.rank <= rank) return x;
  const size_t merged = x.rank - rank;
  sizes[0] = 1;
  for (size_t i = 0; i <= merged; ++i) sizes[0] *= x.sizes[i];
  for (size_t i = 1; i < rank; ++i) sizes[i] = x.sizes[merged + i];
  return {x.data, x.dtype, x.is_int32, sizes.data(), rank};
}

// The copies that results with buffers of their own need: see `Copy`.
std::vector<Copy> CopiesOf(const DecodeOperands& operands, const DecodeParams& p) {
  const Tensors& whole = operands.tensors;
  // Slots of no row may have no address, but only a pool has other than B states.
  const bool pool = p.read_slots != nullptr || p.N != p.B || operands.layer >= 0;
  if (!pool && !whole[kPendingK]) return {};
  std::vector<Copy> copies;
  for (const auto& [from, to] : kUpdated) {
    if (!whole[from] || whole[from]->data == whole[to]->data) continue;
    copies.push_back({whole[to]->data, whole[from]->data, Bytes(*whole[from])});
  }
  return copies;
}

Pending PendingOf(const Tensors& x, int32_t window) {
  if (!x[kPendingK]) return {};
  return {x[kNewPendingK]->data,
          static_cast<float*>(x[kNewPendingU]->data),
          static_cast<float*>(x[kNewPendingDecay]->data),
          static_cast<const int32_t*>(x[kCursors]->data),
          static_cast<const int32_t*>(x[kFold] ? x[kFold]->data : nullptr),
          static_cast<int32_t>(x[kPendingK]->sizes[2]),
          window};
}

}  // namespace

std::variant<Launchable, std::string> MakeParams(const DecodeOperands& operands) {
  const Tensors& whole = operands.tensors;
  Tensors x = whole;
  if (std::string error = CheckAttributes(operands); !error.empty()) return error;
  std::array<int64_t, 4> merged[kNumOperands];
  const size_t decay_rank = x[kA]->rank;
  for (const auto& [from, to] : kUpdated) {
    const bool of_decay = from == kPendingDecay;
    for (const Operand i : {from, to}) {
      if (!x[i]) continue;
      if (operands.layer >= 0) x[i] = LayerOf(*x[i], operands.layer);
      x[i] = WithOneLeadingAxis(*x[i], of_decay ? decay_rank : 4, merged[i]);
    }
  }
  for (const Operand i : {kOut, kOutput}) {
    if (x[i]) x[i] = WithOneLeadingAxis(*x[i], 4, merged[i]);
  }
  if (std::string error = Check(x, operands.state_layout); !error.empty()) return error;
  const auto input = [&](Operand i) { return Input{x[i]->data, *x[i]->dtype}; };
  const auto indices = [&](Operand i) {
    return x[i] ? static_cast<const int32_t*>(x[i]->data) : nullptr;
  };
  const int64_t *q = x[kQ]->sizes, *v = x[kV]->sizes;
  DecodeParams p = {};
  p.q = input(kQ);
  p.k = input(kK);
  p.v = input(kV);
  p.a = input(kA);
  p.b = input(kB);
  // Without weights kernels load what is not used, of arrays that are long enough.
  p.dt_bias = x[kDtBias] ? input(kDtBias) : p.a;
  p.A_log = static_cast<const float*>(x[kALog] ? x[kALog]->data : x[kV]->data);
  p.state = input(kState);
  p.out = {x[kOut]->data, *x[kOut]->dtype};
  p.new_state = x[kNewState]->data;
  p.read_slots = indices(kStateIndices);
  p.write_slots = indices(kOutputStateIndices);
  p.B = q[0];
  p.T = q[1];
  p.N = x[kState]->sizes[0];
  p.H = static_cast<int32_t>(q[2]);
  p.HV = static_cast<int32_t>(v[2]);
  p.K = static_cast<int32_t>(q[3]);
  p.V = static_cast<int32_t>(v[3]);
  p.group = p.HV / p.H;
  p.group_inverse = static_cast<uint32_t>(((int64_t{1} << 32) + p.group - 1) / p.group);
  p.scale = operands.scale;
  p.layout = static_cast<Layout>(operands.state_layout);
  p.use_qk_l2norm = operands.use_qk_l2norm;
  p.per_channel = x[kA]->rank == 4;
  p.snapshots = x[kOutputStateIndices] && x[kOutputStateIndices]->rank == 2;
  p.gates = static_cast<GateForm>(operands.gates);
  p.lower_bound = operands.lower_bound;
  p.beta_scale = operands.beta_scale;
  p.pending = PendingOf(x, operands.window);
  std::vector<Copy> copies = CopiesOf(operands, p);
  // Then the new state has all of the old one.
  if (!copies.empty() && copies[0].to == whole[kNewState]->data) {
    p.state.data = p.new_state;
  }
  return Launchable{p, std::move(copies)};
}

}  // namespace jax_gdn
