// What every thread of a head needs besides the state: gates, norms, q.k.
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

// The inputs of one head that a lane loads: pairs j of q and k at elements
// 2 lane + 64 j, and the head's scalars.
template <int K>
struct HeadInputs {
  static constexpr int kPairs = K / 64;
  Raw<2> q[kPairs], k[kPairs];
  Raw<1> a, dt_bias, b;
  float A_log;
};

template <int K>
__device__ __forceinline__ HeadInputs<K> LoadHead(const DecodeParams& p, int64_t row,
                                                  int hv, int lane) {
  HeadInputs<K> in;
  const int64_t key_head = (row * p.H + unsigned(hv) / unsigned(p.group)) * K;
#pragma unroll
  for (int j = 0; j < in.kPairs; ++j) {
    in.q[j] = LoadRaw<2>(p.q, key_head + 64 * j + 2 * lane);
    in.k[j] = LoadRaw<2>(p.k, key_head + 64 * j + 2 * lane);
  }
  in.a = LoadRaw<1>(p.a, row * p.HV + hv);
  in.b = LoadRaw<1>(p.b, row * p.HV + hv);
  in.dt_bias = LoadRaw<1>(p.dt_bias, hv);
  in.A_log = p.A_log[hv];
  return in;
}

struct Head {
  float decay, beta;
  float qk;  // scale q.k, of the normalised vectors
};

// Every warp computes the head for itself, over all of K, so that the bits do not
// depend on the block's shape. The first warp leaves q (normalised and scaled) and
// k (normalised) in shared memory.
template <int K>
__device__ __forceinline__ Head ComputeHead(const DecodeParams& p,
                                            const HeadInputs<K>& in, int lane,
                                            bool first_warp, float* shared_q,
                                            float* shared_k) {
  constexpr int kPairs = HeadInputs<K>::kPairs;
  float q[kPairs][2], k[kPairs][2];
  float qq = 0.0f, kk = 0.0f, qk = 0.0f;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    Widen(in.q[j], p.q.dtype, q[j]);
    Widen(in.k[j], p.k.dtype, k[j]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      qq = fmaf(q[j][i], q[j][i], qq);
      kk = fmaf(k[j][i], k[j][i], kk);
      qk = fmaf(q[j][i], k[j][i], qk);
    }
  }
  const float q_norm = p.use_qk_l2norm ? rsqrtf(WarpSum(qq) + kNormEpsilon) : 1.0f;
  const float k_norm = p.use_qk_l2norm ? rsqrtf(WarpSum(kk) + kNormEpsilon) : 1.0f;
  const float q_factor = p.scale * q_norm;

  if (first_warp) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int pair = 32 * j + lane;
      reinterpret_cast<float2*>(shared_q)[pair] =
          make_float2(q[j][0] * q_factor, q[j][1] * q_factor);
      reinterpret_cast<float2*>(shared_k)[pair] =
          make_float2(k[j][0] * k_norm, k[j][1] * k_norm);
    }
  }

  float a, b, dt_bias;
  Widen(in.a, p.a.dtype, &a);
  Widen(in.b, p.b.dtype, &b);
  Widen(in.dt_bias, p.dt_bias.dtype, &dt_bias);
  const Gates gates = ComputeGates(in.A_log, a, dt_bias, b);
  return {gates.decay, gates.beta, WarpSum(qk) * q_factor * k_norm};
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
