// A warp's part of a state in a deferred call: where it lies, in pieces, and folding;
// see deferred.cuh.
#ifndef JAX_GDN_CUDA_DEFERRED_STATE_CUH_
#define JAX_GDN_CUDA_DEFERRED_STATE_CUH_

#include "cuda/deferred_row.cuh"

namespace jax_gdn {

// The upper halves of two words: bfloat16 of two float32, cut off.
__device__ __forceinline__ uint32_t UpperHalves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ __forceinline__ float WithoutUpperHalf(float x) {
  return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u);
}

template <KernelSpec kSpec_>
struct DeferredState : DeferredTile<kSpec_> {
  using Base = DeferredTile<kSpec_>;
  using Base::K, Base::kState, Base::kKV, Base::kPart, Base::lane;
  using Base::RingOf, Base::KeyRingOf, Base::U, Base::Key, Base::LoadDecay;
  using typename Base::Block;
  static constexpr int kSteps = kPart / 16;  // of a part, 16 entries of K each
  // An entry as bfloat16: 24, 11 or 8 bits by 8.
  static constexpr int kPieces = kState == DType::kFloat32   ? 3
                                 : kState == DType::kFloat16 ? 2
                                                             : 1;
  using Bits = Access<4 * kStateBytes<kState>>;

  const int part, strip;  // of K, and of VT
  const int g = lane / 4, t = lane % 4;

  __device__ __forceinline__ explicit DeferredState(int warp)
      : part(warp % Base::kParts), strip(warp / Base::kParts) {}

