// Gated-delta-rule decode of states laid out [K, V].
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// in one pass a token: with p = k^T exp(g) S_old and r = q^T exp(g) S_old, one
// reduction over K gives u = beta (v - p) and out = r + (q.k) u (scale folded into q),
// and S_new = exp(g) S_old + k u^T is made from the registers that hold S_old. There
// the state stays, as float32, until the last token is done.
//
// A block owns the K x VT tile of one state, in 2 VT threads. A thread owns C
// neighbouring columns, 16 bytes: 4 of a float32 state, 8 of a 16-bit one; and the
// rows g, g + G, g + 2 G, ... of its group g, with G = 2 C groups:
//
//               column 0..C-1  C..2C-1    ...   VT-C..VT-1
//     row 0      thread 0     thread 1   ...   thread L-1        L = VT / C lanes
//     row 1      thread L     thread L+1 ...
//      ...
//     row G      thread 0     thread 1   ...
//
// A column's sum over K has one shape, whatever VT is, so the tile never changes a
// bit: the rows of a group in order, then the groups as one balanced tree, whose
// levels are shuffles inside a warp and shared memory across warps.
//
// Bytes a state: read once, written once (and once a snapshot). A block's whole tile
// is on its way before anything waits. Nothing else matters: it is memory-bound.
#include "cuda/decode_kv.h"
#include "cuda/head.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {
namespace {

template <DType kState_, int K_, int VT_>
struct Tile {
  static constexpr DType kState = kState_;
  static constexpr int K = K_, VT = VT_;
  static constexpr int kColumns = kValues<kState>;  // of a thread
  static constexpr int kRowGroups = 2 * kColumns;
  static constexpr int kLanes = VT / kColumns;  // that share a row
  static constexpr int kThreads = 2 * VT;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = K / kRowGroups;  // of a thread
  // Small tiles serve small batches; see LoadState.
  static constexpr bool kStreaming = VT < 64;
  // Four blocks of the large tile on a multiprocessor: T = 4 takes 876 us, was 1028
  // (H200, B = 512, HV = 32, K = V = 128). Larger K does not fit.
  static constexpr int kMinBlocks = VT == 64 && K <= 128 ? 4 : 1;
  static_assert(K % 64 == 0 && kThreads % 32 == 0 && kLanes <= 32);

  struct Shared {
    HeadInputs<K, VT> in[2];          // of this token and the next
    alignas(16) float p[kWarps][VT];  // k^T S, a partial sum a warp
    alignas(16) float r[kWarps][VT];  // q^T S, likewise
  };
};

// k^T S and q^T S of a thread's columns.
template <int C>
struct Sums {
  float p[C], r[C];
};

template <int C>
__device__ __forceinline__ Sums<C> operator+(const Sums<C>& x, const Sums<C>& y) {
  Sums<C> sum;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    sum.p[c] = x.p[c] + y.p[c];
    sum.r[c] = x.r[c] + y.r[c];
  }
  return sum;
}

// A thread's columns to and from shared memory, see PlaceOf.
template <typename T>
__device__ __forceinline__ void PutColumns(const float* from, float* to, int column) {
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    *reinterpret_cast<float4*>(to + PlaceOf<T::VT, T::kColumns>(column + c)) =
        *reinterpret_cast<const float4*>(from + c);
  }
}

template <typename T>
__device__ __forceinline__ void GetColumns(const float* from, float* to, int column) {
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    *reinterpret_cast<float4*>(to + c) = *reinterpret_cast<const float4*>(
        from + PlaceOf<T::VT, T::kColumns>(column + c));
  }
}

// Adds the sums of warps [kFirst, kFirst + kCount) as a balanced tree.
template <typename T, int kFirst, int kCount>
__device__ __forceinline__ Sums<T::kColumns> TreeSum(const typename T::Shared& shared,
                                                     int column) {
  if constexpr (kCount == 1) {
    alignas(16) Sums<T::kColumns> sums;
    GetColumns<T>(shared.p[kFirst], sums.p, column);
    GetColumns<T>(shared.r[kFirst], sums.r, column);
    return sums;
  } else {
    return TreeSum<T, kFirst, kCount / 2>(shared, column) +
           TreeSum<T, kFirst + kCount / 2, kCount / 2>(shared, column);
  }
}

