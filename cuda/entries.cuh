// What a thread needs of q, k and the decays, for a K x VT tile of a state: entries of
// the rows that it owns, a quad of rows at a time.
#ifndef JAX_GDN_CUDA_ENTRIES_CUH_
#define JAX_GDN_CUDA_ENTRIES_CUH_

#include "cuda/tile.cuh"

namespace jax_gdn {

// Entries of q and k for the rows that a thread owns, in shared memory, and the decays.
template <typename T>
struct StagedEntries {
  const HeadInputs<T::K, T::kStep>& in;
  const bool per_channel;
  const Thread<T>& thread;

  __device__ __forceinline__ float4 At(const float* x, int c, int j) const {
    return *reinterpret_cast<const float4*>(x + thread.Quad(c, j));
  }
  // Of quad j of the thread's class c; of q and k times the decay where each channel
  // has its own.
  __device__ __forceinline__ float4 K(int c, int j) const { return At(in.k, c, j); }
  __device__ __forceinline__ float4 DecayedQ(int c, int j) const {
    if constexpr (!T::kStep) {
      if (per_channel) return At(in.decayed_q, c, j);
    }
    return At(in.q, c, j);
  }
  __device__ __forceinline__ float4 DecayedK(int c, int j) const {
    if constexpr (!T::kStep) {
      if (per_channel) return At(in.decayed_k, c, j);
    }
    return At(in.k, c, j);
  }
  __device__ __forceinline__ float4 Decay(int c, int j, float common) const {
    if constexpr (!T::kStep) return At(in.decay, c, j);
    return {common, common, common, common};
  }
};

// The same in registers, as bfloat16.
template <typename T>
struct OwnEntries {
  static constexpr int kWords = 2 * T::kOwnClasses;  // of neighbouring classes' quads
  using Access = typename AccessOf<4 * kWords>::Type;
  Words<Access> q[T::kQuads], k[T::kQuads];

  __device__ __forceinline__ void LoadFrom(const DecodeParams& p, int64_t key_row,
                                           const Thread<T>& thread) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
      const int64_t first = key_row + thread.Quad(0, j);
      Load(static_cast<const uint16_t*>(p.q.data) + first, q[j].access);
      Load(static_cast<const uint16_t*>(p.k.data) + first, k[j].access);
    }
  }
  __device__ __forceinline__ static float4 Widened(const Words<Access>& x, int c) {
    const uint32_t low = x.word[2 * c], high = x.word[2 * c + 1];
    return {__uint_as_float(low << 16), __uint_as_float(low & 0xffff0000u),
            __uint_as_float(high << 16), __uint_as_float(high & 0xffff0000u)};
  }
  __device__ __forceinline__ float4 K(int c, int j) const { return Widened(k[j], c); }
  __device__ __forceinline__ float4 DecayedQ(int c, int j) const {
    return Widened(q[j], c);
  }
  __device__ __forceinline__ float4 DecayedK(int c, int j) const { return K(c, j); }
  __device__ __forceinline__ float4 Decay(int, int, float common) const {
    return {common, common, common, common};
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_ENTRIES_CUH_
