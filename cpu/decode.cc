// Gated-delta-rule decode on the host.
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// Two passes over a state: the first reads it from memory and leaves it in the
// core's own cache (K V floats, 64 KB at K = V = 128), with p = k^T S and
// r = q^T S of the old state; the second, from that cache, writes
// exp(g) S + k u^T. So memory sees each byte read once and written once.
#include "cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/convert.h"

// One clone an instruction set, picked when the module loads.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define JAX_GDN_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAX_GDN_CLONES
#endif

namespace jax_gdn {
namespace {

// Scratch of one thread, sized once a range.
struct Scratch {
  Scratch(int32_t K, int32_t V) : q(K), k(K), v(V), p(V), r(V) {}
  std::vector<float> q, k;  // [K], normalised; q scaled
  std::vector<float> v;     // [V], then u
  std::vector<float> p, r;  // [V], k^T S and q^T S; r is then out
};

float Dot(const std::vector<float>& x, const std::vector<float>& y) {
  float sum = 0.0f;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

void Multiply(std::vector<float>& x, float factor) {
  for (float& value : x) value *= factor;
}

float Scalar(const Input& x, int64_t index) {
  float value;
  Widen(x, index, 1, &value);
  return value;
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
float Softplus(float x) {
  return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x)));
}

// Rows taken together, so that the sums are fetched and put back once for all.
constexpr int32_t kRowsAtOnce = 8;

// Adds `Rows` rows to p = k^T S and r = q^T S, in order.
template <int32_t Rows>
inline __attribute__((always_inline)) void AddRows(const float* __restrict rows,
                                                   const float* __restrict q,
                                                   const float* __restrict k, int32_t V,
                                                   float* __restrict p,
                                                   float* __restrict r) {
  for (int32_t j = 0; j < V; ++j) {
    float p_j = p[j], r_j = r[j];
    for (int32_t i = 0; i < Rows; ++i) {
      const float s = rows[int64_t{i} * V + j];
      p_j += k[i] * s;
      r_j += q[i] * s;
    }
    p[j] = p_j;
    r[j] = r_j;
  }
}

// p = k^T S and r = q^T S.
JAX_GDN_CLONES
void Read(const float* __restrict state, const float* __restrict q,
          const float* __restrict k, int32_t K, int32_t V, float* __restrict p,
          float* __restrict r) {
  std::fill(p, p + V, 0.0f);
  std::fill(r, r + V, 0.0f);
  int32_t i = 0;
  for (; i + kRowsAtOnce <= K; i += kRowsAtOnce) {
    AddRows<kRowsAtOnce>(state + int64_t{i} * V, q + i, k + i, V, p, r);
  }
  for (; i < K; ++i) AddRows<1>(state + int64_t{i} * V, q + i, k + i, V, p, r);
}

// S = decay S + k u^T.
JAX_GDN_CLONES
void Update(float* __restrict state, const float* __restrict k,
            const float* __restrict u, float decay, int32_t K, int32_t V) {
  for (int32_t i = 0; i < K; ++i) {
    float* row = state + int64_t{i} * V;
    for (int32_t j = 0; j < V; ++j) row[j] = decay * row[j] + k[i] * u[j];
  }
}

void DecodeState(const DecodeParams& p, int64_t index, Scratch& x) {
  const int32_t hv = static_cast<int32_t>(index % p.HV);
  const int64_t key_head = index / p.HV * p.H + hv / p.group;
  float* state = p.state + index * p.K * p.V;

  Widen(p.q, key_head * p.K, p.K, x.q.data());
  Widen(p.k, key_head * p.K, p.K, x.k.data());
  Widen(p.v, index * p.V, p.V, x.v.data());
  if (p.use_qk_l2norm) {
    Multiply(x.q, 1.0f / std::sqrt(Dot(x.q, x.q) + kNormEpsilon));
    Multiply(x.k, 1.0f / std::sqrt(Dot(x.k, x.k) + kNormEpsilon));
  }
  Multiply(x.q, p.scale);
  const float qk = Dot(x.q, x.k);
  const float g =
      -std::exp(p.A_log[hv]) * Softplus(Scalar(p.a, index) + Scalar(p.dt_bias, hv));
  const float decay = std::exp(g);
  const float beta = 1.0f / (1.0f + std::exp(-Scalar(p.b, index)));

  Read(state, x.q.data(), x.k.data(), p.K, p.V, x.p.data(), x.r.data());
  for (int32_t j = 0; j < p.V; ++j) {
    const float u = beta * (x.v[j] - decay * x.p[j]);
    x.r[j] = decay * x.r[j] + qk * u;
    x.v[j] = u;
  }
  Update(state, x.k.data(), x.v.data(), decay, p.K, p.V);
  Round(x.r.data(), index * p.V, p.V, p.out);
}

}  // namespace

void DecodeStates(const DecodeParams& params, int64_t begin, int64_t end) {
  Scratch scratch(params.K, params.V);
  for (int64_t i = begin; i < end; ++i) DecodeState(params, i, scratch);
}

}  // namespace jax_gdn
