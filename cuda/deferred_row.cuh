// What a row of a deferred call does, and what the warps of a block share; see
// deferred.cuh.
#ifndef JAX_GDN_CUDA_DEFERRED_ROW_CUH_
#define JAX_GDN_CUDA_DEFERRED_ROW_CUH_

#include "cuda/decode.cuh"

namespace jax_gdn {

// The pending tokens of a slot: which entries of its ring.
struct Cursor {
  int32_t first, count;

  // Where entry i, up to R, lies in the ring.
  __device__ __forceinline__ int32_t At(const Pending& ring, int32_t i) const {
    const int32_t at = first + i;
    return at < ring.R ? at : at - ring.R;
  }
};

// What a row does: what it reads, writes, and whether it folds. Not valid: padding.
struct RowPlan {
  int32_t read, write;
  Cursor cursor;
  bool valid, folds;
};

// What that follows from, on its way.
struct RowRegs {
  uint2 cursor;
  int32_t read, write, told;
};

__device__ __forceinline__ RowRegs LoadRow(const DecodeParams& p, unsigned n,
                                           int32_t read) {
  RowRegs regs = {{}, read, read, 0};
  Load(p.pending.cursors + 2 * int64_t{read}, regs.cursor);
  if (p.write_slots != nullptr) Load(p.write_slots + n, regs.write);
  if (p.pending.fold != nullptr) Load(p.pending.fold + n, regs.told);
  return regs;
}

__device__ __forceinline__ RowPlan PlanRow(const DecodeParams& p, const RowRegs& regs) {
  const auto first = static_cast<int32_t>(regs.cursor.x);
  const auto count = static_cast<int32_t>(regs.cursor.y);
  const Pending& ring = p.pending;
  const bool valid = 0 <= first && first < ring.R && 0 <= count && count <= ring.window;
  const bool full = count + p.T > ring.window || regs.told != 0;
  const int32_t write = CheckSlot(p, regs.write);
  const bool folds = write != regs.read || (count > 0 && full);
  return {regs.read, write, {first, count}, valid, valid && write != kNoSlot && folds};
}

// Lane i < count gets the product of the decays after entry i, all lanes that of all.
struct RingDecay {
  float after, all;
};
__device__ __forceinline__ RingDecay MultiplyDecays(float decay, int lane) {
#pragma unroll
  for (int offset = 1; offset < kMaxPending; offset *= 2) {
    const float next = __shfl_sync(0xffffffffu, decay, lane + offset);
    if (lane + offset < kMaxPending) decay *= next;
  }
  const float after = __shfl_sync(0xffffffffu, decay, lane + 1);
  return {lane + 1 < kMaxPending ? after : 1.0f, __shfl_sync(0xffffffffu, decay, 0)};
}

// What all warps of a block know.
template <KernelSpec kSpec_>
struct DeferredTile : SpecTraits<kSpec_> {
  using Base = SpecTraits<kSpec_>;
  using Base::K, Base::VT, Base::kSingle, Base::kSpec, Base::kState;
  using Block = BlockCoord<DeferredTile>;
  static constexpr bool kKV = kSpec.layout == Layout::kKV;
  static constexpr int kParts = 2, kStrips = VT / 32;  // of K, and of VT
  static constexpr int kPart = K / kParts;
  static constexpr int kThreads = 32 * (1 + kParts * kStrips);
  static constexpr int kTokens = kSingle ? 1 : kMaxTokens;  // of a call, at most

  // Products with k and with q of the call's tokens. Their rows are whole pieces of 16
  // bytes, whatever kTokens is.
  static constexpr int kOwn = kTokens < 4 ? 4 : kTokens;
  struct Dots {
    // Padded so that stores meet no bank twice.
    alignas(16) float ring[2][kTokens][kMaxPending + 4];  // of pending k
    alignas(16) float own[2][kTokens][kOwn];              // k, q by k of the call
    alignas(16) float qq[kOwn];
  };
  struct Smem {
    // k^T S and q^T S of each token: of the parts of S_0, and of what is pending.
    // Padded so that lanes meet no bank twice ("VK"), or two do ("KV").
    static constexpr int kRow = VT + (kKV ? 2 : 8);
    alignas(16) float sums[2][kParts][kTokens][kRow];
    Dots parts[kParts];
    // The column warp's own: of all parts, times the decays after the entry; and these.
    Dots dots;
    alignas(16) float after[kMaxPending];
    float decay[kTokens], beta[kTokens];  // of the call's tokens
  };

  const int lane = threadIdx.x % 32;

  // Numbers of the first entries of a slot's ring, of u and decay, and of k. The
  // planner sees to it that they have 32 bits.
  __device__ __forceinline__ static uint32_t RingOf(const DecodeParams& p, int32_t slot,
                                                    unsigned hv) {
    return (slot * p.HV + hv) * p.pending.R;
  }
  __device__ __forceinline__ static uint32_t KeyRingOf(const DecodeParams& p,
                                                       int32_t slot, unsigned h) {
    return (slot * p.H + h) * p.pending.R;
  }
  // Vectors of entries, from their first element on.
  __device__ __forceinline__ static float* U(const DecodeParams& p, uint32_t entry) {
    return p.pending.u + uint64_t{entry} * K;
  }
  __device__ __forceinline__ static uint16_t* Key(const DecodeParams& p,
                                                  uint32_t entry) {
    return static_cast<uint16_t*>(p.pending.k) + uint64_t{entry} * K;
  }
  // Of lane i < count that of entry i; of others 1.
  __device__ __forceinline__ float LoadDecay(const Block& at,
                                             const RowPlan& row) const {
    float decay = 1.0f;
    if (lane < row.cursor.count) {
      const uint32_t ring = RingOf(at.p, row.read, at.hv);
      Load(at.p.pending.decay + ring + row.cursor.At(at.p.pending, lane), decay);
    }
    return decay;
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DEFERRED_ROW_CUH_
