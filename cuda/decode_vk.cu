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
// A block is one warp, with VT rows. It computes gates, norms and q.k for itself: few
// rows give a small batch more warps, many spend less on what is not the state. As in
// decode_kv.cu, what normalises q and k is a factor on the sums.
#include "cuda/decode_vk.h"
#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {
namespace {

template <DType kState_, int K_, int VT_>
struct Rows {
  static constexpr DType kState = kState_;
  static constexpr int K = K_, VT = VT_;
  static constexpr int kWidth = kValues<kState>;  // values in an access
  static constexpr int kAccesses = K / kWidth;    // of a row
  // The largest power of two that divides them, at most a warp.
  static constexpr int kPower = kAccesses & -kAccesses;
  static constexpr int kLanes = kPower < 32 ? kPower : 32;  // that share a row
  static constexpr int kParts = kAccesses / kLanes;  // accesses of a lane and row
  static constexpr int kOwn = kParts * kWidth;       // values of a lane and row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kRows = VT / kRowsAtOnce;  // of a lane
  // Small blocks serve small batches; see LoadState.
  static constexpr bool kStreaming = VT == 4;
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
  Vector<T> q, k;  // as they came
  float decay;     // exp(g), common to the head; 1 where each channel has its own
  float beta;
  Factors factor;  // that normalise q (and scale it) and k
  float qk;        // q.k of the vectors so multiplied
};

template <typename T>
__device__ __forceinline__ Token<T> LoadToken(const DecodeParams& p, int64_t n,
                                              unsigned hv, int64_t t, int lane) {
  const int64_t token = n * p.T + t, head = token * p.HV + hv;
  const int64_t key_head = token * p.H + KeyHead(p, hv);
  float A_log;
  Load(p.A_log + hv, A_log);
  const Raw<1> b = LoadRaw<1>(p.b, head);
  Raw<1> a = {}, bias = {};
  if (!p.per_channel) {
    a = LoadRaw<1>(p.a, head);
    bias = LoadRaw<1>(p.dt_bias, hv);
  }
  const RawVector<T> raw_q = LoadVector<T>(p.q, key_head * T::K, lane);
  const RawVector<T> raw_k = LoadVector<T>(p.k, key_head * T::K, lane);

  Token<T> x;
  x.q = Widen<T>(raw_q, p.q.dtype);
  x.k = Widen<T>(raw_k, p.k.dtype);
  x.factor = NormFactors(p, Dot<T>(x.q, x.q.x), Dot<T>(x.k, x.k.x));
  x.qk = Dot<T>(x.q, x.k.x) * x.factor.q * x.factor.k;
  x.beta = Beta(Widen(b, p.b.dtype));
  const float decay_input = Widen(a, p.a.dtype) + Widen(bias, p.dt_bias.dtype);
  x.decay = p.per_channel ? 1.0f : Decay(A_log, decay_input);
  return x;
}

// exp(g) of a lane's channels, where each has its own.
template <typename T>
__device__ __forceinline__ Vector<T> LoadDecay(const DecodeParams& p, int64_t n,
                                               unsigned hv, int64_t t, int lane) {
  float A_log;
  Load(p.A_log + hv, A_log);
  const int64_t head = (n * p.T + t) * p.HV + hv;
  const RawVector<T> raw_a = LoadVector<T>(p.a, head * T::K, lane);
  const RawVector<T> raw_bias = LoadVector<T>(p.dt_bias, int64_t{hv} * T::K, lane);
  Vector<T> decay = Widen<T>(raw_a, p.a.dtype);
  const Vector<T> bias = Widen<T>(raw_bias, p.dt_bias.dtype);
#pragma unroll
  for (int i = 0; i < T::kOwn; ++i) decay.x[i] = Decay(A_log, decay.x[i] + bias.x[i]);
  return decay;
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
  const int lane = threadIdx.x;
  const int64_t n = blockIdx.z;
  const unsigned hv = blockIdx.y;
  // The lane's rows are own_row, own_row + kRowsAtOnce, ... of the block's.
  const int first_row = blockIdx.x * T::VT, own_row = lane / T::kLanes;
  constexpr int kRowStep = T::kRowsAtOnce * T::kAccesses;

  const int64_t read = ReadSlot(p, n);
  if (read == kNoSlot) {
    for (int64_t t = 0; t < p.T && lane < T::VT; ++t) {
      Store1(p.out, ((n * p.T + t) * p.HV + hv) * p.V + first_row + lane, 0.0f);
    }
    return;
  }

  uint4 bits[T::kRows][T::kParts];
  const uint4* from = FirstAccess<T>(p, read, hv, first_row + own_row, lane);
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      bits[i][part] = LoadState<T::kStreaming>(from + i * kRowStep + part * T::kLanes);
    }
  }

  float s[T::kRows][T::kOwn];
