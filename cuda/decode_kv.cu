// Gated-delta-rule decode of states laid out [K, V].
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// in one pass a token: with p = k^T exp(g) S_old and r = q^T exp(g) S_old, one
// reduction over K gives u = beta (v - p) and out = r + (q.k) u (scale folded into q),
// and S_new = exp(g) S_old + k u^T is made from the registers that hold S_old. There
// the state stays, as float32, until the last token is done.
//
// A block owns the K x VT tile of one state. A thread owns C neighbouring columns, 16
// bytes: 4 of a float32 state, 8 of a 16-bit one. Rows fall into 16 classes: row r is
// of class r / 4 mod 16. A thread has all rows of 16 / G neighbouring classes, G being
// 8 or 16.
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
#include "cuda/decode_kv.h"
#include "cuda/tile.cuh"

namespace jax_gdn {
namespace {

// Value channels of a head.
template <typename T>
__device__ __forceinline__ int ValueChannels(const DecodeParams& p) {
  return T::kStep ? T::K : p.V;
}

// The thread's first row and column of a slot's state.
template <typename T>
__device__ __forceinline__ uint4* FirstRow(const DecodeParams& p, const Place& at,
                                           int32_t slot, const Thread<T>& thread) {
  const int64_t row = HeadOfSlot(p, slot, at.hv) * T::K + thread.Quad(0, 0);
  const int64_t element = row * ValueChannels<T>(p) + at.first_column + thread.column;
  return reinterpret_cast<uint4*>(static_cast<char*>(p.state.data) +
                                  element * kStateBytes<T::kState>);
}

// Calls f(i, row) for each row i that a thread owns, which lies `row` below its first.
template <typename T, typename F>
__device__ __forceinline__ void ForEachRow(F f) {
#pragma unroll
  for (int c = 0; c < T::kOwnClasses; ++c) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        f((c * T::kQuads + j) * 4 + r, 4 * (c + j * kClasses) + r);
      }
    }
  }
}

template <typename T>
struct Sums {
  Columns<T::kColumns> p, r;  // k^T S, q^T S
};

// Over a thread's rows: of a class in order, then its two classes together.
template <typename T>
__device__ __forceinline__ Sums<T> SumRows(const DecodeParams& p, const Owned<T>& state,
                                           const HeadInputs<T::K, !T::kStep>& in,
                                           const Thread<T>& thread) {
  const float *q = in.q, *k = in.k;
  if constexpr (!T::kStep) {
    if (p.per_channel) q = in.decayed_q, k = in.decayed_k;
  }
  Sums<T> sums[T::kOwnClasses] = {};
#pragma unroll
  for (int c = 0; c < T::kOwnClasses; ++c) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
      const int quad = thread.Quad(c, j);
      const float4 q4 = *reinterpret_cast<const float4*>(q + quad);
      const float4 k4 = *reinterpret_cast<const float4*>(k + quad);
      const float q_r[4] = {q4.x, q4.y, q4.z, q4.w}, k_r[4] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float s[T::kColumns];
        state.Get((c * T::kQuads + j) * 4 + r, s);
#pragma unroll
        for (int i = 0; i < T::kColumns; ++i) {
          sums[c].p.x[i] = fmaf(k_r[r], s[i], sums[c].p.x[i]);
          sums[c].r.x[i] = fmaf(q_r[r], s[i], sums[c].r.x[i]);
        }
      }
    }
  }
  if constexpr (T::kOwnClasses == 2) {
    sums[0] = {sums[0].p + sums[1].p, sums[0].r + sums[1].r};
  }
  return sums[0];
}

