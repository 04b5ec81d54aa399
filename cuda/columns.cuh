// v and `out` of a thread's columns, and v of a block's, for states laid out [K, V].
#ifndef JAX_GDN_CUDA_COLUMNS_CUH_
#define JAX_GDN_CUDA_COLUMNS_CUH_

#include "cuda/tile.cuh"

namespace jax_gdn {

// Value channels of a head.
template <typename T>
__device__ __forceinline__ int ValueChannels(const DecodeParams& p) {
  return T::kStep ? T::K : p.V;
}

// A thread's values of v in a "step", on their way.
template <typename T>
struct RawV {
  Raw<T::kPiece> x[T::kColumns / T::kPiece];
};

template <typename T>
__device__ __forceinline__ RawV<T> LoadV(const DecodeParams& p, const Place& at,
                                         int column) {
  static_assert(T::kStep);
  const int64_t head = at.n * p.HV + at.hv;
  const int64_t first = head * T::K + at.first_column + column;
  RawV<T> raw;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += T::kPiece) {
    raw.x[c / T::kPiece] = LoadRaw<T::kPiece, true>(p.v, first + c);
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ Columns<T::kColumns> WidenV(const RawV<T>& raw) {
  Columns<T::kColumns> v;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += T::kPiece) {
    reinterpret_cast<typename T::Piece&>(v.x[c]) =
        Widen(raw.x[c / T::kPiece], DType::kBFloat16);
  }
  return v;
}

// Stores `out` of the thread's columns.
template <typename T>
__device__ __forceinline__ void StoreOut(const DecodeParams& p, const Place& at,
                                         int64_t t, int column,
                                         const Columns<T::kColumns>& out) {
  const int64_t head = at.Token<T::kStep>(p, t) * p.HV + at.hv;
  const DType dtype = T::kStep ? DType::kBFloat16 : p.out.dtype;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += T::kPiece) {
    Store<T::kPiece>({p.out.data, dtype},
                     head * ValueChannels<T>(p) + at.first_column + column + c,
                     reinterpret_cast<const typename T::Piece&>(out.x[c]));
  }
}

// A row that is padding.
template <typename T>
__device__ __forceinline__ void StoreZeros(const DecodeParams& p, const Place& at,
                                           int64_t tokens, const Thread<T>& thread) {
  const Columns<T::kColumns> zeros = {};
  for (int64_t t = 0; t < tokens && thread.group == 0; ++t) {
    StoreOut<T>(p, at, t, thread.column, zeros);
  }
}

// What a token brings to the block, on its way to one warp.
template <typename T>
struct RawInputs {
  static_assert(T::kPiece == 4);
  static constexpr int kLanesOfV = T::VT / 4;
  Raw<4> v;
  RawHead<T::K> head;

  // The lane's four columns of v, in the order of PlaceOf.
  __device__ __forceinline__ static int Column(int lane) {
    return lane % T::kLanes * T::kColumns + lane / T::kLanes * 4;
  }
  __device__ __forceinline__ void LoadFrom(const DecodeParams& p, const Place& at,
                                           int64_t t, int lane) {
    if (lane < kLanesOfV) {
      const int64_t head = at.Token<false>(p, t) * p.HV + at.hv;
      v = LoadRaw<4>(p.v, head * p.V + at.first_column + Column(lane));
    }
    head = LoadHead<T::K, false>(p, at, t, lane);
  }
  __device__ __forceinline__ void Stage(const DecodeParams& p, const Place& at,
                                        int64_t t, int lane,
                                        HeadInputs<T::K, false>& to_head,
                                        Columns<T::VT>& to_v) const {
    StageToken<T::K>(p, at, t, lane, head, to_head);
    if (lane < kLanesOfV) {
      *reinterpret_cast<float4*>(to_v.x + PlaceOf<T>(Column(lane))) =
          Widen(v, p.v.dtype);
    }
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_COLUMNS_CUH_
