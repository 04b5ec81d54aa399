// Loads and stores whose storage type is known at run time, and the state's
// 16-byte accesses.
#ifndef JAX_GDN_CUDA_VEC_CUH_
#define JAX_GDN_CUDA_VEC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ffi/decode_params.h"

namespace jax_gdn {

// N neighbouring values as they are stored. Loading and widening are apart so
// that a kernel can issue all its loads before it waits for any.
template <int N>
struct Raw {
  uint32_t word[N];  // float32: one a word; 16-bit types: two a word
};

template <int Words>
__device__ __forceinline__ void LoadWords(const void* from, uint32_t* word) {
  static_assert(Words == 1 || Words == 2 || Words == 4);
  if constexpr (Words == 1) {
    word[0] = *static_cast<const uint32_t*>(from);
  } else if constexpr (Words == 2) {
    const uint2 x = *static_cast<const uint2*>(from);
    word[0] = x.x, word[1] = x.y;
  } else {
    const uint4 x = *static_cast<const uint4*>(from);
    word[0] = x.x, word[1] = x.y, word[2] = x.z, word[3] = x.w;
  }
}

// Reads elements [index, index + N); index is a multiple of N.
template <int N>
__device__ __forceinline__ Raw<N> LoadRaw(const Input& x, int64_t index) {
  Raw<N> raw = {};
  if (x.dtype == DType::kFloat32) {
    LoadWords<N>(static_cast<const float*>(x.data) + index, raw.word);
  } else if constexpr (N == 1) {
    raw.word[0] = static_cast<const uint16_t*>(x.data)[index];
  } else {
    LoadWords<N / 2>(static_cast<const uint16_t*>(x.data) + index, raw.word);
  }
  return raw;
}

template <int N>
__device__ __forceinline__ void Widen(const Raw<N>& raw, DType dtype, float* value) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const uint16_t half = raw.word[i / 2] >> (16 * (i % 2));
    if (dtype == DType::kFloat32) {
      value[i] = __uint_as_float(raw.word[i]);
    } else if (dtype == DType::kBFloat16) {
      value[i] = __uint_as_float(static_cast<uint32_t>(half) << 16);
    } else {
      value[i] = __half2float(__ushort_as_half(half));
    }
  }
}

// Rounds to nearest even, once, and writes elements [index, index + 4).
__device__ __forceinline__ void Store4(const Output& x, int64_t index,
                                       const float (&value)[4]) {
  if (x.dtype == DType::kFloat32) {
    reinterpret_cast<float4*>(x.data)[index / 4] =
        make_float4(value[0], value[1], value[2], value[3]);
    return;
  }
  uint16_t half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    half[i] = x.dtype == DType::kBFloat16
                  ? __bfloat16_as_ushort(__float2bfloat16_rn(value[i]))
                  : __half_as_ushort(__float2half_rn(value[i]));
  }
  reinterpret_cast<ushort4*>(x.data)[index / 4] =
      make_ushort4(half[0], half[1], half[2], half[3]);
}

// Four neighbouring columns of one row of a state. Streaming accesses leave the
// caches early: they win while few blocks run, and lose where many do.
template <bool kStreaming>
__device__ __forceinline__ float4 LoadState(const float4* from) {
  if constexpr (kStreaming) return __ldcs(from);
  return *from;
}

template <bool kStreaming>
__device__ __forceinline__ void StoreState(float4* to, float4 value) {
  if constexpr (kStreaming) {
    __stcs(to, value);
  } else {
    *to = value;
  }
}

// Hides a value's origin from the compiler, which then computes what follows from
// it again instead of keeping it in registers.
__device__ __forceinline__ int64_t Recompute(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_VEC_CUH_
