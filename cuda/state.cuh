// A state in memory: which slots a row reads and writes, and accesses of 16 or 8 bytes.
#ifndef JAX_GDN_CUDA_STATE_CUH_
#define JAX_GDN_CUDA_STATE_CUH_

#include "cuda/plan.h"
#include "cuda/vec.cuh"

namespace jax_gdn {

constexpr int32_t kNoSlot = -1;

__device__ __forceinline__ int32_t CheckSlot(const DecodeParams& p, int32_t slot) {
  return 0 <= slot && slot < p.N ? slot : kNoSlot;
}

// The slot that row n reads; kNoSlot makes the row padding.
__device__ __forceinline__ int32_t ReadSlot(const DecodeParams& p, unsigned n) {
  if (p.read_slots == nullptr) return n;
  int32_t slot;
  Load(p.read_slots + n, slot);
  return CheckSlot(p, slot);
}

// The slot for the state of row n, which reads `read`, after token t. To be checked
// when it is needed: here, that would wait for memory.
__device__ __forceinline__ int32_t WantedSlot(const DecodeParams& p, unsigned n,
                                              int64_t t, int32_t read) {
  int32_t slot = read;
  if (p.write_slots != nullptr) {
    Load(p.write_slots + (p.snapshots ? n * p.T + t : n), slot);
  }
  return slot;
}

// Index of a slot's head among all.
__device__ __forceinline__ int64_t HeadOfSlot(const DecodeParams& p, int32_t slot,
                                              unsigned hv) {
  return uint64_t{static_cast<uint32_t>(slot)} * static_cast<uint32_t>(p.HV) + hv;
}

template <DType kState>
constexpr int kStateBytes = kState == DType::kFloat32 ? 4 : 2;

// One access to the state.
template <int kBytes>
using Access = std::conditional_t<kBytes == 8, uint2, uint4>;

template <Caching kCaching, typename A>
__device__ __forceinline__ A LoadState(const A* from) {
  A bits;
  if constexpr (kCaching == Caching::kStreaming) {
    LoadStreaming(from, bits);
  } else {
    Load(from, bits);
  }
  return bits;
}

template <Caching kCaching, typename A>
__device__ __forceinline__ void StoreState(A* to, A bits) {
  if constexpr (kCaching == Caching::kPlain) {
    *to = bits;
  } else {
    __stcs(to, bits);
  }
}

// An access as words.
template <typename A>
union Words {
  A access;
  uint32_t word[sizeof(A) / 4];
};

template <DType kState, typename A>
__device__ __forceinline__ void UnpackState(A access, float* value) {
  const Words<A> bits = {access};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(A) / 4); ++i) {
    const uint32_t word = bits.word[i];
    if constexpr (kState == DType::kFloat32) {
      value[i] = __uint_as_float(word);
    } else if constexpr (kState == DType::kBFloat16) {
      value[2 * i] = __uint_as_float(word << 16);
      value[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      value[2 * i] = __half2float(__ushort_as_half(word & 0xffffu));
      value[2 * i + 1] = __half2float(__ushort_as_half(word >> 16));
    }
  }
}

template <DType kState, typename A>
__device__ __forceinline__ A PackState(const float* value) {
  Words<A> bits;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(A) / 4); ++i) {
    if constexpr (kState == DType::kFloat32) {
      bits.word[i] = __float_as_uint(value[i]);
    } else {
      bits.word[i] = RoundPair(value[2 * i], value[2 * i + 1], kState);
    }
  }
  return bits.access;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_STATE_CUH_
