// What a token brings to a head besides v, for warps of states laid out [V, K].
#ifndef JAX_GDN_CUDA_KEYS_CUH_
#define JAX_GDN_CUDA_KEYS_CUH_

#include "cuda/rows.cuh"

namespace jax_gdn {

// q and k of one token, on their way.
template <typename T>
struct RawKeys {
  RawVector<T> q, k;
};

template <typename T>
__device__ __forceinline__ RawKeys<T> LoadKeys(const DecodeParams& p, int64_t key_head,
                                               int lane) {
  __syncwarp();  // The compiler moves no access across.
  const RawKeys<T> raw = {LoadVector<T, T::kStep>(p.q, key_head * T::K, lane),
                          LoadVector<T, T::kStep>(p.k, key_head * T::K, lane)};
  __syncwarp();
  return raw;
}

// What its gates are made of besides.
struct RawGates {
  float A_log;
  Raw<1> a, dt_bias, b;
};

template <typename T>
__device__ __forceinline__ RawGates LoadGates(const DecodeParams& p, int64_t head,
                                              unsigned hv) {
  RawGates x = {};
  Load(p.A_log + hv, x.A_log);
  x.b = LoadRaw<1, T::kStep>(p.b, head);
  if (T::kStep || !p.per_channel) {
    x.a = LoadRaw<1, T::kStep>(p.a, head);
    x.dt_bias = LoadRaw<1>(p.dt_bias, hv);
  }
  __syncwarp();
  return x;
}

template <typename T>
__device__ __forceinline__ Gates MakeGates(const DecodeParams& p, const RawGates& x,
                                           const Vector<T>& q, const Vector<T>& k) {
  const float qq = WarpSum<T::kLanes>(DotOwn<T>(q, q.x));
  const float kk = WarpSum<T::kLanes>(DotOwn<T>(k, k.x));
  const float qk = WarpSum<T::kLanes>(DotOwn<T>(q, k.x));
  const float decay_input =
      Widen(x.a, TypeOf<T::kStep>(p.a)) + Widen(x.dt_bias, p.dt_bias.dtype);
  const float decay = !T::kStep && p.per_channel ? 1.0f : Decay(x.A_log, decay_input);
  return MakeGates(p, decay, Widen(x.b, TypeOf<T::kStep>(p.b)), qq, kk, qk);
}

// exp(g) of a lane's channels, where each has its own.
template <typename T>
__device__ __forceinline__ Vector<T> LoadDecay(const DecodeParams& p, int64_t head,
                                               unsigned hv, float A_log, int lane) {
  const auto raw_a = LoadVector<T, false>(p.a, head * T::K, lane);
  const auto raw_bias = LoadVector<T, false>(p.dt_bias, int64_t{hv} * T::K, lane);
  Vector<T> decay = Widen<T>(raw_a, p.a.dtype);
  const Vector<T> bias = Widen<T>(raw_bias, p.dt_bias.dtype);
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) decay.x[i] = Decay(A_log, decay.x[i] + bias.x[i]);
  return decay;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_KEYS_CUH_
