#include "cpu/convert.h"

#include <cstring>

namespace jax_gdn {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float WidenBFloat16(uint16_t half) { return FromBits(uint32_t{half} << 16); }

float WidenFloat16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t magnitude = half & 0x7fffu;
  // Infinities and NaNs keep an all-ones exponent.
  if (magnitude >= 0x7c00u) return FromBits(sign | 0x7f800000u | magnitude << 13);
  // Shifted into float32's fields, the value is off by 2^(127 - 15), subnormals
  // included; the product is exact.
  return FromBits(sign | Bits(FromBits(magnitude << 13) * 0x1p112f));
}

uint16_t RoundBFloat16(float value) {
  const uint32_t bits = Bits(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x0040u);  // quiet
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

uint16_t RoundFloat16(float value) {
  const uint32_t bits = Bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds above 65504
  if (magnitude < 0x38800000u) {
    // Subnormal in float16: adding 0.5 makes its last place float32's last place.
    const float shifted = FromBits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(Bits(shifted) - Bits(0.5f));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace

void Widen(const Input& x, int64_t first, int64_t count, float* values) {
  const auto* half = static_cast<const uint16_t*>(x.data) + first;
  switch (x.dtype) {
    case DType::kFloat32:
      std::memcpy(values, static_cast<const float*>(x.data) + first,
                  sizeof(float) * count);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) values[i] = WidenBFloat16(half[i]);
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) values[i] = WidenFloat16(half[i]);
      return;
  }
}

void Round(const float* values, int64_t first, int64_t count, const Output& x) {
  auto* half = static_cast<uint16_t*>(x.data) + first;
  switch (x.dtype) {
    case DType::kFloat32:
      std::memcpy(static_cast<float*>(x.data) + first, values, sizeof(float) * count);
      return;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) half[i] = RoundBFloat16(values[i]);
      return;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) half[i] = RoundFloat16(values[i]);
      return;
  }
}

}  // namespace jax_gdn
