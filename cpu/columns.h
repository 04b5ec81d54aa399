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

  // The sums of a token that is the first, or that changes nothing.
  template <DType kType, Source kSource>
  void Sum(const void* state, const float* k, const float* q, Prefetcher& fetch) {
    constexpr bool kKept = kSource == Source::kTile;
    constexpr DType kFrom = kKept ? kFloat : kType;
    float* const tile = tile_;
    const void* const source = kKept ? tile : state;
    const int32_t K = K_;
    const int64_t stride = kKept ? kSize : V_, first = kKept ? 0 : j_;
    Prefetcher ahead = fetch;
    F p[kVectors] = {}, r[kVectors] = {};
    for (int32_t i = 0; i < K; ++i) {
      const int64_t at = i * stride + first;
      ahead.Fetch(kSize);
      const F k_i = Fill<N>(k[i]), q_i = Fill<N>(q[i]);
      for (int c = 0; c < kVectors; ++c) {
        const F s = Load<kFrom, N>(source, at + c * N);
        if (kSource == Source::kStateToTile) {
          Store<kFloat, N>(tile, int64_t{i} * kSize + c * N, s);
        }
        p[c] += k_i * s;
        r[c] += q_i * s;
      }
    }
    Keep(p, r);
    fetch = ahead;
  }

  // Hands the sums over.
  void Put(const Query& x) const {
    for (int c = 0; c < kVectors; ++c) {
      Store<kFloat, N>(x.p, j_ + c * N, p_[c]);
      Store<kFloat, N>(x.r, j_ + c * N, r_[c]);
    }
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

  // Folds into what the tile has: several rows at once, which share what is loaded.
  template <DType kType>
  void FoldTile(const Fold& fold, Prefetcher& fetch) const {
    constexpr int kRows = 4;
    int32_t i = 0;
    for (; i + kRows <= K_; i += kRows) FoldRows<kType, kRows>(fold, i, fetch);
    for (; i < K_; ++i) FoldRows<kType, 1>(fold, i, fetch);
  }

 private:
  using F = typename Lanes<N>::F;

  template <DType kType, int kRows>
  void FoldRows(const Fold& fold, int32_t i, Prefetcher& fetch) const {
    fetch.Fetch(kRows * kSize);
    F s[kRows][kVectors];
    for (int n = 0; n < kRows; ++n) {
      for (int c = 0; c < kVectors; ++c) {
        s[n][c] = fold.decay * Load<kFloat, N>(tile_, (i + n) * kSize + c * N);
      }
    }
    const float *k = fold.k + i, *u = fold.u + j_;
    for (int32_t x = 0; x < fold.count; ++x, k += K_, u += V_) {
      for (int c = 0; c < kVectors; ++c) {
        const F u_c = Load<kFloat, N>(u, c * N);
        for (int n = 0; n < kRows; ++n) s[n][c] += Fill<N>(k[n]) * u_c;
      }
    }
    for (int n = 0; n < kRows; ++n) {
      StoreAll<kType, N>(fold.to, int64_t{i + n} * V_ + j_, N, s[n]);
    }
  }

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
