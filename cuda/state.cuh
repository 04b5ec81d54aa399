// A state in memory: which slots a row reads and writes, and 16-byte accesses of it.
#ifndef JAX_GDN_CUDA_STATE_CUH_
#define JAX_GDN_CUDA_STATE_CUH_

#include "cuda/vec.cuh"

namespace jax_gdn {

constexpr int64_t kNoSlot = -1;

__device__ __forceinline__ int64_t SlotAt(const DecodeParams& p, const int32_t* slots,
                                          int64_t index) {
  int32_t slot;
  Load(slots + index, slot);
  return 0 <= slot && slot < p.N ? slot : kNoSlot;
}

// The slot that row n reads; kNoSlot makes the row padding.
__device__ __forceinline__ int64_t ReadSlot(const DecodeParams& p, int64_t n) {
  return p.read_slots == nullptr ? n : SlotAt(p, p.read_slots, n);
}

// The slot that row n, which reads `read`, writes after token t; kNoSlot: none.
__device__ __forceinline__ int64_t WriteSlot(const DecodeParams& p, int64_t n,
                                             int64_t t, int64_t read) {
  if (p.snapshots) return SlotAt(p, p.write_slots, n * p.T + t);
  if (t + 1 < p.T) return kNoSlot;
  return p.write_slots == nullptr ? read : SlotAt(p, p.write_slots, n);
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
