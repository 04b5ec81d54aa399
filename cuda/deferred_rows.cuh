// A warp of rows of a deferred call: its products, and what is done once a row; see
// deferred.cuh.
#ifndef JAX_GDN_CUDA_DEFERRED_ROWS_CUH_
#define JAX_GDN_CUDA_DEFERRED_ROWS_CUH_

#include "cuda/deferred_state.cuh"

namespace jax_gdn {

template <KernelSpec kSpec_>
struct DeferredRows : DeferredState<kSpec_> {
  using Base = DeferredState<kSpec_>;
  using Base::Base;
  using Base::K, Base::VT, Base::kSingle, Base::kSpec, Base::kState, Base::kKV;
  using Base::kOwn, Base::kPieces;
  using Base::kStrips, Base::kPart, Base::kSteps, Base::kThreads, Base::kTokens;
  using Base::lane, Base::part, Base::strip, Base::g, Base::t;
  using Base::Place, Base::LoadStep, Base::GetColumn, Base::GetPieces, Base::Fold;
  using Base::RingOf, Base::KeyRingOf, Base::U, Base::Key;
  using typename Base::Block, typename Base::Bits, typename Base::Dots;
  using typename Base::Smem;
  // A single float32 token takes fewer instructions without tensor cores.
  static constexpr bool kFma = kSingle && kState == DType::kFloat32;
  // Registers hold either a part of a float32 state or the ring's keys.
  static constexpr bool kKeysLast = kState == DType::kFloat32;

  // Of a step, elements 4 t .. 4 t + 3 of k and q of token g (or, if kFma, of the only
  // one), as operands of products; 0 if there is no such token.
  struct TokenStep {
    uint2 k, q;
  };
  // Steps of the state that are loaded before the first is used up; as registers allow.
  static constexpr int kAtOnce =
      kSteps - (kKV && kState == DType::kFloat32 && !kSingle ? 1 : 0);
  // Those of the first steps stay in registers; others are loaded whenever they are
  // needed, from the first cache.
  static constexpr int kHeld = kState == DType::kFloat32 && !kSingle ? 2 : kSteps;
  struct Tokens {
    const uint16_t *k, *q;
    bool are_there;
    TokenStep held[kHeld];

    __device__ __forceinline__ TokenStep Load(int step) const {
      TokenStep x = {};
      if (are_there) {
        jax_gdn::Load(k + 16 * step, x.k);
        jax_gdn::Load(q + 16 * step, x.q);
      }
      return x;
    }
    __device__ __forceinline__ TokenStep operator[](int step) const {
      return step < kHeld ? held[step] : Load(step);
    }
  };
  __device__ __forceinline__ Tokens LoadTokens(const Block& at) const {
    const int64_t first = at.Key(kFma ? 0 : g) + kPart * part + 4 * t;
    Tokens tokens = {static_cast<const uint16_t*>(at.p.k.data) + first,
                     static_cast<const uint16_t*>(at.p.q.data) + first,
                     kFma || g < at.p.T};
#pragma unroll
    for (int step = 0; step < kHeld; ++step) tokens.held[step] = tokens.Load(step);
    return tokens;
  }

  __device__ __forceinline__ void Run(const Block& at, int32_t read, Smem& smem) const {
    const RowRegs row_regs = LoadRow(at.p, at.n, read);
    Bits bits[kSteps][4];
    const Bits* const from = Place(at.p.state.data, at, read);
#pragma unroll
    for (int step = 0; step < kAtOnce; ++step) LoadStep(from, step, bits[step]);
    const Tokens tokens = LoadTokens(at);
    // What else is to be done while the state arrives, by a warp each.
    const bool gates = strip == kStrips - 1 && part == 0;
    const bool prefetches = strip == kStrips - 1 && part == 1;
    __syncwarp();
    const RowPlan row = PlanRow(at.p, row_regs);
    if (!row.valid) return;  // nobody waits
    if (kSpec.prefetch_distance > 0 && prefetches) Prefetch(at.p, LoadLaterRow(at.p));
    RingKeys keys = {};
    if (strip == 0 && !kKeysLast) keys = LoadRingKeys(at, row);
    PutSums(from, bits, tokens, smem);
    if (strip == 0) {
      if (kKeysLast) keys = LoadRingKeys(at, row);
      PutDots(keys, tokens, smem.parts[part]);
      AppendKeys(at, row, tokens);
    }
    if (gates) PutGates(at, row, LoadGates(at), smem);
    __syncwarp();
    ArriveAtBarrier<kThreads>();
    if (row.folds) Fold(at, row);
  }

