// Gated-delta-rule decode on the host.
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// A state is brought from memory once, while the one before it is computed; all passes
// of all tokens over a part of it follow one another, so that caches serve them.
#include "cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/step.h"

namespace jax_gdn {
namespace {

constexpr int64_t kNoSlot = -1;

int64_t SlotAt(const DecodeParams& p, const int32_t* slots, int64_t index) {
  return 0 <= slots[index] && slots[index] < p.N ? slots[index] : kNoSlot;
}

// The slot that row n reads; kNoSlot makes the row padding.
int64_t ReadSlot(const DecodeParams& p, int64_t n) {
  return p.read_slots == nullptr ? n : SlotAt(p, p.read_slots, n);
}

// The slot that row n, which reads `read`, writes after token t; kNoSlot: none.
int64_t WriteSlot(const DecodeParams& p, int64_t n, int64_t t, int64_t read) {
  if (p.snapshots) return SlotAt(p, p.write_slots, n * p.T + t);
  return p.write_slots == nullptr ? read : SlotAt(p, p.write_slots, n);
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
float Softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

// One entry, by the scalar code that serves every instruction set.
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

// Decodes states one after the other, with scratch of its own.
class Decoder {
 public:
  explicit Decoder(const DecodeParams& params)
      : p_(params),
        kernels_(ChosenKernels()),
        tokens_(p_.T),
        decay_(p_.T * p_.K),
        k_(p_.T * p_.K),
        decayed_q_(p_.T * p_.K),
        decayed_k_(p_.T * p_.K),
        v_(p_.T * p_.V),
        out_(p_.T * p_.V),
        q_(p_.K),
        bias_(p_.K) {}

  // All tokens of state `index` of [B, HV]. The next one is brought near meanwhile.
  void DecodeState(int64_t index, bool has_next) {
    const int64_t n = index / p_.HV;
    const int32_t hv = static_cast<int32_t>(index % p_.HV);
    const int64_t read = ReadSlot(p_, n);
    if (read == kNoSlot) {
      std::fill(out_.begin(), out_.end(), 0.0f);
    } else {
      DecodeTokens(n, hv, read, has_next ? Next(index + 1) : StateView{});
    }
    for (int64_t t = 0; t < p_.T; ++t) {
      kernels_.round(&out_[t * p_.V], ((n * p_.T + t) * p_.HV + hv) * p_.V, p_.V,
                     p_.out);
    }
  }

 private:
  StateView InPool(int64_t slot, int32_t hv) const {
    const int64_t bytes = int64_t{p_.K} * p_.V * SizeOf(p_.state.dtype);
    return {static_cast<char*>(p_.state.data) + (slot * p_.HV + hv) * bytes,
            p_.state.dtype};
  }

  StateView Next(int64_t index) const {
    const int64_t read = ReadSlot(p_, index / p_.HV);
    return read == kNoSlot ? StateView{} : InPool(read, index % p_.HV);
  }

  void DecodeTokens(int64_t n, int32_t hv, int64_t read, StateView ahead) {
    StateView now = InPool(read, hv);
    int64_t first = 0;  // of the tokens that are ready and not yet decoded
    for (int64_t t = 0; t < p_.T; ++t) {
      Token& token = LoadToken(n, t, hv);
      const bool last = t + 1 == p_.T;
      const int64_t write = WriteSlot(p_, n, t, read);
      const bool stores = write != kNoSlot && (p_.snapshots || last);
      token.from = now;
      token.to = Destination(write, stores, last, hv);
      now = token.to;
      const bool rounds = stores && now.data != InPool(write, hv).data;
      if (!last && !rounds) continue;
      kernels_.decode(p_.layout, &tokens_[first], t + 1 - first, p_.K, p_.V,
                      last ? ahead : StateView{});
      if (rounds) RoundInto(write, hv);
      first = t + 1;
    }
  }

  // Where a token's new state goes. Between tokens it is float32: in the slot it is
  // bound for, if that is float32, else in scratch.
  StateView Destination(int64_t write, bool stores, bool last, int32_t hv) {
    if (stores && (last || p_.state.dtype == DType::kFloat32)) {
      return InPool(write, hv);
    }
    if (last) return {nullptr, p_.state.dtype};
    if (write != kNoSlot && p_.state.dtype == DType::kFloat32) return InPool(write, hv);
    scratch_.resize(int64_t{p_.K} * p_.V);
    return {scratch_.data(), DType::kFloat32};
  }

  // A 16-bit snapshot of the state in scratch.
  void RoundInto(int64_t slot, int32_t hv) {
    const StateView to = InPool(slot, hv);
    kernels_.round(scratch_.data(), 0, int64_t{p_.K} * p_.V, {to.data, to.dtype});
  }

  void LoadDecay(int64_t head, int32_t hv, float* decay) {
    const float rate = -std::exp(p_.A_log[hv]);
    if (!p_.per_channel) {
      const float x = Scalar(p_.a, head) + Scalar(p_.dt_bias, hv);
      std::fill_n(decay, p_.K, std::exp(rate * Softplus(x)));
      return;
    }
    kernels_.widen(p_.a, head * p_.K, p_.K, decay);
    kernels_.widen(p_.dt_bias, int64_t{hv} * p_.K, p_.K, bias_.data());
    for (int32_t i = 0; i < p_.K; ++i) {
      decay[i] = std::exp(rate * Softplus(decay[i] + bias_[i]));
    }
  }

  float NormFactor(const float* x) const {
    return 1.0f / std::sqrt(kernels_.dot(x, x, p_.K) + kNormEpsilon);
  }

  Token& LoadToken(int64_t n, int64_t t, int32_t hv) {
    const int64_t token = n * p_.T + t, head = token * p_.HV + hv;
    const int64_t key_head = token * p_.H + hv / p_.group;
    float *const q = q_.data(), *const k = &k_[t * p_.K], *const v = &v_[t * p_.V],
                 *const decay = &decay_[t * p_.K], *const dq = &decayed_q_[t * p_.K],
                 *const dk = &decayed_k_[t * p_.K];
    kernels_.widen(p_.q, key_head * p_.K, p_.K, q);
    kernels_.widen(p_.k, key_head * p_.K, p_.K, k);
    kernels_.widen(p_.v, head * p_.V, p_.V, v);
    LoadDecay(head, hv, decay);
    float q_factor = p_.scale, k_factor = 1.0f;
    if (p_.use_qk_l2norm) {
      q_factor *= NormFactor(q);
      k_factor = NormFactor(k);
    }
    for (int32_t i = 0; i < p_.K; ++i) {
      q[i] *= q_factor;
      k[i] *= k_factor;
      dq[i] = decay[i] * q[i];
      dk[i] = decay[i] * k[i];
    }
    const float beta = 1.0f / (1.0f + std::exp(-Scalar(p_.b, head)));
    return tokens_[t] = {
               dq, dk, k, decay, v, &out_[t * p_.V], beta, kernels_.dot(q, k, p_.K),
               {}, {}};
  }

  const DecodeParams& p_;
  const Kernels& kernels_;
  std::vector<Token> tokens_;                             // [T]
  std::vector<float> decay_, k_, decayed_q_, decayed_k_;  // [T, K]
  std::vector<float> v_, out_;                            // [T, V]
  std::vector<float> q_, bias_;                           // [K]
  std::vector<float> scratch_;  // [K V], only where a state cannot be kept in its slot
};

}  // namespace

void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end) {
  Decoder decoder(params);
  for (int64_t i = begin; i < end; ++i) decoder.DecodeState(i, i + 1 < end);
}

}  // namespace jax_gdn
