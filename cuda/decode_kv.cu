// Gated-delta-rule decode of states laid out [K, V].
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// in one pass a token: with p = k^T exp(g) S_old and r = q^T exp(g) S_old, one
// reduction over K gives u = beta (v - p) and out = r + (q.k) u (scale folded into q),
// and S_new = exp(g) S_old + k u^T is made from the registers that hold S_old. There
// the state stays, as float32, until the last token is done.
//
// A block owns the K x VT tile of one state. A thread owns C neighbouring columns, one
// access: 2 or 4, or 4 or 8 of a 16-bit state. Rows fall into 16 classes: row r is of
// class r / 4 mod 16. A thread has all rows of 16 / G neighbouring classes, G being 8
// or 16.
//
//                  column 0..C-1  C..2C-1    ...   VT-C..VT-1
//     group 0       thread 0     thread 1   ...   thread L-1        L = VT / C lanes
//     group 1       thread L     thread L+1 ...
//      ...
//     group G-1
//
// A column's sum over K has one shape, whatever the tile is, so that the tile never
// changes a bit: the rows of a class in order, then the classes as one balanced tree,
// neighbours first. Its levels fall inside a thread, between lanes, or between warps.
//
// Bytes a state: read once, written once (and once a snapshot). A block's whole tile
// is on its way before anything waits. Nothing else matters: it is memory-bound.
//
// A "step" kernel is the same with what a decode loop has fixed: one token, V = K,
// bfloat16 inputs and out, one decay a head. It has less to decide and to hold.
#include "cuda/columns.cuh"
#include "cuda/decode_kv.h"
#include "cuda/entries.cuh"
#include "cuda/waves.cuh"

namespace jax_gdn {
namespace {

// The thread's first row and column of a slot's state, in the states or the new ones.
template <typename T>
__device__ __forceinline__ typename T::Access* FirstRow(const void* states,
                                                        const DecodeParams& p,
                                                        const Place& at, int32_t slot,
                                                        const Thread<T>& thread) {
  const int64_t row = HeadOfSlot(p, slot, at.hv) * T::K + thread.Quad(0, 0);
  const int64_t element = row * ValueChannels<T>(p) + at.first_column + thread.column;
  return reinterpret_cast<typename T::Access*>(
      const_cast<char*>(static_cast<const char*>(states)) +
      element * kStateBytes<T::kState>);
}

// Over a thread's rows: of a class in order, then its two classes together; then over
// the groups of its warp.
template <typename T, typename Entries>
__device__ __forceinline__ Sums<T::kColumns> SumRows(const Owned<T>& state,
                                                     const Entries& entries) {
  Sums<T::kColumns> sums[T::kOwnClasses] = {};
#pragma unroll
  for (int c = 0; c < T::kOwnClasses; ++c) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
      const float4 q4 = entries.DecayedQ(c, j), k4 = entries.DecayedK(c, j);
      const float q[4] = {q4.x, q4.y, q4.z, q4.w}, k[4] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float s[T::kColumns];
        state.Get((c * T::kQuads + j) * 4 + r, s);
#pragma unroll
        for (int i = 0; i < T::kColumns; ++i) {
          sums[c].p.x[i] = fmaf(k[r], s[i], sums[c].p.x[i]);
          sums[c].r.x[i] = fmaf(q[r], s[i], sums[c].r.x[i]);
        }
      }
    }
  }
  if constexpr (T::kOwnClasses == 2) {
    sums[0] = {sums[0].p + sums[1].p, sums[0].r + sums[1].r};
  }
  AddGroups<T>(sums[0].p);
  AddGroups<T>(sums[0].r);
  return sums[0];
}

template <typename T, typename Entries>
__device__ __forceinline__ void UpdateRows(const Entries& entries, float common_decay,
                                           const float (&u)[T::kColumns],
                                           Owned<T>& state) {
#pragma unroll
  for (int c = 0; c < T::kOwnClasses; ++c) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
      const float4 k4 = entries.K(c, j), d4 = entries.Decay(c, j, common_decay);
      const float k[4] = {k4.x, k4.y, k4.z, k4.w};
      const float decay[4] = {d4.x, d4.y, d4.z, d4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float s[T::kColumns];
        state.Get((c * T::kQuads + j) * 4 + r, s);
#pragma unroll
        for (int i = 0; i < T::kColumns; ++i) s[i] = fmaf(k[r], u[i], decay[r] * s[i]);
        state.Set((c * T::kQuads + j) * 4 + r, s);
      }
    }
  }
}

