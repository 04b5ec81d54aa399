// Gated-delta-rule decode of states laid out [V, K].
//
//     S   <- exp(g) S;  u <- beta (v - S k);  S <- S + u k^T;  out <- scale S q
//
// as in decode_kv.cu: p = exp(g) S_old k and r = exp(g) S_old q in one reduction, then
// u = beta (v - p), out = r + (q.k) u, and the new state from the registers that hold
// the old one, as float32, until the last token is done.
//
// A row of K is contiguous and belongs to L neighbouring lanes, 16 bytes at a time; a
// lane keeps its part of q and k in registers. So a sum over K is a lane's own part in
// order, then a butterfly over L lanes, and no sum is shared between warps:
//
//                      k = 0..C-1   C..2C-1    ...             C = 16 bytes of values
//     row 0             lane 0      lane 1     ...  lane L-1
//     row 1             lane L      lane L+1   ...             (where L < 32)
//
// A butterfly in which a lane passes on only what it keeps no more leaves each lane
// with the sums of one row, and u of all rows is one computation.
//
// A block is several warps, each with rows of its own. In a "step" kernel, which is
// what a decode loop has fixed, one warp more computes gates, norms and q.k for all.
// Where there may be more tokens, each warp stages a token for all. As in decode_kv.cu,
// what normalises q and k is a factor on the sums.
#include "cuda/decode_vk.h"
#include "cuda/keys.cuh"
#include "cuda/waves.cuh"

namespace jax_gdn {
namespace {

// Where a slot's state, in the states or the new ones, has the lane's first values.
template <typename T>
__device__ __forceinline__ uint4* FirstAccess(const void* states, const DecodeParams& p,
                                              int32_t slot, unsigned hv, int row,
                                              int lane) {
  auto* const data = const_cast<uint4*>(static_cast<const uint4*>(states));
  const int64_t head = HeadOfSlot(p, slot, hv);
  if constexpr (T::kStep) {  // a state's size is known
    const unsigned within = row * T::kAccesses + lane % T::kLanes;
    return data + head * (T::K * T::kAccesses) + within;
  } else {
    return data + (head * p.V + row) * T::kAccesses + lane % T::kLanes;
  }
}

// A lane's place in the operands.
struct Place {
  unsigned n;  // sequence
  unsigned hv;
  int first_row;  // of V, of its warp's
  int lane;
  int warp;  // among those that have rows; -1 is a gate warp
};

// k^T S and q^T S of the row that the lane is left with.
struct OwnSums {
  float p, r;
};

template <typename T>
__device__ __forceinline__ OwnSums SumToken(const Vector<T>& q, const Vector<T>& k,
                                            const float (&s)[T::kRows][T::kOwn],
                                            int lane) {
  float p[T::kRows], r[T::kRows];
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    p[i] = DotOwn<T>(k, s[i]);
    r[i] = DotOwn<T>(q, s[i]);
  }
  SumRows<T>(p, lane);
  SumRows<T>(r, lane);
  return {p[0], r[0]};
}

// Stores `out` of the row, whose v is given, and makes the new state of the lane's
// part.
template <typename T>
__device__ __forceinline__ void UpdateToken(const DecodeParams& p, int64_t head,
                                            const Place& at, const Vector<T>& k,
                                            float v, const Gates& gates,
                                            const OwnSums& sums,
                                            float (&s)[T::kRows][T::kOwn]) {
  const float u = gates.beta * fmaf(-gates.decayed_k, sums.p, v);
  if (at.lane % T::kSameRow == 0) {
    const Output out = {p.out.data, T::kStep ? DType::kBFloat16 : p.out.dtype};
    Store1(out, head * (T::kStep ? T::K : p.V) + at.first_row + OwnRow<T>(at.lane),
           fmaf(gates.qk, u, gates.decayed_q * sums.r));
  }
  const float own_u = gates.k_factor * u;
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const float u_i = __shfl_sync(0xffffffffu, own_u, i * T::kSameRow, T::kLanes);
#pragma unroll
    for (int j = 0; j < T::kOwn; ++j) {
      s[i][j] = fmaf(k.x[j], u_i, gates.decay * s[i][j]);
    }
  }
}

