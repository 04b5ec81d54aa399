// What a token brings to a head besides v, for blocks of states laid out [K, V].
#ifndef JAX_GDN_CUDA_HEAD_CUH_
#define JAX_GDN_CUDA_HEAD_CUH_

#include "cuda/gates.cuh"
#include "cuda/vec.cuh"

namespace jax_gdn {

// Where a block's head lies in the operands.
struct Place {
  unsigned n;  // sequence
  unsigned hv;
  int first_column;  // of v and out

  // Index of token t of the sequence among all; of a "step" kernel, whose T is 1,
  // B HV < 2^32 keeps it and what follows from it in 32 bits.
  template <bool kStep>
  __device__ __forceinline__ auto Token(const DecodeParams& p, int64_t t) const {
    if constexpr (kStep) {
      return n;
    } else {
      return n * p.T + t;
    }
  }

  // Index of the first element of its q and k.
  template <int K, bool kStep>
  __device__ __forceinline__ int64_t KeyRow(const DecodeParams& p, int64_t t) const {
    const auto key_head = Token<kStep>(p, t) * p.H + KeyHead(p, hv);
    return int64_t{key_head} * K;
  }
};

// What the gates are made of: the part that is known before anything is summed.
struct GateInputs {
  float qq, kk, qk;  // a lane's part of the sums of squares and of q.k
  float A_log, decay_input, b;
};

// A lane's part of what a token brings to its head, on its way. Pairs j of a K-vector
// lie at elements 2 lane + 64 j.
template <int K>
struct RawHead {
  Raw<2> q[K / 64], k[K / 64];
  Raw<1> a, dt_bias, b;
  float A_log;
};

template <int K, bool kStep>
__device__ __forceinline__ RawHead<K> LoadHead(const DecodeParams& p, const Place& at,
                                               int64_t t, int lane) {
  const auto token = at.Token<kStep>(p, t), head = token * p.HV + at.hv;
  const int64_t pair = at.KeyRow<K, kStep>(p, t) + 2 * lane;
  RawHead<K> raw = {};
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    raw.q[j] = LoadRaw<2, kStep>(p.q, pair + 64 * j);
    raw.k[j] = LoadRaw<2, kStep>(p.k, pair + 64 * j);
  }
  Load(p.A_log + at.hv, raw.A_log);
  raw.b = LoadRaw<1, kStep>(p.b, head);
  if (kStep || !p.per_channel) {
    raw.a = LoadRaw<1, kStep>(p.a, head);
    raw.dt_bias = LoadRaw<1>(p.dt_bias, at.hv);
  }
  return raw;
}

// One warp works on all of K, so that the bits do not depend on the block's shape.
// Hands pair j of q and of k to `each(j, q, k)`.
template <int K, bool kStep, typename F>
__device__ __forceinline__ GateInputs WidenHead(const DecodeParams& p,
                                                const RawHead<K>& raw, F each) {
  GateInputs gates = {};
#pragma unroll
  for (int j = 0; j < K / 64; ++j) {
    const float2 q = Widen(raw.q[j], TypeOf<kStep>(p.q));
    const float2 k = Widen(raw.k[j], TypeOf<kStep>(p.k));
    each(j, q, k);
    gates.qq = fmaf(q.y, q.y, fmaf(q.x, q.x, gates.qq));
    gates.kk = fmaf(k.y, k.y, fmaf(k.x, k.x, gates.kk));
    gates.qk = fmaf(q.y, k.y, fmaf(q.x, k.x, gates.qk));
  }
  gates.A_log = raw.A_log;
  gates.b = Widen(raw.b, TypeOf<kStep>(p.b));
  gates.decay_input =
      Widen(raw.a, TypeOf<kStep>(p.a)) + Widen(raw.dt_bias, p.dt_bias.dtype);
  return gates;
}

// The same warp does.
template <bool kStep>
__device__ __forceinline__ Gates MakeGates(const DecodeParams& p, const GateInputs& x) {
  const bool per_channel = !kStep && p.per_channel;
  const float qq = WarpSum(x.qq), kk = WarpSum(x.kk), qk = WarpSum(x.qk);
  const float decay = per_channel ? 1.0f : Decay(x.A_log, x.decay_input);
  return MakeGates(p, decay, x.b, qq, kk, qk);
}

// What a token brings to a head, staged in shared memory as float32: q and k as they
// came.
template <int K, bool kStep>
struct HeadInputs {
  alignas(16) float q[K];
  alignas(16) float k[K];
  Gates gates;
};

// With the decays of all channels; and, where each has its own, q and k times them.
template <int K>
struct HeadInputs<K, false> : HeadInputs<K, true> {
  alignas(16) float decay[K];
  alignas(16) float decayed_q[K];
  alignas(16) float decayed_k[K];
};

// Puts the decays beside, of each channel or common to all. The same warp does.
template <int K>
__device__ __forceinline__ void StageDecays(const DecodeParams& p, const Place& at,
                                            int64_t t, int lane, float A_log,
                                            float common_decay,
                                            HeadInputs<K, false>& to) {
  const int64_t head = at.Token<false>(p, t) * p.HV + at.hv;
#pragma unroll 1  // Why: in flight at once, they would not fit beside the state.
  for (int pair = lane; pair < K / 2; pair += 32) {
    float2& decay = reinterpret_cast<float2*>(to.decay)[pair];
    if (!p.per_channel) {
      decay = {common_decay, common_decay};
      continue;
    }
    const float2 a = Widen(LoadRaw<2>(p.a, head * K + 2 * pair), p.a.dtype);
    const float2 bias =
        Widen(LoadRaw<2>(p.dt_bias, int64_t{at.hv} * K + 2 * pair), p.dt_bias.dtype);
    const float2 d = {Decay(A_log, a.x + bias.x), Decay(A_log, a.y + bias.y)};
    const float2 q = reinterpret_cast<const float2*>(to.q)[pair];
    const float2 k = reinterpret_cast<const float2*>(to.k)[pair];
    decay = d;
    reinterpret_cast<float2*>(to.decayed_q)[pair] = {q.x * d.x, q.y * d.y};
    reinterpret_cast<float2*>(to.decayed_k)[pair] = {k.x * d.x, k.y * d.y};
  }
}

// One warp stages q and k of a token.
template <int K, bool kStep>
__device__ __forceinline__ GateInputs StageHead(const DecodeParams& p,
                                                const RawHead<K>& raw, int lane,
                                                HeadInputs<K, kStep>& to) {
  return WidenHead<K, kStep>(p, raw, [&](int j, const float2& q, const float2& k) {
    reinterpret_cast<float2*>(to.q)[32 * j + lane] = q;
    reinterpret_cast<float2*>(to.k)[32 * j + lane] = k;
  });
}

// One warp stages all of token t.
template <int K>
__device__ __forceinline__ void StageToken(const DecodeParams& p, const Place& at,
                                           int64_t t, int lane, const RawHead<K>& raw,
                                           HeadInputs<K, false>& to) {
  const GateInputs inputs = StageHead<K, false>(p, raw, lane, to);
  const Gates gates = MakeGates<false>(p, inputs);
  StageDecays<K>(p, at, t, lane, inputs.A_log, gates.decay, to);
  if (lane == 0) to.gates = gates;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
