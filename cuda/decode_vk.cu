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
#include "cuda/rows.cuh"

namespace jax_gdn {
namespace {

// What one token brings to a head, on its way: v of the lane's own row, q and k.
template <typename T>
struct RawToken {
  Raw<1> v;
  RawVector<T> q, k;
};

template <typename T>
__device__ __forceinline__ RawToken<T> LoadToken(const DecodeParams& p, int64_t head,
                                                 int64_t key_head, int row, int lane) {
  RawToken<T> x;
  x.v = LoadRaw<1, T::kStep>(p.v, head * (T::kStep ? T::K : p.V) + row);
  __syncwarp();  // The compiler moves no access across.
  x.q = LoadVector<T, T::kStep>(p.q, key_head * T::K, lane);
  x.k = LoadVector<T, T::kStep>(p.k, key_head * T::K, lane);
  __syncwarp();
  return x;
}

// What its gates are made of.
struct RawGates {
  float A_log;
  Raw<1> a, dt_bias, b;
};

template <typename T>
__device__ __forceinline__ RawGates LoadGates(const DecodeParams& p, int64_t head,
                                              unsigned hv) {
  RawGates x = {};
  Load(p.A_log + hv, x.A_log);
  x.b = LoadRaw<1, T::kStep>(p.b, head);
  if (T::kStep || !p.per_channel) {
    x.a = LoadRaw<1, T::kStep>(p.a, head);
    x.dt_bias = LoadRaw<1>(p.dt_bias, hv);
  }
  __syncwarp();
  return x;
}

struct Gates {
  float decay;  // exp(g), common to the head; 1 where each channel has its own
  float beta;   // write strength
};

template <typename T>
__device__ __forceinline__ Gates MakeGates(const DecodeParams& p, const RawGates& x) {
  const float decay_input =
      Widen(x.a, TypeOf<T::kStep>(p.a)) + Widen(x.dt_bias, p.dt_bias.dtype);
  return {!T::kStep && p.per_channel ? 1.0f : Decay(x.A_log, decay_input),
          Beta(Widen(x.b, TypeOf<T::kStep>(p.b)))};
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
                                            const RawToken<T>& raw, const Gates& gates,
                                            float A_log,
                                            float (&s)[T::kRows][T::kOwn]) {
  const Vector<T> q = Widen<T>(raw.q, TypeOf<T::kStep>(p.q));
  const Vector<T> k = Widen<T>(raw.k, TypeOf<T::kStep>(p.k));
  if (!T::kStep && p.per_channel) {
    const Vector<T> decay = LoadDecay<T>(p, head, hv, A_log, lane);
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < T::kOwn; ++j) s[i][j] *= decay.x[j];
    }
  }
  const Factors factor = NormFactors(p, WarpSum<T::kLanes>(DotOwn<T>(q, q.x)),
                                     WarpSum<T::kLanes>(DotOwn<T>(k, k.x)));
  const float qk = WarpSum<T::kLanes>(DotOwn<T>(q, k.x)) * factor.q * factor.k;
  float sum_p[T::kRows], sum_r[T::kRows];
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    sum_p[i] = DotOwn<T>(k, s[i]);
    sum_r[i] = DotOwn<T>(q, s[i]);
  }
  SumRows<T>(sum_p, lane);
  SumRows<T>(sum_r, lane);

  const float v = Widen(raw.v, TypeOf<T::kStep>(p.v)), decay = gates.decay;
  const float u = gates.beta * fmaf(-decay * factor.k, sum_p[0], v);
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

// A block's place in the operands.
struct Place {
  unsigned n;  // sequence
  unsigned hv;
  int first_row;  // of V
  int lane;
};

