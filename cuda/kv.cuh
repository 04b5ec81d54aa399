// Gated-delta-rule decode of states laid out [K, V].
//
//     S   <- exp(g) S;  u <- beta (v - k^T S);  S <- S + k u^T;  out <- scale q^T S
//
// in one pass a token: with p = k^T exp(g) S_old and r = q^T exp(g) S_old, one
// reduction over K gives u = beta (v - p) and out = r + (q.k) u (scale folded into q).
// The state stays in registers, as float32, until the last token is done.
//
// A block owns the K x VT tile of one state. A thread owns C neighbouring columns, one
// access. Row r is of class r / 4 mod 16, and a thread has all rows of 16 / G
// neighbouring classes, G being 8 or 16.
//
//                  column 0..C-1  C..2C-1    ...   VT-C..VT-1
//     group 0       thread 0     thread 1   ...   thread L-1        L = VT / C lanes
//     group 1       thread L     thread L+1 ...
//      ...
//     group G-1
//
// A column's sum over K has one shape, whatever the tile is, so that the tile never
// changes a bit: the rows of a class in order, then the classes as one balanced tree,
// neighbours first. Its levels fall inside a thread, between lanes, or between warps.
//
// Threads of a single-token kernel load their own entries of q and k; where there may
// be more tokens, they are staged in shared memory (see decode.cuh).

#ifndef JAX_GDN_CUDA_KV_CUH_
#define JAX_GDN_CUDA_KV_CUH_

#include "cuda/decode.cuh"

namespace jax_gdn {

__device__ __forceinline__ float4 operator*(const float4& x, const float4& y) {
  return {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w};
}

template <KernelSpec kSpec_>
struct KVTile : SpecTraits<kSpec_> {
  using Base = SpecTraits<kSpec_>;
  using Base::K, Base::VT, Base::kCaching, Base::kSingle, Base::kSpec, Base::kState;
  using Block = BlockCoord<KVTile>;
  static constexpr int C = kSpec.columns;  // of a thread, one access
  static constexpr int kClasses = 16;      // of rows
  static constexpr int kLanes = VT / C;    // that share a row
  static constexpr int kGroups = kSpec.row_groups;
  static constexpr int kWarps = kLanes * kGroups / 32;  // but for a gate warp
  static constexpr int kThreads = 32 * (kWarps + (kSingle ? 1 : 0));
  static constexpr int kOwnClasses = kClasses / kGroups;  // of a thread
  static constexpr int kQuads = K / (4 * kClasses);       // of a class
  static constexpr int kRows = K / kGroups;               // of a thread
  // A 16-bit state stays as it is stored where one token is all there is to do.
  static constexpr bool kPacked = kSingle && kState != DType::kFloat32;
  using Slice = ::jax_gdn::Slice<2, 32, K / 64>;  // of q and k, for one warp
  using Columns = VectorFrag<::jax_gdn::Slice<C, 1, 1>>;
  using Bits = Access<C * kStateBytes<kState>>;  // a row of a thread
  static_assert(C == 2 || C == 4);
  static_assert(kOwnClasses == 1 || kOwnClasses == 2);
  static_assert(K % 64 == 0 && kLanes * kGroups % 32 == 0 && kLanes <= 32);

  // A thread's rows, in the order of its quads.
  struct Regs {
    Bits row[kRows];
  };
  struct Rows {
    std::conditional_t<kPacked, Bits, Columns> row[kRows];
  };
  // Sums over K, of each column: k^T S, q^T S.
  struct Sums {
    Columns p, r;
  };
  // Of each warp.
  struct Smem {
    alignas(16) float p[kWarps][VT];
    alignas(16) float r[kWarps][VT];
  };

  int lane, warp;  // among those that have rows
  int column;      // the thread's first
  int group;       // that has its rows

  __device__ __forceinline__ explicit KVTile(int warp_)
      : lane(threadIdx.x % 32), warp(warp_) {
    column = C * (lane % kLanes);
    group = (threadIdx.x - (kSingle ? 32 : 0)) / kLanes;
  }

