// What a token brings to a head (q, k, v and gates), for both layouts.
#ifndef JAX_GDN_CUDA_HEAD_CUH_
#define JAX_GDN_CUDA_HEAD_CUH_

#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {

// What both layouts' tiles derive from a kernel's spec.
template <KernelSpec kSpec_>
struct SpecTraits {
  static constexpr KernelSpec kSpec = kSpec_;
  static constexpr DType kState = kSpec.state;
  static constexpr int K = kSpec.K, VT = kSpec.VT;
  static constexpr bool kSingle = kSpec.single_token;
  static constexpr Caching kCaching = kSpec.caching;
};

// A block's place in the operands, and indices that follow from it. In a single-token
// kernel, B HV < 2^32 keeps them in 32 bits.
template <typename T>
struct BlockCoord {
  const DecodeParams& p;
  unsigned n = blockIdx.z;  // sequence
  unsigned hv = blockIdx.y;
  int first_v = blockIdx.x * T::VT;  // its first value channel

  // Of token t among all.
  __device__ __forceinline__ auto Token(int64_t t) const {
    if constexpr (T::kSingle) {
      return n;
    } else {
      return n * p.T + t;
    }
  }
  __device__ __forceinline__ auto Head(int64_t t) const { return Token(t) * p.HV + hv; }
  // Of the first element of its q and k.
  __device__ __forceinline__ int64_t Key(int64_t t) const {
    return int64_t{Token(t) * p.H + KeyHead(p, hv)} * T::K;
  }
  // Of value channel v of the block, in v and `out`.
  __device__ __forceinline__ int64_t Value(int64_t t, int v) const {
    return Head(t) * (T::kSingle ? int64_t{T::K} : int64_t{p.V}) + first_v + v;
  }
  __device__ __forceinline__ bool PerChannel() const {
    return T::kSingle ? T::kSpec.per_channel : p.per_channel;
  }
};

// A lane's part of a K-vector: kWidth neighbouring elements of each of kParts parts,
// where kLanes lanes share a part.
template <int kWidth_, int kLanes_, int kParts_>
struct Slice {
  static constexpr int kWidth = kWidth_, kLanes = kLanes_, kParts = kParts_;
  static constexpr int kSize = kWidth * kParts;
  static constexpr int kPiece = kWidth < 4 ? kWidth : 4;  // of an access
};

template <typename S>
struct VectorRegs {
  Raw<S::kPiece> x[S::kSize / S::kPiece];
};

template <typename S>
struct VectorFrag {
  alignas(4 * (S::kSize < 4 ? S::kSize : 4)) float x[S::kSize];
};

template <typename S, bool kNarrow>
__device__ __forceinline__ VectorRegs<S> LoadVector(const Input& input, int64_t first,
                                                    int lane) {
  VectorRegs<S> regs;
  const int64_t own = first + S::kWidth * (lane % S::kLanes);
#pragma unroll
  for (int i = 0; i < S::kSize; i += S::kPiece) {
    const int part = i / S::kWidth, within = i % S::kWidth;
    regs.x[i / S::kPiece] =
        LoadRaw<S::kPiece, kNarrow>(input, own + S::kWidth * S::kLanes * part + within);
  }
  return regs;
}

template <typename S>
__device__ __forceinline__ VectorFrag<S> Widen(const VectorRegs<S>& regs, DType dtype) {
  VectorFrag<S> frag;
#pragma unroll
  for (int i = 0; i < S::kSize; i += S::kPiece) {
    reinterpret_cast<Floats<S::kPiece>&>(frag.x[i]) =
        Widen(regs.x[i / S::kPiece], dtype);
  }
  return frag;
}

// In shared memory lies the first piece of all lanes, then the second, so that
// neighbouring lanes meet no bank twice. The element at offset j, a multiple of 4.
template <typename S>
__device__ __forceinline__ int ElementAt(int j) {
  const int piece = j / (S::kPiece * S::kLanes), lane = j / S::kPiece % S::kLanes;
  constexpr int kPieces = S::kWidth / S::kPiece;  // of a lane and part
  return (piece / kPieces * S::kLanes + lane) * S::kWidth + piece % kPieces * S::kPiece;
}

template <typename S, int K>
__device__ __forceinline__ void PutVector(const VectorFrag<S>& from, float (&to)[K],
                                          int lane) {
  if (lane >= S::kLanes) return;
#pragma unroll
  for (int i = 0; i < S::kSize; i += S::kPiece) {
    reinterpret_cast<Floats<S::kPiece>&>(to[i * S::kLanes + S::kPiece * lane]) =
        reinterpret_cast<const Floats<S::kPiece>&>(from.x[i]);
  }
}

template <typename S, int K>
__device__ __forceinline__ VectorFrag<S> GetVector(const float (&from)[K], int lane) {
  VectorFrag<S> to;
#pragma unroll
  for (int i = 0; i < S::kSize; i += S::kPiece) {
    reinterpret_cast<Floats<S::kPiece>&>(to.x[i]) =
        reinterpret_cast<const Floats<S::kPiece>&>(
            from[i * S::kLanes + S::kPiece * (lane % S::kLanes)]);
  }
  return to;
}

