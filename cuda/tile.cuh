// A thread's part of a K x VT tile of a state laid out [K, V], and sums over its rows.
#ifndef JAX_GDN_CUDA_TILE_CUH_
#define JAX_GDN_CUDA_TILE_CUH_

#include "cuda/head.cuh"
#include "cuda/state.cuh"

namespace jax_gdn {

// The classes of rows whose sums are the leaves of the tree over K.
constexpr int kClasses = 16;

template <DType kState_, int K_, int VT_, int kColumns_, int kRowGroups_,
          Caching kCaching_, int kMinBlocks_, bool kStep_, bool kGateWarp_, Ask kAsk_,
          int kAhead_>
struct Tile {
  static constexpr DType kState = kState_;
  static constexpr int K = K_, VT = VT_;
  static constexpr bool kStep = kStep_;
  static constexpr int kColumns = kColumns_;  // of a thread
  // Of those, what goes to and from shared memory, v and `out` at once.
  static constexpr int kPiece = kColumns < 4 ? kColumns : 4;
  using Piece = typename FloatsOf<kPiece>::Type;
  static constexpr int kLanes = VT / kColumns;  // that share a row
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kWarps = kLanes * kRowGroups / 32;  // that have rows
  // A warp more, the first, that has none and computes the gates.
  static constexpr bool kGateWarp = kGateWarp_;
  static constexpr int kThreads = 32 * (kWarps + (kGateWarp ? 1 : 0));
  static constexpr int kOwnClasses = kClasses / kRowGroups;  // of a thread
  static constexpr int kQuads = K / (4 * kClasses);          // of a class
  static constexpr int kRows = K / kRowGroups;               // of a thread
  // Tokens whose inputs are staged at once: a warp each, or several where warps are
  // few.
  static constexpr int kTokensOfWarp = kWarps >= 4 ? 1 : K > 128 ? 2 : 4 / kWarps;
  static constexpr int kTokens = kWarps >= 4 ? 4 : kWarps * kTokensOfWarp;
  static constexpr Caching kCaching = kCaching_;
  static constexpr int kMinBlocks = kMinBlocks_;  // on a multiprocessor
  static constexpr Ask kAsk = kAsk_;              // see PrefetchLater
  static constexpr int kAhead = kAhead_;
  // A 16-bit state stays as it is stored where one token is all there is to do.
  static constexpr bool kPacked = kStep && kState != DType::kFloat32;
  using Access = typename AccessOf<kColumns * kStateBytes<kState>>::Type;
  static_assert(kOwnClasses == 1 || kOwnClasses == 2);
  static_assert(K % 64 == 0 && kLanes * kRowGroups % 32 == 0 && kLanes <= 32);
  static_assert(kStep || !kGateWarp);
  static_assert(kGateWarp || kAhead == 0);
};

// A thread's place among those that have rows.
template <typename T>
struct Thread {
  int lane, warp;
  int column;  // the first of its C
  int group;   // that has its rows

  __device__ __forceinline__ Thread() : lane(threadIdx.x % 32) {
    const unsigned index = threadIdx.x - (T::kGateWarp ? 32 : 0);
    warp = T::kThreads == 32 ? 0 : index / 32;
    column = T::kColumns * (lane % T::kLanes);
    group = index / T::kLanes;
  }

  // The first row of quad j of its class c.
  __device__ __forceinline__ int Quad(int c, int j) const {
    return 4 * (group * T::kOwnClasses + c + j * kClasses);
  }
};

template <int C>
struct alignas(16) Columns {
  float x[C];
};

// Sums over K, of each column.
template <int C>
struct Sums {
  Columns<C> p, r;  // k^T S, q^T S
};

// Partial ones, a warp's each.
template <typename T>
struct SharedSums {
  alignas(16) float p[T::kWarps][T::VT];
  alignas(16) float r[T::kWarps][T::VT];
};

template <int C>
__device__ __forceinline__ Columns<C> operator+(const Columns<C>& x,
                                                const Columns<C>& y) {
  Columns<C> sum;
#pragma unroll
  for (int c = 0; c < C; ++c) sum.x[c] = x.x[c] + y.x[c];
  return sum;
}

// Where a piece of VT columns lies in shared memory: the first piece of all threads,
// then the second, so that neighbouring lanes meet no bank twice.
template <typename T>
__device__ __forceinline__ int PlaceOf(int column) {
  return column % T::kColumns / T::kPiece * (T::kPiece * T::kLanes) +
         column / T::kColumns * T::kPiece;
}

// A thread's columns to and from shared memory.
template <typename T>
__device__ __forceinline__ void PutColumns(const Columns<T::kColumns>& from, float* to,
                                           int column) {
#pragma unroll
  for (int c = 0; c < T::kColumns; c += T::kPiece) {
    *reinterpret_cast<typename T::Piece*>(to + PlaceOf<T>(column + c)) =
        reinterpret_cast<const typename T::Piece&>(from.x[c]);
  }
}

template <typename T>
__device__ __forceinline__ Columns<T::kColumns> GetColumns(const float* from,
                                                           int column) {
  Columns<T::kColumns> to;
#pragma unroll
  for (int c = 0; c < T::kColumns; c += T::kPiece) {
    reinterpret_cast<typename T::Piece&>(to.x[c]) =
        *reinterpret_cast<const typename T::Piece*>(from + PlaceOf<T>(column + c));
  }
  return to;
}

// Adds the sums of warps [kFirst, kFirst + kCount) as a balanced tree.
template <typename T, int kFirst, int kCount>
__device__ __forceinline__ Columns<T::kColumns> TreeSum(const float (*sums)[T::VT],
                                                        int column) {
  if constexpr (kCount == 1) {
    return GetColumns<T>(sums[kFirst], column);
  } else {
    return TreeSum<T, kFirst, kCount / 2>(sums, column) +
           TreeSum<T, kFirst + kCount / 2, kCount / 2>(sums, column);
  }
}

// The sums over the groups of a warp.
template <typename T>
__device__ __forceinline__ void AddGroups(Columns<T::kColumns>& sums) {
#pragma unroll
  for (int offset = T::kLanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) {
      sums.x[c] += __shfl_xor_sync(0xffffffffu, sums.x[c], offset);
    }
  }
}