template <typename T>
__device__ __forceinline__ void UpdateRows(const HeadInputs<T::K, !T::kStep>& in,
                                           float common_decay,
                                           const float (&u)[T::kColumns],
                                           const Thread<T>& thread, Owned<T>& state) {
#pragma unroll
  for (int c = 0; c < T::kOwnClasses; ++c) {
#pragma unroll
    for (int j = 0; j < T::kQuads; ++j) {
      const int quad = thread.Quad(c, j);
      const float4 k4 = *reinterpret_cast<const float4*>(in.k + quad);
      const float k_r[4] = {k4.x, k4.y, k4.z, k4.w};
      float decay[4] = {common_decay, common_decay, common_decay, common_decay};
      if constexpr (!T::kStep) {
        const float4 d4 = *reinterpret_cast<const float4*>(in.decay + quad);
        decay[0] = d4.x, decay[1] = d4.y, decay[2] = d4.z, decay[3] = d4.w;
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float s[T::kColumns];
        state.Get((c * T::kQuads + j) * 4 + r, s);
#pragma unroll
        for (int i = 0; i < T::kColumns; ++i)
          s[i] = fmaf(k_r[r], u[i], decay[r] * s[i]);
        state.Set((c * T::kQuads + j) * 4 + r, s);
      }
    }
  }
}

// A thread's values of v, on their way.
template <typename T>
struct RawV {
  Raw<4> x[T::kColumns / 4];
};

template <typename T>
__device__ __forceinline__ RawV<T> LoadV(const DecodeParams& p, const Place& at,
                                         int64_t t, int column) {
  const int64_t head = at.Token<T::kStep>(p, t) * p.HV + at.hv;
  const int64_t first = head * ValueChannels<T>(p) + at.first_column + column;
  RawV<T> raw;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    raw.x[c / 4] = LoadRaw<4, T::kStep>(p.v, first + c);
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ void StoreOut(const DecodeParams& p, const Place& at,
                                         int64_t t, int column, const float* out) {
  const int64_t head = at.Token<T::kStep>(p, t) * p.HV + at.hv;
  const DType dtype = T::kStep ? DType::kBFloat16 : p.out.dtype;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    Store4({p.out.data, dtype},
           head * ValueChannels<T>(p) + at.first_column + column + c, out + c);
  }
}

