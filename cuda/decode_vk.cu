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
// A warp owns kRows of these accesses, a block up to four warps. Each warp computes
// gates, norms and q.k for itself; that hides behind the state's loads.
#include "cuda/decode_vk.h"
#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {
namespace {

template <DType kState_, int K_>
struct Rows {
  static constexpr DType kState = kState_;
  static constexpr int K = K_;
  static constexpr int kWidth = kValues<kState>;  // values in an access
  static constexpr int kAccesses = K / kWidth;    // of a row
  // The largest power of two that divides them, at most a warp.
  static constexpr int kPower = kAccesses & -kAccesses;
  static constexpr int kLanes = kPower < 32 ? kPower : 32;  // that share a row
  static constexpr int kParts = kAccesses / kLanes;  // accesses of a lane and row
  static constexpr int kOwn = kParts * kWidth;       // values of a lane and row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  // About 16 values a lane: enough in flight, and small blocks.
  static constexpr int kRows = kOwn < 16 ? 16 / kOwn : 1;  // of a lane
  static constexpr int kRowsOfWarp = kRows * kRowsAtOnce;
  static constexpr int kWarps = 16 / kRowsOfWarp < 4 ? 16 / kRowsOfWarp : 4;
  static constexpr int VT = kWarps * kRowsOfWarp;
  static constexpr int kThreads = 32 * kWarps;
  static_assert(K % 64 == 0 && 16 % VT == 0);
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

template <typename T>
__device__ __forceinline__ RawVector<T> LoadVector(const Input& input, int64_t first,
                                                   int lane) {
  RawVector<T> raw;
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) {
    const int channel = T::kWidth * (lane % T::kLanes + T::kLanes * part);
#pragma unroll
    for (int i = 0; i < T::kWidth / 4; ++i) {
      raw.x[part * T::kWidth / 4 + i] = LoadRaw<4>(input, first + channel + 4 * i);
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

template <typename T>
__device__ __forceinline__ float Dot(const Vector<T>& x, const float* y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) sum = fmaf(x.x[i], y[i], sum);
  return WarpSum<T::kLanes>(sum);
}

// What one token brings to every row.
template <typename T>
struct Token {
  Vector<T> q, k;   // normalised, q scaled
  Vector<T> decay;  // exp(g), the same in all channels or not
  float beta, qk;
};

template <typename T>
__device__ __forceinline__ Token<T> LoadToken(const DecodeParams& p, int64_t n,
                                              unsigned hv, int64_t t, int lane) {
  const int64_t token = n * p.T + t, head = token * p.HV + hv;
  const int64_t key_head = token * p.H + KeyHead(p, hv);
  float A_log;
  Load(p.A_log + hv, A_log);
  const Raw<1> b = LoadRaw<1>(p.b, head);
  const RawVector<T> raw_q = LoadVector<T>(p.q, key_head * T::K, lane);
  const RawVector<T> raw_k = LoadVector<T>(p.k, key_head * T::K, lane);

  Token<T> x;
  if (p.per_channel) {
    const RawVector<T> raw_a = LoadVector<T>(p.a, head * T::K, lane);
    const RawVector<T> raw_bias =
        LoadVector<T>(p.dt_bias, static_cast<int64_t>(hv) * T::K, lane);
    const Vector<T> a = Widen<T>(raw_a, p.a.dtype);
    const Vector<T> bias = Widen<T>(raw_bias, p.dt_bias.dtype);
#pragma unroll
    for (int i = 0; i < T::kOwn; ++i) x.decay.x[i] = Decay(A_log, a.x[i] + bias.x[i]);
  } else {
    const Raw<1> a = LoadRaw<1>(p.a, head), bias = LoadRaw<1>(p.dt_bias, hv);
    const float decay =
        Decay(A_log, Widen(a, p.a.dtype) + Widen(bias, p.dt_bias.dtype));
#pragma unroll
    for (int i = 0; i < T::kOwn; ++i) x.decay.x[i] = decay;
  }
  x.beta = Beta(Widen(b, p.b.dtype));
  x.q = Widen<T>(raw_q, p.q.dtype);
  x.k = Widen<T>(raw_k, p.k.dtype);
  const Factors factor = NormFactors(p, Dot<T>(x.q, x.q.x), Dot<T>(x.k, x.k.x));
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) {
    x.q.x[i] *= factor.q;
    x.k.x[i] *= factor.k;
  }
  x.qk = Dot<T>(x.q, x.k.x);
  return x;
}

// Where a slot's state has the lane's first values.
template <typename T>
__device__ __forceinline__ uint4* FirstAccess(const DecodeParams& p, int64_t slot,
                                              unsigned hv, int row, int lane) {
  const int64_t first_row = (slot * p.HV + hv) * p.V + row;
  return reinterpret_cast<uint4*>(p.state.data) + first_row * T::kAccesses +
         lane % T::kLanes;
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void DecodeRows(const DecodeParams& p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.z;
  const unsigned hv = blockIdx.y;
  // The lane's rows are row, row + kRowsAtOnce, ...
  const int row = blockIdx.x * T::VT + warp * T::kRowsOfWarp + lane / T::kLanes;
  const bool writes_out = lane % T::kLanes == 0;
  constexpr int kRowStep = T::kRowsAtOnce * T::kAccesses;

  const int64_t read = ReadSlot(p, n);
  if (read == kNoSlot) {
    for (int64_t t = 0; t < p.T && writes_out; ++t) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
        Store1(p.out, ((n * p.T + t) * p.HV + hv) * p.V + row + i * T::kRowsAtOnce,
               0.0f);
      }
    }
    return;
  }