  // k^T S and q^T S of the part, of all tokens.
  __device__ __forceinline__ void PutSums(const Bits* from, Bits (&bits)[kSteps][4],
                                          const Tokens& tokens, Smem& smem) const {
    if constexpr (kFma) return PutSumsOfOne(bits, tokens, smem);
    float all_sums[4][4] = {},
          all_small[4][4] = {};  // of the largest pieces; of others
    // In the order in which accesses to the state are used up.
#pragma unroll
    for (int n = 0; n < 4 * kSteps; ++n) {
      const int i = kKV ? n % 4 : n / kSteps, step = kKV ? n / 4 : n % kSteps;
      float (&sums)[4] = all_sums[i], (&small)[4] = all_small[i];
      const auto [k, q] = tokens[step];
      const uint32_t a[4] = {k.x, q.x, k.y, q.y};
      uint32_t b[kPieces][2];
      GetPieces(bits[step], i, b);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        MultiplyAdd(piece == 0 ? sums : small, a, b[piece]);
      }
      if (kAtOnce < kSteps && n == 3) LoadStep(from, kSteps - 1, bits[kSteps - 1]);
      if (step + 1 < kSteps) continue;
      if (g < kTokens) {
        float* const p = &smem.sums[0][part][g][32 * strip];
        float* const r = &smem.sums[1][part][g][32 * strip];
        const float2 p2 = {sums[0] + small[0], sums[1] + small[1]};
        const float2 r2 = {sums[2] + small[2], sums[3] + small[3]};
        if constexpr (kKV) {
          p[8 * t + i] = p2.x, p[8 * t + 4 + i] = p2.y;
          r[8 * t + i] = r2.x, r[8 * t + 4 + i] = r2.y;
        } else {
          reinterpret_cast<float2*>(p + 8 * i)[t] = p2;
          reinterpret_cast<float2*>(r + 8 * i)[t] = r2;
        }
      }
    }
  }

  // If kFma: a lane's own entries, then over the four lanes that share columns, each of
  // which is left with a quarter.
  __device__ __forceinline__ void PutSumsOfOne(const Bits (&bits)[kSteps][4],
                                               const Tokens& tokens, Smem& smem) const {
    float x[8] = {};  // p of the four columns, r of them
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float k[4], q[4];
      UnpackState<DType::kBFloat16>(tokens[step].k, k);
      UnpackState<DType::kBFloat16>(tokens[step].q, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float s[4];
        GetColumn(bits[step], i, s);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          x[i] = fmaf(k[j], s[j], x[i]);
          x[4 + i] = fmaf(q[j], s[j], x[4 + i]);
        }
      }
    }
