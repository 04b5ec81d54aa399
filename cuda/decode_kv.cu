// Gated-delta-rule decode, one token, states laid out [K, V].
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// in one pass: with p = exp(g) k^T S_old and r = exp(g) q^T S_old, one reduction
// over K gives u = beta (v - p) and out = r + (q.k) u (scale folded into q), and
// S_new = exp(g) S_old + k u^T is written from the registers that hold S_old.
//
// A block owns the K x VT tile of one state, in 2 VT threads. A thread owns 4
// neighbouring columns (16 bytes) of the rows g, g + 8, g + 16, ... of its group g:
//
//               column 0..3   4..7     ...    VT-4..VT-1
//     row 0      thread 0    thread 1  ...   thread L-1        L = VT / 4 lanes
//     row 1      thread L    thread L+1 ...
//      ...
//     row 8      thread 0    thread 1  ...
//
// A column's sum over K has one shape, whatever VT is, so the tile never changes a
// bit: the rows of a group in order, then the 8 groups as one balanced tree, whose
// levels are shuffles inside a warp and shared memory across warps.
//
// Bytes a state: 2 K V sizeof(float), and a block's whole tile is on its way before
// anything waits. Nothing else matters: the kernel is memory-bound.
#include "cuda/decode_kv.h"
#include "cuda/head.cuh"
#include "cuda/vec.cuh"

namespace jax_gdn {
namespace {

constexpr int kRowGroups = 8;

template <int K_, int VT_>
struct Tile {
  static constexpr int K = K_, VT = VT_;
  static constexpr int kLanes = VT / 4;  // that share a row
  static constexpr int kThreads = kLanes * kRowGroups;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = K / kRowGroups;  // of a thread
  // Small tiles serve small batches; see LoadState.
  static constexpr bool kStreaming = VT < 64;
  static_assert(K % 64 == 0 && kThreads % 32 == 0);

  struct Shared {
    HeadInputs<K, VT> in;
    alignas(16) float p[kWarps][VT];  // k^T S, a partial sum a warp
    alignas(16) float r[kWarps][VT];  // q^T S, likewise
  };
};

struct Sums {
  float p[4], r[4];  // k^T S and q^T S of four columns
};

__device__ __forceinline__ Sums operator+(const Sums& x, const Sums& y) {
  Sums sum;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sum.p[c] = x.p[c] + y.p[c];
    sum.r[c] = x.r[c] + y.r[c];
  }
  return sum;
}

__device__ __forceinline__ void AddRow(Sums& sums, float4 s, float q, float k) {
  const float row[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    sums.p[c] = fmaf(k, row[c], sums.p[c]);
    sums.r[c] = fmaf(q, row[c], sums.r[c]);
  }
}

// Adds the sums of warps [kFirst, kFirst + kCount) as a balanced tree.
template <int kFirst, int kCount, typename Shared>
__device__ __forceinline__ Sums TreeSum(const Shared& shared, int column) {
  if constexpr (kCount == 1) {
    const float4 p = *reinterpret_cast<const float4*>(&shared.p[kFirst][column]);
    const float4 r = *reinterpret_cast<const float4*>(&shared.r[kFirst][column]);
    return {{p.x, p.y, p.z, p.w}, {r.x, r.y, r.z, r.w}};
  } else {
    return TreeSum<kFirst, kCount / 2>(shared, column) +
           TreeSum<kFirst + kCount / 2, kCount / 2>(shared, column);
  }
}

// Adds the sums of the row groups of one warp; every lane gets its columns' sums.
template <typename T>
__device__ __forceinline__ void AddGroups(Sums& sums) {
#pragma unroll
  for (int offset = T::kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums.p[c] += __shfl_xor_sync(0xffffffffu, sums.p[c], offset);
      sums.r[c] += __shfl_xor_sync(0xffffffffu, sums.r[c], offset);
    }
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void DecodeTile(const DecodeParams& p) {
  const int lane = threadIdx.x % 32;
  const int warp = T::kWarps == 1 ? 0 : threadIdx.x / 32;
  const int column = 4 * (threadIdx.x % T::kLanes), group = threadIdx.x / T::kLanes;
  const int hv = blockIdx.y;
  const int64_t row = blockIdx.z, head = row * p.HV + hv;
  const int64_t out_index = head * p.V + blockIdx.x * T::VT + column;

  // The state's loads before all else.
  float4* state = reinterpret_cast<float4*>(p.state + (head * T::K + group) * p.V +
                                            blockIdx.x * T::VT + column);
  const int64_t row_stride = int64_t{kRowGroups} * p.V / 4;
  float4 s[T::kRows];
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    s[i] = LoadState<T::kStreaming>(state + i * row_stride);
  }
  // The first warp brings what else the block needs.
  __shared__ typename T::Shared shared;
  if (warp == 0) StageHead(p, row, hv, blockIdx.x * T::VT, lane, shared.in);
  __syncthreads();
  const Head h = ComputeHead(p, shared.in, lane);

  Sums sums = {};
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const int at = group + i * kRowGroups;
    AddRow(sums, s[i], shared.in.q[at], shared.in.k[at]);
  }
  AddGroups<T>(sums);
  if constexpr (T::kWarps > 1) {
    if (lane < T::kLanes) {
      *reinterpret_cast<float4*>(&shared.p[warp][column]) =
          make_float4(sums.p[0], sums.p[1], sums.p[2], sums.p[3]);
      *reinterpret_cast<float4*>(&shared.r[warp][column]) =
          make_float4(sums.r[0], sums.r[1], sums.r[2], sums.r[3]);
    }
    __syncthreads();
    sums = TreeSum<0, T::kWarps>(shared, column);
  }