// What the gate warp does: its loads before all else, then the gates for the others.
template <typename T>
__device__ __forceinline__ void MakeGatesApart(const DecodeParams& p, const Place& at,
                                               Gates& shared) {
  const unsigned head = at.n * p.HV + at.hv;
  const RawGates raw_gates = LoadGates<T>(p, head, at.hv);
  const RawKeys<T> raw = LoadKeys<T>(p, at.n * p.H + KeyHead(p, at.hv), at.lane);
  PrefetchLater<T, Ask::kBeforeGates>(p, at.lane);
  if (ReadSlot(p, at.n) == kNoSlot) return;  // nobody waits
  const Gates gates = MakeGates<T>(p, raw_gates, Widen<T>(raw.q, DType::kBFloat16),
                                   Widen<T>(raw.k, DType::kBFloat16));
  HandOn<T>(p, gates, at.lane, shared);
}

// One token is all there is.
template <typename T>
__device__ __forceinline__ void DecodeStep(const DecodeParams& p, const Place& at,
                                           int32_t read, const Gates& shared_gates) {
  const unsigned head = at.n * p.HV + at.hv;
  const int row = at.first_row + at.lane / T::kLanes;
  // All loads before the first is looked at.
  OwnRows<T> rows;
  rows.LoadFrom(FirstAccess<T>(p.state.data, p, read, at.hv, row, at.lane));
  const int64_t own = int64_t{head} * T::K + at.first_row + OwnRow<T>(at.lane);
  const Raw<1> raw_v = LoadRaw<1, true>(p.v, own);
  const RawKeys<T> raw = LoadKeys<T>(p, at.n * p.H + KeyHead(p, at.hv), at.lane);
  const int32_t wanted = WantedSlot(p, at.n, 0, read);
  // Early: the rows are what is waited for longest.
  WaitForArrivals<T::kThreads>();
  const Vector<T> q = Widen<T>(raw.q, DType::kBFloat16);
  const Vector<T> k = Widen<T>(raw.k, DType::kBFloat16);
  float s[T::kRows][T::kOwn];
  rows.Unpack(s);
  const OwnSums sums = SumToken<T>(q, k, s, at.lane);
  UpdateToken<T>(p, head, at, k, Widen(raw_v, DType::kBFloat16), shared_gates, sums, s);
  if (CheckSlot(p, wanted) == kNoSlot) return;
  rows.Store(s, FirstAccess<T>(p.new_state, p, wanted, at.hv, row, at.lane));
}

// What one token brings to a block.
template <typename T>
struct StagedToken {
  alignas(16) float q[T::K];
  alignas(16) float k[T::K];
  alignas(16) float decay[T::K];  // exp(g) of the channels, where each has its own
  float v[T::VT];
  Gates gates;
};

// One warp stages token t.
template <typename T>
__device__ __forceinline__ void StageToken(const DecodeParams& p, const Place& at,
                                           int64_t t, StagedToken<T>& to) {
  const int64_t token = at.n * p.T + t, head = token * p.HV + at.hv;
  const RawGates raw_gates = LoadGates<T>(p, head, at.hv);
  constexpr int kPasses = (T::VT + 31) / 32;
  const int64_t first_v = head * p.V + at.first_row - at.warp * T::kWarpRows;
  Raw<1> raw_v[kPasses] = {};
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = 32 * i + at.lane;
    if (row < T::VT) raw_v[i] = LoadRaw<1>(p.v, first_v + row);
  }
  const RawKeys<T> raw = LoadKeys<T>(p, token * p.H + KeyHead(p, at.hv), at.lane);
  const Vector<T> q = Widen<T>(raw.q, p.q.dtype), k = Widen<T>(raw.k, p.k.dtype);
  const Gates gates = MakeGates<T>(p, raw_gates, q, k);
  PutOwn<T>(q, to.q, at.lane);
  PutOwn<T>(k, to.k, at.lane);
  if (p.per_channel) {
    PutOwn<T>(LoadDecay<T>(p, head, at.hv, raw_gates.A_log, at.lane), to.decay,
              at.lane);
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int row = 32 * i + at.lane;
    if (row < T::VT) to.v[row] = Widen(raw_v[i], p.v.dtype);
  }
  if (at.lane == 0) to.gates = gates;
}