#pragma unroll
    for (int half = 4; half >= 2; half /= 2) {
      const bool upper = t & (half / 2);
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float passed = upper ? x[i] : x[i + half];
        const float kept = upper ? x[i + half] : x[i];
        x[i] = kept + __shfl_xor_sync(0xffffffffu, passed, half / 2);
      }
    }
    float* const to = &smem.sums[t / 2][part][0][32 * strip];
    const int column = t % 2 * 2;
    if constexpr (kKV) {
      reinterpret_cast<float2*>(to)[(4 * g + column) / 2] = {x[0], x[1]};
    } else {
      to[8 * column + g] = x[0], to[8 * column + 8 + g] = x[1];
    }
  }

  // A part of the pending keys g and g + 8, likewise.
  struct RingKeys {
    uint2 k[2][kSteps];
  };
  __device__ __forceinline__ RingKeys LoadRingKeys(const Block& at,
                                                   const RowPlan& row) const {
    const uint32_t ring = KeyRingOf(at.p, row.read, KeyHead(at.p, at.hv));
    RingKeys keys = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i >= row.cursor.count) continue;
      const int32_t entry = row.cursor.At(at.p.pending, g + 8 * i);
      const uint16_t* const key = Key(at.p, ring + entry) + kPart * part + 4 * t;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) Load(key + 16 * step, keys.k[i][step]);
    }
    __syncwarp();
    return keys;
  }
  // A part's products.
  __device__ __forceinline__ void PutDots(const RingKeys& keys, const Tokens& tokens,
                                          Dots& dots) const {
    float ring[2][4] = {}, own[2][4] = {};  // with k, with q
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      auto [k, q] = tokens[step];
      if (kFma && g > 0) k = q = {0, 0};
      const uint2 low = keys.k[0][step], high = keys.k[1][step];
      const uint32_t of_k[2] = {k.x, k.y}, of_q[2] = {q.x, q.y};
      const uint32_t of_ring[4] = {low.x, high.x, low.y, high.y};
      const uint32_t of_own[4] = {k.x, q.x, k.y, q.y};
      MultiplyAdd(own[0], of_own, of_k);
      MultiplyAdd(own[1], of_own, of_q);
      MultiplyAdd(ring[0], of_ring, of_k);
      MultiplyAdd(ring[1], of_ring, of_q);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 2 * t + c % 2;
        if (token < kTokens) dots.ring[i][token][g + c / 2 * 8] = ring[i][c];
        if (c / 2 == i && g < kTokens && token < kOwn) {
          dots.own[i][g][token] = own[0][c];
        }
      }
    }
    if (g < kOwn && g / 2 == t) dots.qq[g] = g % 2 ? own[1][3] : own[1][2];
  }

  // Of token g; its keys are kept once a key head.
  __device__ __forceinline__ void AppendKeys(const Block& at, const RowPlan& row,
                                             const Tokens& tokens) const {
    const unsigned h = KeyHead(at.p, at.hv);
    const bool mine = blockIdx.x == 0 && at.hv == h * at.p.group && g < at.p.T;
    if (!mine || row.write == kNoSlot) return;
    const uint32_t entry = KeyRingOf(at.p, row.write, h) +
                           row.cursor.At(at.p.pending, row.cursor.count + g);
    uint16_t* const to = Key(at.p, entry) + kPart * part + 4 * t;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      *reinterpret_cast<uint2*>(to + 16 * step) = tokens[step].k;
    }
  }

  // Of lane i those of token i.
  struct GatesRegs {
    Raw<1> a, b, dt_bias;
    float A_log;
  };
  __device__ __forceinline__ GatesRegs LoadGates(const Block& at) const {
    const DecodeParams& p = at.p;
    const auto head = at.Head(lane < p.T ? lane : 0);
    GatesRegs regs = {LoadRaw<1>(p.a, head), LoadRaw<1>(p.b, head),
                      LoadRaw<1>(p.dt_bias, at.hv), 0.0f};
    Load(p.A_log + at.hv, regs.A_log);
    return regs;
  }
  __device__ __forceinline__ void PutGates(const Block& at, const RowPlan& row,
                                           const GatesRegs& regs, Smem& smem) const {
    const DecodeParams& p = at.p;
    const float decay = DecayOf(p, regs.A_log, Widen(regs.a, p.a.dtype),
                                Widen(regs.dt_bias, p.dt_bias.dtype));
    const float beta = BetaOf(p, Widen(regs.b, p.b.dtype));
    if (lane >= p.T) return;
    smem.decay[lane] = decay, smem.beta[lane] = beta;
    if (row.write != kNoSlot && blockIdx.x == 0) {
      const int32_t entry = row.cursor.At(p.pending, row.cursor.count + lane);
      p.pending.decay[RingOf(p, row.write, at.hv) + entry] = decay;
    }
  }

  // A row that a block works on which starts about when this one ends.
  struct LaterRow {
    unsigned tile, hv;
    int32_t slot;
    Cursor cursor;
  };
  static constexpr unsigned kTiles = K / VT;  // of a state
  __device__ __forceinline__ static LaterRow LoadLaterRow(const DecodeParams& p) {
    const unsigned block = BlockNumber() + kSpec.prefetch_distance * kMultiprocessors;
    const unsigned head = block / kTiles, n = head / gridDim.y;
    LaterRow later = {block % kTiles, head % gridDim.y, kNoSlot, {0, 0}};
    if (n >= gridDim.z) return later;
    later.slot = ReadSlot(p, n);
    if (later.slot == kNoSlot) return later;
    uint2 cursor;
    Load(p.pending.cursors + 2 * int64_t{later.slot}, cursor);
    later.cursor = {static_cast<int32_t>(cursor.x), static_cast<int32_t>(cursor.y)};
    return later;
  }
  // Prefetches into the L2 cache its share of the state, as PrefetchLaterTile does, and
  // of what is pending: a lane an entry of u or, for one value head a key head, of k.
  __device__ __forceinline__ void Prefetch(const DecodeParams& p,
                                           const LaterRow& later) const {
    if (later.slot == kNoSlot) return;
    if (lane == 0) {
      constexpr uint32_t kShare = K * VT * kStateBytes<kState>;
      const int64_t share = HeadOfSlot(p, later.slot, later.hv) * kTiles + later.tile;
      PrefetchBulk(static_cast<const char*>(p.state.data) + share * kShare, kShare);
    }
    const auto [first, count] = later.cursor;
    const int n = lane % kMaxPending;
    if (n >= count || n % kTiles != later.tile || first < 0 || first >= p.pending.R) {
      return;
    }
    const int32_t at = later.cursor.At(p.pending, n);
    const unsigned h = KeyHead(p, later.hv);
    if (lane < kMaxPending) {
      PrefetchBulk(U(p, RingOf(p, later.slot, later.hv) + at), 4 * K);
    } else if (later.hv == h * p.group) {
      PrefetchBulk(Key(p, KeyRingOf(p, later.slot, h) + at), 2 * K);
    }
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DEFERRED_ROWS_CUH_
