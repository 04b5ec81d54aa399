// A state in memory: which slots a row reads and writes, and 16-byte accesses of it.
#ifndef JAX_GDN_CUDA_STATE_CUH_
#define JAX_GDN_CUDA_STATE_CUH_

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

// Sizes of an access of 16 bytes, `uint4`.
template <DType kState>
constexpr int kStateBytes = kState == DType::kFloat32 ? 4 : 2;
template <DType kState>
constexpr int kValues = 16 / kStateBytes<kState>;  // neighbours in one access

// Streaming accesses leave the caches early: they win while few blocks run, and lose
// where many do.
template <bool kStreaming>
__device__ __forceinline__ uint4 LoadState(const uint4* from) {
  uint4 bits;
  if constexpr (kStreaming) {
    LoadStreaming(from, bits);
  } else {
    Load(from, bits);
  }
  return bits;
}

template <bool kStreaming>
__device__ __forceinline__ void StoreState(uint4* to, uint4 bits) {
  if constexpr (kStreaming) {
    __stcs(to, bits);
  } else {
    *to = bits;
  }
}

template <DType kState>
__device__ __forceinline__ void UnpackState(uint4 bits, float* value) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kState == DType::kFloat32) {
      value[i] = __uint_as_float(word[i]);
    } else if constexpr (kState == DType::kBFloat16) {
      value[2 * i] = __uint_as_float(word[i] << 16);
      value[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      value[2 * i] = __half2float(__ushort_as_half(word[i] & 0xffffu));
      value[2 * i + 1] = __half2float(__ushort_as_half(word[i] >> 16));
    }
  }
}

template <DType kState>
__device__ __forceinline__ uint4 PackState(const float* value) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kState == DType::kFloat32) {
      word[i] = __float_as_uint(value[i]);
    } else {
      word[i] = RoundPair(value[2 * i], value[2 * i + 1], kState);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_STATE_CUH_