// Any number of tokens, staged in shared memory by rounds, a token a warp.
template <typename T>
__device__ __forceinline__ void DecodeTokens(const DecodeParams& p, const Place& at,
                                             int32_t read) {
  __shared__ StagedToken<T> tokens[T::kWarps];
  const int row = at.first_row + at.lane / T::kLanes;
  const auto stage = [&](int64_t first) {
    if (first + at.warp < p.T) StageToken<T>(p, at, first + at.warp, tokens[at.warp]);
  };
  float s[T::kRows][T::kOwn];
  {
    OwnRows<T> rows;
    rows.LoadFrom(FirstAccess<T>(p.state.data, p, read, at.hv, row, at.lane));
    stage(0);
    rows.Unpack(s);  // ahead of the loop, which would otherwise keep the bits too
  }
#pragma unroll 1
  for (int64_t first = 0; first < p.T; first += T::kWarps) {
    if (first > 0) {
      __syncthreads();  // the last round's tokens are still read
      stage(first);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < T::kWarps && first + i < p.T; ++i) {
      const int64_t t = first + i;
      const int32_t wanted = WantedSlot(p, at.n, t, read);
      const StagedToken<T>& staged = tokens[i];
      const int own_row = at.warp * T::kWarpRows + OwnRow<T>(at.lane);
      const Vector<T> q = GetOwn<T>(staged.q, at.lane),
                      k = GetOwn<T>(staged.k, at.lane);
      if (p.per_channel) {
        const Vector<T> decay = GetOwn<T>(staged.decay, at.lane);
#pragma unroll
        for (int r = 0; r < T::kRows; ++r) {
#pragma unroll
          for (int j = 0; j < T::kOwn; ++j) s[r][j] *= decay.x[j];
        }
      }
      const OwnSums sums = SumToken<T>(q, k, s, at.lane);
      UpdateToken<T>(p, (at.n * p.T + t) * p.HV + at.hv, at, k, staged.v[own_row],
                     staged.gates, sums, s);
      if (!p.snapshots && t + 1 < p.T) continue;
      if (CheckSlot(p, wanted) == kNoSlot) continue;
      OwnRows<T>::Store(s, FirstAccess<T>(p.new_state, p, wanted, at.hv, row, at.lane));
    }
  }
}

// A row that is padding.
template <typename T>
__device__ __forceinline__ void StoreZeros(const DecodeParams& p, const Place& at,
                                           int64_t tokens) {
  if (at.lane % T::kSameRow != 0) return;
#pragma unroll 1
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t head = (at.n * p.T + t) * p.HV + at.hv;
    Store1(p.out, head * p.V + at.first_row + OwnRow<T>(at.lane), 0.0f);
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void Decode(const DecodeParams& p) {
  if constexpr (T::VT == 64) StartApart<4>();
  // What WarpNumber does made tokens slower.
  const int warp = T::kStep ? WarpNumber() - 1 : static_cast<int>(threadIdx.x / 32);
  const Place at = {blockIdx.z, blockIdx.y,
                    static_cast<int>(blockIdx.x * T::VT) + warp * T::kWarpRows,
                    static_cast<int>(threadIdx.x % 32), warp};
  __shared__ Gates gates;  // of a gate warp
  if constexpr (T::kStep) {
    if (warp < 0) return MakeGatesApart<T>(p, at, gates);
  }
  const int32_t read = ReadSlot(p, at.n);
  if (read == kNoSlot) {
    StoreZeros<T>(p, at, T::kStep ? 1 : p.T);
  } else if constexpr (T::kStep) {
    DecodeStep<T>(p, at, read, gates);
  } else {
    DecodeTokens<T>(p, at, read);
  }
}

}  // namespace

// A kernel under a name that reads well in a profiler; see Kernel.
#define JAX_GDN_NAME(kind, name, K, VT, R, access) \
  gdn_##kind##_vk_##name##_k##K##_vt##VT##_r##R##_##access
#define JAX_GDN_IS_STEP_step true
#define JAX_GDN_IS_STEP_decode false
#define JAX_GDN_ROWS(kind, dtype, K, VT, R, access, ask, ahead)               \
  Rows<dtype, K, R, VT / R, JAX_GDN_CACHING_##access, JAX_GDN_IS_STEP_##kind, \
       Ask::k##ask##Gates, K == 128 ? ahead : 0>
