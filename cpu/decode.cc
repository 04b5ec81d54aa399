// Gated-delta-rule decode on the host.
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// A state is brought from memory once, while the one before it is computed; all passes
// of all tokens over a part of it follow one another, so that caches serve them.
#include "cpu/decode.h"

#include <algorithm>
#include <vector>

#include "cpu/deferred.h"
#include "cpu/inputs.h"
#include "cpu/state_kernel.h"

namespace jax_gdn {
namespace {

// Decodes states one after the other.
class Decoder {
 public:
  explicit Decoder(const DecodeParams& params)
      : Decoder(params, Scratch::OfThread(Keys::ScratchSize(params) +
                                              params.T * (3 * params.K + 2 * params.V) +
                                              (1 + kTileWidth) * params.K,
                                          Keys::kPieces + 7)) {}

  // All tokens of state `index` of [B, HV]. The next one is brought near meanwhile.
  void DecodeState(int64_t index, bool has_next) {
    const int64_t n = index / p_.HV;
    const int32_t hv = static_cast<int32_t>(index % p_.HV);
    const int64_t read = ReadSlot(p_, n);
    if (read == kNoSlot) {
      std::fill_n(out_, p_.T * p_.V, 0.0f);
    } else {
      DecodeTokens(n, hv, read, has_next ? StateAhead(p_, index + 1) : nullptr);
    }
    for (int64_t t = 0; t < p_.T; ++t) {
      kernels_.round(&out_[t * p_.V], ((n * p_.T + t) * p_.HV + hv) * p_.V, p_.V,
                     p_.out);
    }
  }

 private:
  Decoder(const DecodeParams& params, Scratch& scratch)
      : p_(params),
        kernels_(ChosenKernels()),
        keys_(p_, kernels_, scratch),
        tokens_(p_.T) {
    for (float** per_key : {&decay_, &decayed_q_, &decayed_k_}) {
      *per_key = scratch.Take(p_.T * p_.K);
    }
    for (float** per_value : {&v_, &out_}) *per_value = scratch.Take(p_.T * p_.V);
    bias_ = scratch.Take(p_.K);
    tile_ = scratch.Take(int64_t{kTileWidth} * p_.K);
  }

  void DecodeTokens(int64_t n, int32_t hv, int64_t read, const void* ahead) {
    keys_.Load(n, hv / p_.group);
    for (int64_t t = 0; t < p_.T; ++t) {
      const int64_t write = WriteSlot(p_, n, t, read);
      const bool stores = write != kNoSlot && (p_.snapshots || t + 1 == p_.T);
      LoadToken(n, t, hv).to = stores ? NewStateOf(p_, write, hv) : nullptr;
    }
    kernels_.decode(
        {{p_.layout, p_.state.dtype, p_.K, p_.V, StateOf(p_, read, hv), tile_, ahead},
         tokens_.data(),
         p_.T});
  }

  void LoadDecay(int64_t head, int32_t hv, float* decay) {
    if (!p_.per_channel) {
      std::fill_n(decay, p_.K, DecayOfHead(p_, head, hv));
      return;
    }
    kernels_.widen(p_.a, head * p_.K, p_.K, decay);
    kernels_.widen(p_.dt_bias, int64_t{hv} * p_.K, p_.K, bias_);
    const float A_log = p_.gates == GateForm::kGiven ? 0.0f : p_.A_log[hv];
    for (int32_t i = 0; i < p_.K; ++i) {
      decay[i] = DecayOf(p_, A_log, decay[i], bias_[i]);
    }
  }

  Token& LoadToken(int64_t n, int64_t t, int32_t hv) {
    const int64_t head = (n * p_.T + t) * p_.HV + hv;
    const float *const q = keys_.q(t), *const k = keys_.k(t);
    float *const v = &v_[t * p_.V], *const decay = &decay_[t * p_.K],
                 *const dq = &decayed_q_[t * p_.K], *const dk = &decayed_k_[t * p_.K];
    kernels_.widen(p_.v, head * p_.V, p_.V, v);
    LoadDecay(head, hv, decay);
    for (int32_t i = 0; i < p_.K; ++i) {
      dq[i] = decay[i] * q[i];
      dk[i] = decay[i] * k[i];
    }
    return tokens_[t] = {
               dq,          dk,     k, decay, v, &out_[t * p_.V], BetaOf(p_, head),
               keys_.qk(t), nullptr};
  }

  const DecodeParams& p_;
  const Kernels& kernels_;
  Keys keys_;
  std::vector<Token> tokens_;               // [T]
  float *decay_, *decayed_q_, *decayed_k_;  // [T, K]
  float *v_, *out_;                         // [T, V]
  float* bias_;                             // [K]
  float* tile_;                             // [kTileWidth, K]
};

}  // namespace

void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end) {
  if (params.pending.k != nullptr) return DecodeDeferredStates(params, begin, end);
  Decoder decoder(params);
  for (int64_t i = begin; i < end; ++i) decoder.DecodeState(i, i + 1 < end);
}

}  // namespace jax_gdn
