// Jobs on one state. Compiled once an instruction set, under the namespace that
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

// Calls run(part) for parts of kSize columns or rows, from `j` on, while there are
// enough; returns the first that is left.
template <typename Of, typename F>
int32_t RunParts(const StateJob& job, int32_t j, F& run) {
  for (; j + Of::kSize <= job.V; j += Of::kSize) {
    Of part(job, j);
    run(part);
  }
  return j;
}

// Calls run(part) for all parts of a state. kTiled: those that the tile has room for.
template <bool kTiled, typename F>
void ForEachPart(const StateJob& job, F run) {
  static_assert(!kTiled || kAtOnceOfTile * kLanes <= kTileWidth);
  int32_t j = 0;
  if (job.layout == Layout::kKV) {
    j = RunParts<Columns<kLanes, kTiled ? kAtOnceOfTile : kAtOnce>>(job, j, run);
    j = RunParts<Columns<kLanes, 1>>(job, j, run);
    RunParts<Columns<1, 1>>(job, j, run);
  } else {
    j = RunParts<Interleaved<Rows<kLanes == 16 ? 8 : 4>>>(job, j, run);
    RunParts<Rows<1>>(job, j, run);
  }
}

// Every token over one part before the next part. kKeeps: through the tile, which
// several tokens need, and which spares widening 16 bits twice.
template <DType kType, bool kKeeps>
void DecodeAs(const DecodeJob& job) {
  constexpr Source kSource = kKeeps ? Source::kStateToTile : Source::kState;
  const int64_t entries = int64_t{job.K} * job.V;
  Prefetcher ahead(job.ahead, entries * SizeOf(kType), entries * (job.count + 1));
  ForEachPart<kKeeps>(job, [&job, &ahead](auto& part) {
    const Token &first = *job.tokens, *const last = job.tokens + job.count - 1;
    part.template Sum<kType, kSource>(job.from, first.decayed_k, first.decayed_q,
                                      ahead);
    for (const Token* x = job.tokens; kKeeps && x < last; ++x) {
      part.Finish(*x);
      if (x->to == nullptr) {
        part.template UpdateAndSum<kType, false>(*x, x[1], ahead);
      } else {
        part.template UpdateAndSum<kType, true>(*x, x[1], ahead);
      }
    }
    part.Finish(*last);
    if (last->to == nullptr) return;
    part.template Update<kType, kKeeps>(job.from, *last, ahead);
  });
}

template <DType kType>
void DecodeAs(const DecodeJob& job) {
  return job.count > 1 || kType != kFloat ? DecodeAs<kType, true>(job)
                                          : DecodeAs<kType, false>(job);
}

// Likewise every query. kKeeps: through the tile, which several queries need, and what
// folds.
template <DType kType, bool kKeeps>
void QueryAs(const QueryJob& job) {
  constexpr Source kSource = kKeeps ? Source::kStateToTile : Source::kState;
  const int64_t entries = int64_t{job.K} * job.V;
  const int64_t passes = job.count + (job.fold.to != nullptr);
  Prefetcher ahead(job.ahead, entries * SizeOf(kType), entries * passes);
  ForEachPart<kKeeps>(job, [&job, &ahead](auto& part) {
    const Query& first = *job.queries;
    part.template Sum<kType, kSource>(job.from, first.k, first.q, ahead);
    part.Put(first);
    if constexpr (kKeeps) {
      for (int64_t i = 1; i < job.count; ++i) {
        const Query& query = job.queries[i];
        part.template Sum<kType, Source::kTile>(job.from, query.k, query.q, ahead);
        part.Put(query);
      }
      if (job.fold.to != nullptr) part.template FoldTile<kType>(job.fold, ahead);
    }
  });
}

template <DType kType>
void QueryAs(const QueryJob& job) {
  return job.count > 1 || job.fold.to != nullptr ? QueryAs<kType, true>(job)
                                                 : QueryAs<kType, false>(job);
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

void Decode(const DecodeJob& job) {
  switch (job.dtype) {
    case DType::kFloat32:
      return DecodeAs<DType::kFloat32>(job);
    case DType::kBFloat16:
      return DecodeAs<DType::kBFloat16>(job);
    case DType::kFloat16:
      return DecodeAs<DType::kFloat16>(job);
  }
}

void RunQueries(const QueryJob& job) {
  switch (job.dtype) {
    case DType::kFloat32:
      return QueryAs<DType::kFloat32>(job);
    case DType::kBFloat16:
      return QueryAs<DType::kBFloat16>(job);
    case DType::kFloat16:
      return QueryAs<DType::kFloat16>(job);
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
