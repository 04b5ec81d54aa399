// Gated-delta-rule decode of states laid out [V, K].
//
//     S   <- exp(g) S;  u <- beta (v - S k);  S <- S + u k^T;  out <- scale S q
//
// as in kv.cuh: p = exp(g) S_old k and r = exp(g) S_old q in one reduction, then
// u = beta (v - p), out = r + (q.k) u, and the new state from the registers that hold
// the old one, as float32, until the last token is done.
//
// A row of K is contiguous and belongs to L neighbouring lanes, 16 bytes at a time; a
// lane keeps its part of q and k in registers. So a sum over K is a lane's own part in
// order, then a butterfly over L lanes, and no sum is shared between warps:
//
//                      k = 0..C-1   C..2C-1    ...             C = 16 bytes of values
//     row 0             lane 0      lane 1     ...  lane L-1
//     row 1             lane L      lane L+1   ...             (where L < 32)
//
// A butterfly in which a lane passes on only what it keeps no more leaves each lane
// with the sums of one row, and u of all rows is one computation.
#ifndef JAX_GDN_CUDA_VK_CUH_
#define JAX_GDN_CUDA_VK_CUH_

#include "cuda/decode.cuh"

namespace jax_gdn {

template <KernelSpec kSpec_>
struct VKTile : SpecTraits<kSpec_> {
  using Base = SpecTraits<kSpec_>;
  using Base::K, Base::VT, Base::kCaching, Base::kSingle, Base::kSpec, Base::kState;
  using Block = BlockCoord<VKTile>;
  static constexpr int kWarps = VT / kSpec.warp_rows;  // but for a gate warp
  static constexpr int kThreads = 32 * (kWarps + (kSingle ? 1 : 0));
  static constexpr int kWidth = 16 / kStateBytes<kState>;  // values in an access
  static constexpr int kAccesses = K / kWidth;             // of a row
  // The largest power of two that divides them, at most a warp.
  static constexpr int kPower = kAccesses & -kAccesses;
  static constexpr int kLanes = kPower < 32 ? kPower : 32;  // that share a row
  static constexpr int kParts = kAccesses / kLanes;  // accesses of a lane and row
  static constexpr int kOwn = kParts * kWidth;       // values of a lane and row
  static constexpr int kRowsAtOnce = 32 / kLanes;
  static constexpr int kRows = kSpec.warp_rows / kRowsAtOnce;  // of a lane
  // Lanes that are left with the sums of the same row.
  static constexpr int kSameRow = kLanes / kRows;
  using Slice = ::jax_gdn::Slice<kWidth, kLanes, kParts>;  // of a row, q and k
  using Vector = VectorFrag<Slice>;
  static_assert(kRows >= 1 && kSameRow >= 1);

  // A lane's part of its rows.
  struct Regs {
    uint4 row[kRows][kParts];
  };
  struct Rows {
    float row[kRows][kOwn];
  };
  struct Smem {};  // no sum is shared

  int lane, warp;  // among those that have rows
  int first_row;   // of the warp's, in the block

  __device__ __forceinline__ explicit VKTile(int warp_)
      : lane(threadIdx.x % 32), warp(warp_), first_row(warp_ * kSpec.warp_rows) {}