// Stores out of the thread's columns, and returns u times what normalises k.
template <typename T>
__device__ __forceinline__ Columns<T::kColumns> Solve(
    const DecodeParams& p, const Place& at, int64_t t, const Thread<T>& thread,
    const Columns<T::kColumns>& v, const Gates& gates, const Sums<T::kColumns>& sums) {
  Columns<T::kColumns> u, out;
#pragma unroll
  for (int c = 0; c < T::kColumns; ++c) {
    const float u_c = gates.beta * fmaf(-gates.decayed_k, sums.p.x[c], v.x[c]);
    out.x[c] = fmaf(gates.qk, u_c, gates.decayed_q * sums.r.x[c]);
    u.x[c] = gates.k_factor * u_c;
  }
  if (thread.group == 0) StoreOut<T>(p, at, t, thread.column, out);
  return u;
}

// One token, from the thread's rows to the new state.
template <typename T, typename Entries>
__device__ __forceinline__ void Finish(const DecodeParams& p, const Place& at,
                                       const Thread<T>& thread, const RawV<T>& raw_v,
                                       const Entries& entries, const Gates& gates,
                                       const Sums<T::kColumns>& sums, int32_t wanted,
                                       Owned<T>& state) {
  const Columns<T::kColumns> u =
      Solve<T>(p, at, 0, thread, WidenV<T>(raw_v), gates, sums);
  state.ForgetUnpacked();
  UpdateRows<T>(entries, gates.decay, u.x, state);
  if (CheckSlot(p, wanted) == kNoSlot) return;
  StoreRows<T>(FirstRow<T>(p.new_state, p, at, wanted, thread), T::K / T::kColumns,
               state);
}

// One token. The first warp stages q and k, and makes the gates while the others sum.
template <typename T>
__device__ __forceinline__ void DecodeStep(const DecodeParams& p, const Place& at,
                                           const Thread<T>& thread, int32_t read) {
  __shared__ HeadInputs<T::K, true> in;
  __shared__ SharedSums<T> shared;
  // The state's loads before all else.
  typename T::Access bits[T::kRows];
  LoadRows<T>(FirstRow<T>(p.state.data, p, at, read, thread), T::K / T::kColumns, bits);
  __syncwarp();  // The compiler moves no access across.
  const RawV<T> raw_v = LoadV<T>(p, at, thread.column);
  __syncwarp();
  GateInputs gate_inputs;
  if (thread.warp == 0) {
    const RawHead<T::K> head = LoadHead<T::K, true>(p, at, 0, thread.lane);
    __syncwarp();
    gate_inputs = StageHead<T::K, true>(p, head, thread.lane, in);
  }
  Owned<T> state;
  state.Unpack(bits);
  BlockSync<T>();
  const int32_t wanted = WantedSlot(p, at.n, 0, read);
  Gates gates;
  // Late, so that the rows do not wait for what follows from norms.
  if (thread.warp == 0) {
    gates = MakeGates<true>(p, gate_inputs);
    if (T::kWarps > 1 && thread.lane == 0) in.gates = gates;
  }
  const StagedEntries<T> entries = {in, false, thread};
  Sums<T::kColumns> sums = SumRows<T>(state, entries);
  PutSums<T>(sums, thread, shared);
  if constexpr (T::kWarps > 1) {
    BlockSync<T>();
    AddWarps<T>(shared, thread, sums);
    gates = in.gates;
  }
  Finish<T>(p, at, thread, raw_v, entries, gates, sums, wanted, state);
}

// What the gate warp does: its loads before all else, then the gates for the others.
template <typename T>
__device__ __forceinline__ void MakeGatesApart(const DecodeParams& p, const Place& at,
                                               int lane, Gates& shared) {
  const RawHead<T::K> head = LoadHead<T::K, true>(p, at, 0, lane);
  PrefetchLater<T, Ask::kBeforeGates>(p, lane);
  if (ReadSlot(p, at.n) == kNoSlot) return;  // nobody waits
  const auto none = [](int, const float2&, const float2&) {};
  const Gates gates = MakeGates<true>(p, WidenHead<T::K, true>(p, head, none));
  HandOn<T>(p, gates, lane, shared);
}

