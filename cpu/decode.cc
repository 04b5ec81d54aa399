// Gated-delta-rule decode on the host.
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// A state is brought from memory once, while the one before it is computed; all passes
// of all tokens over a part of it follow one another, so that caches serve them.
#include "cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/state_kernel.h"

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

// exp(g) of a head or a channel, for what the call has of a, dt_bias and A_log.
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

float BetaOf(const DecodeParams& p, float b) {
  return p.gates == GateForm::kGiven ? b : p.beta_scale / (1.0f + std::exp(-b));
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

// A thread's memory, kept from call to call: zeroed pages cost more than a small call.
class Scratch {
 public:
  // Room for `count` numbers, from the start of a cache line on. Until the next Reset.
  float* Take(int64_t count) {
    const int64_t lines = (count + kPerLine - 1) / kPerLine;
    used_ += lines;
    return lines_[used_ - lines].values;
  }
  // At least so much can be taken, in up to `pieces` pieces.
  void Reset(int64_t count, int64_t pieces) {
    used_ = 0;
    const size_t lines = count / kPerLine + pieces;
    if (lines_.size() < lines) lines_.resize(lines);
  }

 private:
  static constexpr int64_t kPerLine = 16;
  struct alignas(64) Line {
    float values[kPerLine];
  };
  std::vector<Line> lines_;
  int64_t used_ = 0;
};

// Decodes states one after the other.
class Decoder {
 public:
  explicit Decoder(const DecodeParams& params)
      : p_(params), kernels_(ChosenKernels()), tokens_(p_.T) {
    static thread_local Scratch scratch;
    scratch.Reset(p_.T * (5 * p_.K + 2 * p_.V + 1) + (1 + kTileWidth) * p_.K, 10);
    for (float** per_key : {&q_, &k_, &decay_, &decayed_q_, &decayed_k_}) {
      *per_key = scratch.Take(p_.T * p_.K);
    }
    for (float** per_value : {&v_, &out_}) *per_value = scratch.Take(p_.T * p_.V);
    qk_ = scratch.Take(p_.T);
    bias_ = scratch.Take(p_.K);
    tile_ = scratch.Take(int64_t{kTileWidth} * p_.K);
  }

  // All tokens of state `index` of [B, HV]. The next one is brought near meanwhile.
  void DecodeState(int64_t index, bool has_next) {
    const int64_t n = index / p_.HV;
    const int32_t hv = static_cast<int32_t>(index % p_.HV);
    const int64_t read = ReadSlot(p_, n);
    if (read == kNoSlot) {
      std::fill_n(out_, p_.T * p_.V, 0.0f);
    } else {
      DecodeTokens(n, hv, read, has_next ? Next(index + 1) : nullptr);
    }
    for (int64_t t = 0; t < p_.T; ++t) {
      kernels_.round(&out_[t * p_.V], ((n * p_.T + t) * p_.HV + hv) * p_.V, p_.V,
                     p_.out);
    }
  }

 private:
  // Where a slot's state of a head lies in the states, or in the new ones.
  int64_t OffsetOf(int64_t slot, int32_t hv) const {
    const int64_t bytes = int64_t{p_.K} * p_.V * SizeOf(p_.state.dtype);
    return (slot * p_.HV + hv) * bytes;
  }
  const void* StateOf(int64_t slot, int32_t hv) const {
    return static_cast<const char*>(p_.state.data) + OffsetOf(slot, hv);
  }
  void* NewStateOf(int64_t slot, int32_t hv) const {
    return static_cast<char*>(p_.new_state) + OffsetOf(slot, hv);
  }

  const void* Next(int64_t index) const {
    const int64_t read = ReadSlot(p_, index / p_.HV);
    return read == kNoSlot ? nullptr : StateOf(read, index % p_.HV);
  }

  void DecodeTokens(int64_t n, int32_t hv, int64_t read, const void* ahead) {
    const int64_t key_head = n * p_.H + hv / p_.group;
    if (key_head != key_head_) LoadKeys(n, hv / p_.group);
    key_head_ = key_head;
    for (int64_t t = 0; t < p_.T; ++t) {
      const int64_t write = WriteSlot(p_, n, t, read);
      const bool stores = write != kNoSlot && (p_.snapshots || t + 1 == p_.T);
      LoadToken(n, t, hv).to = stores ? NewStateOf(write, hv) : nullptr;
    }
    kernels_.decode({p_.layout, p_.state.dtype, p_.K, p_.V, StateOf(read, hv),
                     tokens_.data(), p_.T, tile_, ahead});
  }

  void LoadDecay(int64_t head, int32_t hv, float* decay) {
    const float A_log = p_.gates == GateForm::kGiven ? 0.0f : p_.A_log[hv];
    if (!p_.per_channel) {
      const float a = Scalar(p_.a, head), dt_bias = Scalar(p_.dt_bias, hv);
      std::fill_n(decay, p_.K, DecayOf(p_, A_log, a, dt_bias));
      return;
    }
    kernels_.widen(p_.a, head * p_.K, p_.K, decay);
    kernels_.widen(p_.dt_bias, int64_t{hv} * p_.K, p_.K, bias_);
    for (int32_t i = 0; i < p_.K; ++i) {
      decay[i] = DecayOf(p_, A_log, decay[i], bias_[i]);
    }
  }

  float NormFactor(const float* x) const {
    return 1.0f / std::sqrt(kernels_.dot(x, x, p_.K) + kNormEpsilon);
  }

  // q and k of all tokens; value heads that follow one another share them.
  void LoadKeys(int64_t n, int32_t h) {
    for (int64_t t = 0; t < p_.T; ++t) {
      const int64_t first = ((n * p_.T + t) * p_.H + h) * p_.K;
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
    }
  }

  Token& LoadToken(int64_t n, int64_t t, int32_t hv) {
    const int64_t head = (n * p_.T + t) * p_.HV + hv;
    const float *const q = &q_[t * p_.K], *const k = &k_[t * p_.K];
    float *const v = &v_[t * p_.V], *const decay = &decay_[t * p_.K],
                 *const dq = &decayed_q_[t * p_.K], *const dk = &decayed_k_[t * p_.K];
    kernels_.widen(p_.v, head * p_.V, p_.V, v);
    LoadDecay(head, hv, decay);
    for (int32_t i = 0; i < p_.K; ++i) {
      dq[i] = decay[i] * q[i];
      dk[i] = decay[i] * k[i];
    }
    const float beta = BetaOf(p_, Scalar(p_.b, head));
    return tokens_[t] = {dq, dk, k, decay, v, &out_[t * p_.V], beta, qk_[t], nullptr};
  }

  const DecodeParams& p_;
  const Kernels& kernels_;
  std::vector<Token> tokens_;               // [T]
  int64_t key_head_ = -1;                   // of [B, H], whose q and k are:
  float *q_, *k_;                           // [T, K], normalised
  float* qk_;                               // [T]
  float *decay_, *decayed_q_, *decayed_k_;  // [T, K]
  float *v_, *out_;                         // [T, V]
  float* bias_;                             // [K]
  float* tile_;                             // [kTileWidth, K]
};

}  // namespace

void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end) {
  Decoder decoder(params);
  for (int64_t i = begin; i < end; ++i) decoder.DecodeState(i, i + 1 < end);
}

}  // namespace jax_gdn