  uint4 bits[T::kRows][T::kParts];
  const uint4* from = FirstAccess<T>(p, read, hv, row, lane);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      bits[i][part] = LoadState<true>(from + i * kRowStep + part * T::kLanes);
    }
  }

  float s[T::kRows][T::kOwn];
#pragma unroll 1
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t out_index = ((n * p.T + t) * p.HV + hv) * p.V + row;
    const int64_t write = WriteSlot(p, n, t, read);
    Raw<1> v[T::kRows];
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      v[i] = LoadRaw<1>(p.v, out_index + i * T::kRowsAtOnce);
    }
    const Token<T> x = LoadToken<T>(p, n, hv, t, lane);
    if (t == 0) {
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
        for (int part = 0; part < T::kParts; ++part) {
          UnpackState<T::kState>(bits[i][part], &s[i][part * T::kWidth]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kOwn; ++j) s[i][j] *= x.decay.x[j];
      const float u = x.beta * (Widen(v[i], p.v.dtype) - Dot<T>(x.k, s[i]));
      const float out = fmaf(x.qk, u, Dot<T>(x.q, s[i]));
      if (writes_out) Store1(p.out, out_index + i * T::kRowsAtOnce, out);
#pragma unroll
      for (int j = 0; j < T::kOwn; ++j) s[i][j] = fmaf(x.k.x[j], u, s[i][j]);
    }
    if (write == kNoSlot) continue;
    uint4* to = FirstAccess<T>(p, write, hv, row, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        StoreState<true>(to + i * kRowStep + part * T::kLanes,
                         PackState<T::kState>(&s[i][part * T::kWidth]));
      }
    }
  }
}

}  // namespace

// One kernel an instance, under a name that reads well in a profiler.
// clang-format off
#define JAX_GDN_FOR_EACH_INSTANCE(INSTANCE)                                   \
  INSTANCE(f32, DType::kFloat32, 64) INSTANCE(f32, DType::kFloat32, 128)      \
  INSTANCE(f32, DType::kFloat32, 192) INSTANCE(f32, DType::kFloat32, 256)     \
  INSTANCE(bf16, DType::kBFloat16, 64) INSTANCE(bf16, DType::kBFloat16, 128)  \
  INSTANCE(bf16, DType::kBFloat16, 192) INSTANCE(bf16, DType::kBFloat16, 256) \
  INSTANCE(f16, DType::kFloat16, 64) INSTANCE(f16, DType::kFloat16, 128)      \
  INSTANCE(f16, DType::kFloat16, 192) INSTANCE(f16, DType::kFloat16, 256)
// clang-format on

#define JAX_GDN_NAME(name, K) gdn_decode_vk_##name##_k##K
#define JAX_GDN_DEFINE(name, dtype, K)                                     \
  extern "C" __global__ void __launch_bounds__((Rows<dtype, K>::kThreads)) \
      JAX_GDN_NAME(name, K)(const __grid_constant__ DecodeParams p) {      \
    DecodeRows<Rows<dtype, K>>(p);                                         \
  }
JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

#define JAX_GDN_LIST(name, dtype, K)                     \
  {"gdn_decode_vk_" #name "_k" #K,                       \
   reinterpret_cast<const void*>(JAX_GDN_NAME(name, K)), \
   Layout::kVK,                                          \
   dtype,                                                \
   K,                                                    \
   Rows<dtype, K>::VT,                                   \
   Rows<dtype, K>::kThreads},

const std::vector<Kernel>& DecodeVKKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
