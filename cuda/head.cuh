// What a head needs besides its state: gates, norms, q.k.
#ifndef JAX_GDN_CUDA_HEAD_CUH_
#define JAX_GDN_CUDA_HEAD_CUH_

#include "cuda/vec.cuh"

namespace jax_gdn {

// Sums over a warp as a butterfly: every lane gets the same bits.
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// softplus(x) = log(1 + exp(x)), exact to rounding for every x.
__device__ __forceinline__ float Softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

struct Gates {
  float decay;  // exp(g), in [0, 1]
  float beta;   // write strength, in [0, 1]
};

__device__ __forceinline__ Gates ComputeGates(float A_log, float a, float dt_bias,
                                              float b) {
  const float g = -expf(A_log) * Softplus(a + dt_bias);
  return {expf(g), __fdividef(1.0f, 1.0f + expf(-b))};
}

// hv / group, exact for hv < 2^16: the error of the rounded-up inverse is below
// hv / 2^32 < 1 / group. Group 1 has the inverse 2^32, which wraps to 0.
__device__ __forceinline__ unsigned KeyHead(const DecodeParams& p, unsigned hv) {
  return p.group_inverse == 0 ? hv : __umulhi(hv, p.group_inverse);
}

// The inputs of one head, in shared memory, as float32 but otherwise as they came.
// What normalises q and k is a factor on sums over K (in `Head`), so that no row of
// the state waits for a norm.
template <int K, int VT>
struct HeadInputs {
  alignas(16) float q[K];
  alignas(16) float k[K];
  alignas(16) float v[VT];
  float A_log, a, dt_bias, b;
};

// One warp brings them. All loads are issued before the first is looked at.
template <int K, int VT>
__device__ __forceinline__ void StageHead(const DecodeParams& p, int64_t row,
                                          unsigned hv, int first_column, int lane,
                                          HeadInputs<K, VT>& to) {
  const int64_t head = row * p.HV + hv;
  const int64_t key_head = row * p.H + KeyHead(p, hv);
  float A_log;
  Load(p.A_log + hv, A_log);
  const Raw<1> a = LoadRaw<1>(p.a, head), b = LoadRaw<1>(p.b, head);
  const Raw<1> dt_bias = LoadRaw<1>(p.dt_bias, hv);
  Raw<2> q[K / 64], k[K / 64];
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    q[j] = LoadRaw<2>(p.q, key_head * K + 64 * j + 2 * lane);
    k[j] = LoadRaw<2>(p.k, key_head * K + 64 * j + 2 * lane);
  }
  Raw<4> v = {};
  if (lane < VT / 4) v = LoadRaw<4>(p.v, head * p.V + first_column + 4 * lane);

#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    reinterpret_cast<float2*>(to.q)[32 * j + lane] = Widen(q[j], p.q.dtype);
    reinterpret_cast<float2*>(to.k)[32 * j + lane] = Widen(k[j], p.k.dtype);
  }
  if (lane < VT / 4) reinterpret_cast<float4*>(to.v)[lane] = Widen(v, p.v.dtype);
  if (lane == 0) {
    to.A_log = A_log;
    to.a = Widen(a, p.a.dtype);
    to.dt_bias = Widen(dt_bias, p.dt_bias.dtype);
    to.b = Widen(b, p.b.dtype);
  }
}

struct Head {
  float decay, beta;
  float q_factor, k_factor;  // that normalise q (and scale it) and k
  float qk;                  // q.k of the vectors so multiplied
};

// Every warp computes the head for itself, over all of K, so that the bits do not
// depend on the block's shape.
template <int K, int VT>
__device__ __forceinline__ Head ComputeHead(const DecodeParams& p,
                                            const HeadInputs<K, VT>& in, int lane) {
  float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    const float2 q = reinterpret_cast<const float2*>(in.q)[32 * j + lane];
    const float2 k = reinterpret_cast<const float2*>(in.k)[32 * j + lane];
    qq = fmaf(q.y, q.y, fmaf(q.x, q.x, qq));
    kk = fmaf(k.y, k.y, fmaf(k.x, k.x, kk));
    qk = fmaf(q.y, k.y, fmaf(q.x, k.x, qk));
  }
  const float q_norm = rsqrtf(WarpSum(qq) + kNormEpsilon);
  const float k_norm = rsqrtf(WarpSum(kk) + kNormEpsilon);
  const float q_factor = p.use_qk_l2norm ? p.scale * q_norm : p.scale;
  const float k_factor = p.use_qk_l2norm ? k_norm : 1.0f;
  const Gates gates = ComputeGates(in.A_log, in.a, in.dt_bias, in.b);
  return {gates.decay, gates.beta, q_factor, k_factor,
          WarpSum(qk) * q_factor * k_factor};
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
