// Vectors of N float32 lanes, and storage types to and from them.
//
// Written with the compiler's vector types, so that one source serves every
// instruction set; N = 1 are plain numbers. In an unnamed namespace because files
// compiled for different instruction sets include it: nothing here may be shared
// between them by the linker.
#ifndef JAX_GDN_CPU_LANES_H_
#define JAX_GDN_CPU_LANES_H_

#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "common/decode_params.h"

namespace jax_gdn {
namespace {

template <int N>
struct Lanes {
  typedef float F __attribute__((vector_size(4 * N)));
  typedef uint32_t U __attribute__((vector_size(4 * N)));
  typedef uint16_t H __attribute__((vector_size(2 * N)));
};
template <>
struct Lanes<1> {
  typedef float F;
  typedef uint32_t U;
  typedef uint16_t H;
};

template <typename To, int N, typename From>
inline To Convert(From x) {
  if constexpr (N == 1) {
    return static_cast<To>(x);
  } else {
    return __builtin_convertvector(x, To);
  }
}

template <typename To, typename From>
inline To Bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &x, sizeof to);
  return to;
}

template <typename T>
inline T Read(const void* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

template <int N>
inline typename Lanes<N>::F Fill(float x) {
  return x - typename Lanes<N>::F{};
}

constexpr int64_t SizeOf(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// Elements [index, index + N), widened exactly.
template <DType kType, int N>
inline typename Lanes<N>::F Load(const void* data, int64_t index) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  using H = typename Lanes<N>::H;
  const char* from = static_cast<const char*>(data) + SizeOf(kType) * index;
  if constexpr (kType == DType::kFloat32) {
    return Read<F>(from);
  } else {
#ifdef __AVX512BW__
    if constexpr (kType == DType::kBFloat16 && N == 16) {
      // To the upper half of each lane in one step; the mask clears the lower.
      constexpr U kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const __m512i halves = _mm512_castsi256_si512(Read<__m256i>(from));
      return Bits<F>(_mm512_maskz_permutexvar_epi16(
          0xaaaaaaaau, Bits<__m512i>(kLane << 16), halves));
    }
#endif
    // Instructions that know float16's subnormals, whatever a thread does with
    // float32's.
#ifdef __AVX512F__
    if constexpr (kType == DType::kFloat16 && N == 16) {
      return Bits<F>(_mm512_cvtph_ps(Read<__m256i>(from)));
    }
#endif
#ifdef __F16C__
    if constexpr (kType == DType::kFloat16 && N == 8) {
      return Bits<F>(_mm256_cvtph_ps(Read<__m128i>(from)));
    }
#endif
    const U half = Convert<U, N>(Read<H>(from));
    if constexpr (kType == DType::kBFloat16) return Bits<F>(half << 16);
    const U sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    // XLA's threads treat float32 subnormals as zero, so none may occur on the way:
    // float16's are whole numbers of 2^-24.
    const U subnormal = Bits<U>(Convert<F, N>(magnitude) * 0x1p-24f);
    const U normal = (magnitude << 13) + 0x38000000u;   // exponents 2^112 apart
    const U special = (magnitude << 13) + 0x70000000u;  // infinity and NaN: all ones
    const U large = magnitude >= 0x7c00u ? special : normal;
    return Bits<F>(sign | (magnitude < 0x0400u ? subnormal : large));
  }
}

// Rounds to nearest even, once, into elements [index, index + N).
template <DType kType, int N>
inline void Store(void* data, int64_t index, typename Lanes<N>::F value) {
  using F = typename Lanes<N>::F;
  using U = typename Lanes<N>::U;
  using H = typename Lanes<N>::H;
  char* to = static_cast<char*>(data) + SizeOf(kType) * index;
  if constexpr (kType == DType::kFloat32) {
    __builtin_memcpy(to, &value, sizeof value);
  } else {
#ifdef __AVX512BF16__
    if constexpr (kType == DType::kBFloat16 && N == 16) {
      // As below, but for subnormals, which become zero.
      const auto rounded = _mm512_cvtneps_pbh(value);
      __builtin_memcpy(to, &rounded, sizeof rounded);
      return;
    }
#endif
#ifdef __AVX512F__
    if constexpr (kType == DType::kFloat16 && N == 16) {
      const __m256i rounded = _mm512_cvtps_ph(
          Bits<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      __builtin_memcpy(to, &rounded, sizeof rounded);
      return;
    }
#endif
#ifdef __F16C__
    if constexpr (kType == DType::kFloat16 && N == 8) {
      const __m128i rounded =
          _mm256_cvtps_ph(Bits<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
      __builtin_memcpy(to, &rounded, sizeof rounded);
      return;
    }
#endif
    const U bits = Bits<U>(value), magnitude = bits & 0x7fffffffu;
    U half;
    if constexpr (kType == DType::kBFloat16) {
      const U rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      half = magnitude > 0x7f800000u ? (bits >> 16 | 0x0040u) : rounded;
    } else {
      const U sign = bits >> 16 & 0x8000u;
      // Below 2^-14, adding 0.5 makes float16's last place float32's last place.
      const U subnormal = Bits<U>(Bits<F>(magnitude) + 0.5f) - 0x3f000000u;
      const U normal =
          (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
      const U finite = magnitude < 0x38800000u ? subnormal : normal;
      const U infinite = U{} + 0x7c00u, nan = U{} + 0x7e00u;
      // 65520 and above round to infinity.
      const U large = magnitude > 0x7f800000u ? nan : infinite;
      half = sign | (magnitude >= 0x477ff000u ? large : finite);
    }
    const H narrow = Convert<H, N>(half);
    __builtin_memcpy(to, &narrow, sizeof narrow);
  }
}

// Stores x[n] into elements [index + n stride, index + n stride + N).
template <DType kType, int N, int kCount>
inline void StoreAll(void* data, int64_t index, int64_t stride,
                     const typename Lanes<N>::F (&x)[kCount]) {
#ifdef __AVX512BF16__
  if constexpr (kType == DType::kBFloat16 && N == 16 && kCount % 2 == 0) {
    // Rounds two vectors at the price of one.
    for (int n = 0; n < kCount; n += 2) {
      const auto two = Bits<int64_t __attribute__((vector_size(64)))>(
          _mm512_cvtne2ps_pbh(x[n + 1], x[n]));
      char* to = static_cast<char*>(data) + 2 * (index + n * stride);
      if (stride == N) {
        __builtin_memcpy(to, &two, sizeof two);
        continue;
      }
      const auto first = __builtin_shufflevector(two, two, 0, 1, 2, 3);
      const auto second = __builtin_shufflevector(two, two, 4, 5, 6, 7);
      __builtin_memcpy(to, &first, sizeof first);
      __builtin_memcpy(to + 2 * stride, &second, sizeof second);
    }
    return;
  }
#endif
  for (int n = 0; n < kCount; ++n) Store<kType, N>(data, index + n * stride, x[n]);
}

}  // namespace
}  // namespace jax_gdn

#endif  // JAX_GDN_CPU_LANES_H_
