// All tokens of one state. Compiled once an instruction set, under the namespace that
// JAX_GDN_ISA names; includes nothing whose code the linker could share with others.
#include "cpu/state_kernel.h"

#include "cpu/columns.h"
#include "cpu/lanes.h"
#include "cpu/prefetch.h"
#include "cpu/rows.h"

namespace jax_gdn {
namespace {

// Vectors of columns taken at once: enough sums to hide a multiply-add's latency, few
// enough for sixteen registers; for several tokens as few as keep the tile small.
constexpr int kAtOnce = 4, kAtOnceOfTile = 2;

// Columns or rows from `j` on while there are enough for whole parts, every token over
// one part before the next part; returns the first that is left. kKeeps: through the
// tile, which several tokens need, and which spares widening 16 bits twice.
template <typename Of, DType kType, bool kKeeps>
int32_t DecodeParts(const StateJob& job, int32_t j, Prefetcher& ahead) {
  static_assert(!kKeeps || Of::kSize <= kTileWidth);
  const Token* const last = job.tokens + job.count - 1;
  for (; j + Of::kSize <= job.V; j += Of::kSize) {
    Of part(job, j);
    part.template Sum<kType, kKeeps>(job.from, *job.tokens, ahead);
    for (const Token* x = job.tokens; kKeeps && x < last; ++x) {
      part.Finish(*x);
      if (x->to == nullptr) {
        part.template UpdateAndSum<kType, false>(*x, x[1], ahead);
      } else {
        part.template UpdateAndSum<kType, true>(*x, x[1], ahead);
      }
    }
    part.Finish(*last);
    if (last->to == nullptr) continue;
    part.template Update<kType, kKeeps>(job.from, *last, ahead);
  }
  return j;
}

template <DType kType, bool kKeeps>
void DecodeAs(const StateJob& job) {
  const int64_t entries = int64_t{job.K} * job.V;
  Prefetcher ahead(job.ahead, entries * SizeOf(kType), entries * (job.count + 1));
  int32_t j = 0;
  if (job.layout == Layout::kKV) {
    using Wide = Columns<kLanes, kKeeps ? kAtOnceOfTile : kAtOnce>;
    j = DecodeParts<Wide, kType, kKeeps>(job, j, ahead);
    j = DecodeParts<Columns<kLanes, 1>, kType, kKeeps>(job, j, ahead);
    DecodeParts<Columns<1, 1>, kType, kKeeps>(job, j, ahead);
  } else {
    j = DecodeParts<Interleaved<Rows<kLanes == 16 ? 8 : 4>>, kType, kKeeps>(job, j,
                                                                            ahead);
    DecodeParts<Rows<1>, kType, kKeeps>(job, j, ahead);
  }
}

template <DType kType>
void DecodeAs(const StateJob& job) {
  return job.count > 1 || kType != kFloat ? DecodeAs<kType, true>(job)
                                          : DecodeAs<kType, false>(job);
}

template <DType kType>
void WidenAs(const void* from, int64_t first, int64_t count, float* values) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Store<kFloat, kLanes>(values, i, Load<kType, kLanes>(from, first + i));
  }
  for (; i < count; ++i) values[i] = Load<kType, 1>(from, first + i);
}

template <DType kType>
void RoundAs(const float* values, void* to, int64_t first, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Store<kType, kLanes>(to, first + i, Load<kFloat, kLanes>(values, i));
  }
  for (; i < count; ++i) Store<kType, 1>(to, first + i, values[i]);
}

}  // namespace

namespace JAX_GDN_ISA {

void Decode(const StateJob& job) {
  switch (job.dtype) {
    case DType::kFloat32:
      return DecodeAs<DType::kFloat32>(job);
    case DType::kBFloat16:
      return DecodeAs<DType::kBFloat16>(job);
    case DType::kFloat16:
      return DecodeAs<DType::kFloat16>(job);
  }
}

float Dot(const float* x, const float* y, int32_t size) {
  auto lanes = Fill<kLanes>(0.0f);
  int32_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    lanes += Load<kFloat, kLanes>(x, i) * Load<kFloat, kLanes>(y, i);
  }
  const Lanes<kLanes>::F all[] = {lanes};
  float sums[kLanes];
  SumLanes(all, sums);
  float sum = sums[0];
  for (; i < size; ++i) sum += x[i] * y[i];
  return sum;
}

void Widen(const Input& x, int64_t first, int64_t count, float* values) {
  switch (x.dtype) {
    case DType::kFloat32:
      return WidenAs<DType::kFloat32>(x.data, first, count, values);
    case DType::kBFloat16:
      return WidenAs<DType::kBFloat16>(x.data, first, count, values);
    case DType::kFloat16:
      return WidenAs<DType::kFloat16>(x.data, first, count, values);
  }
}

void Round(const float* values, int64_t first, int64_t count, const Output& x) {
  switch (x.dtype) {
    case DType::kFloat32:
      return RoundAs<DType::kFloat32>(values, x.data, first, count);
    case DType::kBFloat16:
      return RoundAs<DType::kBFloat16>(values, x.data, first, count);
    case DType::kFloat16:
      return RoundAs<DType::kFloat16>(values, x.data, first, count);
  }
}

}  // namespace JAX_GDN_ISA
}  // namespace jax_gdn