  // The first row of quad j of its class c.
  __device__ __forceinline__ int Quad(int c, int j) const {
    return 4 * (group * kOwnClasses + c + j * kClasses);
  }

  // Calls f(i, where row i lies), in the states or the new ones.
  template <typename F>
  __device__ __forceinline__ void ForEachRow(const void* states, const Block& at,
                                             int32_t slot, F f) const {
    int64_t V = kSingle ? K : at.p.V;
    // Kept since the loads, the rows' addresses would cost 2 registers each.
    if constexpr (!kSingle) HideOrigin(V);
    const int64_t row = HeadOfSlot(at.p, slot, at.hv) * K + Quad(0, 0);
    const int64_t element = row * V + at.first_v + column;
    auto* const data = const_cast<char*>(static_cast<const char*>(states));
    auto* const first = reinterpret_cast<Bits*>(data + element * kStateBytes<kState>);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int c = i / 4 / kQuads, j = i / 4 % kQuads;
      f(i, first + (4 * (c + j * kClasses) + i % 4) * (V / C));
    }
  }
  __device__ __forceinline__ void Load(const Block& at, int32_t slot,
                                       Regs& regs) const {
    ForEachRow(at.p.state.data, at, slot,
               [&](int i, const Bits* x) { regs.row[i] = LoadState<kCaching>(x); });
  }
  __device__ __forceinline__ void Unpack(const Regs& regs, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kPacked) {
        rows.row[i] = regs.row[i];
      } else {
        UnpackState<kState>(regs.row[i], rows.row[i].x);
      }
    }
  }
  __device__ __forceinline__ void Store(const Block& at, int32_t slot,
                                        const Rows& rows) const {
    ForEachRow(at.p.new_state, at, slot, [&](int i, Bits* x) {
      if constexpr (kPacked) {
        StoreState<kCaching>(x, rows.row[i]);
      } else {
        StoreState<kCaching>(x, PackState<kState, Bits>(rows.row[i].x));
      }
    });
  }
  __device__ __forceinline__ static Columns Get(const Rows& rows, int i) {
    Columns row;
    if constexpr (kPacked) {
      UnpackState<kState>(rows.row[i], row.x);
    } else {
      row = rows.row[i];
    }
    return row;
  }
  __device__ __forceinline__ static void Set(Rows& rows, int i, const Columns& row) {
    if constexpr (kPacked) {
      rows.row[i] = PackState<kState, Bits>(row.x);
    } else {
      rows.row[i] = row;
    }
  }

  // What a thread needs of a token, by quads of its rows: quad j of its class c. Staged
  // in shared memory, or q and k in registers, as bfloat16.
  struct EntriesSmem {
    const KVTile& tile;
    const TokenSmem<KVTile>& token;

    __device__ __forceinline__ float4 At(const float* x, int c, int j) const {
      return *reinterpret_cast<const float4*>(x + tile.Quad(c, j));
    }
    __device__ __forceinline__ float4 Q(int c, int j) const {
      return At(token.q, c, j);
    }
    __device__ __forceinline__ float4 K(int c, int j) const {
      return At(token.k, c, j);
    }
    __device__ __forceinline__ float4 Decay(int c, int j) const {
      return At(token.decay, c, j);
    }
  };
  struct EntriesRegs {
    using A = Access<8 * kOwnClasses>;  // of neighbouring classes' quads
    const KVTile& tile;
    const GatesSmem<KVTile>& gates;
    Words<A> q[kQuads], k[kQuads];

    __device__ __forceinline__ void Load(const DecodeParams& p, int64_t key) {
#pragma unroll
      for (int j = 0; j < kQuads; ++j) {
        const int64_t first = key + tile.Quad(0, j);
        jax_gdn::Load(static_cast<const uint16_t*>(p.q.data) + first, q[j].access);
        jax_gdn::Load(static_cast<const uint16_t*>(p.k.data) + first, k[j].access);
      }
    }
    __device__ __forceinline__ static float4 Widened(const Words<A>& x, int c) {
      const uint32_t low = x.word[2 * c], high = x.word[2 * c + 1];
      return {__uint_as_float(low << 16), __uint_as_float(low & 0xffff0000u),
              __uint_as_float(high << 16), __uint_as_float(high & 0xffff0000u)};
    }
    __device__ __forceinline__ float4 Q(int c, int j) const { return Widened(q[j], c); }
    __device__ __forceinline__ float4 K(int c, int j) const { return Widened(k[j], c); }
    __device__ __forceinline__ float4 Decay(int c, int j) const {
      return *reinterpret_cast<const float4*>(gates.decay + tile.Quad(c, j));
    }
  };

  // Over a thread's rows: of a class in order, then its two classes together; then over
  // the groups of its warp.
  template <bool kPerChannel, typename Entries>
  __device__ __forceinline__ Sums SumRows(const Rows& rows,
                                          const Entries& entries) const {
    Sums sums[kOwnClasses] = {};
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const int c = i / 4 / kQuads, j = i / 4 % kQuads;
      float4 q4 = entries.Q(c, j), k4 = entries.K(c, j);
      if constexpr (kPerChannel) {
        const float4 decay = entries.Decay(c, j);
        q4 = q4 * decay, k4 = k4 * decay;
      }
      const float q[4] = {q4.x, q4.y, q4.z, q4.w}, k[4] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Columns s = Get(rows, i + r);
#pragma unroll
        for (int x = 0; x < C; ++x) {
          sums[c].p.x[x] = fmaf(k[r], s.x[x], sums[c].p.x[x]);
          sums[c].r.x[x] = fmaf(q[r], s.x[x], sums[c].r.x[x]);
        }
      }
    }
    if constexpr (kOwnClasses == 2) {
      sums[0] = {sums[0].p + sums[1].p, sums[0].r + sums[1].r};
    }
    AddGroups(sums[0].p);
    AddGroups(sums[0].r);
    return sums[0];
  }
  __device__ __forceinline__ static void AddGroups(Columns& sums) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        sums.x[c] += __shfl_xor_sync(0xffffffffu, sums.x[c], offset);
      }
    }
  }

  // From the sums of a thread's warp to those of its columns, with a barrier between; r
  // is wanted by the threads of group 0 alone.
  __device__ __forceinline__ static Columns& At(float* x, int column) {
    return *reinterpret_cast<Columns*>(x + column);
  }
  __device__ __forceinline__ void PutSums(const Sums& sums, Smem& smem) const {
    if (kWarps == 1 || lane >= kLanes) return;
    At(smem.p[warp], column) = sums.p, At(smem.r[warp], column) = sums.r;
  }
  __device__ __forceinline__ void AddWarps(Smem& smem, Sums& sums) const {
    if constexpr (kWarps > 1) {
      sums.p = TreeSum(smem.p);
      if (group == 0) sums.r = TreeSum(smem.r);
    }
  }
  // Adds the sums of warps [kFirst, kFirst + kCount) as a balanced tree.
  template <int kFirst = 0, int kCount = kWarps>
  __device__ __forceinline__ Columns TreeSum(float (*sums)[VT]) const {
    if constexpr (kCount == 1) {
      return At(sums[kFirst], column);
    } else {
      return TreeSum<kFirst, kCount / 2>(sums) +
             TreeSum<kFirst + kCount / 2, kCount / 2>(sums);
    }
  }

  // Stores out of the thread's columns, and returns u times what normalises k.
  __device__ __forceinline__ Columns Solve(const Block& at, int64_t t, const Columns& v,
                                           const Gates& gates, const Sums& sums) const {
    Columns u, out;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float u_c = gates.beta * fmaf(-gates.decayed_k, sums.p.x[c], v.x[c]);
      out.x[c] = fmaf(gates.qk, u_c, gates.decayed_q * sums.r.x[c]);
      u.x[c] = gates.k_factor * u_c;
    }
    StoreOut(at, t, out);
    return u;
  }
  __device__ __forceinline__ void StoreOut(const Block& at, int64_t t,
                                           const Columns& out) const {
    if (group != 0) return;
    jax_gdn::Store<C>(at.p.out, at.Value(t, column),
                      reinterpret_cast<const Floats<C>&>(out));
  }

  template <bool kPerChannel, typename Entries>
  __device__ __forceinline__ void Update(const Entries& entries, float common_decay,
                                         const Columns& u, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < kRows; i += 4) {
      const int c = i / 4 / kQuads, j = i / 4 % kQuads;
      const float4 k4 = entries.K(c, j);
      float4 d4 = {common_decay, common_decay, common_decay, common_decay};
      if constexpr (kPerChannel) d4 = entries.Decay(c, j);
      const float k[4] = {k4.x, k4.y, k4.z, k4.w};
      const float decay[4] = {d4.x, d4.y, d4.z, d4.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        Columns s = Get(rows, i + r);
#pragma unroll
        for (int x = 0; x < C; ++x) s.x[x] = fmaf(k[r], u.x[x], decay[r] * s.x[x]);
        Set(rows, i + r, s);
      }
    }
  }

  __device__ __forceinline__ void Token(const Block& at, int64_t t,
                                        TokenSmem<KVTile>& token, Smem& smem,
                                        Rows& rows) const {
    const EntriesSmem entries = {*this, token};
    Sums sums =
        at.p.per_channel ? SumRows<true>(rows, entries) : SumRows<false>(rows, entries);
    PutSums(sums, smem);
    if constexpr (kWarps > 1) __syncthreads();
    AddWarps(smem, sums);
    const Gates gates = token.gates;
    const Columns u = Solve(at, t, At(token.v, column), gates, sums);
    if (at.p.per_channel) {
      Update<true>(entries, gates.decay, u, rows);
    } else {
      Update<false>(entries, gates.decay, u, rows);
    }
  }

  // The compiler moves no access across any __syncwarp.
  __device__ __forceinline__ void SingleToken(const Block& at, int32_t read,
                                              GatesSmem<KVTile>& gates_smem) const {
    constexpr bool kPerChannel = kSpec.per_channel;
    __shared__ Smem smem;
    const DecodeParams& p = at.p;
    Regs regs;
    Load(at, read, regs);  // all loads before the first is looked at
    __syncwarp();
    // What is needed last is loaded last; where registers are few, ptxas would put that
    // off until the rows are here.
    constexpr bool kLast = kCaching == Caching::kStreaming;
    Raw<C> v_regs;
    if constexpr (!kLast) {
      v_regs = LoadRaw<C, true>(p.v, at.Value(0, column));
      __syncwarp();
    }
    EntriesRegs entries = {*this, gates_smem};
    entries.Load(p, at.Key(0));
    __syncwarp();
    if constexpr (kLast) {
      v_regs = LoadRaw<C, true>(p.v, at.Value(0, column));
      __syncwarp();
    }
    const int32_t wanted = WantedSlot(p, at.n, 0, read);
    __syncwarp();
    Rows rows;
    Unpack(regs, rows);
    if constexpr (kPerChannel) SyncAtBarrier<1, kThreads>();
    Sums sums = SumRows<kPerChannel>(rows, entries);
    PutSums(sums, smem);
    SyncAtBarrier<kPerChannel ? 2 : 1, kPerChannel ? 32 * kWarps : kThreads>();
    AddWarps(smem, sums);
    const Gates gates = gates_smem.gates;
    Columns v;
    reinterpret_cast<Floats<C>&>(v) = Widen(v_regs, DType::kBFloat16);
    const Columns u = Solve(at, 0, v, gates, sums);
    if constexpr (kPacked) {  // both forms at once would not fit into registers
#pragma unroll
      for (int i = 0; i < kRows; ++i) HideOrigin(rows.row[i]);
    }
    Update<kPerChannel>(entries, gates.decay, u, rows);
    if (CheckSlot(p, wanted) != kNoSlot) Store(at, wanted, rows);
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_KV_CUH_