  float ku[4], out[4];  // u, times what normalises k
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float u =
        h.beta * fmaf(-h.decay * h.k_factor, sums.p[c], shared.in.v[column + c]);
    out[c] = fmaf(h.qk, u, h.decay * h.q_factor * sums.r[c]);
    ku[c] = h.k_factor * u;
  }
  // Why: kept since the loads, the rows' addresses would cost 2 registers each.
  const int64_t store_stride = Recompute(row_stride);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const float k = shared.in.k[group + i * kRowGroups];
    s[i].x = fmaf(k, ku[0], h.decay * s[i].x);
    s[i].y = fmaf(k, ku[1], h.decay * s[i].y);
    s[i].z = fmaf(k, ku[2], h.decay * s[i].z);
    s[i].w = fmaf(k, ku[3], h.decay * s[i].w);
    StoreState<T::kStreaming>(state + i * store_stride, s[i]);
  }
  if (group == 0) Store4(p.out, out_index, out);
}

}  // namespace

// One kernel an instance, under a name that reads well in a profiler.
// clang-format off
#define JAX_GDN_FOR_EACH_INSTANCE(INSTANCE)             \
  INSTANCE(64, 16) INSTANCE(64, 32) INSTANCE(64, 64)    \
  INSTANCE(128, 16) INSTANCE(128, 32) INSTANCE(128, 64) \
  INSTANCE(192, 16) INSTANCE(192, 32) INSTANCE(192, 64) \
  INSTANCE(256, 16) INSTANCE(256, 32) INSTANCE(256, 64)
// clang-format on

#define JAX_GDN_NAME(K, VT) gdn_decode_kv_f32_k##K##_vt##VT
#define JAX_GDN_DEFINE(K, VT)                                           \
  extern "C" __global__ void __launch_bounds__((Tile<K, VT>::kThreads)) \
      JAX_GDN_NAME(K, VT)(const __grid_constant__ DecodeParams p) {     \
    DecodeTile<Tile<K, VT>>(p);                                         \
  }
JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

#define JAX_GDN_LIST(K, VT)            \
  {"gdn_decode_kv_f32_k" #K "_vt" #VT, \
   reinterpret_cast<const void*>(JAX_GDN_NAME(K, VT)), K, VT, Tile<K, VT>::kThreads},

const std::vector<Kernel>& DecodeKVKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
