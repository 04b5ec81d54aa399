#include "cpu/convert.h"

#include "cpu/lanes.h"

namespace jax_gdn {
namespace {

template <DType kType>
void WidenAs(const Input& x, int64_t first, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = Load<kType, 1>(x.data, first + i);
}

template <DType kType>
void RoundAs(const float* values, int64_t first, int64_t count, const Output& x) {
  for (int64_t i = 0; i < count; ++i) Store<kType, 1>(x.data, first + i, values[i]);
}

}  // namespace

void Widen(const Input& x, int64_t first, int64_t count, float* values) {
  switch (x.dtype) {
    case DType::kFloat32:
      return WidenAs<DType::kFloat32>(x, first, count, values);
    case DType::kBFloat16:
      return WidenAs<DType::kBFloat16>(x, first, count, values);
    case DType::kFloat16:
      return WidenAs<DType::kFloat16>(x, first, count, values);
  }
}

void Round(const float* values, int64_t first, int64_t count, const Output& x) {
  switch (x.dtype) {
    case DType::kFloat32:
      return RoundAs<DType::kFloat32>(values, first, count, x);
    case DType::kBFloat16:
      return RoundAs<DType::kBFloat16>(values, first, count, x);
    case DType::kFloat16:
      return RoundAs<DType::kFloat16>(values, first, count, x);
  }
}

}  // namespace jax_gdn