template <typename S>
__device__ __forceinline__ VectorFrag<S> operator+(const VectorFrag<S>& x,
                                                   const VectorFrag<S>& y) {
  VectorFrag<S> sum;
#pragma unroll
  for (int i = 0; i < S::kSize; ++i) sum.x[i] = x.x[i] + y.x[i];
  return sum;
}

// A lane's part of a sum over K.
template <typename S>
__device__ __forceinline__ float DotFrag(const VectorFrag<S>& x, const float* y) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < S::kSize; ++i) sum = fmaf(x.x[i], y[i], sum);
  return sum;
}

// All of a token but v, on its way to one warp. That one works on all of K, so the bits
// do not depend on the block's shape.
template <typename T>
struct HeadRegs {
  VectorRegs<typename T::Slice> q, k;
  Raw<1> a, dt_bias, b;
  float A_log;
};

template <typename T>
__device__ __forceinline__ HeadRegs<T> LoadHead(const BlockCoord<T>& at, int64_t t,
                                                int lane) {
  using S = typename T::Slice;
  const DecodeParams& p = at.p;
  const auto head = at.Head(t);
  const int64_t key = at.Key(t);
  HeadRegs<T> regs = {};
  regs.q = LoadVector<S, T::kSingle>(p.q, key, lane);
  regs.k = LoadVector<S, T::kSingle>(p.k, key, lane);
  Load(p.A_log + at.hv, regs.A_log);
  regs.b = LoadRaw<1>(p.b, head);
  if (!at.PerChannel()) {
    regs.a = LoadRaw<1>(p.a, head);
    regs.dt_bias = LoadRaw<1>(p.dt_bias, at.hv);
  }
  __syncwarp();
  return regs;
}

template <typename T, typename S = typename T::Slice>
__device__ __forceinline__ Gates MakeGates(const BlockCoord<T>& at,
                                           const HeadRegs<T>& regs,
                                           const VectorFrag<S>& q,
                                           const VectorFrag<S>& k) {
  const float qq = WarpSum<S::kLanes>(DotFrag<S>(q, q.x));
  const float kk = WarpSum<S::kLanes>(DotFrag<S>(k, k.x));
  const float qk = WarpSum<S::kLanes>(DotFrag<S>(q, k.x));
  const DecodeParams& p = at.p;
  const float a = Widen(regs.a, p.a.dtype);
  const float dt_bias = Widen(regs.dt_bias, p.dt_bias.dtype);
  const float decay = at.PerChannel() ? 1.0f : DecayOf(p, regs.A_log, a, dt_bias);
  return MakeGates(p, decay, Widen(regs.b, p.b.dtype), qq, kk, qk);
}

// One warp stages exp(g) of the channels, where each has its own: as GetVector reads
// it.
template <typename T>
__device__ __forceinline__ void StageDecay(const BlockCoord<T>& at, int64_t t, int lane,
                                           float A_log, float (&to)[T::K]) {
  const DecodeParams& p = at.p;
  for (int j = 4 * lane; j < T::K; j += 128) {
    const int i = ElementAt<typename T::Slice>(j);
    const float4 a = Widen(LoadRaw<4>(p.a, at.Head(t) * int64_t{T::K} + i), p.a.dtype);
    const float4 bias =
        Widen(LoadRaw<4>(p.dt_bias, int64_t{at.hv} * T::K + i), p.dt_bias.dtype);
    reinterpret_cast<float4&>(to[j]) = {
        DecayOf(p, A_log, a.x, bias.x), DecayOf(p, A_log, a.y, bias.y),
        DecayOf(p, A_log, a.z, bias.z), DecayOf(p, A_log, a.w, bias.w)};
  }
}

// A token staged for all warps of a block: q and k as they came, as float32.
template <typename T>
struct TokenSmem {
  alignas(16) float q[T::K];
  alignas(16) float k[T::K];
  alignas(16) float decay[T::K];  // exp(g) of the channels, where each has its own
  alignas(16) float v[T::VT];
  Gates gates;
};

// Each warp stages a token, from `first` on.
template <typename T>
__device__ __forceinline__ void StageTokens(const BlockCoord<T>& at, int64_t first,
                                            int warp, int lane,
                                            TokenSmem<T> (&tokens)[T::kWarps]) {
  const DecodeParams& p = at.p;
  const int64_t t = first + warp;
  if (t >= p.T) return;
  TokenSmem<T>& to = tokens[warp];
  // All loads before the first is looked at.
  Raw<4> v = {};
  if (lane < T::VT / 4) v = LoadRaw<4>(p.v, at.Value(t, 4 * lane));
  const HeadRegs<T> regs = LoadHead<T>(at, t, lane);
  const auto q = Widen(regs.q, p.q.dtype), k = Widen(regs.k, p.k.dtype);
  PutVector(q, to.q, lane);
  PutVector(k, to.k, lane);
  const Gates gates = MakeGates<T>(at, regs, q, k);
  if (p.per_channel) StageDecay<T>(at, t, lane, regs.A_log, to.decay);
  if (lane < T::VT / 4) reinterpret_cast<float4*>(to.v)[lane] = Widen(v, p.v.dtype);
  if (lane == 0) to.gates = gates;
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_HEAD_CUH_
