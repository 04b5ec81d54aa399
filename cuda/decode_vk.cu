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
// order, then a butterfly over L lanes, and nothing is shared between warps:
//
//                      k = 0..C-1   C..2C-1    ...             C = 16 bytes of values
//     row 0             lane 0      lane 1     ...  lane L-1
//     row 1             lane L      lane L+1   ...             (where L < 32)
//
// A butterfly in which a lane passes on only what it keeps no more leaves each lane
// with the sums of one row, and u of all rows is one computation.
//
// A block is one warp, with VT rows, and computes gates, norms and q.k for itself. As
// in decode_kv.cu, what normalises q and k is a factor on the sums, and a "step" kernel
// is the same with what a decode loop has fixed.
#include "cuda/decode_vk.h"
#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {
namespace {

template <DType kState_, int K_, int VT_, bool kStreaming_, bool kStep_>
struct Rows {
  static constexpr DType kState = kState_;
  static constexpr int K = K_, VT = VT_;
  static constexpr bool kStep = kStep_;
  static constexpr int kWidth = kValues<kState>;  // values in an access
  static constexpr int kAccesses = K / kWidth;    // of a row
  // The largest power of two that divides them, at most a warp.
  static constexpr int kPower = kAccesses & -kAccesses;
  static constexpr int kLanes = kPower < 32 ? kPower : 32;  // that share a row
  static constexpr int kParts = kAccesses / kLanes;  // accesses of a lane and row
  static constexpr int kOwn = kParts * kWidth;       // values of a lane and row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kRows = VT / kRowsAtOnce;  // of a lane
  // Lanes that are left with the sums of the same row.
  static constexpr int kSameRow = kLanes / kRows;
  static constexpr bool kStreaming = kStreaming_;  // see LoadState
  static_assert(kRows >= 1 && kSameRow >= 1);
};

// A lane's part of a K-vector.
template <typename T>
struct Vector {
  float x[T::kOwn];
};

// The part as it is stored.
template <typename T>
struct RawVector {
  Raw<4> x[T::kOwn / 4];
};

template <typename T, bool kNarrow>
__device__ __forceinline__ RawVector<T> LoadVector(const Input& input, int64_t first,
                                                   int lane) {
  RawVector<T> raw;
  const int64_t own = first + T::kWidth * (lane % T::kLanes);
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) {
#pragma unroll
    for (int i = 0; i < T::kWidth; i += 4) {
      raw.x[(part * T::kWidth + i) / 4] =
          LoadRaw<4, kNarrow>(input, own + T::kWidth * T::kLanes * part + i);
    }
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ Vector<T> Widen(const RawVector<T>& raw, DType dtype) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < T::kOwn / 4; ++i) {
    const float4 x = Widen(raw.x[i], dtype);
    vector.x[4 * i] = x.x, vector.x[4 * i + 1] = x.y;
    vector.x[4 * i + 2] = x.z, vector.x[4 * i + 3] = x.w;
  }
  return vector;
}

// A lane's part of a sum over K.
template <typename T>
__device__ __forceinline__ float DotOwn(const Vector<T>& x, const float* y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) sum = fmaf(x.x[i], y[i], sum);
  return sum;
}

// The sums of all rows over the lanes that share them: the butterfly of `WarpSum`, in
// which a lane passes on only what it keeps no more. It is left with one row, which
// its upper bits name (see OwnRow), in x[0].
template <typename T, int kOffset = T::kLanes / 2, int kLeft = T::kRows>
__device__ __forceinline__ void SumRows(float (&x)[T::kRows], int lane) {
  if constexpr (kOffset > 0) {
    if constexpr (kLeft > 1) {
      const bool upper = lane & kOffset;
#pragma unroll
      for (int i = 0; i < kLeft / 2; ++i) {
        const float passed = upper ? x[i] : x[i + kLeft / 2];
        const float kept = upper ? x[i + kLeft / 2] : x[i];
        x[i] = kept + __shfl_xor_sync(0xffffffffu, passed, kOffset);
      }
      SumRows<T, kOffset / 2, kLeft / 2>(x, lane);
    } else {
      x[0] += __shfl_xor_sync(0xffffffffu, x[0], kOffset);
      SumRows<T, kOffset / 2, 1>(x, lane);
    }
  }
}

