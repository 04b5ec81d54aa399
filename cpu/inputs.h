// What a call brings to its states, in float32, and a thread's memory for it.
#ifndef JAX_GDN_CPU_INPUTS_H_
#define JAX_GDN_CPU_INPUTS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/decode_params.h"
#include "cpu/state_kernel.h"

namespace jax_gdn {

inline constexpr int64_t kNoSlot = -1;

// What `slots` has at `index`; kNoSlot if that is outside the pool.
int64_t SlotAt(const DecodeParams& p, const int32_t* slots, int64_t index);

// The slot that row n reads; kNoSlot makes the row padding.
int64_t ReadSlot(const DecodeParams& p, int64_t n);

// The slot that row n, which reads `read`, writes after token t; kNoSlot: none.
int64_t WriteSlot(const DecodeParams& p, int64_t n, int64_t t, int64_t read);

// Where a slot's state of a head lies in the states, or in the new ones.
const void* StateOf(const DecodeParams& p, int64_t slot, int32_t hv);
void* NewStateOf(const DecodeParams& p, int64_t slot, int32_t hv);

// The state that state `index` of [B, HV] reads; null if it is padding.
const void* StateAhead(const DecodeParams& p, int64_t index);

// One entry, by the scalar code that serves every instruction set.
float Scalar(const Input& x, int64_t index);

// exp(g) of a head or a channel, for what the call has of a, dt_bias and A_log.
float DecayOf(const DecodeParams& p, float A_log, float a, float dt_bias);

// exp(g) of value head hv, where there is one a head; `head` is of [B, T, HV].
float DecayOfHead(const DecodeParams& p, int64_t head, int32_t hv);

// The weight of a head's new value.
float BetaOf(const DecodeParams& p, int64_t head);

// A thread's memory, kept from call to call: zeroed pages cost more than a small call.
class Scratch {
 public:
  // That of this thread, with room for `count` numbers in up to `pieces` pieces.
  static Scratch& OfThread(int64_t count, int64_t pieces);

  // Room for `count` numbers, from the start of a cache line on, until the next call.
  float* Take(int64_t count);

 private:
  static constexpr int64_t kPerLine = 16;
  struct alignas(64) Line {
    float values[kPerLine];
  };
  std::vector<Line> lines_;
  int64_t used_ = 0;
};

// q and k of all tokens, normalised; value heads that follow one another share them.
class Keys {
 public:
  static constexpr int64_t kPieces = 4;  // of scratch
  static int64_t ScratchSize(const DecodeParams& p) { return p.T * (2 * p.K + 2); }

  Keys(const DecodeParams& p, const Kernels& kernels, Scratch& scratch);

  // Those of key head h of row n. Returns whether others were there before.
  bool Load(int64_t n, int32_t h);

  const float* q(int64_t t) const { return &q_[t * p_.K]; }  // [K], scaled
  const float* k(int64_t t) const { return &k_[t * p_.K]; }  // [K]
  float qk(int64_t t) const { return qk_[t]; }               // q.k
  float k_factor(int64_t t) const { return k_factor_[t]; }   // has normalised k

 private:
  void LoadToken(int64_t t, int64_t first);
  float NormFactor(const float* x) const;

  const DecodeParams& p_;
  const Kernels& kernels_;
  int64_t head_ = -1;      // of [B, H], whose q and k are:
  float *q_, *k_;          // [T, K]
  float *qk_, *k_factor_;  // [T]
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_INPUTS_H_
