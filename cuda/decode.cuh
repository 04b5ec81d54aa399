// What a block does, for both layouts. A tile T (see kv.cuh, vk.cuh) is a thread's
// place and its part of the work:
//
//     Rows, Regs, Smem     of a state: unpacked; as loaded; what sums need to be added
//     Load, Unpack, Store  a slot's rows
//     Token                one staged token: from the rows to `out` and the new rows
//     SingleToken          the same for a single-token kernel, loads and store included
//     StoreOut             what the thread has of `out`; zeros where a row is padding
#ifndef JAX_GDN_CUDA_DECODE_CUH_
#define JAX_GDN_CUDA_DECODE_CUH_

#include "cuda/head.cuh"

namespace jax_gdn {

// Of H100 SXM and H200. On other GPUs results are the same; only speed may differ.
constexpr unsigned kMultiprocessors = 132;

// Number of the block among all, which start in this order.
__device__ __forceinline__ unsigned BlockNumber() {
  return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// Lets the first kBlocks blocks of a multiprocessor start one after another: started
// together, they and those that take their places load together, then compute together.
// A grid of few waves would only wait.
template <unsigned kBlocks>
__device__ __forceinline__ void StaggerFirstWave() {
  constexpr unsigned kWave = kMultiprocessors * kBlocks;
  const unsigned block = BlockNumber();
  if (block < kWave && gridDim.x * gridDim.y * gridDim.z > 3 * kWave) {
    __nanosleep(block / kMultiprocessors * 1000);
  }
}

// Prefetches into the L2 cache what a block reads that starts about when this one ends,
// so that it waits less. A distance too large by one costs 10 to 25 %. Each block of a
// state prefetches an equal, contiguous share of a later state, whatever rows it reads
// itself. For V = K.
template <typename T>
__device__ __forceinline__ void PrefetchLaterTile(const DecodeParams& p, int lane) {
  constexpr int kDistance = T::kSpec.prefetch_distance;
  if constexpr (kDistance > 0) {
    const unsigned block = BlockNumber() + kDistance * kMultiprocessors;
    const unsigned head = block / gridDim.x, n = head / gridDim.y;
    if (lane != 0 || n >= gridDim.z) return;
    const int32_t slot = ReadSlot(p, n);
    if (slot == kNoSlot) return;
    constexpr uint32_t kShare = T::K * T::VT * kStateBytes<T::kState>;
    const int64_t share =
        HeadOfSlot(p, slot, head % gridDim.y) * gridDim.x + block % gridDim.x;
    PrefetchBulk(static_cast<const char*>(p.state.data) + share * kShare, kShare);
  }
}

// Of the thread's warp in its block. From lane 0, so that the compiler sees that no
// warp diverges; else single-token kernels are 1 to 15 % slower.
__device__ __forceinline__ int WarpNumber() {
  return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// What a gate warp makes for the others.
template <typename T>
struct GatesSmem {
  Gates gates;
  alignas(16) float decay[T::kSpec.per_channel ? T::K : 4];
};

// The first warp of a single-token kernel: its loads before all else, then the gates
// for the others, who wait at named barrier 1.
template <typename T>
__device__ __forceinline__ void RunGateWarp(const BlockCoord<T>& at, int lane,
                                            GatesSmem<T>& shared) {
  const DecodeParams& p = at.p;
  const HeadRegs<T> regs = LoadHead<T>(at, 0, lane);
  if constexpr (T::kSpec.prefetch_first) PrefetchLaterTile<T>(p, lane);
  if (ReadSlot(p, at.n) == kNoSlot) return;  // nobody waits
  if constexpr (T::kSpec.per_channel) {
    StageDecay<T>(at, 0, lane, regs.A_log, shared.decay);
  }
  const Gates gates = MakeGates<T>(at, regs, Widen(regs.q, DType::kBFloat16),
                                   Widen(regs.k, DType::kBFloat16));
  if (lane == 0) shared.gates = gates;
  __syncwarp();  // A warp arrives as one.
  ArriveAtBarrier<T::kThreads>();
  if constexpr (!T::kSpec.prefetch_first) PrefetchLaterTile<T>(p, lane);
}

// Any number of tokens, staged in shared memory by rounds, a token a warp.
template <typename T>
__device__ __forceinline__ void DecodeTokens(const BlockCoord<T>& at, const T& tile,
                                             int32_t read) {
  const DecodeParams& p = at.p;
  __shared__ TokenSmem<T> tokens[T::kWarps];
  // Two, so that no warp waits for another to have read the last token's.
  __shared__ typename T::Smem smem[2];
  typename T::Rows rows;
  {
    typename T::Regs regs;
    tile.Load(at, read, regs);
    __syncwarp();  // The compiler moves no access across.
    StageTokens<T>(at, 0, tile.warp, tile.lane, tokens);
    tile.Unpack(regs, rows);  // ahead of the loop, which would otherwise keep both
  }
#pragma unroll 1
  for (int64_t first = 0; first < p.T; first += T::kWarps) {
    if (first > 0) {
      __syncthreads();  // the last round's tokens are still read
      StageTokens<T>(at, first, tile.warp, tile.lane, tokens);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < T::kWarps && first + i < p.T; ++i) {
      const int64_t t = first + i;
      const int32_t wanted = WantedSlot(p, at.n, t, read);
      tile.Token(at, t, tokens[i], smem[t % 2], rows);
      if ((p.snapshots || t + 1 == p.T) && CheckSlot(p, wanted) != kNoSlot) {
        tile.Store(at, wanted, rows);
      }
    }
  }
}

// Grid: (V / VT, HV, B).
template <typename T>
__device__ __forceinline__ void Decode(const DecodeParams& p) {
  if constexpr (T::kSingle) {
    const int warp = WarpNumber();
    const T tile(warp - 1);
    const BlockCoord<T> at = {p};
    __shared__ GatesSmem<T> gates;
    if (warp == 0) return RunGateWarp<T>(at, tile.lane, gates);
    const int32_t read = ReadSlot(p, at.n);
    if (read == kNoSlot) return tile.StoreOut(at, 0, {});
    tile.SingleToken(at, read, gates);
  } else {
    if constexpr (T::VT >= 64) StaggerFirstWave<T::kSpec.min_blocks>();
    const T tile(threadIdx.x / 32);
    const BlockCoord<T> at = {p};
    const int32_t read = ReadSlot(p, at.n);
    if (read != kNoSlot) return DecodeTokens<T>(at, tile, read);
    for (int64_t t = 0; t < p.T; ++t) tile.StoreOut(at, t, {});
  }
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DECODE_CUH_
