// Parts of a [K, V] state. Compiled once an instruction set.
#ifndef JAX_GDN_CPU_COLUMNS_H_
#define JAX_GDN_CPU_COLUMNS_H_

#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/prefetch.h"
#include "cpu/state_kernel.h"

namespace jax_gdn {
namespace {

// Columns [j, j + kVectors N) of a [K, V] state, with both sums over K in registers.
template <int N, int kVectors>
class Columns {
 public:
  static constexpr int32_t kSize = kVectors * N;

  Columns(const StateJob& job, int32_t j)
      : K_(job.K), V_(job.V), j_(j), tile_(job.tile) {}

  // The first token's sums. kKeeps: the entries go into the tile as well.
  template <DType kType, bool kKeeps>
  void Sum(const void* state, const Token& token, Prefetcher& fetch) {
    const float *const dk = token.decayed_k, *const dq = token.decayed_q;
    float* const tile = tile_;
    const int32_t K = K_, V = V_, j = j_;
    Prefetcher ahead = fetch;
    F p[kVectors] = {}, r[kVectors] = {};
    for (int32_t i = 0; i < K; ++i) {
      const int64_t at = int64_t{i} * V + j;
      ahead.Fetch(kSize);
      const F dk_i = Fill<N>(dk[i]), dq_i = Fill<N>(dq[i]);
      for (int c = 0; c < kVectors; ++c) {
        const F s = Load<kType, N>(state, at + c * N);
        if (kKeeps) Store<kFloat, N>(tile, int64_t{i} * kSize + c * N, s);
        p[c] += dk_i * s;
        r[c] += dq_i * s;
      }
    }
    Keep(p, r);
    fetch = ahead;
  }

  // A token's u and its output.
  void Finish(const Token& x) {
    for (int c = 0; c < kVectors; ++c) {
      u_[c] = x.beta * (Load<kFloat, N>(x.v, j_ + c * N) - p_[c]);
      Store<kFloat, N>(x.out, j_ + c * N, r_[c] + x.qk * u_[c]);
    }
  }

  // Applies a token to the tile and sums for the next one. kStores: to the state, too.
  template <DType kType, bool kStores>
  void UpdateAndSum(const Token& token, const Token& next, Prefetcher& fetch) {
    const float *const k = token.k, *const decay = token.decay;
    const float *const dk = next.decayed_k, *const dq = next.decayed_q;
    float* const tile = tile_;
    void* const to = token.to;
    const int32_t K = K_, V = V_, j = j_;
    Prefetcher ahead = fetch;
    F p[kVectors] = {}, r[kVectors] = {}, u[kVectors];
    for (int c = 0; c < kVectors; ++c) u[c] = u_[c];
    for (int32_t i = 0; i < K; ++i) {
      ahead.Fetch(kSize);
      const F k_i = Fill<N>(k[i]), decay_i = Fill<N>(decay[i]);
      const F dk_i = Fill<N>(dk[i]), dq_i = Fill<N>(dq[i]);
      F s[kVectors];
      for (int c = 0; c < kVectors; ++c) {
        const int64_t at = int64_t{i} * kSize + c * N;
        s[c] = Updated(Load<kFloat, N>(tile, at), k_i, u[c], decay_i);
        Store<kFloat, N>(tile, at, s[c]);
        p[c] += dk_i * s[c];
        r[c] += dq_i * s[c];
      }
      if (kStores) StoreAll<kType, N>(to, int64_t{i} * V + j, N, s);
    }
    Keep(p, r);
    fetch = ahead;
  }

  // Applies the last token. From the last row to the first: those that were read last
  // are still in the first cache, which does not hold all of a part.
  template <DType kType, bool kKept>
  void Update(const void* from, const Token& token, Prefetcher& fetch) {
    const float *const k = token.k, *const decay = token.decay;
    constexpr DType kFrom = kKept ? kFloat : kType;
    const void* const source = kKept ? tile_ : from;
    void* const to = token.to;
    const int32_t V = V_, j = j_;
    const int64_t stride = kKept ? kSize : V, first = kKept ? 0 : j;
    Prefetcher ahead = fetch;
    F u[kVectors];
    for (int c = 0; c < kVectors; ++c) u[c] = u_[c];
    for (int32_t i = K_ - 1; i >= 0; --i) {
      ahead.Fetch(kSize);
      const F k_i = Fill<N>(k[i]), decay_i = Fill<N>(decay[i]);
      F s[kVectors];
      for (int c = 0; c < kVectors; ++c) {
        s[c] = Load<kFrom, N>(source, i * stride + first + c * N);
        s[c] = Updated(s[c], k_i, u[c], decay_i);
      }
      StoreAll<kType, N>(to, int64_t{i} * V + j, N, s);
    }
    fetch = ahead;
  }

 private:
  using F = typename Lanes<N>::F;

  void Keep(const F (&p)[kVectors], const F (&r)[kVectors]) {
    for (int c = 0; c < kVectors; ++c) {
      p_[c] = p[c];
      r_[c] = r[c];
    }
  }

  const int32_t K_, V_, j_;
  float* const tile_;  // [K, kSize]
  F p_[kVectors], r_[kVectors], u_[kVectors];
};

}  // namespace
}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_COLUMNS_H_
