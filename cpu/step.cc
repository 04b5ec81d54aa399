// One token of one state. Compiled once an instruction set, under the namespace that
// JAX_GDN_ISA names; includes nothing whose code the linker could share with others.
#include "cpu/step.h"

#include "cpu/lanes.h"

namespace jax_gdn {
namespace {

constexpr int kLanes = 16;

// Rows of a [K, V] state taken together, so that the sums are fetched and put back
// once for all.
constexpr int32_t kRowsAtOnce = 8;

// Adds `kRows` rows to p = k^T S and r = q^T S, in order, in N columns.
template <DType kFrom, int N, int32_t kRows>
inline void AddRows(const void* state, int64_t first, const float* q, const float* k,
                    int32_t V, float* p, float* r) {
  auto p_sum = Load<DType::kFloat32, N>(p, 0), r_sum = Load<DType::kFloat32, N>(r, 0);
  for (int32_t i = 0; i < kRows; ++i) {
    const auto s = Load<kFrom, N>(state, first + int64_t{i} * V);
    p_sum += k[i] * s;
    r_sum += q[i] * s;
  }
  Store<DType::kFloat32, N>(p, 0, p_sum);
  Store<DType::kFloat32, N>(r, 0, r_sum);
}

template <DType kFrom, int32_t kRows>
inline void AddRowBlock(const void* state, int32_t row, const float* q, const float* k,
                        int32_t V, float* p, float* r) {
  const int64_t first = int64_t{row} * V;
  // Copies, which no store below can be thought to change.
  float q_rows[kRows], k_rows[kRows];
  for (int32_t i = 0; i < kRows; ++i) q_rows[i] = q[row + i], k_rows[i] = k[row + i];
  int32_t j = 0;
  for (; j + kLanes <= V; j += kLanes) {
    AddRows<kFrom, kLanes, kRows>(state, first + j, q_rows, k_rows, V, p + j, r + j);
  }
  for (; j < V; ++j) {
    AddRows<kFrom, 1, kRows>(state, first + j, q_rows, k_rows, V, p + j, r + j);
  }
}

// N columns of one row: S = decay S + k u.
template <DType kFrom, DType kTo, int N>
inline void UpdateColumns(const void* from, void* to, int64_t at, float decay, float k,
                          const float* u) {
  const auto s = Load<kFrom, N>(from, at);
  Store<kTo, N>(to, at, k * Load<DType::kFloat32, N>(u, 0) + decay * s);
}

// Two passes: the first brings the state into the core's own cache, with the sums over
// K; the second writes from there.
template <DType kFrom, DType kTo>
void StepKV(const void* from, void* to, const Token& token, int32_t K, int32_t V) {
  const Token x = token;  // a copy, which no store below can be thought to change
  for (int32_t j = 0; j < V; ++j) x.p[j] = x.out[j] = 0.0f;
  int32_t i = 0;
  for (; i + kRowsAtOnce <= K; i += kRowsAtOnce) {
    AddRowBlock<kFrom, kRowsAtOnce>(from, i, x.decayed_q, x.decayed_k, V, x.p, x.out);
  }
  for (; i < K; ++i) {
    AddRowBlock<kFrom, 1>(from, i, x.decayed_q, x.decayed_k, V, x.p, x.out);
  }
  for (int32_t j = 0; j < V; ++j) {
    x.u[j] = x.beta * (x.v[j] - x.p[j]);
    x.out[j] += x.qk * x.u[j];
  }
  if (to == nullptr) return;
  for (i = 0; i < K; ++i) {
    const int64_t row = int64_t{i} * V;
    const float decay = x.decay[i], k = x.k[i];
    int32_t j = 0;
    for (; j + kLanes <= V; j += kLanes) {
      UpdateColumns<kFrom, kTo, kLanes>(from, to, row + j, decay, k, x.u + j);
    }
    for (; j < V; ++j) {
      UpdateColumns<kFrom, kTo, 1>(from, to, row + j, decay, k, x.u + j);
    }
  }
}

// The sum of all lanes, as a balanced tree.
inline float SumLanes(Lanes<kLanes>::F x) {
  float lane[kLanes];
  __builtin_memcpy(lane, &x, sizeof x);
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// One pass: a row of K holds all that its own update needs.
template <DType kFrom, DType kTo>
void StepVK(const void* from, void* to, const Token& token, int32_t K, int32_t V) {
  const Token x = token;  // as in StepKV
  constexpr DType kFloat = DType::kFloat32;
  for (int32_t j = 0; j < V; ++j) {
    const int64_t row = int64_t{j} * K;
    auto p_lanes = Fill<kLanes>(0.0f), r_lanes = Fill<kLanes>(0.0f);
    int32_t i = 0;
    for (; i + kLanes <= K; i += kLanes) {
      const auto s = Load<kFrom, kLanes>(from, row + i);
      p_lanes += Load<kFloat, kLanes>(x.decayed_k, i) * s;
      r_lanes += Load<kFloat, kLanes>(x.decayed_q, i) * s;
    }
    float p = SumLanes(p_lanes), r = SumLanes(r_lanes);
    for (; i < K; ++i) {
      const float s = Load<kFrom, 1>(from, row + i);
      p += x.decayed_k[i] * s;
      r += x.decayed_q[i] * s;
    }
    const float u = x.beta * (x.v[j] - p);
    x.out[j] = r + x.qk * u;
    if (to == nullptr) continue;
    for (i = 0; i + kLanes <= K; i += kLanes) {
      const auto s = Load<kFrom, kLanes>(from, row + i);
      Store<kTo, kLanes>(
          to, row + i,
          u * Load<kFloat, kLanes>(x.k, i) + Load<kFloat, kLanes>(x.decay, i) * s);
    }
    for (; i < K; ++i) {
      const float s = Load<kFrom, 1>(from, row + i);
      Store<kTo, 1>(to, row + i, u * x.k[i] + x.decay[i] * s);
    }
  }
}

template <DType kFrom, DType kTo>
void StepLayout(Layout layout, const void* from, void* to, const Token& token,
                int32_t K, int32_t V) {
  if (layout == Layout::kKV) {
    StepKV<kFrom, kTo>(from, to, token, K, V);
  } else {
    StepVK<kFrom, kTo>(from, to, token, K, V);
  }
}

// A 16-bit state becomes 16 or 32 bits.
template <DType kFrom>
void StepFromHalf(Layout layout, StateView from, StateView to, const Token& token,
                  int32_t K, int32_t V) {
  if (to.dtype == kFrom) {
    StepLayout<kFrom, kFrom>(layout, from.data, to.data, token, K, V);
  } else {
    StepLayout<kFrom, DType::kFloat32>(layout, from.data, to.data, token, K, V);
  }
}

}  // namespace

namespace JAX_GDN_ISA {

void DecodeStep(Layout layout, StateView from, StateView to, const Token& token,
                int32_t K, int32_t V) {
  constexpr DType kFloat = DType::kFloat32;
  if (from.dtype == DType::kBFloat16) {
    StepFromHalf<DType::kBFloat16>(layout, from, to, token, K, V);
  } else if (from.dtype == DType::kFloat16) {
    StepFromHalf<DType::kFloat16>(layout, from, to, token, K, V);
  } else if (to.dtype == DType::kBFloat16) {
    StepLayout<kFloat, DType::kBFloat16>(layout, from.data, to.data, token, K, V);
  } else if (to.dtype == DType::kFloat16) {
    StepLayout<kFloat, DType::kFloat16>(layout, from.data, to.data, token, K, V);
  } else {
    StepLayout<kFloat, kFloat>(layout, from.data, to.data, token, K, V);
  }
}

}  // namespace JAX_GDN_ISA
}  // namespace jax_gdn
