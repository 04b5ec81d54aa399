// What a block of states laid out [K, V] shares besides its state: the inputs of one
// token of one head, in shared memory, and what follows from them.
#ifndef JAX_GDN_CUDA_HEAD_CUH_
#define JAX_GDN_CUDA_HEAD_CUH_

#include "cuda/gates.cuh"
#include "cuda/vec.cuh"

namespace jax_gdn {

// As float32, but otherwise as they came. What normalises q and k is a factor on sums
// over K (in `Head`), so that no row of the state waits for a norm.
template <int K, int VT>
struct HeadInputs {
  alignas(16) float q[K];
  alignas(16) float k[K];
  alignas(16) float v[VT];  // at PlaceOf
  float A_log, a, dt_bias, b;
  // Only with one decay a key channel: the decays, and q and k times them.
  alignas(16) float decay[K];
  alignas(16) float decayed_q[K];
  alignas(16) float decayed_k[K];
};

// The same on its way from memory, spread over a warp: pairs j of a K-vector at
// elements 2 lane + 64 j, four v a lane, scalars in every lane.
template <int K>
struct RawInputs {
  float A_log;
  Raw<1> a, dt_bias, b;
  Raw<4> v;
  Raw<2> q[K / 64], k[K / 64];
  Raw<2> channel_a[K / 64], channel_bias[K / 64];
};

// Where a block's head lies in the operands.
struct Place {
  int64_t n;  // sequence
  unsigned hv;
  int first_column;  // of v and out
};

// Where four of VT columns lie in shared memory, when a thread owns C: the first four
// of all threads, then the second, so that neighbouring lanes meet no bank twice.
template <int VT, int C>
__device__ __forceinline__ int PlaceOf(int column) {
  return column % C / 4 * (4 * VT / C) + column / C * 4;
}

// The columns that lie at place 4 i.
template <int VT, int C>
__device__ __forceinline__ int ColumnAt(int i) {
  return i % (VT / C) * C + i / (VT / C) * 4;
}

// Issues the loads of token t. One warp does.
template <int C, int K, int VT>
__device__ __forceinline__ void LoadInputs(const DecodeParams& p, const Place& at,
                                           int64_t t, int lane, RawInputs<K>& raw) {
  const int64_t token = at.n * p.T + t, head = token * p.HV + at.hv;
  const int64_t key_head = token * p.H + KeyHead(p, at.hv);
  Load(p.A_log + at.hv, raw.A_log);
  raw.b = LoadRaw<1>(p.b, head);
  if (!p.per_channel) {
    raw.a = LoadRaw<1>(p.a, head);
    raw.dt_bias = LoadRaw<1>(p.dt_bias, at.hv);
  }
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    const int channel = 64 * j + 2 * lane;
    raw.q[j] = LoadRaw<2>(p.q, key_head * K + channel);
    raw.k[j] = LoadRaw<2>(p.k, key_head * K + channel);
    if (p.per_channel) {
      raw.channel_a[j] = LoadRaw<2>(p.a, head * K + channel);
      raw.channel_bias[j] = LoadRaw<2>(p.dt_bias, int64_t{at.hv} * K + channel);
    }
  }
  if (lane < VT / 4) {
    const int column = at.first_column + ColumnAt<VT, C>(lane);
    raw.v = LoadRaw<4>(p.v, head * p.V + column);
  }
}

// Puts them into shared memory once they are there. The same warp does.
template <int K, int VT>
__device__ __forceinline__ void StageInputs(const DecodeParams& p, int lane,
                                            const RawInputs<K>& raw,
                                            HeadInputs<K, VT>& to) {
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    const int pair = 32 * j + lane;
    const float2 q = Widen(raw.q[j], p.q.dtype), k = Widen(raw.k[j], p.k.dtype);
    reinterpret_cast<float2*>(to.q)[pair] = q;
    reinterpret_cast<float2*>(to.k)[pair] = k;
    if (p.per_channel) {
      const float2 a = Widen(raw.channel_a[j], p.a.dtype);
      const float2 bias = Widen(raw.channel_bias[j], p.dt_bias.dtype);
      const float2 d = {Decay(raw.A_log, a.x + bias.x), Decay(raw.A_log, a.y + bias.y)};
      reinterpret_cast<float2*>(to.decay)[pair] = d;
      reinterpret_cast<float2*>(to.decayed_q)[pair] = {q.x * d.x, q.y * d.y};
      reinterpret_cast<float2*>(to.decayed_k)[pair] = {k.x * d.x, k.y * d.y};
    }
  }
  if (lane < VT / 4) reinterpret_cast<float4*>(to.v)[lane] = Widen(raw.v, p.v.dtype);
  if (lane == 0) {
    to.A_log = raw.A_log;
    to.b = Widen(raw.b, p.b.dtype);
    if (!p.per_channel) {
      to.a = Widen(raw.a, p.a.dtype);
      to.dt_bias = Widen(raw.dt_bias, p.dt_bias.dtype);
    }
  }
}

struct Head {
  float decay;     // exp(g), common to the head; 1 where each channel has its own
  float beta;      // write strength
  Factors factor;  // that normalise q (and scale it) and k
  float qk;        // q.k of the vectors so multiplied
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
  const Factors factor = NormFactors(p, WarpSum(qq), WarpSum(kk));
  const float decay = p.per_channel ? 1.0f : Decay(in.A_log, in.a + in.dt_bias);
  return {decay, Beta(in.b), factor, WarpSum(qk) * factor.q * factor.k};
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
