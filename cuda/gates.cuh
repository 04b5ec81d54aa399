// Gates and warp sums, for both kernels.
#ifndef JAX_GDN_CUDA_GATES_CUH_
#define JAX_GDN_CUDA_GATES_CUH_

#include "common/decode_params.h"

namespace jax_gdn {

// Sums over groups of kLanes neighbouring lanes as a butterfly: every lane of a group
// gets the same bits.
template <int kLanes = 32>
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// log(1 + x) for x in [0, 1], within 1 ulp; NaN stays. Unlike log1pf it has no branch,
// so the decay's chain of instructions runs beside that of the norms.
__device__ __forceinline__ float Log1pOfFraction(float x) {
  const bool upper = x >= 0.5f;
  // 1 + m is 1 + x, or half of it.
  const float m = upper ? fmaf(0.5f, x, -0.5f) : x;
  // (log(1 + m) - m) / m^2 on [-1/4, 1/2], its largest error as small as can be.
  float r = -0.0449096076f;
  r = fmaf(r, m, 0.1044833139f);
  r = fmaf(r, m, -0.1316223293f);
  r = fmaf(r, m, 0.1448206156f);
  r = fmaf(r, m, -0.1664776653f);
  r = fmaf(r, m, 0.1999060661f);
  r = fmaf(r, m, -0.2500005364f);
  r = fmaf(r, m, 0.3333345354f);
  r = fmaf(r, m, -0.5f);
  r = fmaf(r * m, m, m);
  return upper ? r + 0.6931471806f : r;
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
__device__ __forceinline__ float Softplus(float x) {
  return fmaxf(x, 0.0f) + Log1pOfFraction(expf(-fabsf(x)));
}

// exp(A_log) * softplus(x) must not become inf * 0. Above kMaxALog exp(A_log) may be
// infinite where softplus(x) is nearly 0; above kMaxFloat softplus(x) is infinite where
// exp(A_log) may be 0. The decay rate is then exp(A_log + x), because softplus(x) is
// exp(x) below x = -17, with x at most kLogMaxFloat, times softplus(kUnitSoftplus) = 1.
constexpr float kMaxALog = 88.0f;
constexpr float kMaxFloat = 3.4028235e38f, kLogMaxFloat = 88.722839f;
constexpr float kUnitSoftplus = 0.54132485f;

// exp(g), in [0, 1], for x = a + dt_bias: for finite inputs never NaN, see kMaxALog.
// Without a branch, so Softplus of a value that is picked, not a picked value of it.
__device__ __forceinline__ float Decay(float A_log, float x) {
  const bool special = A_log > kMaxALog || x > kMaxFloat;
  const float log_softplus = x > kLogMaxFloat ? kLogMaxFloat : x;  // NaN stays
  const float log_rate = special ? A_log + log_softplus : A_log;
  return expf(-expf(log_rate) * Softplus(special ? kUnitSoftplus : x));
}

// In [0, 1].
__device__ __forceinline__ float Sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + expf(-x));
}

// exp(g) for what the call has of a, dt_bias and A_log. The first form is in no branch,
// so that it runs beside the norms; a branch around it costs up to 14 %.
__device__ __forceinline__ float DecayOf(const DecodeParams& p, float A_log, float a,
                                         float dt_bias) {
  float decay = Decay(A_log, a + dt_bias);
  if (p.gates == GateForm::kGiven) decay = expf(a);
  if (p.gates == GateForm::kSigmoid) {
    // exp(A_log) in two steps: no infinity times zero, for any finite A_log and x.
    const float half = expf(0.5f * (A_log > 176.0f ? 176.0f : A_log));
    decay = expf(p.lower_bound * Sigmoid(half * (a + dt_bias) * half));
  }
  return decay;
}

// The write strength.
__device__ __forceinline__ float BetaOf(const DecodeParams& p, float b) {
  return p.gates == GateForm::kGiven ? b : p.beta_scale * Sigmoid(b);
}

// hv / group, exact for hv < 2^16: the error of the rounded-up inverse is below
// hv / 2^32 < 1 / group. Group 1 has the inverse 2^32, which wraps to 0.
__device__ __forceinline__ unsigned KeyHead(const DecodeParams& p, unsigned hv) {
  return p.group_inverse == 0 ? hv : __umulhi(hv, p.group_inverse);
}

// What follows from a token's inputs. What normalises q and k is a factor on sums over
// K, so that no row of the state waits for a norm.
struct alignas(16) Gates {
  float decay;      // exp(g), common to the head; 1 where each channel has its own
  float beta;       // write strength
  float qk;         // q.k of the normalised, scaled vectors
  float k_factor;   // normalises k
  float decayed_q;  // exp(g) times what normalises and scales q
  float decayed_k;  // exp(g) times what normalises k
};

__device__ __forceinline__ Gates MakeGates(const DecodeParams& p, float decay, float b,
                                           float qq, float kk, float qk) {
  const float q_norm = p.scale * rsqrtf(qq + kNormEpsilon);
  const float q = p.use_qk_l2norm ? q_norm : p.scale;  // normalises and scales q
  const float k = p.use_qk_l2norm ? rsqrtf(kk + kNormEpsilon) : 1.0f;
  return {decay, BetaOf(p, b), qk * q * k, k, decay * q, decay * k};
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_GATES_CUH_
