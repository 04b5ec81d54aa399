// Parts of a [V, K] state. Compiled once an instruction set.
#ifndef JAX_GDN_CPU_ROWS_H_
#define JAX_GDN_CPU_ROWS_H_

#include <cstdint>
#include <utility>

#include "cpu/lanes.h"
#include "cpu/prefetch.h"
#include "cpu/state_kernel.h"

namespace jax_gdn {
namespace {

// Lanes whose index has the bit kApart are y's, the others x's; kOther: they come from
// lanes kApart away.
template <int kApart, bool kOther, typename F, int... kLane>
inline F Exchange(F x, F y, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      x, y,
      (kLane & kApart ? kLanes + (kOther ? kLane - kApart : kLane)
                      : (kOther ? kLane + kApart : kLane))...);
}

// sums[n] becomes the sum over the lanes of x[n], by neighbours, then neighbours'
// pairs. What it writes are whole vectors.
template <int kCount, int kApart = 1>
inline void SumLanes(const Lanes<kLanes>::F (&x)[kCount], float* sums) {
  if constexpr (kApart == kLanes) {
    __builtin_memcpy(sums, x, sizeof x);
  } else {
    constexpr std::make_integer_sequence<int, kLanes> kAll{};
    constexpr int kHalf = (kCount + 1) / 2;
    Lanes<kLanes>::F y[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      const auto first = x[2 * i], second = x[kCount > 1 ? 2 * i + 1 : 0];
      y[i] = Exchange<kApart, false>(first, second, kAll) +
             Exchange<kApart, true>(first, second, kAll);
    }
    SumLanes<kHalf, 2 * kApart>(y, sums);
  }
}

// Rows [j, j + kRows) of a [V, K] state: a row holds all that its own update needs.
// The passes are not inlined, so that each has the registers for itself. Their loops
// are unrolled early, so that arrays are in registers, not cleared and reloaded in
// memory.
template <int kRows>
class Rows {
 public:
  static constexpr int32_t kSize = kRows;

  Rows(const StateJob& job, int32_t j, float* tile)
      : K_(job.K), V_(job.V), whole_(K_ - K_ % kLanes), j_(j), tile_(tile) {}
  Rows(const StateJob& job, int32_t j) : Rows(job, j, job.tile) {}

  // The sums of a token that is the first, or that changes nothing.
  template <DType kType, Source kSource>
  [[gnu::noinline]] void Sum(const void* state, const float* k, const float* q,
                             Prefetcher& fetch) {
    constexpr bool kKept = kSource == Source::kTile;
    constexpr DType kFrom = kKept ? kFloat : kType;
    float* const tile = tile_;
    const void* const source = kKept ? tile : state;
    const int32_t K = K_, whole = whole_;
    const int64_t first = int64_t{j_} * K;
    Prefetcher ahead = fetch;
    F sums[2 * kRows];  // p of each row, then r
#pragma GCC unroll 16
    for (F& sum : sums) sum = F{};
    for (int32_t i = 0; i < whole; i += kLanes) {
      const F k_i = Load<kFloat, kLanes>(k, i), q_i = Load<kFloat, kLanes>(q, i);
      ahead.Fetch(kRows * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const int64_t at = kKept ? InTile<kLanes>(n, i) : first + int64_t{n} * K + i;
        const F s = Load<kFrom, kLanes>(source, at);
        if (kSource == Source::kStateToTile) {
          Store<kFloat, kLanes>(tile, InTile<kLanes>(n, i), s);
        }
        sums[n] += k_i * s;
        sums[kRows + n] += q_i * s;
      }
    }
    SumLanes(sums, sums_);
    fetch = ahead;
    for (int32_t i = whole; i < K; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const int64_t at = kKept ? InTile<1>(n, i) : first + int64_t{n} * K + i;
        const float s = Load<kFrom, 1>(source, at);
        if (kSource == Source::kStateToTile) tile[InTile<1>(n, i)] = s;
        sums_[n] += k[i] * s;
        sums_[kRows + n] += q[i] * s;
      }
    }
  }

