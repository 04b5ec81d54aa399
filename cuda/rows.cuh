// A lane's part of a warp's rows of a state laid out [V, K], of K-vectors, and sums
// over K.
#ifndef JAX_GDN_CUDA_ROWS_CUH_
#define JAX_GDN_CUDA_ROWS_CUH_

#include "cuda/gates.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {

template <DType kState_, int K_, int kWarpRows_, int kWarps_, Caching kCaching_,
          bool kStep_, Ask kAsk_, int kAhead_>
struct Rows {
  static constexpr DType kState = kState_;
  static constexpr int K = K_, kWarpRows = kWarpRows_;
  static constexpr int kWarps = kWarps_;  // that have rows
  static constexpr int VT = kWarps * kWarpRows;
  static constexpr bool kStep = kStep_;
  // In a "step" a warp more, the first, that has none and computes the gates.
  static constexpr int kThreads = 32 * (kWarps + (kStep ? 1 : 0));
  static constexpr Ask kAsk = kAsk_;  // see PrefetchLater
  static constexpr int kAhead = kAhead_;
  static constexpr int kWidth = 16 / kStateBytes<kState>;  // values in an access
  static constexpr int kAccesses = K / kWidth;             // of a row
  // The largest power of two that divides them, at most a warp.
  static constexpr int kPower = kAccesses & -kAccesses;
  static constexpr int kLanes = kPower < 32 ? kPower : 32;  // that share a row
  static constexpr int kParts = kAccesses / kLanes;  // accesses of a lane and row
  static constexpr int kOwn = kParts * kWidth;       // values of a lane and row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kRows = kWarpRows / kRowsAtOnce;  // of a lane
  // Lanes that are left with the sums of the same row.
  static constexpr int kSameRow = kLanes / kRows;
  static constexpr Caching kCaching = kCaching_;
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

// Where in shared memory four values lie of which the first is a lane's i-th: the first
// four of all lanes, then the next, so that neighbouring lanes meet no bank twice.
template <typename T>
__device__ __forceinline__ int PlaceOfFour(int i, int lane) {
  return i * T::kLanes + 4 * lane;
}

// The part to and from shared memory.
template <typename T>
__device__ __forceinline__ void PutOwn(const Vector<T>& from, float (&to)[T::K],
                                       int lane) {
  if (lane >= T::kLanes) return;
#pragma unroll
  for (int i = 0; i < T::kOwn; i += 4) {
    *reinterpret_cast<float4*>(to + PlaceOfFour<T>(i, lane)) =
        make_float4(from.x[i], from.x[i + 1], from.x[i + 2], from.x[i + 3]);
  }
}

template <typename T>
__device__ __forceinline__ Vector<T> GetOwn(const float (&from)[T::K], int lane) {
  Vector<T> to;
#pragma unroll
  for (int i = 0; i < T::kOwn; i += 4) {
    const float4 x =
        *reinterpret_cast<const float4*>(from + PlaceOfFour<T>(i, lane % T::kLanes));
    to.x[i] = x.x, to.x[i + 1] = x.y, to.x[i + 2] = x.z, to.x[i + 3] = x.w;
  }
  return to;
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

// Of the warp's rows, the one whose sums the lane is left with.
template <typename T>
__device__ __forceinline__ int OwnRow(int lane) {
  return lane % T::kLanes / T::kSameRow * T::kRowsAtOnce + lane / T::kLanes;
}

// A lane's part of a state.
template <typename T>
struct OwnRows {
  static constexpr int kStep = T::kRowsAtOnce * T::kAccesses;  // from row to row
  uint4 bits[T::kRows][T::kParts];

  __device__ __forceinline__ void LoadFrom(const uint4* from) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        bits[i][part] = LoadState<T::kCaching>(from + i * kStep + part * T::kLanes);
      }
    }
    __syncwarp();  // The compiler moves no access across.
  }
  __device__ __forceinline__ void Unpack(float (&s)[T::kRows][T::kOwn]) const {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        UnpackState<T::kState>(bits[i][part], &s[i][part * T::kWidth]);
      }
    }
  }
  __device__ __forceinline__ static void Store(const float (&s)[T::kRows][T::kOwn],
                                               uint4* to) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
#pragma unroll
      for (int part = 0; part < T::kParts; ++part) {
        StoreState<T::kCaching>(to + i * kStep + part * T::kLanes,
                                PackState<T::kState, uint4>(&s[i][part * T::kWidth]));
      }
    }
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_ROWS_CUH_
