// All tokens of one state. Compiled once an instruction set, under the namespace that
// JAX_GDN_ISA names; includes nothing whose code the linker could share with others.
#include "cpu/step.h"

#include <utility>

#include "cpu/lanes.h"

namespace jax_gdn {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vectors of sums held at once: enough to hide a multiply-add's latency, few enough for
// sixteen registers.
constexpr int kAtOnce = 4;

constexpr DType kFloat = DType::kFloat32;

// Memory that is asked for while there is arithmetic to do, evenly over all of it.
class Ahead {
 public:
  // `visits`: entries of a state that are passed over in the meantime.
  Ahead(StateView state, int64_t entries, int64_t visits)
      : at_(static_cast<const char*>(state.data)),
        end_(at_ == nullptr ? at_ : at_ + entries * SizeOf(state.dtype)),
        price_(kLine * visits / (entries * SizeOf(state.dtype))) {}

  // To be called with every entry that is passed over.
  void Fetch(int64_t visits) {
    for (credit_ += visits; credit_ >= price_ && at_ < end_; credit_ -= price_) {
      __builtin_prefetch(at_, 1, 2);
      at_ += kLine;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* at_;
  const char* end_;
  int64_t price_;  // of a line, in visits
  int64_t credit_ = 0;
};

// Columns [j, j + kVectors N) of a [K, V] state. The first pass brings them into the
// core's first cache, with both sums over K in registers; the second finds them there.
template <int N, int kVectors>
struct Columns {
  static constexpr int32_t kSize = kVectors * N;
  template <DType kFrom, DType kTo>
  static Ahead Decode(const Token& token, int32_t j, int32_t K, int32_t V, Ahead ahead);
};

template <int N, int kVectors>
template <DType kFrom, DType kTo>
Ahead Columns<N, kVectors>::Decode(const Token& token, int32_t j, int32_t K, int32_t V,
                                   Ahead ahead) {
  const Token x = token;  // a copy, which no store below can be thought to change
  using F = typename Lanes<N>::F;
  F p[kVectors], r[kVectors], u[kVectors];
  for (int c = 0; c < kVectors; ++c) p[c] = r[c] = Fill<N>(0.0f);
  const float *const dk = x.decayed_k, *const dq = x.decayed_q;
  for (int32_t i = 0; i < K; ++i) {
    const int64_t at = int64_t{i} * V + j;
    ahead.Fetch(kVectors * N);
    for (int c = 0; c < kVectors; ++c) {
      const F s = Load<kFrom, N>(x.from.data, at + c * N);
      p[c] += dk[i] * s;
      r[c] += dq[i] * s;
    }
  }
  for (int c = 0; c < kVectors; ++c) {
    u[c] = x.beta * (Load<kFloat, N>(x.v, j + c * N) - p[c]);
    Store<kFloat, N>(x.out, j + c * N, r[c] + x.qk * u[c]);
  }
  if (x.to.data == nullptr) return ahead;
  const float *const k = x.k, *const decay = x.decay;
  for (int32_t i = 0; i < K; ++i) {
    const int64_t at = int64_t{i} * V + j;
    ahead.Fetch(kVectors * N);
    // Copies, which no store below can be thought to change.
    const float k_i = k[i], decay_i = decay[i];
    for (int c = 0; c < kVectors; ++c) {
      const F s = Load<kFrom, N>(x.from.data, at + c * N);
      Store<kTo, N>(x.to.data, at + c * N, k_i * u[c] + decay_i * s);
    }
  }
  return ahead;
}

// Lanes 0, 2, 4... (kFirst = 0) or 1, 3, 5... (kFirst = 1) of x, then of y.
template <int kFirst, typename F, int... kLane>
inline F EveryOther(F x, F y, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, y, (2 * kLane + kFirst)...);
}

// Sums over the lanes of each of `kCount` vectors, by neighbours: after every round the
// vectors, one after the other, hold half as many entries for each sum.
template <int kCount, int kEach = kLanes>
inline void SumLanes(const Lanes<kLanes>::F (&x)[kCount], float* sums) {
  if constexpr (kEach == 1) {
    __builtin_memcpy(sums, x, sizeof x);
  } else {
    constexpr std::make_integer_sequence<int, kLanes> kAll{};
    constexpr int kHalf = (kCount + 1) / 2;
    Lanes<kLanes>::F y[kHalf];
    for (int i = 0; i < kHalf; ++i) {
      const auto first = x[2 * i], second = x[kCount > 1 ? 2 * i + 1 : 0];
      y[i] = EveryOther<0>(first, second, kAll) + EveryOther<1>(first, second, kAll);
    }
    SumLanes<kHalf, kEach / 2>(y, sums);
  }
}

// Rows [j, j + kRows) of a [V, K] state: a row holds all that its own update needs.
template <int kRows>
struct Rows {
  static constexpr int32_t kSize = kRows;
  template <DType kFrom, DType kTo>
  static Ahead Decode(const Token& token, int32_t j, int32_t K, int32_t V, Ahead ahead);
};

template <int kRows>
template <DType kFrom, DType kTo>
Ahead Rows<kRows>::Decode(const Token& token, int32_t j, int32_t K, int32_t /*V*/,
                          Ahead ahead) {
  const Token x = token;  // as above
  using F = Lanes<kLanes>::F;
  F lanes[2 * kRows];  // p of each row, then r
  for (F& sum : lanes) sum = Fill<kLanes>(0.0f);
  int64_t row[kRows];
  for (int n = 0; n < kRows; ++n) row[n] = int64_t{j + n} * K;
  int32_t i = 0;
  for (; i + kLanes <= K; i += kLanes) {
    const F dk = Load<kFloat, kLanes>(x.decayed_k, i);
    const F dq = Load<kFloat, kLanes>(x.decayed_q, i);
    ahead.Fetch(2 * kRows * kLanes);  // both passes'
    for (int n = 0; n < kRows; ++n) {
      const F s = Load<kFrom, kLanes>(x.from.data, row[n] + i);
      lanes[n] += dk * s;
      lanes[kRows + n] += dq * s;
    }
  }
  float sums[2 * kRows + kLanes];
  SumLanes(lanes, sums);
  const int32_t rest = i;
  float u[kRows];
  for (int n = 0; n < kRows; ++n) {
    float p = sums[n], r = sums[kRows + n];
    for (i = rest; i < K; ++i) {
      const float s = Load<kFrom, 1>(x.from.data, row[n] + i);
      p += x.decayed_k[i] * s;
      r += x.decayed_q[i] * s;
    }
    u[n] = x.beta * (x.v[j + n] - p);
    x.out[j + n] = r + x.qk * u[n];
  }
  if (x.to.data == nullptr) return ahead;
  for (i = 0; i + kLanes <= K; i += kLanes) {
    const F k = Load<kFloat, kLanes>(x.k, i), decay = Load<kFloat, kLanes>(x.decay, i);
    for (int n = 0; n < kRows; ++n) {
      const F s = Load<kFrom, kLanes>(x.from.data, row[n] + i);
      Store<kTo, kLanes>(x.to.data, row[n] + i, u[n] * k + decay * s);
    }
  }
  for (i = rest; i < K; ++i) {
    for (int n = 0; n < kRows; ++n) {
      const float s = Load<kFrom, 1>(x.from.data, row[n] + i);
      Store<kTo, 1>(x.to.data, row[n] + i, u[n] * x.k[i] + x.decay[i] * s);
    }
  }
  return ahead;
}

using Part = Ahead (*)(const Token&, int32_t, int32_t, int32_t, Ahead);

template <typename Of, DType kFrom>
Part PartTo(DType to) {
  if (to == kFrom) return Of::template Decode<kFrom, kFrom>;
  if (kFrom != kFloat) return Of::template Decode<kFrom, kFloat>;
  return to == DType::kBFloat16 ? Of::template Decode<kFloat, DType::kBFloat16>
                                : Of::template Decode<kFloat, DType::kFloat16>;
}

// Of two dtypes, as of `Token`, one is float32 or both are the same.
template <typename Of>
Part PartFor(const Token& token) {
  if (token.from.dtype == kFloat) return PartTo<Of, kFloat>(token.to.dtype);
  if (token.from.dtype == DType::kBFloat16) {
    return PartTo<Of, DType::kBFloat16>(token.to.dtype);
  }
  return PartTo<Of, DType::kFloat16>(token.to.dtype);
}

struct Work {
  const Token* tokens;
  int64_t count;
  int32_t K, V;
  Ahead ahead;
};

// Columns or rows from `j` on while there are enough for whole parts, every token over
// one part before the next part; returns the first that is left.
template <typename Of>
int32_t DecodeParts(Work& work, int32_t j) {
  for (; j + Of::kSize <= work.V; j += Of::kSize) {
    for (const Token* x = work.tokens; x < work.tokens + work.count; ++x) {
      work.ahead = PartFor<Of>(*x)(*x, j, work.K, work.V, work.ahead);
    }
  }
  return j;
}

template <DType kType>
void WidenAs(const void* from, int64_t first, int64_t count, float* values) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Store<kFloat, kLanes>(values, i, Load<kType, kLanes>(from, first + i));
  }
  for (; i < count; ++i) values[i] = Load<kType, 1>(from, first + i);
}