template <typename T>
__device__ __forceinline__ void BlockSync() {
  if constexpr (T::kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Token t, whose inputs are in shared memory but for v.
template <typename T>
__device__ __forceinline__ void DecodeToken(
    const DecodeParams& p, const Place& at, int64_t t, const Thread<T>& thread,
    const RawV<T>& raw_v, const GateInputs& gate_inputs,
    HeadInputs<T::K, !T::kStep>& in, typename T::Shared& shared, Owned<T>& state) {
  constexpr int C = T::kColumns;
  Gates gates;
  if constexpr (T::kStep) {
    // Late, so that the rows do not wait for what follows from norms.
    if (thread.warp == 0) {
      gates = MakeGates<true>(p, gate_inputs);
      if (T::kWarps > 1 && thread.lane == 0) in.gates = gates;
    }
  }
  Sums<T> sums = SumRows<T>(p, state, in, thread);
  AddGroups<T>(sums.p);
  AddGroups<T>(sums.r);
  if constexpr (T::kWarps > 1) {
    // Two buffers, so that no warp waits for another to have read this token's.
    const int buffer = T::kStep ? 0 : t % 2;
    if (thread.lane < T::kLanes) {
      PutColumns<T>(sums.p, shared.p[buffer][thread.warp], thread.column);
      PutColumns<T>(sums.r, shared.r[buffer][thread.warp], thread.column);
    }
    BlockSync<T>();
    sums.p = TreeSum<T, 0, T::kWarps>(shared.p[buffer], thread.column);
    if (thread.group == 0) {
      sums.r = TreeSum<T, 0, T::kWarps>(shared.r[buffer], thread.column);
    }
  }
  if constexpr (!T::kStep || T::kWarps > 1) gates = in.gates;
  float u[C], out[C];  // u times what normalises k
#pragma unroll
  for (int c = 0; c < C; c += 4) {
    const float4 v4 = Widen(raw_v.x[c / 4], TypeOf<T::kStep>(p.v));
    const float v[4] = {v4.x, v4.y, v4.z, v4.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u_i = gates.beta * fmaf(-gates.decayed_k, sums.p.x[c + i], v[i]);
      out[c + i] = fmaf(gates.qk, u_i, gates.decayed_q * sums.r.x[c + i]);
      u[c + i] = gates.k_factor * u_i;
    }
  }
  if (thread.group == 0) StoreOut<T>(p, at, t, thread.column, out);
  state.ForgetUnpacked();
  UpdateRows<T>(in, gates.decay, u, thread, state);
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void DecodeTile(const DecodeParams& p) {
  constexpr int C = T::kColumns;
  const Thread<T> thread;
  const Place at = {blockIdx.z, blockIdx.y, static_cast<int>(blockIdx.x * T::VT)};
  const int64_t tokens = T::kStep ? 1 : p.T;

  const int32_t read = ReadSlot(p, at.n);
  if (read == kNoSlot) {
    const float zeros[C] = {};
    for (int64_t t = 0; t < tokens && thread.group == 0; ++t) {
      StoreOut<T>(p, at, t, thread.column, zeros);
    }
    return;
  }

  // The state's loads before all else.
  uint4 bits[T::kRows];
  const uint4* from = FirstRow<T>(p, at, read, thread);
  const int64_t stride = ValueChannels<T>(p) / C;  // of rows
  ForEachRow<T>(
      [&](int i, int row) { bits[i] = LoadState<T::kStreaming>(from + row * stride); });
  __syncwarp();  // The compiler moves no access across.
  RawV<T> raw_v;
  if constexpr (T::kStep) raw_v = LoadV<T>(p, at, 0, thread.column);
  __syncwarp();
  __shared__ typename T::Shared shared;
  Owned<T> state;
  GateInputs gate_inputs;
  const auto stage = [&](int64_t first) {  // a token a warp
    if (thread.warp >= T::kTokens || first + thread.warp >= tokens) return;
    auto& in = shared.in[thread.warp];
    const int64_t t = first + thread.warp;
    gate_inputs = StageToken<T::K, T::kStep>(p, at, t, thread.lane, in);
    if constexpr (!T::kStep) {
      const Gates gates = MakeGates<false>(p, gate_inputs);
      StageDecays<T::K>(p, at, t, thread.lane, gate_inputs.A_log, gates.decay, in);
      if (thread.lane == 0) in.gates = gates;
    }
  };
  stage(0);
  state.Unpack(bits);
#pragma unroll 1
  for (int64_t first = 0; first < tokens; first += T::kTokens) {
    if (first > 0) {
      BlockSync<T>();  // the last round's inputs are still read
      stage(first);
    }
    BlockSync<T>();
#pragma unroll 1
    for (int i = 0; i < T::kTokens && first + i < tokens; ++i) {
      const int64_t t = first + i;
      const int32_t wanted = WantedSlot(p, at.n, t, read);
      if constexpr (!T::kStep) raw_v = LoadV<T>(p, at, t, thread.column);
      DecodeToken<T>(p, at, t, thread, raw_v, gate_inputs, shared.in[i], shared, state);
      if ((T::kStep || p.snapshots || t + 1 == tokens) &&
          CheckSlot(p, wanted) != kNoSlot) {
        uint4* to = FirstRow<T>(p, at, wanted, thread);
        // Why: kept since the loads, the rows' addresses would cost 2 registers each.
        const int64_t stride = T::kStep ? T::K / C : Recompute(ValueChannels<T>(p) / C);
        ForEachRow<T>([&](int i, int row) {
          StoreState<T::kStreaming>(to + row * stride, state.Bits(i));
        });
      }
    }
  }
}

}  // namespace

// A kernel under a name that reads well in a profiler; see Kernel.
#define JAX_GDN_NAME(kind, name, K, VT, G) gdn_##kind##_kv_##name##_k##K##_vt##VT##_g##G
#define JAX_GDN_TILE(kind, dtype, K, VT, G, streaming, blocks) \
  Tile<dtype, K, VT, G, streaming, blocks, JAX_GDN_IS_STEP_##kind>
#define JAX_GDN_IS_STEP_step true
#define JAX_GDN_IS_STEP_decode false
#define JAX_GDN_DEFINE(kind, name, dtype, K, VT, G, streaming, blocks, max_states)  \
  extern "C" __global__ void __launch_bounds__(                                     \
      (JAX_GDN_TILE(kind, dtype, K, VT, G, streaming, blocks)::kThreads), (blocks)) \
      JAX_GDN_NAME(kind, name, K, VT, G)(const __grid_constant__ DecodeParams p) {  \
    DecodeTile<JAX_GDN_TILE(kind, dtype, K, VT, G, streaming, blocks)>(p);          \
  }
#define JAX_GDN_LIST(kind, name, dtype, K, VT, G, streaming, blocks, max_states) \
  {"gdn_" #kind "_kv_" #name "_k" #K "_vt" #VT "_g" #G,                          \
   reinterpret_cast<const void*>(JAX_GDN_NAME(kind, name, K, VT, G)),            \
   Layout::kKV,                                                                  \
   dtype,                                                                        \
   K,                                                                            \
   VT,                                                                           \
   JAX_GDN_TILE(kind, dtype, K, VT, G, streaming, blocks)::kThreads,             \
   JAX_GDN_IS_STEP_##kind,                                                       \
   max_states},

// Every tile, the smallest first: kind, state, K, VT, G, streaming, blocks, max_states.
// Tuned at K = 128 on an H200; a larger K has no registers to share.
// clang-format off
#define JAX_GDN_FOR_EACH_TILE(X, K)                                                     \
  X(step, f32, DType::kFloat32, K, 16, 8, true, 1, 256)                                 \
  X(step, f32, DType::kFloat32, K, 64, 8, true, 1, 2048)                                \
  X(step, f32, DType::kFloat32, K, 64, 16, false, 1, kMany)                             \
  X(step, bf16, DType::kBFloat16, K, 64, 8, false, K <= 128 ? 6 : 1, 2048)              \
  X(decode, bf16, DType::kBFloat16, K, 16, 16, true, 1, 256)                            \
  X(decode, bf16, DType::kBFloat16, K, 64, 16, false, K <= 128 ? 3 : 1, kMany)          \
  X(decode, f16, DType::kFloat16, K, 16, 16, true, 1, 256)                              \
  X(decode, f16, DType::kFloat16, K, 64, 16, false, 1, kMany)
// Where K, which is V, has such columns.
#define JAX_GDN_FOR_EACH_WIDE_TILE(X, K)                                                \
  X(step, bf16, DType::kBFloat16, K, 128, 8, false, 1, kMany)
// Where G goes by K: a thread of a larger state would run out of registers.
#define JAX_GDN_FOR_EACH_DEEP_TILE(X, K, G)                                             \
  X(step, bf16, DType::kBFloat16, K, 32, G, true, 1, 256)                               \
  X(decode, f32, DType::kFloat32, K, 16, G, true, 1, 256)                               \
  X(decode, f32, DType::kFloat32, K, 64, G, false, K <= 128 ? 3 : 1, kMany)
#define JAX_GDN_FOR_EACH_INSTANCE(X)                                                    \
  JAX_GDN_FOR_EACH_DEEP_TILE(X, 64, 8) JAX_GDN_FOR_EACH_DEEP_TILE(X, 128, 8)            \
  JAX_GDN_FOR_EACH_DEEP_TILE(X, 192, 16) JAX_GDN_FOR_EACH_DEEP_TILE(X, 256, 16)         \
  JAX_GDN_FOR_EACH_TILE(X, 64) JAX_GDN_FOR_EACH_TILE(X, 128)                            \
  JAX_GDN_FOR_EACH_TILE(X, 192) JAX_GDN_FOR_EACH_TILE(X, 256)                           \
  JAX_GDN_FOR_EACH_WIDE_TILE(X, 128) JAX_GDN_FOR_EACH_WIDE_TILE(X, 256)
// clang-format on

JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

const std::vector<Kernel>& DecodeKVKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