  // Hands the sums over.
  void Put(const Query& x) const {
    __builtin_memcpy(x.p + j_, sums_, kRows * sizeof(float));
    __builtin_memcpy(x.r + j_, sums_ + kRows, kRows * sizeof(float));
  }

  void Finish(const Token& x) {
    using R = typename Lanes<kRows>::F;
    const R p = Load<kFloat, kRows>(sums_, 0), r = Load<kFloat, kRows>(sums_, kRows);
    const R u = x.beta * (Load<kFloat, kRows>(x.v, j_) - p);
    Store<kFloat, kRows>(u_, 0, u);
    Store<kFloat, kRows>(x.out, j_, r + x.qk * u);
  }

  template <DType kType, bool kStores>
  [[gnu::noinline]] void UpdateAndSum(const Token& token, const Token& next,
                                      Prefetcher& fetch) {
    const float *const k = token.k, *const decay = token.decay;
    const float *const dk = next.decayed_k, *const dq = next.decayed_q;
    float* const tile = tile_;
    void* const to = token.to;
    const int32_t K = K_, whole = whole_;
    const int64_t first = int64_t{j_} * K;
    Prefetcher ahead = fetch;
    F u[kRows], sums[2 * kRows];
#pragma GCC unroll 16
    for (F& sum : sums) sum = F{};
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) u[n] = Fill<kLanes>(u_[n]);
    for (int32_t i = 0; i < whole; i += kLanes) {
      const F k_i = Load<kFloat, kLanes>(k, i),
              decay_i = Load<kFloat, kLanes>(decay, i);
      const F dk_i = Load<kFloat, kLanes>(dk, i), dq_i = Load<kFloat, kLanes>(dq, i);
      ahead.Fetch(kRows * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const int64_t at = InTile<kLanes>(n, i);
        const F s = Updated(Load<kFloat, kLanes>(tile, at), k_i, u[n], decay_i);
        Store<kFloat, kLanes>(tile, at, s);
        if (kStores) Store<kType, kLanes>(to, first + int64_t{n} * K + i, s);
        sums[n] += dk_i * s;
        sums[kRows + n] += dq_i * s;
      }
    }
    SumLanes(sums, sums_);
    fetch = ahead;
    for (int32_t i = whole; i < K; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        float& entry = tile[InTile<1>(n, i)];
        const float s = entry = Updated(entry, k[i], u_[n], decay[i]);
        if (kStores) Store<kType, 1>(to, first + int64_t{n} * K + i, s);
        sums_[n] += dk[i] * s;
        sums_[kRows + n] += dq[i] * s;
      }
    }
  }

  template <DType kType, bool kKept>
  [[gnu::noinline]] void Update(const void* from, const Token& token,
                                Prefetcher& fetch) {
    const float *const k = token.k, *const decay = token.decay;
    constexpr DType kFrom = kKept ? kFloat : kType;
    const void* const source = kKept ? tile_ : from;
    void* const to = token.to;
    const int32_t K = K_, whole = whole_;
    const int64_t first = int64_t{j_} * K;
    Prefetcher ahead = fetch;
    F u[kRows];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) u[n] = Fill<kLanes>(u_[n]);
    for (int32_t i = 0; i < whole; i += kLanes) {
      const F k_i = Load<kFloat, kLanes>(k, i),
              decay_i = Load<kFloat, kLanes>(decay, i);
      ahead.Fetch(kRows * kLanes);
      F s[kRows];
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const int64_t at = kKept ? InTile<kLanes>(n, i) : first + int64_t{n} * K + i;
        s[n] = Updated(Load<kFrom, kLanes>(source, at), k_i, u[n], decay_i);
      }
      StoreAll<kType, kLanes>(to, first + i, K, s);
    }
    fetch = ahead;
    for (int32_t i = whole; i < K; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const int64_t at = first + int64_t{n} * K + i;
        const float s = Load<kFrom, 1>(source, kKept ? InTile<1>(n, i) : at);
        Store<kType, 1>(to, at, Updated(s, k[i], u_[n], decay[i]));
      }
    }
  }

  // Folds into what the tile has.
  template <DType kType>
  [[gnu::noinline]] void FoldTile(const Fold& fold, Prefetcher& fetch) const {
    const int32_t K = K_, V = V_, count = fold.count;
    const int64_t first = int64_t{j_} * K;
    Prefetcher ahead = fetch;
    for (int32_t i = 0; i < whole_; i += kLanes) {
      ahead.Fetch(kRows * kLanes);
      F s[kRows];
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        s[n] = fold.decay * Load<kFloat, kLanes>(tile_, InTile<kLanes>(n, i));
      }
      const float *k = fold.k + i, *u = fold.u + j_;
      for (int32_t x = 0; x < count; ++x, k += K, u += V) {
        const F k_i = Load<kFloat, kLanes>(k, 0);
#pragma GCC unroll 16
        for (int n = 0; n < kRows; ++n) s[n] += k_i * Fill<kLanes>(u[n]);
      }
      StoreAll<kType, kLanes>(fold.to, first + i, K, s);
    }
    fetch = ahead;
    for (int32_t i = whole_; i < K; ++i) {
      for (int n = 0; n < kRows; ++n) {
        float s = fold.decay * tile_[InTile<1>(n, i)];
        const float *k = fold.k + i, *u = fold.u + j_ + n;
        for (int32_t x = 0; x < count; ++x, k += K, u += V) s += *k * *u;
        Store<kType, 1>(fold.to, first + int64_t{n} * K + i, s);
      }
    }
  }

 private:
  using F = Lanes<kLanes>::F;

  // Where the tile has entries [i, i + N) of a row: in the order they are passed over.
  template <int N>
  static int64_t InTile(int n, int32_t i) {
    return int64_t{i} * kRows + n * N;
  }

  const int32_t K_, V_, whole_, j_;
  float* const tile_;  // [K / kLanes, kRows, kLanes], then [K % kLanes, kRows]
  float sums_[2 * kRows > kLanes ? 2 * kRows : kLanes];  // p of each row, then r
  float u_[kRows];
};

