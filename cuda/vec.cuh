// Loads and stores whose storage type is known at run time.
#ifndef JAX_GDN_CUDA_VEC_CUH_
#define JAX_GDN_CUDA_VEC_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/decode_params.h"
#include "cuda/ptx.cuh"

namespace jax_gdn {

// N neighbouring values as they are stored, in two halves of 2 N bytes. Of float32,
// each half holds N / 2 values (for N = 1: bits); of a 16-bit type, both hold all N.
// So a load is the same two instructions whatever the type is.
template <int N>
struct Raw {
  std::conditional_t<N == 1, uint16_t, std::conditional_t<N == 2, uint32_t, uint2>> low,
      high;
};

// Reads elements [index, index + N); index is a multiple of N. Where the type is known
// to have 16 bits when compiled, the low half is all there is.
template <int N, bool kNarrow = false>
__device__ __forceinline__ Raw<N> LoadRaw(const Input& x, int64_t index) {
  using Half = decltype(Raw<N>::low);
  static_assert(sizeof(Half) == 2 * N);
  if constexpr (kNarrow) {
    Raw<N> raw = {};
    Load(static_cast<const char*>(x.data) + (index << 1), raw.low);
    return raw;
  }
  const bool wide = x.dtype == DType::kFloat32;
  const auto* low = static_cast<const char*>(x.data) + (index << (wide ? 2 : 1));
  const char* high = low + (wide ? sizeof(Half) : 0);
  Raw<N> raw;
  Load(low, raw.low);
  Load(high, raw.high);
  return raw;
}

// One value out of two words, a 16-bit type's bits in the upper half. What differs
// between types is data, not control, so no load waits until the type is looked at.
__device__ __forceinline__ float WidenBits(uint32_t x, uint32_t y, DType dtype,
                                           uint32_t wide_pick, uint32_t half_pick) {
  const bool wide = dtype == DType::kFloat32;
  const uint32_t bits = __byte_perm(x, y, wide ? wide_pick : half_pick);
  const float narrow = __half2float(__ushort_as_half(bits >> 16));
  return dtype == DType::kFloat16
             ? narrow
             : __uint_as_float(bits & (wide ? 0xffffffffu : 0xffff0000u));
}

// Selectors of `__byte_perm(x, y, .)`.
constexpr uint32_t kPickX = 0x3210, kPickY = 0x7654;  // a word
constexpr uint32_t kPickLows = 0x5410;                // y's low half above x's
constexpr uint32_t kRaiseX = 0x1010;                  // x's low half, to the upper

__device__ __forceinline__ float Widen(Raw<1> raw, DType dtype) {
  return WidenBits(raw.low, raw.high, dtype, kPickLows, kRaiseX);
}

__device__ __forceinline__ float2 Widen(Raw<2> raw, DType dtype) {
  return {WidenBits(raw.low, raw.high, dtype, kPickX, kRaiseX),
          WidenBits(raw.low, raw.high, dtype, kPickY, kPickX)};
}

__device__ __forceinline__ float4 Widen(Raw<4> raw, DType dtype) {
  return {WidenBits(raw.low.x, raw.low.y, dtype, kPickX, kRaiseX),
          WidenBits(raw.low.x, raw.low.y, dtype, kPickY, kPickX),
          WidenBits(raw.low.y, raw.high.x, dtype, kPickY, kRaiseX),
          WidenBits(raw.low.y, raw.high.y, dtype, kPickY, kPickX)};
}

// Two values rounded to nearest even, as the 16-bit type `dtype` stores them.
__device__ __forceinline__ uint32_t RoundPair(float x, float y, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

// One, two or four values, one access.
template <int N>
using Floats =
    std::conditional_t<N == 1, float, std::conditional_t<N == 2, float2, float4>>;

// Writes elements [index, index + N), each rounded once; index is a multiple of N.
template <int N>
__device__ __forceinline__ void Store(const Output& x, int64_t index,
                                      const Floats<N>& values) {
  if (x.dtype == DType::kFloat32) {
    reinterpret_cast<Floats<N>*>(x.data)[index / N] = values;
    return;
  }
  decltype(Raw<N>::low) rounded;
  if constexpr (N == 1) {
    rounded = static_cast<uint16_t>(RoundPair(values, 0.0f, x.dtype));
  } else {
    const auto* value = reinterpret_cast<const float*>(&values);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      reinterpret_cast<uint32_t*>(&rounded)[i] =
          RoundPair(value[2 * i], value[2 * i + 1], x.dtype);
    }
  }
  reinterpret_cast<decltype(Raw<N>::low)*>(x.data)[index / N] = rounded;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_VEC_CUH_