// Of the block's rows, the one whose sums the lane is left with.
template <typename T>
__device__ __forceinline__ int OwnRow(int lane) {
  return lane % T::kLanes / T::kSameRow * T::kRowsAtOnce + lane / T::kLanes;
}

// What one token brings to a head, as it comes.
template <typename T>
struct RawToken {
  float A_log;
  Raw<1> a, dt_bias, b, v;  // v of the lane's own row
  RawVector<T> q, k;
};

template <typename T>
__device__ __forceinline__ RawToken<T> LoadToken(const DecodeParams& p, int64_t head,
                                                 int64_t key_head, unsigned hv, int row,
                                                 int lane) {
  RawToken<T> x;
  Load(p.A_log + hv, x.A_log);
  x.b = LoadRaw<1, T::kStep>(p.b, head);
  x.a = x.dt_bias = {};
  if (T::kStep || !p.per_channel) {
    x.a = LoadRaw<1, T::kStep>(p.a, head);
    x.dt_bias = LoadRaw<1>(p.dt_bias, hv);
  }
  x.v = LoadRaw<1, T::kStep>(p.v, head * (T::kStep ? T::K : p.V) + row);
  __syncwarp();  // The compiler moves no access across.
  x.q = LoadVector<T, T::kStep>(p.q, key_head * T::K, lane);
  x.k = LoadVector<T, T::kStep>(p.k, key_head * T::K, lane);
  __syncwarp();
  return x;
}

// exp(g) of a lane's channels, where each has its own.
template <typename T>
__device__ __forceinline__ Vector<T> LoadDecay(const DecodeParams& p, int64_t head,
                                               unsigned hv, float A_log, int lane) {
  const auto raw_a = LoadVector<T, false>(p.a, head * T::K, lane);
  const auto raw_bias = LoadVector<T, false>(p.dt_bias, int64_t{hv} * T::K, lane);
  Vector<T> decay = Widen<T>(raw_a, p.a.dtype);
  const Vector<T> bias = Widen<T>(raw_bias, p.dt_bias.dtype);
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) decay.x[i] = Decay(A_log, decay.x[i] + bias.x[i]);
  return decay;
}

// Where a slot's state has the lane's first values.
template <typename T>
__device__ __forceinline__ uint4* FirstAccess(const DecodeParams& p, int32_t slot,
                                              unsigned hv, int row, int lane) {
  const int64_t first_row = HeadOfSlot(p, slot, hv) * (T::kStep ? T::K : p.V) + row;
  return reinterpret_cast<uint4*>(p.state.data) + first_row * T::kAccesses +
         lane % T::kLanes;
}

