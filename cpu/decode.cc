// Gated-delta-rule decode on the host.
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// A state is brought from memory once: the first token's pass leaves it in the core's
// own cache (K V floats, 64 KB at K = V = 128), where all further passes find it.
#include "cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/convert.h"
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

float Dot(const std::vector<float>& x, const std::vector<float>& y) {
  float sum = 0.0f;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
float Softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

float Scalar(const Input& x, int64_t index) {
  float value;
  Widen(x, index, 1, &value);
  return value;
}

// Decodes states one after the other, with scratch of its own.
class Decoder {
 public:
  explicit Decoder(const DecodeParams& params)
      : p_(params),
        step_(BestStep()),
        q_(p_.K),
        k_(p_.K),
        decay_(p_.K),
        bias_(p_.K),
        decayed_q_(p_.K),
        decayed_k_(p_.K),
        v_(p_.V),
        u_(p_.V),
        sums_(p_.V),
        out_(p_.V) {}

  // All tokens of row n and value head hv.
  void DecodeState(int64_t n, int32_t hv) {
    const int64_t read = ReadSlot(p_, n);
    if (read == kNoSlot) {
      std::fill(out_.begin(), out_.end(), 0.0f);
      for (int64_t t = 0; t < p_.T; ++t) StoreOut(n, t, hv);
      return;
    }
    StateView now = InPool(read, hv);
    for (int64_t t = 0; t < p_.T; ++t) {
      const Token token = LoadToken(n, t, hv);
      const bool last = t + 1 == p_.T;
      const int64_t write = WriteSlot(p_, n, t, read);
      const bool stores = write != kNoSlot && (p_.snapshots || last);
      const StateView next = Destination(write, stores, last, hv);
      step_(p_.layout, now, next, token, p_.K, p_.V);
      StoreOut(n, t, hv);
      if (stores && next.data != InPool(write, hv).data) RoundInto(write, hv);
      now = next;
    }
  }

 private:
  StateView InPool(int64_t slot, int32_t hv) const {
    const int64_t bytes = int64_t{p_.K} * p_.V * SizeOf(p_.state.dtype);
    return {static_cast<char*>(p_.state.data) + (slot * p_.HV + hv) * bytes,
            p_.state.dtype};
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
    Round(scratch_.data(), 0, int64_t{p_.K} * p_.V, {to.data, to.dtype});
  }

  void StoreOut(int64_t n, int64_t t, int32_t hv) {
    Round(out_.data(), ((n * p_.T + t) * p_.HV + hv) * p_.V, p_.V, p_.out);
  }

  void LoadDecay(int64_t head, int32_t hv) {
    const float rate = -std::exp(p_.A_log[hv]);
    if (!p_.per_channel) {
      const float x = Scalar(p_.a, head) + Scalar(p_.dt_bias, hv);
      std::fill(decay_.begin(), decay_.end(), std::exp(rate * Softplus(x)));
      return;
    }
    Widen(p_.a, head * p_.K, p_.K, decay_.data());
    Widen(p_.dt_bias, int64_t{hv} * p_.K, p_.K, bias_.data());
    for (int32_t i = 0; i < p_.K; ++i) {
      decay_[i] = std::exp(rate * Softplus(decay_[i] + bias_[i]));
    }
  }

  Token LoadToken(int64_t n, int64_t t, int32_t hv) {
    const int64_t token = n * p_.T + t, head = token * p_.HV + hv;
    const int64_t key_head = token * p_.H + hv / p_.group;
    Widen(p_.q, key_head * p_.K, p_.K, q_.data());
    Widen(p_.k, key_head * p_.K, p_.K, k_.data());
    Widen(p_.v, head * p_.V, p_.V, v_.data());
    LoadDecay(head, hv);
    float q_factor = p_.scale, k_factor = 1.0f;
    if (p_.use_qk_l2norm) {
      q_factor *= 1.0f / std::sqrt(Dot(q_, q_) + kNormEpsilon);
      k_factor = 1.0f / std::sqrt(Dot(k_, k_) + kNormEpsilon);
    }
    for (int32_t i = 0; i < p_.K; ++i) {
      q_[i] *= q_factor;
      k_[i] *= k_factor;
      decayed_q_[i] = decay_[i] * q_[i];
      decayed_k_[i] = decay_[i] * k_[i];
    }
    const float beta = 1.0f / (1.0f + std::exp(-Scalar(p_.b, head)));
    return {
        decayed_q_.data(), decayed_k_.data(), k_.data(), decay_.data(), v_.data(), beta,
        Dot(q_, k_),       out_.data(),       u_.data(), sums_.data()};
  }

  const DecodeParams& p_;
  const Step step_;
  std::vector<float> q_, k_, decay_, bias_, decayed_q_, decayed_k_;  // [K]
  std::vector<float> v_, u_, sums_, out_;                            // [V]
  std::vector<float> scratch_;  // [K V], only where a state cannot be kept in its slot
};

}  // namespace

void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end) {
  Decoder decoder(params);
  for (int64_t i = begin; i < end; ++i) {
    decoder.DecodeState(i / params.HV, static_cast<int32_t>(i % params.HV));
  }
}

}  // namespace jax_gdn
