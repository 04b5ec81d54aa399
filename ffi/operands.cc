#include "ffi/operands.h"

#include <array>
#include <initializer_list>
#include <limits>
#include <utility>

namespace jax_gdn {
namespace {

// Kernels read q, k, v and states 16 bytes at a time, and write as many.
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

// Collects the first thing that is wrong. A text is made only where it is needed.
class Checker {
 public:
  // An array of floats, or of int32.
  enum Kind { kVectors, kFloats, kIndices };

  void Array(const char* name, const Tensor& x, Kind kind,
             std::initializer_list<int64_t> want) {
    bool same = x.rank == want.size();
    for (size_t i = 0; same && i < x.rank; ++i) same = x.sizes[i] == want.begin()[i];
    Require(same, [&] {
      return std::string(name) + " must have shape " +
             ShapeText(want.begin(), want.size()) + ", got " +
             ShapeText(x.sizes, x.rank);
    });
    Require(kind == kIndices ? x.is_int32 : x.dtype.has_value(), [&] {
      return std::string(name) + " must be " +
             (kind == kIndices ? "int32" : "float32, bfloat16 or float16");
    });
    const uintptr_t alignment = kind == kVectors ? kVectorAlignment : ElementBytes(x);
    Require(reinterpret_cast<uintptr_t>(x.data) % alignment == 0, [&] {
      return std::string(name) + " must lie at a multiple of " +
             std::to_string(alignment) + " bytes";
    });
  }