// The sums over all of K, from each thread's own rows.
template <typename T>
__device__ __forceinline__ Sums<T::kColumns> ReduceGroups(Sums<T::kColumns> sums,
                                                          typename T::Shared& shared,
                                                          int lane, int warp,
                                                          int column) {
#pragma unroll
  for (int offset = T::kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      sums.p[c] += __shfl_xor_sync(0xffffffffu, sums.p[c], offset);
      sums.r[c] += __shfl_xor_sync(0xffffffffu, sums.r[c], offset);
    }
  }
  if constexpr (T::kWarps > 1) {
    if (lane < T::kLanes) {
      PutColumns<T>(sums.p, shared.p[warp], column);
      PutColumns<T>(sums.r, shared.r[warp], column);
    }
    __syncthreads();
    sums = TreeSum<T, 0, T::kWarps>(shared, column);
  }
  return sums;
}

// The state's part that a thread owns.
template <typename T>
struct Owned {
  float s[T::kRows][T::kColumns];
};

// The thread's first row and column of a slot's state.
template <typename T>
__device__ __forceinline__ uint4* FirstRow(const DecodeParams& p, const Place& at,
                                           int64_t slot, int group, int column) {
  const int64_t element =
      ((slot * p.HV + at.hv) * T::K + group) * p.V + at.first_column + column;
  return reinterpret_cast<uint4*>(static_cast<char*>(p.state.data) +
                                  element * kStateBytes<T::kState>);
}

template <typename T>
__device__ __forceinline__ int64_t RowStride(const DecodeParams& p) {
  return int64_t{T::kRowGroups} * p.V / T::kColumns;
}

template <typename T>
__device__ __forceinline__ Sums<T::kColumns> SumRows(const DecodeParams& p,
                                                     const Owned<T>& state,
                                                     const HeadInputs<T::K, T::VT>& in,
                                                     int group) {
  const float* q = p.per_channel ? in.decayed_q : in.q;
  const float* k = p.per_channel ? in.decayed_k : in.k;
  Sums<T::kColumns> sums = {};
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const float q_i = q[group + i * T::kRowGroups], k_i = k[group + i * T::kRowGroups];
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      sums.p[c] = fmaf(k_i, state.s[i][c], sums.p[c]);
      sums.r[c] = fmaf(q_i, state.s[i][c], sums.r[c]);
    }
  }
  return sums;
}