  // Calls f(i, part, where it lies), in the states or the new ones.
  template <typename F>
  __device__ __forceinline__ void ForEachAccess(const void* states, const Block& at,
                                                int32_t slot, F f) const {
    auto* const data = const_cast<uint4*>(static_cast<const uint4*>(states));
    const int64_t head = HeadOfSlot(at.p, slot, at.hv);
    const int row = at.first_v + first_row + lane / kLanes;
    // A single-token kernel knows a state's size.
    const int64_t first =
        kSingle ? head * (K * kAccesses) + unsigned(row * kAccesses + lane % kLanes)
                : (head * at.p.V + row) * kAccesses + lane % kLanes;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        f(i, part, data + first + i * kRowsAtOnce * kAccesses + part * kLanes);
      }
    }
  }
  __device__ __forceinline__ void Load(const Block& at, int32_t slot,
                                       Regs& regs) const {
    ForEachAccess(at.p.state.data, at, slot, [&](int i, int part, const uint4* x) {
      regs.row[i][part] = LoadState<kCaching>(x);
    });
  }
  __device__ __forceinline__ void Unpack(const Regs& regs, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        UnpackState<kState>(regs.row[i][part], &rows.row[i][part * kWidth]);
      }
    }
  }
  __device__ __forceinline__ void Store(const Block& at, int32_t slot,
                                        const Rows& rows) const {
    ForEachAccess(at.p.new_state, at, slot, [&](int i, int part, uint4* x) {
      StoreState<kCaching>(x, PackState<kState, uint4>(&rows.row[i][part * kWidth]));
    });
  }

  // The sums of all rows over the lanes that share them: the butterfly of `WarpSum`, in
  // which a lane passes on only what it keeps no more. It is left with one row, which
  // its upper bits name (see OwnRow), in x[0].
  template <int kOffset = kLanes / 2, int kLeft = kRows>
  __device__ __forceinline__ void SumRows(float (&x)[kRows]) const {
    if constexpr (kOffset > 0) {
      if constexpr (kLeft > 1) {
        const bool upper = lane & kOffset;
#pragma unroll
        for (int i = 0; i < kLeft / 2; ++i) {
          const float passed = upper ? x[i] : x[i + kLeft / 2];
          const float kept = upper ? x[i + kLeft / 2] : x[i];
          x[i] = kept + __shfl_xor_sync(0xffffffffu, passed, kOffset);
        }
        SumRows<kOffset / 2, kLeft / 2>(x);
      } else {
        x[0] += __shfl_xor_sync(0xffffffffu, x[0], kOffset);
        SumRows<kOffset / 2, 1>(x);
      }
    }
  }
  // Of the block's rows, the one whose sums the lane is left with.
  __device__ __forceinline__ int OwnRow() const {
    return first_row + lane % kLanes / kSameRow * kRowsAtOnce + lane / kLanes;
  }

  // k^T S and q^T S of the lane's own row.
  struct Sums {
    float p, r;
  };
  __device__ __forceinline__ Sums SumToken(const Vector& q, const Vector& k,
                                           const Rows& rows) const {
    float p[kRows], r[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      p[i] = DotFrag(k, rows.row[i]);
      r[i] = DotFrag(q, rows.row[i]);
    }
    SumRows(p);
    SumRows(r);
    return {p[0], r[0]};
  }

  // exp(g) of each channel times the rows.
  __device__ __forceinline__ void DecayRows(const float (&decay_smem)[K],
                                            Rows& rows) const {
    const auto decay = GetVector<Slice>(decay_smem, lane);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) rows.row[i][j] *= decay.x[j];
    }
  }

  // `out` of the lane's own row.
  __device__ __forceinline__ void StoreOut(const Block& at, int64_t t,
                                           float out) const {
    if (lane % kSameRow == 0) jax_gdn::Store<1>(at.p.out, at.Value(t, OwnRow()), out);
  }

  __device__ __forceinline__ void Update(const Vector& k, float decay, float own_u,
                                         Rows& rows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float u = __shfl_sync(0xffffffffu, own_u, i * kSameRow, kLanes);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        rows.row[i][j] = fmaf(k.x[j], u, decay * rows.row[i][j]);
      }
    }
  }

  __device__ __forceinline__ void Token(const Block& at, int64_t t,
                                        const TokenSmem<VKTile>& token, Smem&,
                                        Rows& rows) const {
    const auto q = GetVector<Slice>(token.q, lane), k = GetVector<Slice>(token.k, lane);
    if (at.p.per_channel) DecayRows(token.decay, rows);
    const Sums sums = SumToken(q, k, rows);
    const Gates& gates = token.gates;
    const float u = gates.beta * fmaf(-gates.decayed_k, sums.p, token.v[OwnRow()]);
    StoreOut(at, t, fmaf(gates.qk, u, gates.decayed_q * sums.r));
    Update(k, gates.decay, gates.k_factor * u, rows);
  }

  // The compiler moves no access across any __syncwarp.
  __device__ __forceinline__ void SingleToken(
      const Block& at, int32_t read, const GatesSmem<VKTile>& gates_smem) const {
    const DecodeParams& p = at.p;
    Regs regs;
    Load(at, read, regs);  // all loads before the first is looked at
    __syncwarp();
    const Raw<1> v_regs = LoadRaw<1, true>(p.v, at.Value(0, OwnRow()));
    __syncwarp();
    const auto q_regs = LoadVector<Slice, true>(p.q, at.Key(0), lane);
    const auto k_regs = LoadVector<Slice, true>(p.k, at.Key(0), lane);
    __syncwarp();
    // Where ptxas is kept from sinking the barrier, 3 % at B = 1; others lose by it.
    constexpr bool kPinned =
        kState == DType::kFloat32 && kCaching == Caching::kStreaming;
    if constexpr (kPinned) SyncAtBarrier<1, kThreads>();
    const int32_t wanted = WantedSlot(p, at.n, 0, read);
    if constexpr (kPinned) {
      __syncwarp();
    } else {
      SyncAtBarrier<1, kThreads>();
    }
    const Vector q = Widen(q_regs, DType::kBFloat16);
    const Vector k = Widen(k_regs, DType::kBFloat16);
    Rows rows;
    Unpack(regs, rows);
    if constexpr (kSpec.per_channel) DecayRows(gates_smem.decay, rows);
    const Sums sums = SumToken(q, k, rows);
    const Gates& gates = gates_smem.gates;
    const float v = Widen(v_regs, DType::kBFloat16);
    const float u = gates.beta * fmaf(-gates.decayed_k, sums.p, v);
    const float out = fmaf(gates.qk, u, gates.decayed_q * sums.r);
    // Where states are few, `out` is not to delay the state; 3 to 5 % at B = 1.
    constexpr bool kOutLast = kCaching == Caching::kStreaming;
    if constexpr (!kOutLast) StoreOut(at, 0, out);
    Update(k, gates.decay, gates.k_factor * u, rows);
    if (CheckSlot(p, wanted) != kNoSlot) Store(at, wanted, rows);
    if constexpr (kOutLast) StoreOut(at, 0, out);
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_VK_CUH_