template <DType kType>
void RoundAs(const float* values, void* to, int64_t first, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Store<kType, kLanes>(to, first + i, Load<kFloat, kLanes>(values, i));
  }
  for (; i < count; ++i) Store<kType, 1>(to, first + i, values[i]);
}

}  // namespace

namespace JAX_GDN_ISA {

void Decode(Layout layout, const Token* tokens, int64_t count, int32_t K, int32_t V,
            StateView ahead) {
  const int64_t entries = int64_t{K} * V;
  Work work = {tokens, count, K, V, Ahead(ahead, entries, 2 * entries * count)};
  int32_t j = 0;
  if (layout == Layout::kKV) {
    j = DecodeParts<Columns<kLanes, kAtOnce>>(work, j);
    j = DecodeParts<Columns<kLanes, 1>>(work, j);
    DecodeParts<Columns<1, 1>>(work, j);
  } else {
    j = DecodeParts<Rows<kLanes == 16 ? 8 : kAtOnce>>(work, j);
    DecodeParts<Rows<1>>(work, j);
  }
}

float Dot(const float* x, const float* y, int32_t size) {
  auto lanes = Fill<kLanes>(0.0f);
  int32_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    lanes += Load<kFloat, kLanes>(x, i) * Load<kFloat, kLanes>(y, i);
  }
  float sum = 0.0f, lane[kLanes];
  __builtin_memcpy(lane, &lanes, sizeof lane);
  for (float value : lane) sum += value;
  for (; i < size; ++i) sum += x[i] * y[i];
  return sum;
}

void Widen(const Input& x, int64_t first, int64_t count, float* values) {
  switch (x.dtype) {
    case DType::kFloat32:
      return WidenAs<DType::kFloat32>(x.data, first, count, values);
    case DType::kBFloat16:
      return WidenAs<DType::kBFloat16>(x.data, first, count, values);
    case DType::kFloat16:
      return WidenAs<DType::kFloat16>(x.data, first, count, values);
  }
}

void Round(const float* values, int64_t first, int64_t count, const Output& x) {
  switch (x.dtype) {
    case DType::kFloat32:
      return RoundAs<DType::kFloat32>(values, x.data, first, count);
    case DType::kBFloat16:
      return RoundAs<DType::kBFloat16>(values, x.data, first, count);
    case DType::kFloat16:
      return RoundAs<DType::kFloat16>(values, x.data, first, count);
  }
}

}  // namespace JAX_GDN_ISA
}  // namespace jax_gdn