template <typename T>
__device__ __forceinline__ void UpdateRows(const DecodeParams& p, const Head& h,
                                           const HeadInputs<T::K, T::VT>& in,
                                           const float (&u)[T::kColumns], int group,
                                           Owned<T>& state) {
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const int row = group + i * T::kRowGroups;
    const float decay = p.per_channel ? in.decay[row] : h.decay, k = in.k[row];
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      state.s[i][c] = fmaf(k, u[c], decay * state.s[i][c]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void StoreRows(const DecodeParams& p, const Owned<T>& state,
                                          uint4* to) {
  // Why: kept since the loads, the rows' addresses would cost 2 registers each.
  const int64_t stride = Recompute(RowStride<T>(p));
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    StoreState<T::kStreaming>(to + i * stride, PackState<T::kState>(state.s[i]));
  }
}

template <typename T>
__device__ __forceinline__ void StoreOut(const DecodeParams& p, const Place& at,
                                         int64_t t, int column, const float* out) {
  const int64_t head = (at.n * p.T + t) * p.HV + at.hv;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += 4) {
    Store4(p.out, head * p.V + at.first_column + column + c, out + c);
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void DecodeTile(const DecodeParams& p) {
  constexpr int C = T::kColumns;
  const int lane = threadIdx.x % 32, warp = T::kWarps == 1 ? 0 : threadIdx.x / 32;
  const int column = C * (threadIdx.x % T::kLanes), group = threadIdx.x / T::kLanes;
  const Place at = {blockIdx.z, blockIdx.y, static_cast<int>(blockIdx.x * T::VT)};

  const int64_t read = ReadSlot(p, at.n);
  if (read == kNoSlot) {
    const float zeros[C] = {};
    for (int64_t t = 0; t < p.T && group == 0; ++t) {
      StoreOut<T>(p, at, t, column, zeros);
    }
    return;
  }

  // The state's loads before all else, then the first token's.
  uint4 bits[T::kRows];
  const uint4* first_row = FirstRow<T>(p, at, read, group, column);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    bits[i] = LoadState<T::kStreaming>(first_row + i * RowStride<T>(p));
  }
  __shared__ typename T::Shared shared;
  RawInputs<T::K> raw;
  if (warp == 0) {
    LoadInputs<T::kColumns, T::K, T::VT>(p, at, 0, lane, raw);
    StageInputs(p, lane, raw, shared.in[0]);
  }
  Owned<T> state;
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) UnpackState<T::kState>(bits[i], state.s[i]);

#pragma unroll 1
  for (int64_t t = 0; t < p.T; ++t) {
    const HeadInputs<T::K, T::VT>& in = shared.in[t % 2];
    __syncthreads();
    const bool loads_next = warp == 0 && t + 1 < p.T;
    if (loads_next) LoadInputs<T::kColumns, T::K, T::VT>(p, at, t + 1, lane, raw);
    const int64_t write = WriteSlot(p, at.n, t, read);

    const Head h = ComputeHead(p, in, lane);
    const Sums<C> sums =
        ReduceGroups<T>(SumRows<T>(p, state, in, group), shared, lane, warp, column);
    alignas(16) float v[C];
    GetColumns<T>(in.v, v, column);
    float u[C], out[C];  // u times what normalises k
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float u_c = h.beta * fmaf(-h.decay * h.factor.k, sums.p[c], v[c]);
      out[c] = fmaf(h.qk, u_c, h.decay * h.factor.q * sums.r[c]);
      u[c] = h.factor.k * u_c;
    }
    if (group == 0) StoreOut<T>(p, at, t, column, out);
    UpdateRows<T>(p, h, in, u, group, state);
    if (write != kNoSlot) {
      StoreRows<T>(p, state, FirstRow<T>(p, at, write, group, column));
    }
    if (loads_next) StageInputs(p, lane, raw, shared.in[(t + 1) % 2]);
  }
}

}  // namespace

// One kernel an instance, under a name that reads well in a profiler.
// clang-format off
#define JAX_GDN_FOR_EACH_TILE(INSTANCE, ...)                                  \
  INSTANCE(__VA_ARGS__, 64, 16) INSTANCE(__VA_ARGS__, 64, 32)                 \
  INSTANCE(__VA_ARGS__, 64, 64) INSTANCE(__VA_ARGS__, 128, 16)                \
  INSTANCE(__VA_ARGS__, 128, 32) INSTANCE(__VA_ARGS__, 128, 64)               \
  INSTANCE(__VA_ARGS__, 192, 16) INSTANCE(__VA_ARGS__, 192, 32)               \
  INSTANCE(__VA_ARGS__, 192, 64) INSTANCE(__VA_ARGS__, 256, 16)               \
  INSTANCE(__VA_ARGS__, 256, 32) INSTANCE(__VA_ARGS__, 256, 64)
#define JAX_GDN_FOR_EACH_INSTANCE(INSTANCE)              \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, f32, DType::kFloat32)  \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, bf16, DType::kBFloat16) \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, f16, DType::kFloat16)
// clang-format on

#define JAX_GDN_NAME(name, K, VT) gdn_decode_kv_##name##_k##K##_vt##VT
#define JAX_GDN_DEFINE(name, dtype, K, VT)                                     \
  extern "C" __global__ void __launch_bounds__(Tile<dtype, K, VT>::kThreads,   \
                                               Tile<dtype, K, VT>::kMinBlocks) \
      JAX_GDN_NAME(name, K, VT)(const __grid_constant__ DecodeParams p) {      \
    DecodeTile<Tile<dtype, K, VT>>(p);                                         \
  }
JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

#define JAX_GDN_LIST(name, dtype, K, VT)                     \
  {"gdn_decode_kv_" #name "_k" #K "_vt" #VT,                 \
   reinterpret_cast<const void*>(JAX_GDN_NAME(name, K, VT)), \
   Layout::kKV,                                              \
   dtype,                                                    \
   K,                                                        \
   VT,                                                       \
   Tile<dtype, K, VT>::kThreads},

const std::vector<Kernel>& DecodeKVKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