#pragma unroll 1
  for (int64_t t = 0; t < p.T; ++t) {
    const int64_t out_index = ((n * p.T + t) * p.HV + hv) * p.V + first_row;
    const int64_t write = WriteSlot(p, n, t, read);
    Raw<1> raw_v = {};  // lane r brings the value of row r
    if (lane < T::VT) raw_v = LoadRaw<1>(p.v, out_index + lane);
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
    if (p.per_channel) {
      const Vector<T> decay = LoadDecay<T>(p, n, hv, t, lane);
#pragma unroll
      for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < T::kOwn; ++j) s[i][j] *= decay.x[j];
      }
    }
    const float v = Widen(raw_v, p.v.dtype);
    float out = 0.0f;  // lane r keeps the output of row r
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      const float v_i = __shfl_sync(0xffffffffu, v, i * T::kRowsAtOnce + own_row);
      const float u = x.beta * fmaf(-x.decay * x.factor.k, Dot<T>(x.k, s[i]), v_i);
      const float out_i = fmaf(x.qk, u, x.decay * x.factor.q * Dot<T>(x.q, s[i]));
      const float gathered =
          __shfl_sync(0xffffffffu, out_i, lane % T::kRowsAtOnce * T::kLanes);
      if (lane / T::kRowsAtOnce == i) out = gathered;
#pragma unroll
      for (int j = 0; j < T::kOwn; ++j) {
        s[i][j] = fmaf(x.k.x[j], x.factor.k * u, x.decay * s[i][j]);
      }
    }
    if (lane < T::VT) Store1(p.out, out_index + lane, out);
    if (write == kNoSlot) continue;
    uint4* to = FirstAccess<T>(p, write, hv, first_row + own_row, lane);
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

// One kernel an instance, under a name that reads well in a profiler.
// clang-format off
#define JAX_GDN_FOR_EACH_TILE(INSTANCE, ...)                    \
  INSTANCE(__VA_ARGS__, 64, 4) INSTANCE(__VA_ARGS__, 64, 16)    \
  INSTANCE(__VA_ARGS__, 128, 4) INSTANCE(__VA_ARGS__, 128, 16)  \
  INSTANCE(__VA_ARGS__, 192, 4) INSTANCE(__VA_ARGS__, 192, 8)   \
  INSTANCE(__VA_ARGS__, 256, 4) INSTANCE(__VA_ARGS__, 256, 8)
#define JAX_GDN_FOR_EACH_INSTANCE(INSTANCE)               \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, f32, DType::kFloat32)   \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, bf16, DType::kBFloat16) \
  JAX_GDN_FOR_EACH_TILE(INSTANCE, f16, DType::kFloat16)
// clang-format on

#define JAX_GDN_NAME(name, K, VT) gdn_decode_vk_##name##_k##K##_vt##VT
#define JAX_GDN_DEFINE(name, dtype, K, VT)                                \
  extern "C" __global__ void __launch_bounds__(32)                        \
      JAX_GDN_NAME(name, K, VT)(const __grid_constant__ DecodeParams p) { \
    DecodeRows<Rows<dtype, K, VT>>(p);                                    \
  }
JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

#define JAX_GDN_LIST(name, dtype, K, VT)                     \
  {"gdn_decode_vk_" #name "_k" #K "_vt" #VT,                 \
   reinterpret_cast<const void*>(JAX_GDN_NAME(name, K, VT)), \
   Layout::kVK,                                              \
   dtype,                                                    \
   K,                                                        \
   VT,                                                       \
   /*threads=*/32},

const std::vector<Kernel>& DecodeVKKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
