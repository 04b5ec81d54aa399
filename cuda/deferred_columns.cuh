// The column warp of a deferred call: what is small, for all columns of a block; see
// deferred.cuh.
#ifndef JAX_GDN_CUDA_DEFERRED_COLUMNS_CUH_
#define JAX_GDN_CUDA_DEFERRED_COLUMNS_CUH_

#include "cuda/deferred_row.cuh"

namespace jax_gdn {

template <KernelSpec kSpec_>
struct DeferredColumns : DeferredTile<kSpec_> {
  using Base = DeferredTile<kSpec_>;
  using Base::K, Base::VT, Base::kParts, Base::kThreads, Base::kTokens;
  using Base::lane, Base::RingOf, Base::U, Base::LoadDecay;
  using typename Base::Block, typename Base::Dots, typename Base::Smem;
  static constexpr int kColumns = VT / 32;  // neighbouring ones of a lane
  using Columns = VectorFrag<::jax_gdn::Slice<kColumns, 1, 1>>;

  // The lane's first. It is the first warp; with `lane` in place of this, which row
  // warps use too, registers are too few for a float32 state and several tokens.
  __device__ __forceinline__ static int Column() { return kColumns * threadIdx.x; }

  __device__ __forceinline__ void Run(const Block& at, int32_t read, Smem& smem) const {
    const DecodeParams& p = at.p;
    const int v = Column();
    const RowRegs row_regs = LoadRow(p, at.n, read);
    Raw<kColumns> values[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i < p.T) values[i] = LoadRaw<kColumns, true>(p.v, at.Value(i, v));
    }
    __syncwarp();
    const RowPlan row = PlanRow(p, row_regs);
    if (!row.valid) return StoreZeros(at);
    const uint32_t ring = RingOf(p, row.read, at.hv);
    Columns u[kMaxPending] = {};
    {
      const float* const first = U(p, ring) + at.first_v + v;
      int32_t entry = row.cursor.first;
#pragma unroll
      for (int n = 0; n < kMaxPending; ++n) {
        if (n < row.cursor.count) {
          Load(first + entry * K, reinterpret_cast<Floats<kColumns>&>(u[n]));
        }
        if (++entry == p.pending.R) entry = 0;
      }
    }
    const float ring_decay = LoadDecay(at, row);
    __syncwarp();
    const RingDecay decay = MultiplyDecays(ring_decay, lane);
    if (lane < kMaxPending) smem.after[lane] = decay.after;
    __syncwarp();
    SyncAtBarrier<1, kThreads>();
    AddParts(smem);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i >= p.T) continue;
      SumPending(smem.sums[0], smem.dots.ring[0][i], u, decay.all, i);
      SumPending(smem.sums[1], smem.dots.ring[1][i], u, decay.all, i);
    }
    Solve(at, row, values, smem);
  }

  // The products of all parts.
  __device__ __forceinline__ void AddParts(Smem& smem) const {
    constexpr int kRing = 2 * kTokens * kMaxPending / 4;  // pieces without padding
    constexpr int kPieces = kRing + sizeof(Dots::own) / 16 + sizeof(Dots::qq) / 16;
    auto* const sums = reinterpret_cast<float4*>(&smem.dots);
#pragma unroll
    for (int i = lane; i < kPieces; i += 32) {
      const int piece = i + (i < kRing ? i / 4 : kRing / 4);
      float x[4] = {};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float4 y = reinterpret_cast<const float4*>(&smem.parts[part])[piece];
        x[0] += y.x, x[1] += y.y, x[2] += y.z, x[3] += y.w;
      }
      float4 after = {1.0f, 1.0f, 1.0f, 1.0f};
      if (i < kRing) after = reinterpret_cast<const float4*>(smem.after)[i % 4];
      sums[piece] = {x[0] * after.x, x[1] * after.y, x[2] * after.z, x[3] * after.w};
    }
    __syncwarp();
  }

  // k^T S or q^T S of token i for S_0 and what is pending, as before the call.
  // In the place of the first part, which this lane alone has to do with now.
  __device__ __forceinline__ void SumPending(float (&sums)[kParts][kTokens][Smem::kRow],
                                             const float (&dots)[kMaxPending + 4],
                                             const Columns (&u)[kMaxPending],
                                             float decay, int i) const {
    Columns sum = {}, result = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Columns& x = reinterpret_cast<const Columns&>(sums[part][i][Column()]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum.x[c] += x.x[c];
    }
#pragma unroll
    for (int n = 0; n < kMaxPending; n += 4) {
      const float4 x = *reinterpret_cast<const float4*>(dots + n);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        result.x[c] = fmaf(x.x, u[n].x[c], result.x[c]);
        result.x[c] = fmaf(x.y, u[n + 1].x[c], result.x[c]);
        result.x[c] = fmaf(x.z, u[n + 2].x[c], result.x[c]);
        result.x[c] = fmaf(x.w, u[n + 3].x[c], result.x[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      result.x[c] = fmaf(decay, sum.x[c], result.x[c]);
    }
    reinterpret_cast<Columns&>(sums[0][i][Column()]) = result;
  }

  __device__ __forceinline__ void Solve(const Block& at, const RowPlan& row,
                                        const Raw<kColumns> (&values)[kTokens],
                                        const Smem& smem) const {
    using Own = Floats<kColumns>;
    const DecodeParams& p = at.p;
    const Dots& dots = smem.dots;
    const int v = Column();
    Columns u[kTokens];  // of the call's tokens, decayed to the one at hand
    float decay = 1.0f;  // from the pending tokens to it
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (i >= p.T) continue;
      const float own_decay = smem.decay[i];
      decay *= own_decay;
      Columns sums[2];
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        sums[x] = reinterpret_cast<const Columns&>(smem.sums[x][0][i][v]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[x].x[c] *= decay;
      }
#pragma unroll
      for (int n = 0; n < i; ++n) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          u[n].x[c] *= own_decay;
          sums[0].x[c] = fmaf(dots.own[0][i][n], u[n].x[c], sums[0].x[c]);
          sums[1].x[c] = fmaf(dots.own[1][i][n], u[n].x[c], sums[1].x[c]);
        }
      }
      const float q_norm = p.scale * rsqrtf(dots.qq[i] + kNormEpsilon);
      const float k_norm = rsqrtf(dots.own[0][i][i] + kNormEpsilon);
      const float q = p.use_qk_l2norm ? q_norm : p.scale;
      const float k = p.use_qk_l2norm ? k_norm : 1.0f;
      const float beta = smem.beta[i];
      Columns value, out;
      reinterpret_cast<Own&>(value) = Widen(values[i], DType::kBFloat16);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        u[i].x[c] = k * (beta * fmaf(-k, sums[0].x[c], value.x[c]));
        out.x[c] = q * fmaf(dots.own[1][i][i], u[i].x[c], sums[1].x[c]);
      }
      jax_gdn::Store<kColumns>(p.out, at.Value(i, v),
                               reinterpret_cast<const Own&>(out));
      if (row.write != kNoSlot) {
        const uint32_t entry = RingOf(p, row.write, at.hv) +
                               row.cursor.At(p.pending, row.cursor.count + i);
        *reinterpret_cast<Own*>(U(p, entry) + at.first_v + v) =
            reinterpret_cast<const Own&>(u[i]);
      }
    }
  }

  __device__ __forceinline__ void StoreZeros(const Block& at) const {
    for (int64_t i = 0; i < at.p.T; ++i) {
      jax_gdn::Store<kColumns>(at.p.out, at.Value(i, Column()), {});
    }
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DEFERRED_COLUMNS_CUH_