// One token. A warp more makes the gates, and asks for a later block's rows;
// threads load their own entries of q and k, and all meet once.
template <typename T>
__device__ __forceinline__ void DecodeStepApart(const DecodeParams& p, const Place& at,
                                                const Thread<T>& thread, int32_t read,
                                                const Gates& shared_gates) {
  __shared__ SharedSums<T> shared;
  typename T::Access bits[T::kRows];
  LoadRows<T>(FirstRow<T>(p.state.data, p, at, read, thread), T::K / T::kColumns, bits);
  // The compiler moves no access across any of these.
  __syncwarp();
  // What is needed last is loaded last, 0.05 us a call at B = 1; but ptxas would put it
  // off where registers are few.
  constexpr bool kLast = T::kMinBlocks == 1;
  RawV<T> raw_v;
  if constexpr (!kLast) raw_v = LoadV<T>(p, at, thread.column);
  __syncwarp();
  OwnEntries<T> entries;
  entries.LoadFrom(p, at.KeyRow<T::K, true>(p, 0), thread);
  if constexpr (kLast) raw_v = LoadV<T>(p, at, thread.column);
  __syncwarp();
  const int32_t wanted = WantedSlot(p, at.n, 0, read);
  __syncwarp();
  Owned<T> state;
  state.Unpack(bits);
  Sums<T::kColumns> sums = SumRows<T>(state, entries);
  PutSums<T>(sums, thread, shared);
  WaitForArrivals<T::kThreads>();
  AddWarps<T>(shared, thread, sums);
  const Gates gates = shared_gates;
  Finish<T>(p, at, thread, raw_v, entries, gates, sums, wanted, state);
}