// Interleaved parts in turn: while the lanes of one are summed, the other is passed
// over.
template <typename Of>
class Interleaved {
 public:
  static constexpr int32_t kSize = 2 * Of::kSize;

  Interleaved(const StateJob& job, int32_t j)
      : parts_{Of(job, j, job.tile),
               Of(job, j + Of::kSize, job.tile + int64_t{Of::kSize} * job.K)} {}

  template <DType kType, Source kSource>
  void Sum(const void* state, const float* k, const float* q, Prefetcher& ahead) {
    for (Of& part : parts_) part.template Sum<kType, kSource>(state, k, q, ahead);
  }
  void Put(const Query& query) const {
    for (const Of& part : parts_) part.Put(query);
  }
  void Finish(const Token& token) {
    for (Of& part : parts_) part.Finish(token);
  }
  template <DType kType, bool kStores>
  void UpdateAndSum(const Token& token, const Token& next, Prefetcher& ahead) {
    for (Of& part : parts_) {
      part.template UpdateAndSum<kType, kStores>(token, next, ahead);
    }
  }
  template <DType kType, bool kKept>
  void Update(const void* from, const Token& token, Prefetcher& ahead) {
    for (Of& part : parts_) part.template Update<kType, kKept>(from, token, ahead);
  }
  template <DType kType>
  void FoldTile(const Fold& fold, Prefetcher& ahead) const {
    for (const Of& part : parts_) part.template FoldTile<kType>(fold, ahead);
  }

 private:
  Of parts_[2];
};

}  // namespace
}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_ROWS_H_
