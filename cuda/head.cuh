// What a block of states laid out [K, V] shares besides its state: what a token brings
// to a head, in shared memory.
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
};

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

// q and k as they came, as float32.
template <int K, bool kPerChannel>
struct HeadInputs {
  alignas(16) float q[K];
  alignas(16) float k[K];
  Gates gates;
};

// With the decays of all channels; and, where each has its own, q and k times them.
template <int K>
struct HeadInputs<K, true> : HeadInputs<K, false> {
  alignas(16) float decay[K];
  alignas(16) float decayed_q[K];
  alignas(16) float decayed_k[K];
};

// What the gates are made of: the part that is known before anything is summed.
struct GateInputs {
  float qq, kk, qk;  // a lane's part of the sums of squares and of q.k
  float A_log, decay_input, b;
};

// One warp brings token t of its head and works on all of K, so that the bits do not
// depend on the block's shape. Pairs j of a K-vector lie at elements 2 lane + 64 j.
template <int K, bool kStep>
__device__ __forceinline__ GateInputs StageToken(const DecodeParams& p, const Place& at,
                                                 int64_t t, int lane,
                                                 HeadInputs<K, !kStep>& to) {
  constexpr int kPairs = K / 64;
  const bool per_channel = !kStep && p.per_channel;
  const auto token = at.Token<kStep>(p, t), head = token * p.HV + at.hv;
  const auto key_head = token * p.H + KeyHead(p, at.hv);
  const int64_t key_pair = int64_t{key_head} * K + 2 * lane;

  // Every load before the first is looked at.
  Raw<2> raw_q[kPairs], raw_k[kPairs];
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    raw_q[j] = LoadRaw<2, kStep>(p.q, key_pair + 64 * j);
    raw_k[j] = LoadRaw<2, kStep>(p.k, key_pair + 64 * j);
  }
  GateInputs gates = {};
  Load(p.A_log + at.hv, gates.A_log);
  const Raw<1> b = LoadRaw<1, kStep>(p.b, head);
  Raw<1> a = {}, dt_bias = {};
  if (!per_channel) {
    a = LoadRaw<1, kStep>(p.a, head);
    dt_bias = LoadRaw<1>(p.dt_bias, at.hv);
  }
  __syncwarp();  // The compiler moves no access across.

#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int pair = 32 * j + lane;
    const float2 q = Widen(raw_q[j], TypeOf<kStep>(p.q));
    const float2 k = Widen(raw_k[j], TypeOf<kStep>(p.k));
    reinterpret_cast<float2*>(to.q)[pair] = q;
    reinterpret_cast<float2*>(to.k)[pair] = k;
    gates.qq = fmaf(q.y, q.y, fmaf(q.x, q.x, gates.qq));
    gates.kk = fmaf(k.y, k.y, fmaf(k.x, k.x, gates.kk));
    gates.qk = fmaf(q.y, k.y, fmaf(q.x, k.x, gates.qk));
  }
  gates.b = Widen(b, TypeOf<kStep>(p.b));
  gates.decay_input = Widen(a, TypeOf<kStep>(p.a)) + Widen(dt_bias, p.dt_bias.dtype);
  return gates;
}

// The same warp does.
template <bool kStep>
__device__ __forceinline__ Gates MakeGates(const DecodeParams& p, const GateInputs& x) {
  const bool per_channel = !kStep && p.per_channel;
  const float decay = per_channel ? 1.0f : Decay(x.A_log, x.decay_input);
  const Factors factor = NormFactors(p, WarpSum(x.qq), WarpSum(x.kk));
  return {decay,    Beta(x.b),        WarpSum(x.qk) * factor.q * factor.k,
          factor.k, decay * factor.q, decay * factor.k};
}

// Puts the decays beside, of each channel or common to all. The same warp does.
template <int K>
__device__ __forceinline__ void StageDecays(const DecodeParams& p, const Place& at,
                                            int64_t t, int lane, float A_log,
                                            float common_decay,
                                            HeadInputs<K, true>& to) {
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

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