template <typename T>
__device__ __forceinline__ void BlockSync() {
  if constexpr (T::kThreads == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// From the sums of a thread's warp to those of its columns, with a barrier between; r
// is wanted by the threads of group 0 alone.
template <typename T>
__device__ __forceinline__ void PutSums(const Sums<T::kColumns>& sums,
                                        const Thread<T>& thread,
                                        SharedSums<T>& shared) {
  if (T::kWarps == 1 || thread.lane >= T::kLanes) return;
  PutColumns<T>(sums.p, shared.p[thread.warp], thread.column);
  PutColumns<T>(sums.r, shared.r[thread.warp], thread.column);
}

template <typename T>
__device__ __forceinline__ void AddWarps(const SharedSums<T>& shared,
                                         const Thread<T>& thread,
                                         Sums<T::kColumns>& sums) {
  if constexpr (T::kWarps > 1) {
    sums.p = TreeSum<T, 0, T::kWarps>(shared.p, thread.column);
    if (thread.group == 0) {
      sums.r = TreeSum<T, 0, T::kWarps>(shared.r, thread.column);
    }
  }
}

// The state's part that a thread owns: its quads' rows in order.
template <typename T, bool kPacked = T::kPacked>
struct Owned {
  float s[T::kRows][T::kColumns];

  __device__ __forceinline__ void Unpack(const typename T::Access (&bits)[T::kRows]) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) UnpackState<T::kState>(bits[i], s[i]);
  }
  __device__ __forceinline__ void Get(int i, float (&row)[T::kColumns]) const {
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) row[c] = s[i][c];
  }
  __device__ __forceinline__ void Set(int i, const float (&row)[T::kColumns]) {
#pragma unroll
    for (int c = 0; c < T::kColumns; ++c) s[i][c] = row[c];
  }
  __device__ __forceinline__ typename T::Access Bits(int i) const {
    return PackState<T::kState, typename T::Access>(s[i]);
  }
  __device__ __forceinline__ void ForgetUnpacked() {}
};

template <typename T>
struct Owned<T, true> {
  typename T::Access bits[T::kRows];

  __device__ __forceinline__ void Unpack(const typename T::Access (&loaded)[T::kRows]) {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) bits[i] = loaded[i];
  }
  __device__ __forceinline__ void Get(int i, float (&row)[T::kColumns]) const {
    UnpackState<T::kState>(bits[i], row);
  }
  __device__ __forceinline__ void Set(int i, const float (&row)[T::kColumns]) {
    bits[i] = PackState<T::kState, typename T::Access>(row);
  }
  __device__ __forceinline__ typename T::Access Bits(int i) const { return bits[i]; }
  // Both forms at once would not fit.
  __device__ __forceinline__ void ForgetUnpacked() {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) Forget(bits[i]);
  }
};

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
__device__ __forceinline__ void LoadRows(const typename T::Access* from, int64_t stride,
                                         typename T::Access (&bits)[T::kRows]) {
  ForEachRow<T>(
      [&](int i, int row) { bits[i] = LoadState<T::kCaching>(from + row * stride); });
}

template <typename T>
__device__ __forceinline__ void StoreRows(typename T::Access* to, int64_t stride,
                                          const Owned<T>& state) {
  ForEachRow<T>([&](int i, int row) {
    StoreState<T::kCaching>(to + row * stride, state.Bits(i));
  });
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_TILE_CUH_