// One token, whose inputs are there.
template <typename T>
__device__ __forceinline__ void DecodeToken(const DecodeParams& p, int64_t head,
                                            unsigned hv, int first_row, int lane,
                                            const RawToken<T>& raw,
                                            float (&s)[T::kRows][T::kOwn]) {
  const bool per_channel = !T::kStep && p.per_channel;
  const Vector<T> q = Widen<T>(raw.q, TypeOf<T::kStep>(p.q));
  const Vector<T> k = Widen<T>(raw.k, TypeOf<T::kStep>(p.k));
  if (per_channel) {
    const Vector<T> decay = LoadDecay<T>(p, head, hv, raw.A_log, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kOwn; ++j) s[i][j] *= decay.x[j];
    }
  }
  float sum_p[T::kRows], sum_r[T::kRows];
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    sum_p[i] = DotOwn<T>(k, s[i]);
    sum_r[i] = DotOwn<T>(q, s[i]);
  }
  SumRows<T>(sum_p, lane);
  SumRows<T>(sum_r, lane);

  const float decay_input =
      Widen(raw.a, TypeOf<T::kStep>(p.a)) + Widen(raw.dt_bias, p.dt_bias.dtype);
  const float decay = per_channel ? 1.0f : Decay(raw.A_log, decay_input);
  const float beta = Beta(Widen(raw.b, TypeOf<T::kStep>(p.b)));
  const Factors factor = NormFactors(p, WarpSum<T::kLanes>(DotOwn<T>(q, q.x)),
                                     WarpSum<T::kLanes>(DotOwn<T>(k, k.x)));
  const float qk = WarpSum<T::kLanes>(DotOwn<T>(q, k.x)) * factor.q * factor.k;

  const float v = Widen(raw.v, TypeOf<T::kStep>(p.v));
  const float u = beta * fmaf(-decay * factor.k, sum_p[0], v);
  if (lane % T::kSameRow == 0) {
    const Output out = {p.out.data, T::kStep ? DType::kBFloat16 : p.out.dtype};
    Store1(out, head * (T::kStep ? T::K : p.V) + first_row + OwnRow<T>(lane),
           fmaf(qk, u, decay * factor.q * sum_r[0]));
  }
  const float own_u = factor.k * u;
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    const float u_i = __shfl_sync(0xffffffffu, own_u, i * T::kSameRow, T::kLanes);
#pragma unroll
    for (int j = 0; j < T::kOwn; ++j) s[i][j] = fmaf(k.x[j], u_i, decay * s[i][j]);
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void DecodeRows(const DecodeParams& p) {
  const int lane = threadIdx.x, first_row = blockIdx.x * T::VT;
  const unsigned n = blockIdx.z, hv = blockIdx.y;
  const int64_t tokens = T::kStep ? 1 : p.T;
  // A lane's rows are lane / kLanes, that + kRowsAtOnce, ... of the block's.
  constexpr int kRowStep = T::kRowsAtOnce * T::kAccesses;
  const auto token = [&](int64_t t) {
    if constexpr (T::kStep) {
      return n;
    } else {
      return n * p.T + t;
    }
  };

  const int32_t read = ReadSlot(p, n);
  if (read == kNoSlot) {
#pragma unroll 1
    for (int64_t t = 0; t < tokens && lane % T::kSameRow == 0; ++t) {
      Store1(p.out, (token(t) * int64_t{p.HV} + hv) * p.V + first_row + OwnRow<T>(lane),
             0.0f);
    }
    return;
  }

  uint4 bits[T::kRows][T::kParts];
  const uint4* from = FirstAccess<T>(p, read, hv, first_row + lane / T::kLanes, lane);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      bits[i][part] = LoadState<T::kStreaming>(from + i * kRowStep + part * T::kLanes);
    }
  }
  __syncwarp();  // The compiler moves no access across.

  const auto load = [&](int64_t t) {
    const auto head = token(t) * p.HV + hv, key_head = token(t) * p.H + KeyHead(p, hv);
    return LoadToken<T>(p, head, key_head, hv, first_row + OwnRow<T>(lane), lane);
  };
  float s[T::kRows][T::kOwn];
  const auto unpack = [&] {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        UnpackState<T::kState>(bits[i][part], &s[i][part * T::kWidth]);
      }
    }
  };
  // A token's inputs are on their way before the state is looked at. That is done
  // ahead of a loop, which would otherwise keep the state's bits too.
  RawToken<T> raw = load(0);
  if constexpr (!T::kStep) unpack();