// One block at least leaves the compiler all registers: it then issues the loads of a
// short kernel first. With four, tokens of 16-bit states of K = 192 would spill.
#define JAX_GDN_BLOCKS_step(K) 1
#define JAX_GDN_BLOCKS_decode(K) (K == 192 ? 3 : 4)
#define JAX_GDN_CACHING_plain Caching::kPlain
#define JAX_GDN_CACHING_streaming Caching::kStreaming
#define JAX_GDN_DEFINE(kind, name, dtype, K, VT, R, access, ask, ahead, max_states) \
  extern "C" __global__ void __launch_bounds__(                                     \
      (JAX_GDN_ROWS(kind, dtype, K, VT, R, access, ask, ahead)::kThreads),          \
      JAX_GDN_BLOCKS_##kind(K))                                                     \
      JAX_GDN_NAME(kind, name, K, VT, R,                                            \
                   access)(const __grid_constant__ DecodeParams p) {                \
    Decode<JAX_GDN_ROWS(kind, dtype, K, VT, R, access, ask, ahead)>(p);             \
  }
#define JAX_GDN_LIST(kind, name, dtype, K, VT, R, access, ask, ahead, max_states) \
  {"gdn_" #kind "_vk_" #name "_k" #K "_vt" #VT "_r" #R "_" #access,               \
   reinterpret_cast<const void*>(JAX_GDN_NAME(kind, name, K, VT, R, access)),     \
   Layout::kVK,                                                                   \
   dtype,                                                                         \
   K,                                                                             \
   VT,                                                                            \
   JAX_GDN_ROWS(kind, dtype, K, VT, R, access, ask, ahead)::kThreads,             \
   JAX_GDN_IS_STEP_##kind,                                                        \
   max_states},

// Every instance: kind, state, K, VT, rows of a warp, access, when it asks ahead and
// how far (see PrefetchLater), max_states. Tuned at K = 128 on an H200 and, but for
// what asks before the gates, an H100.
// clang-format off
#define JAX_GDN_FOR_EACH_STEP(X, K)                                                     \
  X(step, f32, DType::kFloat32, K, 16, 4, streaming, After, 0, K == 128 ? 128 : 1024)   \
  X(step, f32, DType::kFloat32, K, 32, 2, plain, After, 4, kMany)                       \
  X(step, bf16, DType::kBFloat16, K, 16, 4, streaming, After, 0, 128)                   \
  X(step, bf16, DType::kBFloat16, K, 32, 8, plain, Before, 5, kMany)
// Of K = 128, which models have.
#define JAX_GDN_FOR_EACH_TUNED_STEP(X, K)                                               \
  X(step, f32, DType::kFloat32, K, 16, 2, plain, After, 7, 1024)
#define JAX_GDN_FOR_EACH_DECODE(X, K, VT, R, max_states)                                \
  X(decode, f32, DType::kFloat32, K, VT, R, plain, After, 0, max_states)                \
  X(decode, bf16, DType::kBFloat16, K, VT, R, plain, After, 0, max_states)              \
  X(decode, f16, DType::kFloat16, K, VT, R, plain, After, 0, max_states)
#define JAX_GDN_FOR_EACH_INSTANCE(X)                                                    \
  JAX_GDN_FOR_EACH_STEP(X, 64) JAX_GDN_FOR_EACH_STEP(X, 128)                            \
  JAX_GDN_FOR_EACH_STEP(X, 192) JAX_GDN_FOR_EACH_STEP(X, 256)                           \
  JAX_GDN_FOR_EACH_TUNED_STEP(X, 128)                                                   \
  JAX_GDN_FOR_EACH_DECODE(X, 64, 16, 4, 64) JAX_GDN_FOR_EACH_DECODE(X, 128, 16, 4, 64)  \
  JAX_GDN_FOR_EACH_DECODE(X, 192, 16, 4, 64) JAX_GDN_FOR_EACH_DECODE(X, 256, 16, 4, 64) \
  JAX_GDN_FOR_EACH_DECODE(X, 64, 64, 16, kMany)                                         \
  JAX_GDN_FOR_EACH_DECODE(X, 128, 64, 16, kMany)                                        \
  JAX_GDN_FOR_EACH_DECODE(X, 192, 32, 8, kMany)                                         \
  JAX_GDN_FOR_EACH_DECODE(X, 256, 32, 8, kMany)
// clang-format on

JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

const std::vector<Kernel>& DecodeVKKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