// Any number of tokens, whose inputs are staged in shared memory.
template <typename T>
__device__ __forceinline__ void DecodeTokens(const DecodeParams& p, const Place& at,
                                             const Thread<T>& thread, int32_t read) {
  typename T::Access bits[T::kRows];
  LoadRows<T>(FirstRow<T>(p.state.data, p, at, read, thread), p.V / T::kColumns, bits);
  __syncwarp();  // The compiler moves no access across.
  __shared__ HeadInputs<T::K, false> inputs[T::kTokens];
  __shared__ Columns<T::VT> v[T::kTokens];
  // Two, so that no warp waits for another to have read the last token's.
  __shared__ SharedSums<T> shared[2];
  const auto stage = [&](int64_t first) {
    if (thread.warp >= T::kTokens) return;
    // All loads before the first is looked at.
    RawInputs<T> raw[T::kTokensOfWarp] = {};
#pragma unroll
    for (int i = 0; i < T::kTokensOfWarp; ++i) {
      const int64_t t = first + thread.warp + i * T::kWarps;
      if (t < p.T) raw[i].LoadFrom(p, at, t, thread.lane);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < T::kTokensOfWarp; ++i) {
      const int slot = thread.warp + i * T::kWarps;
      const int64_t t = first + slot;
      if (t < p.T) raw[i].Stage(p, at, t, thread.lane, inputs[slot], v[slot]);
    }
  };
  stage(0);
  Owned<T> state;
  state.Unpack(bits);
#pragma unroll 1
  for (int64_t first = 0; first < p.T; first += T::kTokens) {
    if (first > 0) {
      BlockSync<T>();  // the last round's inputs are still read
      stage(first);
    }
    BlockSync<T>();
#pragma unroll 1
    for (int i = 0; i < T::kTokens && first + i < p.T; ++i) {
      const int64_t t = first + i;
      const int32_t wanted = WantedSlot(p, at.n, t, read);
      const StagedEntries<T> entries = {inputs[i], p.per_channel, thread};
      Sums<T::kColumns> sums = SumRows<T>(state, entries);
      PutSums<T>(sums, thread, shared[t % 2]);
      if constexpr (T::kWarps > 1) BlockSync<T>();
      AddWarps<T>(shared[t % 2], thread, sums);
      const Gates gates = inputs[i].gates;
      const Columns<T::kColumns> own_v = GetColumns<T>(v[i].x, thread.column);
      const Columns<T::kColumns> u = Solve<T>(p, at, t, thread, own_v, gates, sums);
      UpdateRows<T>(entries, gates.decay, u.x, state);
      if ((p.snapshots || t + 1 == p.T) && CheckSlot(p, wanted) != kNoSlot) {
        // Why: kept since the loads, the rows' addresses would cost 2 registers each.
        const int64_t stride = Recompute(p.V / T::kColumns);
        StoreRows<T>(FirstRow<T>(p.new_state, p, at, wanted, thread), stride, state);
      }
    }
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void Decode(const DecodeParams& p) {
  // Measured at K = 128. Where blocks ask ahead they need not start apart.
  if constexpr (T::VT >= 64 && T::K <= 128 && T::kAhead == 0) {
    StartApart<T::kMinBlocks == 1 ? 512 / T::kThreads : T::kMinBlocks>();
  }
  const Thread<T> thread;
  const Place at = {blockIdx.z, blockIdx.y, static_cast<int>(blockIdx.x * T::VT)};
  __shared__ Gates gates;  // of a gate warp
  if constexpr (T::kGateWarp) {
    if (WarpNumber() == 0) return MakeGatesApart<T>(p, at, thread.lane, gates);
  }
  const int32_t read = ReadSlot(p, at.n);
  if (read == kNoSlot) {
    StoreZeros<T>(p, at, T::kStep ? 1 : p.T, thread);
  } else if constexpr (T::kGateWarp) {
    DecodeStepApart<T>(p, at, thread, read, gates);
  } else if constexpr (T::kStep) {
    DecodeStep<T>(p, at, thread, read);
  } else {
    DecodeTokens<T>(p, at, thread, read);
  }
}

}  // namespace

// A kernel under a name that reads well in a profiler; see Kernel.
#define JAX_GDN_NAME(kind, name, K, VT, C, G, extra) \
  gdn_##kind##_kv_##name##_k##K##_vt##VT##_c##C##_g##G##extra
#define JAX_GDN_TILE(kind, dtype, K, VT, C, G, extra, caching, blocks, ask, ahead) \
  Tile<dtype, K, VT, C, G, Caching::k##caching, blocks, JAX_GDN_IS_STEP_##kind,    \
       JAX_GDN_GATES##extra, Ask::k##ask##Gates, K == 128 ? ahead : 0>
#define JAX_GDN_IS_STEP_step true
#define JAX_GDN_IS_STEP_decode false
#define JAX_GDN_GATES false
#define JAX_GDN_GATES_gw true
#define JAX_GDN_DEFINE(kind, name, dtype, K, VT, C, G, extra, caching, blocks, ask, \
                       ahead, max_states)                                           \
  extern "C" __global__ void __launch_bounds__(                                     \
      (JAX_GDN_TILE(kind, dtype, K, VT, C, G, extra, caching, blocks, ask,          \
                    ahead)::kThreads),                                              \
      (blocks)) JAX_GDN_NAME(kind, name, K, VT, C, G,                               \
                             extra)(const __grid_constant__ DecodeParams p) {       \
    Decode<JAX_GDN_TILE(kind, dtype, K, VT, C, G, extra, caching, blocks, ask,      \
                        ahead)>(p);                                                 \
  }
#define JAX_GDN_LIST(kind, name, dtype, K, VT, C, G, extra, caching, blocks, ask, \
                     ahead, max_states)                                           \
  {"gdn_" #kind "_kv_" #name "_k" #K "_vt" #VT "_c" #C "_g" #G #extra,            \
   reinterpret_cast<const void*>(JAX_GDN_NAME(kind, name, K, VT, C, G, extra)),   \
   Layout::kKV,                                                                   \
   dtype,                                                                         \
   K,                                                                             \
   VT,                                                                            \
   JAX_GDN_TILE(kind, dtype, K, VT, C, G, extra, caching, blocks, ask,            \
                ahead)::kThreads,                                                 \
   JAX_GDN_IS_STEP_##kind,                                                        \
   max_states},