#pragma unroll 1
  for (int64_t t = 0; t < tokens; ++t) {
    if (!T::kStep && t > 0) raw = load(t);
    const int32_t wanted = WantedSlot(p, n, t, read);
    if constexpr (T::kStep) unpack();
    DecodeToken<T>(p, token(t) * p.HV + hv, hv, first_row, lane, raw, s);
    if (!T::kStep && !p.snapshots && t + 1 < tokens) continue;
    if (CheckSlot(p, wanted) == kNoSlot) continue;
    uint4* to = FirstAccess<T>(p, wanted, hv, first_row + lane / T::kLanes, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        StoreState<T::kStreaming>(to + i * kRowStep + part * T::kLanes,
                                  PackState<T::kState>(&s[i][part * T::kWidth]));
      }
    }
  }
}

}  // namespace

// A kernel under a name that reads well in a profiler; see Kernel.
#define JAX_GDN_NAME(kind, name, K, VT, access) \
  gdn_##kind##_vk_##name##_k##K##_vt##VT##_##access
#define JAX_GDN_IS_STEP_step true
#define JAX_GDN_IS_STEP_decode false
// One block at least leaves the compiler all registers: it then issues the loads of a
// short kernel first. What loops fares better with more blocks.
#define JAX_GDN_BOUNDS_step 32, 1
#define JAX_GDN_BOUNDS_decode 32
#define JAX_GDN_IS_STREAMING_streaming true
#define JAX_GDN_IS_STREAMING_plain false
#define JAX_GDN_DEFINE(kind, name, dtype, K, VT, access, max_states)                   \
  extern "C" __global__ void __launch_bounds__(JAX_GDN_BOUNDS_##kind) JAX_GDN_NAME(    \
      kind, name, K, VT, access)(const __grid_constant__ DecodeParams p) {             \
    DecodeRows<                                                                        \
        Rows<dtype, K, VT, JAX_GDN_IS_STREAMING_##access, JAX_GDN_IS_STEP_##kind>>(p); \
  }
#define JAX_GDN_LIST(kind, name, dtype, K, VT, access, max_states)         \
  {"gdn_" #kind "_vk_" #name "_k" #K "_vt" #VT "_" #access,                \
   reinterpret_cast<const void*>(JAX_GDN_NAME(kind, name, K, VT, access)), \
   Layout::kVK,                                                            \
   dtype,                                                                  \
   K,                                                                      \
   VT,                                                                     \
   /*threads=*/32,                                                         \
   JAX_GDN_IS_STEP_##kind,                                                 \
   max_states},

// Every instance, for the smallest grids first: kind, state, K, VT, access, max_states.
// clang-format off
#define JAX_GDN_FOR_EACH_STEP(X, K)                                                     \
  X(step, f32, DType::kFloat32, K, 8, streaming, 2048)                                  \
  X(step, f32, DType::kFloat32, K, 8, plain, kMany)                                     \
  X(step, bf16, DType::kBFloat16, K, 8, streaming, 2048)                                \
  X(step, bf16, DType::kBFloat16, K, 8, plain, kMany)
#define JAX_GDN_FOR_EACH_DECODE(X, K, VT)                                               \
  X(decode, f32, DType::kFloat32, K, VT, plain, kMany)                                  \
  X(decode, bf16, DType::kBFloat16, K, VT, plain, kMany)                                \
  X(decode, f16, DType::kFloat16, K, VT, plain, kMany)
#define JAX_GDN_FOR_EACH_INSTANCE(X)                                                    \
  JAX_GDN_FOR_EACH_STEP(X, 64) JAX_GDN_FOR_EACH_STEP(X, 128)                            \
  JAX_GDN_FOR_EACH_STEP(X, 192) JAX_GDN_FOR_EACH_STEP(X, 256)                           \
  JAX_GDN_FOR_EACH_DECODE(X, 64, 16) JAX_GDN_FOR_EACH_DECODE(X, 128, 16)                \
  JAX_GDN_FOR_EACH_DECODE(X, 192, 8) JAX_GDN_FOR_EACH_DECODE(X, 256, 8)
// clang-format on

JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

const std::vector<Kernel>& DecodeVKKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