  // Two buffers of which one is written: apart, or one and the same if that is allowed.
  void Apart(const char* written, const Tensor& x, const char* other, const Tensor& y,
             bool may_be_same = false) {
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

// Results are written while operands are still read. But for the operands that they are
// to share a buffer with, they lie apart from all.
void CheckBuffers(const DecodeOperands& x, Checker& check) {
  check.Apart("the new state", x.new_state, "state", x.state, /*may_be_same=*/true);
  check.Apart("out", x.out, "the new state", x.new_state);
  check.Apart("out", x.out, "state", x.state);
  const std::pair<const char*, const Tensor*> read[] = {
      {"q", &x.q},
      {"k", &x.k},
      {"v", &x.v},
      {"A_log", &x.A_log},
      {"a", &x.a},
      {"dt_bias", &x.dt_bias},
      {"b", &x.b},
      {"state_indices", x.state_indices ? &*x.state_indices : nullptr},
      {"output_state_indices",
       x.output_state_indices ? &*x.output_state_indices : nullptr}};
  for (const auto& [name, operand] : read) {
    if (operand == nullptr) continue;
    check.Apart("the new state", x.new_state, name, *operand);
    check.Apart("out", x.out, name, *operand);
  }
  if (!x.output) return;
  check.Apart("the new state", x.new_state, "output", *x.output);
  check.Apart("out", x.out, "output", *x.output, /*may_be_same=*/true);
}

// The first thing that is wrong with the operands, or nothing.
std::string Check(const DecodeOperands& x) {
  Checker check;
  check.Require(x.state_layout == 0 || x.state_layout == 1, [&] {
    return "state_layout must be 0 (KV) or 1 (VK), got " +
           std::to_string(x.state_layout);
  });
  check.Require(x.q.rank == 4, [] { return "q must have rank 4"; });
  check.Require(x.v.rank == 4, [] { return "v must have rank 4"; });
  check.Require(x.state.rank == 4, [] { return "state must have rank 4 or more"; });
  if (!check.error().empty()) return check.error();
  const int64_t B = x.q.sizes[0], T = x.q.sizes[1], H = x.q.sizes[2], K = x.q.sizes[3];
  const int64_t HV = x.v.sizes[2], V = x.v.sizes[3];
  const int64_t N = x.state_indices ? x.state.sizes[0] : B;
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  check.Require(B >= 0 && N >= 0,
                [] { return "q and state must have no axis below 0"; });
  check.Require(T > 0 && K > 0, [] { return "q must have T and K of at least 1"; });
  check.Require(HV > 0 && V > 0, [] { return "v must have HV and V of at least 1"; });
  check.Require(H > 0 && HV % H == 0,
                [] { return "v must have HV, a multiple of q's H"; });
  check.Require(HV <= kMaxSize && K <= kMaxSize && V <= kMaxSize,
                [] { return "q and v must have HV, K and V that fit 32 bits"; });
  if (!check.error().empty()) return check.error();
  using C = Checker;
  check.Array("q", x.q, C::kVectors, {B, T, H, K});
  check.Array("k", x.k, C::kVectors, {B, T, H, K});
  check.Array("v", x.v, C::kVectors, {B, T, HV, V});
  const bool KV = x.state_layout == static_cast<int32_t>(Layout::kKV);
  check.Array("state", x.state, C::kVectors, {N, HV, KV ? K : V, KV ? V : K});
  check.Array("the new state", x.new_state, C::kVectors,
              {N, HV, KV ? K : V, KV ? V : K});
  check.Array("A_log", x.A_log, C::kFloats, {HV});
  if (x.a.rank == 4) {
    check.Array("a", x.a, C::kVectors, {B, T, HV, K});
    check.Array("dt_bias", x.dt_bias, C::kVectors, {HV, K});
  } else {
    check.Array("a", x.a, C::kFloats, {B, T, HV});
    check.Array("dt_bias", x.dt_bias, C::kFloats, {HV});
  }
  check.Array("b", x.b, C::kFloats, {B, T, HV});
  check.Array("out", x.out, C::kVectors, {B, T, HV, V});
  if (x.output) {
    check.Array("output", *x.output, C::kFloats, {B, T, HV, V});
    check.Require(x.output->dtype == x.out.dtype,
                  [] { return "output must have out's dtype"; });
  }
  if (x.state_indices) {
    check.Array("state_indices", *x.state_indices, C::kIndices, {B});
  }
  if (x.output_state_indices) {
    check.Require(x.state_indices.has_value(),
                  [] { return "output_state_indices needs state_indices"; });
    if (x.output_state_indices->rank == 2) {
      check.Array("output_state_indices", *x.output_state_indices, C::kIndices, {B, T});
    } else {
      check.Array("output_state_indices", *x.output_state_indices, C::kIndices, {B});
    }
  }
  check.Require(x.A_log.dtype == DType::kFloat32,
                [] { return "A_log must be float32"; });
  check.Require(x.new_state.dtype == x.state.dtype,
                [] { return "the new state must have the state's dtype"; });
  if (check.error().empty()) CheckBuffers(x, check);
  return check.error();
}

// The same tensor with one axis in place of all but the last three; `sizes` keeps its
// shape.
Tensor WithOneLeadingAxis(const Tensor& x, std::array<int64_t, 4>& sizes) {
  if (x.rank <= sizes.size()) return x;
  const size_t merged = x.rank - sizes.size();
  sizes = {1, x.sizes[merged + 1], x.sizes[merged + 2], x.sizes[merged + 3]};
  for (size_t i = 0; i <= merged; ++i) sizes[0] *= x.sizes[i];
  return {x.data, x.dtype, x.is_int32, sizes.data(), sizes.size()};
}

}  // namespace

std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& operands) {
  DecodeOperands x = operands;
  std::array<int64_t, 4> state, new_state, out, output;
  x.state = WithOneLeadingAxis(x.state, state);
  x.new_state = WithOneLeadingAxis(x.new_state, new_state);
  x.out = WithOneLeadingAxis(x.out, out);
  if (x.output) x.output = WithOneLeadingAxis(*x.output, output);
  if (std::string error = Check(x); !error.empty()) return error;
  const auto input = [](const Tensor& tensor) {
    return Input{tensor.data, *tensor.dtype};
  };
  const auto indices = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const int32_t*>(tensor->data) : nullptr;
  };
  DecodeParams p = {};
  p.q = input(x.q);
  p.k = input(x.k);
  p.v = input(x.v);
  p.a = input(x.a);
  p.dt_bias = input(x.dt_bias);
  p.b = input(x.b);
  p.A_log = static_cast<const float*>(x.A_log.data);
  p.state = input(x.state);
  p.out = {x.out.data, *x.out.dtype};
  p.new_state = x.new_state.data;
  p.read_slots = indices(x.state_indices);
  p.write_slots = indices(x.output_state_indices);
  p.B = x.q.sizes[0];
  p.T = x.q.sizes[1];
  p.N = x.state.sizes[0];
  p.H = static_cast<int32_t>(x.q.sizes[2]);
  p.HV = static_cast<int32_t>(x.v.sizes[2]);
  p.K = static_cast<int32_t>(x.q.sizes[3]);
  p.V = static_cast<int32_t>(x.v.sizes[3]);
  p.group = p.HV / p.H;
  p.group_inverse = static_cast<uint32_t>(((int64_t{1} << 32) + p.group - 1) / p.group);
  p.scale = x.scale;
  p.layout = static_cast<Layout>(x.state_layout);
  p.use_qk_l2norm = x.use_qk_l2norm;
  p.per_channel = x.a.rank == 4;
  p.snapshots = x.output_state_indices && x.output_state_indices->rank == 2;
  return p;
}

size_t BytesToCopy(const DecodeParams& p) {
  // Slots of no row may have no address, but only a pool has other than B states.
  const bool pool = p.read_slots != nullptr || p.N != p.B;
  if (!pool || p.state.data == p.new_state) return 0;
  const size_t entry = p.state.dtype == DType::kFloat32 ? 4 : 2;
  return entry * p.N * p.HV * p.K * p.V;
}

}  // namespace jax_gdn