// Every tile: kind, state, K, VT, columns of a thread, row groups, what else its name
// says (_gw: it has a gate warp), caching, blocks on a multiprocessor, when it asks
// ahead and how far (see PrefetchLater), max_states. Tuned at K = 128 on an H200 and,
// but for what asks before the gates, an H100; a larger K has no registers to share.
// clang-format off
#define JAX_GDN_FOR_EACH_TILE(X, K)                                                     \
  X(step, f32, DType::kFloat32, K, 64, 4, 16, _gw, Plain, K <= 128 ? 2 : 1, Before, 1,  \
    kMany)                                                                              \
  X(decode, bf16, DType::kBFloat16, K, 16, 8, 16, , Streaming, 1, After, 0, 128)        \
  X(decode, bf16, DType::kBFloat16, K, 64, 8, 16, , Plain, K <= 128 ? 3 : 1, After, 0,  \
    kMany)                                                                              \
  X(decode, f16, DType::kFloat16, K, 16, 8, 16, , Streaming, 1, After, 0, 128)          \
  X(decode, f16, DType::kFloat16, K, 64, 8, 16, , Plain, K <= 128 ? 2 : 1, After, 0,    \
    kMany)
// Of K = 128, which models have. The second never asks for anything, its grids being too
// small: it is 3 % faster at 128 states of an H200 than with 0, and why was not found.
#define JAX_GDN_FOR_EACH_TUNED_TILE(X, K)                                               \
  X(step, f32, DType::kFloat32, K, 16, 2, 16, _gw, Streaming, 1, After, 0, 64)          \
  X(step, f32, DType::kFloat32, K, 16, 4, 8, _gw, Around, 1, After, 8, 128)             \
  X(step, f32, DType::kFloat32, K, 32, 4, 16, _gw, Plain, 1, Before, 6, 256)            \
  X(step, bf16, DType::kBFloat16, K, 32, 4, 16, _gw, Streaming, 1, After, 0, 128)       \
  X(step, bf16, DType::kBFloat16, K, 64, 4, 8, _gw, Plain, 4, After, 4, 4096)           \
  X(step, bf16, DType::kBFloat16, K, 128, 4, 8, _gw, Plain, 2, After, 1, kMany)
// Of others, which were not timed.
#define JAX_GDN_FOR_EACH_OTHER_TILE(X, K)                                               \
  X(step, f32, DType::kFloat32, K, 16, 4, 8, , Streaming, 1, After, 0, 256)             \
  X(step, f32, DType::kFloat32, K, 64, 4, 8, , Streaming, 1, After, 0, 1024)            \
  X(step, bf16, DType::kBFloat16, K, 64, 4, 8, , Plain, K <= 128 ? 4 : 1, After, 0,     \
    kMany)
// Where G goes by K: a thread of a larger state would run out of registers.
#define JAX_GDN_FOR_EACH_DEEP_TILE(X, K, G)                                             \
  X(step, bf16, DType::kBFloat16, K, 32, 8, G, , Streaming, 1, After, 0,                \
    K == 128 ? 256 : 128)                                                               \
  X(decode, f32, DType::kFloat32, K, 16, 4, G, , Streaming, 1, After, 0, 128)           \
  X(decode, f32, DType::kFloat32, K, 64, 4, G, , Plain, K <= 128 ? 4 : 1, After, 0, kMany)
#define JAX_GDN_FOR_EACH_INSTANCE(X)                                                    \
  JAX_GDN_FOR_EACH_TUNED_TILE(X, 128)                                                   \
  JAX_GDN_FOR_EACH_TILE(X, 64) JAX_GDN_FOR_EACH_TILE(X, 128)                            \
  JAX_GDN_FOR_EACH_TILE(X, 192) JAX_GDN_FOR_EACH_TILE(X, 256)                           \
  JAX_GDN_FOR_EACH_OTHER_TILE(X, 64) JAX_GDN_FOR_EACH_OTHER_TILE(X, 192)                \
  JAX_GDN_FOR_EACH_OTHER_TILE(X, 256)                                                   \
  JAX_GDN_FOR_EACH_DEEP_TILE(X, 64, 8) JAX_GDN_FOR_EACH_DEEP_TILE(X, 128, 8)            \
  JAX_GDN_FOR_EACH_DEEP_TILE(X, 192, 16) JAX_GDN_FOR_EACH_DEEP_TILE(X, 256, 16)
// clang-format on

JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

const std::vector<Kernel>& DecodeKVKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
