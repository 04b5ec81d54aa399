#include "cpu/inputs.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/lanes.h"

namespace jax_gdn {
namespace {

int64_t StateOffset(const DecodeParams& p, int64_t slot, int32_t hv) {
  const int64_t bytes = int64_t{p.K} * p.V * SizeOf(p.state.dtype);
  return (slot * p.HV + hv) * bytes;
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
float Softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

// exp(g), in [0, 1], for x = a + dt_bias: for finite inputs never NaN. XLA's threads
// treat subnormals as zero: where exp(A_log), or a softplus(x) that it makes count, may
// be one, or infinite, it is exp(A_log + log softplus(x)), and below -17 log
// softplus(x) is x.
float Decay(float A_log, float x) {
  const float softplus = Softplus(x);
  if (std::abs(A_log) <= 60.0f) return std::exp(-std::exp(A_log) * softplus);
  const float log_softplus =
      x < -17.0f ? x : std::log(std::min(softplus, std::numeric_limits<float>::max()));
  return std::exp(-std::exp(A_log + log_softplus));
}

// sigmoid(exp(A_log) x): no infinity times zero, for any finite A_log and x.
float ScaledSigmoid(float A_log, float x) {
  const float half = std::exp(0.5f * std::min(A_log, 176.0f));
  return 1.0f / (1.0f + std::exp(-(half * x) * half));
}

}  // namespace

int64_t SlotAt(const DecodeParams& p, const int32_t* slots, int64_t index) {
  return 0 <= slots[index] && slots[index] < p.N ? slots[index] : kNoSlot;
}

int64_t ReadSlot(const DecodeParams& p, int64_t n) {
  return p.read_slots == nullptr ? n : SlotAt(p, p.read_slots, n);
}

int64_t WriteSlot(const DecodeParams& p, int64_t n, int64_t t, int64_t read) {
  if (p.snapshots) return SlotAt(p, p.write_slots, n * p.T + t);
  return p.write_slots == nullptr ? read : SlotAt(p, p.write_slots, n);
}

const void* StateOf(const DecodeParams& p, int64_t slot, int32_t hv) {
  return static_cast<const char*>(p.state.data) + StateOffset(p, slot, hv);
}

void* NewStateOf(const DecodeParams& p, int64_t slot, int32_t hv) {
  return static_cast<char*>(p.new_state) + StateOffset(p, slot, hv);
}

const void* StateAhead(const DecodeParams& p, int64_t index) {
  const int64_t read = ReadSlot(p, index / p.HV);
  return read == kNoSlot ? nullptr : StateOf(p, read, index % p.HV);
}

float Scalar(const Input& x, int64_t index) {
  switch (x.dtype) {
    case DType::kBFloat16:
      return Load<DType::kBFloat16, 1>(x.data, index);
    case DType::kFloat16:
      return Load<DType::kFloat16, 1>(x.data, index);
    default:
      return Load<DType::kFloat32, 1>(x.data, index);
  }
}

float DecayOf(const DecodeParams& p, float A_log, float a, float dt_bias) {
  switch (p.gates) {
    case GateForm::kGiven:
      return std::exp(a);
    case GateForm::kSigmoid:
      return std::exp(p.lower_bound * ScaledSigmoid(A_log, a + dt_bias));
    default:
      return Decay(A_log, a + dt_bias);
  }
}

float DecayOfHead(const DecodeParams& p, int64_t head, int32_t hv) {
  const float A_log = p.gates == GateForm::kGiven ? 0.0f : p.A_log[hv];
  return DecayOf(p, A_log, Scalar(p.a, head), Scalar(p.dt_bias, hv));
}

float BetaOf(const DecodeParams& p, int64_t head) {
  const float b = Scalar(p.b, head);
  return p.gates == GateForm::kGiven ? b : p.beta_scale / (1.0f + std::exp(-b));
}

Scratch& Scratch::OfThread(int64_t count, int64_t pieces) {
  static thread_local Scratch scratch;
  scratch.used_ = 0;
  const size_t lines = count / kPerLine + pieces;
  if (scratch.lines_.size() < lines) scratch.lines_.resize(lines);
  return scratch;
}

float* Scratch::Take(int64_t count) {
  const int64_t lines = (count + kPerLine - 1) / kPerLine;
  used_ += lines;
  return lines_[used_ - lines].values;
}

Keys::Keys(const DecodeParams& p, const Kernels& kernels, Scratch& scratch)
    : p_(p),
      kernels_(kernels),
      q_(scratch.Take(p.T * p.K)),
      k_(scratch.Take(p.T * p.K)),
      qk_(scratch.Take(p.T)),
      k_factor_(scratch.Take(p.T)) {}

bool Keys::Load(int64_t n, int32_t h) {
  const int64_t head = n * p_.H + h;
  if (head == head_) return false;
  head_ = head;
  for (int64_t t = 0; t < p_.T; ++t) LoadToken(t, ((n * p_.T + t) * p_.H + h) * p_.K);
  return true;
}

float Keys::NormFactor(const float* x) const {
  return 1.0f / std::sqrt(kernels_.dot(x, x, p_.K) + kNormEpsilon);
}

void Keys::LoadToken(int64_t t, int64_t first) {
  float *const q = &q_[t * p_.K], *const k = &k_[t * p_.K];
  kernels_.widen(p_.q, first, p_.K, q);
  kernels_.widen(p_.k, first, p_.K, k);
  float q_factor = p_.scale, k_factor = 1.0f;
  if (p_.use_qk_l2norm) {
    q_factor *= NormFactor(q);
    k_factor = NormFactor(k);
  }
  for (int32_t i = 0; i < p_.K; ++i) {
    q[i] *= q_factor;
    k[i] *= k_factor;
  }
  qk_[t] = kernels_.dot(q, k, p_.K);
  k_factor_[t] = k_factor;
}

}  // namespace jax_gdn
