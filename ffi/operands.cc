#include "ffi/operands.h"

#include <array>
#include <initializer_list>
#include <limits>

namespace jax_gdn {
namespace {

// Kernels read 16 bytes at a time.
constexpr uintptr_t kAlignment = 16;

std::string ShapeText(const int64_t* sizes, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

// Collects the first thing that is wrong.
class Checker {
 public:
  void Shape(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
    bool same = x.rank == want.size();
    for (size_t i = 0; same && i < x.rank; ++i) same = x.sizes[i] == want.begin()[i];
    Require(same, std::string(name) + " must have shape " +
                      ShapeText(want.begin(), want.size()) + ", got " +
                      ShapeText(x.sizes, x.rank));
    Require(reinterpret_cast<uintptr_t>(x.data) % kAlignment == 0,
            std::string(name) + " must lie at a multiple of 16 bytes");
  }

  void Floats(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
    Shape(name, x, want);
    Require(x.dtype.has_value(), std::string(name) + " must hold floats");
  }

  void Indices(const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
    Shape(name, x, want);
    Require(!x.dtype.has_value(), std::string(name) + " must be int32");
  }

  void Require(bool holds, const std::string& otherwise) {
    if (!holds && error_.empty()) error_ = "jax_gdn.decode: " + otherwise;
  }

  const std::string& error() const { return error_; }

 private:
  std::string error_;
};

// The first thing that is wrong with the operands, or nothing.
std::string Check(const DecodeOperands& x) {
  Checker check;
  check.Require(x.q.rank == 4, "q must have rank 4");
  check.Require(x.v.rank == 4, "v must have rank 4");
  check.Require(x.state.rank == 4, "state must have rank 4");
  if (!check.error().empty()) return check.error();
  const int64_t B = x.q.sizes[0], T = x.q.sizes[1], H = x.q.sizes[2], K = x.q.sizes[3];
  const int64_t HV = x.v.sizes[2], V = x.v.sizes[3];
  const int64_t N = x.state_indices ? x.state.sizes[0] : B;
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  check.Require(T > 0, "T must be at least 1");
  check.Require(H > 0 && HV % H == 0, "HV must be a multiple of H");
  check.Require(HV <= kMaxSize && K <= kMaxSize && V <= kMaxSize,
                "HV, K and V must fit 32 bits");
  check.Floats("q", x.q, {B, T, H, K});
  check.Floats("k", x.k, {B, T, H, K});
  check.Floats("v", x.v, {B, T, HV, V});
  const bool KV = x.layout == Layout::kKV;
  check.Floats("state", x.state, {N, HV, KV ? K : V, KV ? V : K});
  check.Floats("the new state", x.new_state, {N, HV, KV ? K : V, KV ? V : K});
  check.Floats("A_log", x.A_log, {HV});
  if (x.a.rank == 4) {
    check.Floats("a", x.a, {B, T, HV, K});
    check.Floats("dt_bias", x.dt_bias, {HV, K});
  } else {
    check.Floats("a", x.a, {B, T, HV});
    check.Floats("dt_bias", x.dt_bias, {HV});
  }
  check.Floats("b", x.b, {B, T, HV});
  check.Floats("out", x.out, {B, T, HV, V});
  if (x.state_indices) check.Indices("state_indices", *x.state_indices, {B});
  if (x.output_state_indices) {
    check.Require(x.state_indices.has_value(),
                  "output_state_indices needs state_indices");
    if (x.output_state_indices->rank == 2) {
      check.Indices("output_state_indices", *x.output_state_indices, {B, T});
    } else {
      check.Indices("output_state_indices", *x.output_state_indices, {B});
    }
  }
  check.Require(x.A_log.dtype == DType::kFloat32, "A_log must be float32");
  check.Require(x.new_state.dtype == x.state.dtype,
                "the new state must have the state's dtype");
  check.Require(x.state.data == x.new_state.data,
                "the new state must share the state's buffer");
  return check.error();
}

// The same tensor with one axis in place of all but the last three; `sizes` keeps its
// shape.
Tensor WithOneLeadingAxis(const Tensor& x, std::array<int64_t, 4>& sizes) {
  if (x.rank <= sizes.size()) return x;
  const size_t merged = x.rank - sizes.size();
  sizes = {1, x.sizes[merged + 1], x.sizes[merged + 2], x.sizes[merged + 3]};
  for (size_t i = 0; i <= merged; ++i) sizes[0] *= x.sizes[i];
  return {x.data, x.dtype, sizes.data(), sizes.size()};
}

}  // namespace

std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& operands) {
  DecodeOperands x = operands;
  std::array<int64_t, 4> state, new_state, out;
  x.state = WithOneLeadingAxis(x.state, state);
  x.new_state = WithOneLeadingAxis(x.new_state, new_state);
  x.out = WithOneLeadingAxis(x.out, out);
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
  p.state = {x.state.data, *x.state.dtype};
  p.out = {x.out.data, *x.out.dtype};
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
  p.layout = x.layout;
  p.use_qk_l2norm = x.use_qk_l2norm;
  p.per_channel = x.a.rank == 4;
  p.snapshots = x.output_state_indices && x.output_state_indices->rank == 2;
  return p;
}

}  // namespace jax_gdn