  // Where the lane's first access to a slot's state lies, in old or new states.
  __device__ __forceinline__ Bits* Place(const void* states, const Block& at,
                                         int32_t slot) const {
    const int k = kPart * part + 4 * t;
    const int v = at.first_v + 32 * strip + (kKV ? 4 * g : g);
    const int64_t first =
        HeadOfSlot(at.p, slot, at.hv) * (K * K) + (kKV ? k * K + v : v * K + k);
    auto* const data = const_cast<char*>(static_cast<const char*>(states));
    return reinterpret_cast<Bits*>(data + first * kStateBytes<kState>);
  }
  // How far from there access i of a step lies: a row ("KV") or 8 rows ("VK") apart.
  __device__ __forceinline__ static constexpr int AccessAt(int step, int i) {
    return (kKV ? (16 * step + i) * K : 8 * i * K + 16 * step) / 4;
  }
  __device__ __forceinline__ static void LoadStep(const Bits* from, int step,
                                                  Bits (&bits)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) Load(from + AccessAt(step, i), bits[i]);
  }

  // Four entries of K of column i of a step.
  __device__ __forceinline__ static void GetColumn(const Bits (&bits)[4], int i,
                                                   float (&x)[4]) {
    if constexpr (kKV) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float row[4];
        UnpackState<kState>(bits[j], row);
        x[j] = row[i];
      }
    } else {
      UnpackState<kState>(bits[i], x);
    }
  }
  // The same as pieces that add up to them.
  __device__ __forceinline__ static void GetPieces(const Bits (&bits)[4], int i,
                                                   uint32_t (&b)[kPieces][2]) {
    if constexpr (kState == DType::kBFloat16) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Words<Bits> low = {bits[kKV ? 2 * j : i]},
                          high = {bits[kKV ? 2 * j + 1 : i]};
        b[0][j] = kKV ? __byte_perm(low.word[i / 2], high.word[i / 2],
                                    i % 2 ? 0x7632 : 0x5410)
                      : low.word[j];
      }
    } else {
      float x[4];
      GetColumn(bits, i, x);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        b[piece][0] = UpperHalves(x[0], x[1]), b[piece][1] = UpperHalves(x[2], x[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = WithoutUpperHalf(x[j]);
      }
    }
  }

  // Values 2 pair and 2 pair + 1 of an access, times decay, plus x and y.
  __device__ __forceinline__ static void AddPair(Bits& access, int pair, float decay,
                                                 float x, float y) {
    Words<Bits> bits = {access};
    if constexpr (kState == DType::kFloat32) {
      uint32_t &low = bits.word[2 * pair], &high = bits.word[2 * pair + 1];
      low = __float_as_uint(fmaf(decay, __uint_as_float(low), x));
      high = __float_as_uint(fmaf(decay, __uint_as_float(high), y));
    } else {
      float value[4];
      UnpackState<kState>(access, value);
      bits.word[pair] = RoundPair(fmaf(decay, value[2 * pair], x),
                                  fmaf(decay, value[2 * pair + 1], y), kState);
    }
    access = bits.access;
  }

  // Four accesses, times decay, plus the entries' u by four elements of their keys.
  __device__ __forceinline__ void FoldStep(const uint32_t (&u)[2][3][4],
                                           const uint2 (&k)[4], float decay,
                                           Bits (&bits)[4]) const {
    const uint32_t own_half = g % 2 ? 0x7632 : 0x5410;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // entries 2 h and 2 h + 1 of four
      const int m = i / 2, h = i % 2;
      const auto word = [&](int e) { return h ? k[e].y : k[e].x; };
      const uint32_t b[2] = {__byte_perm(word(0), word(1), own_half),
                             __byte_perm(word(2), word(3), own_half)};
      float sums[4] = {};
#pragma unroll
      for (int piece = 2; piece >= 0; --piece) MultiplyAdd(sums, u[m][piece], b);
      if constexpr (kKV) {
        AddPair(bits[2 * h], m, decay, sums[0], sums[2]);
        AddPair(bits[2 * h + 1], m, decay, sums[1], sums[3]);
      } else {
        AddPair(bits[2 * m], h, decay, sums[0], sums[1]);
        AddPair(bits[2 * m + 1], h, decay, sums[2], sums[3]);
      }
    }
  }

  // What was pending goes into the state: u k^T, a product over the entries, of which a
  // lane has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. The state is loaded again, from the
  // first cache: kept until now, it would cost a third of all registers.
  __device__ __forceinline__ void Fold(const Block& at, const RowPlan& row) const {
    const RingDecay decay = MultiplyDecays(LoadDecay(at, row), lane);
    const uint32_t ring = RingOf(at.p, row.read, at.hv);
    const uint32_t key_ring = KeyRingOf(at.p, row.read, KeyHead(at.p, at.hv));
    float u[4][4] = {};  // [entry][column]
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int n = 2 * t + e % 2 + e / 2 * 8;
      const float after = __shfl_sync(0xffffffffu, decay.after, n);
      if (n >= row.cursor.count) continue;
      const float* const from =
          U(at.p, ring + row.cursor.At(at.p.pending, n)) + at.first_v + 32 * strip;
      if constexpr (kKV) {
        Load(from + 4 * g, reinterpret_cast<float4&>(u[e]));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) Load(from + 8 * i + g, u[e][i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) u[e][i] *= after;
    }
    uint32_t a[2][3][4];  // [columns 2 m and 2 m + 1][piece]
#pragma unroll
    for (int i = 0; i < 4 * 3 * 2; ++i) {
      const int m = i / 12, piece = i / 4 % 3, e = i / 2 % 2 * 2;
      float &x = u[e][2 * m + i % 2], &y = u[e + 1][2 * m + i % 2];
      a[m][piece][i % 4] = UpperHalves(x, y);
      x = WithoutUpperHalf(x), y = WithoutUpperHalf(y);
    }
    Bits* const to = Place(at.p.new_state, at, row.write);
    const Bits* const from = Place(at.p.state.data, at, row.read);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      __syncwarp();  // else all loads would come first, and registers be too few
      Bits bits[4];
      LoadStep(from, step, bits);
      uint2 k[4] = {};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int n = 2 * t + e % 2 + e / 2 * 8;
        if (n >= row.cursor.count) continue;
        const uint32_t entry = key_ring + row.cursor.At(at.p.pending, n);
        Load(Key(at.p, entry) + kPart * part + 16 * step + g / 2 * 4, k[e]);
      }
      FoldStep(a, k, decay.all, bits);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[AccessAt(step, i)] = bits[i];
    }
  }
};

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DEFERRED_STATE_CUH_