// One token.
template <typename T>
__device__ __forceinline__ void DecodeStep(const DecodeParams& p, const Place& at,
                                           int32_t read) {
  const unsigned head = at.n * p.HV + at.hv, key_head = at.n * p.H + KeyHead(p, at.hv);
  const int row = at.first_row + at.lane / T::kLanes;
  // All loads before the first is looked at.
  OwnRows<T> rows;
  rows.LoadFrom(FirstAccess<T>(p, read, at.hv, row, at.lane));
  const RawGates raw_gates = LoadGates<T>(p, head, at.hv);
  const RawToken<T> raw =
      LoadToken<T>(p, head, key_head, at.first_row + OwnRow<T>(at.lane), at.lane);
  const int32_t wanted = WantedSlot(p, at.n, 0, read);
  const Gates gates = MakeGates<T>(p, raw_gates);
  float s[T::kRows][T::kOwn];
  rows.Unpack(s);
  DecodeToken<T>(p, head, at.hv, at.first_row, at.lane, raw, gates, raw_gates.A_log, s);
  if (CheckSlot(p, wanted) == kNoSlot) return;
  rows.Store(s, FirstAccess<T>(p, wanted, at.hv, row, at.lane));
}

// Any number of tokens. A token's inputs are on their way while the one before it is
// computed, and the gates of 32 tokens are made at once, a token a lane.
template <typename T>
__device__ __forceinline__ void DecodeTokens(const DecodeParams& p, const Place& at,
                                             int32_t read) {
  const int row = at.first_row + at.lane / T::kLanes;
  const auto head = [&](int64_t t) { return (at.n * p.T + t) * p.HV + at.hv; };
  const auto load = [&](int64_t t) {
    const int64_t key_head = (at.n * p.T + t) * p.H + KeyHead(p, at.hv);
    return LoadToken<T>(p, head(t), key_head, at.first_row + OwnRow<T>(at.lane),
                        at.lane);
  };
  float s[T::kRows][T::kOwn];
  RawToken<T> next;
  {
    OwnRows<T> rows;
    rows.LoadFrom(FirstAccess<T>(p, read, at.hv, row, at.lane));
    next = load(0);
    rows.Unpack(s);  // ahead of the loop, which would otherwise keep the bits too
  }
  float A_log = 0.0f;
  Gates own_gates = {};  // of the token of the lane
#pragma unroll 1
  for (int64_t t = 0; t < p.T; ++t) {
    const int of_lane = t % 32;
    if (of_lane == 0) {
      const RawGates raw = LoadGates<T>(p, head(min(t + at.lane, p.T - 1)), at.hv);
      own_gates = MakeGates<T>(p, raw);
      A_log = raw.A_log;
    }
    const RawToken<T> raw = next;
    if (t + 1 < p.T) next = load(t + 1);
    const int32_t wanted = WantedSlot(p, at.n, t, read);
    const Gates gates = {__shfl_sync(0xffffffffu, own_gates.decay, of_lane),
                         __shfl_sync(0xffffffffu, own_gates.beta, of_lane)};
    DecodeToken<T>(p, head(t), at.hv, at.first_row, at.lane, raw, gates, A_log, s);
    if (!p.snapshots && t + 1 < p.T) continue;
    if (CheckSlot(p, wanted) == kNoSlot) continue;
    OwnRows<T>::Store(s, FirstAccess<T>(p, wanted, at.hv, row, at.lane));
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void Decode(const DecodeParams& p) {
  const Place at = {blockIdx.z, blockIdx.y, static_cast<int>(blockIdx.x * T::VT),
                    static_cast<int>(threadIdx.x)};
  const int32_t read = ReadSlot(p, at.n);
  if (read == kNoSlot) {
    const int64_t tokens = T::kStep ? 1 : p.T;
#pragma unroll 1
    for (int64_t t = 0; t < tokens && at.lane % T::kSameRow == 0; ++t) {
      const int64_t head = (at.n * p.T + t) * p.HV + at.hv;
      Store1(p.out, head * p.V + at.first_row + OwnRow<T>(at.lane), 0.0f);
    }
  } else if constexpr (T::kStep) {
    DecodeStep<T>(p, at, read);
  } else {
    DecodeTokens<T>(p, at, read);
  }
}

}  // namespace

// A kernel under a name that reads well in a profiler; see Kernel.
#define JAX_GDN_NAME(kind, name, K, VT, access) \
  gdn_##kind##_vk_##name##_k##K##_vt##VT##_##access
#define JAX_GDN_IS_STEP_step true
#define JAX_GDN_IS_STEP_decode false
// One block at least leaves the compiler all registers: it then issues the loads of a
// short kernel first. A float32 state's tokens fit 16 blocks on a multiprocessor;
// 16-bit ones, unpacked, would spill.
#define JAX_GDN_BOUNDS(kind, name, K) (JAX_GDN_BLOCKS_##kind##_##name(K))
#define JAX_GDN_BLOCKS_step_f32(K) 1
#define JAX_GDN_BLOCKS_step_bf16(K) 1
#define JAX_GDN_BLOCKS_decode_f32(K) (K <= 128 ? 16 : 0)
#define JAX_GDN_BLOCKS_decode_bf16(K) 0
#define JAX_GDN_BLOCKS_decode_f16(K) 0
#define JAX_GDN_IS_STREAMING_streaming true
#define JAX_GDN_IS_STREAMING_plain false
#define JAX_GDN_DEFINE(kind, name, dtype, K, VT, access, max_states)                   \
  extern "C" __global__ void __launch_bounds__(32, JAX_GDN_BOUNDS(kind, name, K))      \
      JAX_GDN_NAME(kind, name, K, VT,                                                  \
                   access)(const __grid_constant__ DecodeParams p) {                   \
    Decode<Rows<dtype, K, VT, JAX_GDN_IS_STREAMING_##access, JAX_GDN_IS_STEP_##kind>>( \
        p);                                                                            \
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
  X(step, f32, DType::kFloat32, K, 8, streaming, 4096)                                  \
  X(step, f32, DType::kFloat32, K, 8, plain, kMany)                                     \
  X(step, bf16, DType::kBFloat16, K, 8, streaming, 128)
#define JAX_GDN_FOR_EACH_LONG_STEP(X, K)                                                \
  X(step, bf16, DType::kBFloat16, K, 16, streaming, 4096)                               \
  X(step, bf16, DType::kBFloat16, K, 16, plain, kMany)
#define JAX_GDN_FOR_EACH_DECODE(X, K, VT)                                               \
  X(decode, f32, DType::kFloat32, K, VT, plain, kMany)                                  \
  X(decode, bf16, DType::kBFloat16, K, VT, plain, kMany)                                \
  X(decode, f16, DType::kFloat16, K, VT, plain, kMany)
#define JAX_GDN_FOR_EACH_INSTANCE(X)                                                    \
  JAX_GDN_FOR_EACH_STEP(X, 64) JAX_GDN_FOR_EACH_STEP(X, 128)                            \
  JAX_GDN_FOR_EACH_STEP(X, 192) JAX_GDN_FOR_EACH_STEP(X, 256)                           \
  JAX_GDN_FOR_EACH_LONG_STEP(X, 64) JAX_GDN_FOR_EACH_LONG_STEP(X, 128)                  \
  JAX_GDN_FOR_EACH_DECODE(X, 64, 16) JAX_GDN_FOR_EACH_DECODE(X, 128, 16)                \
  JAX_GDN_FOR_EACH_DECODE(X, 192, 8) JAX_GDN_FOR_EACH_DECODE(X, 256, 8)
// clang-format on

JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_DEFINE)

const std::vector<Kernel>& DecodeVKKernels() {
  static const std::vector<Kernel> kernels = {JAX_GDN_FOR_EACH_INSTANCE(JAX_GDN_LIST)};
  return kernels;
}

}  // namespace jax_gdn
