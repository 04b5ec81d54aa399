#include "ffi/operands.h"

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

  void Require(bool holds, const std::string& otherwise) {
    if (!holds && error_.empty()) error_ = "jax_gdn.decode: " + otherwise;
  }

  const std::string& error() const { return error_; }

 private:
  std::string error_;
};

}  // namespace

std::variant<DecodeParams, std::string> MakeParams(const DecodeOperands& x) {
  Checker check;
  check.Require(x.q.rank == 4, "q must have rank 4");
  check.Require(x.state.rank == 4, "state must have rank 4");
  if (!check.error().empty()) return check.error();
  const int64_t B = x.q.sizes[0], T = x.q.sizes[1], H = x.q.sizes[2];
  const int64_t HV = x.state.sizes[1], K = x.state.sizes[2], V = x.state.sizes[3];
  constexpr int64_t kMaxSize = std::numeric_limits<int32_t>::max();
  check.Require(T == 1, "T must be 1");
  check.Require(H > 0 && HV % H == 0, "HV must be a multiple of H");
  check.Require(HV <= kMaxSize && K <= kMaxSize && V <= kMaxSize,
                "HV, K and V must fit 32 bits");
  check.Shape("q", x.q, {B, T, H, K});
  check.Shape("k", x.k, {B, T, H, K});
  check.Shape("v", x.v, {B, T, HV, V});
  check.Shape("state", x.state, {B, HV, K, V});
  check.Shape("A_log", x.A_log, {HV});
  check.Shape("a", x.a, {B, T, HV});
  check.Shape("dt_bias", x.dt_bias, {HV});
  check.Shape("b", x.b, {B, T, HV});
  check.Shape("out", x.out, {B, T, HV, V});
  check.Shape("the new state", x.new_state, {B, HV, K, V});
  check.Require(x.state.dtype == DType::kFloat32, "state must be float32");
  check.Require(x.new_state.dtype == x.state.dtype,
                "the new state must have the state's dtype");
  check.Require(x.A_log.dtype == DType::kFloat32, "A_log must be float32");
  check.Require(x.state.data == x.new_state.data,
                "the new state must share the state's buffer");
  if (!check.error().empty()) return check.error();

  DecodeParams p = {};
  p.q = {x.q.data, x.q.dtype};
  p.k = {x.k.data, x.k.dtype};
  p.v = {x.v.data, x.v.dtype};
  p.a = {x.a.data, x.a.dtype};
  p.dt_bias = {x.dt_bias.data, x.dt_bias.dtype};
  p.b = {x.b.data, x.b.dtype};
  p.A_log = static_cast<const float*>(x.A_log.data);
  p.state = static_cast<float*>(x.state.data);
  p.out = {x.out.data, x.out.dtype};
  p.B = B;
  p.H = static_cast<int32_t>(H);
  p.HV = static_cast<int32_t>(HV);
  p.K = static_cast<int32_t>(K);
  p.V = static_cast<int32_t>(V);
  p.group = static_cast<int32_t>(HV / H);
  p.group_inverse = static_cast<uint32_t>(((int64_t{1} << 32) + p.group - 1) / p.group);
  p.scale = x.scale;
  p.use_qk_l2norm = x.use_qk_l2norm;
  return p;
}

}  // namespace jax_gdn
