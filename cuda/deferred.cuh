// Gated-delta-rule decode that reads the states and leaves them as they are.
//
// With the pending tokens i of a slot (see Pending), D_i the product of the decays
// after token i and D that of all, a token of the call has
//
//     p = k^T S = D k^T S_0 + sum_i D_i (k.k_i) u_i         likewise r = q^T S
//     u = beta (v - p);   out = scale (r + (q.k) u);   it becomes pending: k, u, exp(g)
//
// all of it times what the call's own tokens before it decay, and plus what they add.
// Only a row whose ring has no room for the call's tokens, or that is told to, folds
// what was pending into the state, in the same launch.
//
// A block owns the K x VT tile of one state, a warp of rows 64 x 32 of it. Those load,
// multiply by k and q of all tokens, hand over and are done, or load it again, from the
// first cache, and fold; they wait for nobody. The first warp does what is small, for
// all columns: what the ring adds, the tokens' own triangle, `out`, and the new u.
//
// Products run on tensor cores, of bfloat16. q and k are that; an entry of the state is
// the exact sum of up to three such pieces, and so is an entry of u. A single token by
// a float32 state, which fills a fraction of a tensor core, takes multiply-adds. Only
// the layouts' places differ:
//
//     "KV"   a lane loads rows 4 t .. 4 t + 3 of each 16, columns 4 g .. 4 g + 3
//     "VK"   a lane loads of rows g, g + 8, .. columns 4 t .. 4 t + 3 of each 16
//
// with g = lane / 4, t = lane % 4: 4 x 4 entries, of four products of 8 columns each.
#ifndef JAX_GDN_CUDA_DEFERRED_CUH_
#define JAX_GDN_CUDA_DEFERRED_CUH_

#include "cuda/deferred_columns.cuh"
#include "cuda/deferred_rows.cuh"

namespace jax_gdn {

// Grid: (V / VT, HV, B).
template <KernelSpec kSpec>
__device__ __forceinline__ void DecodeDeferred(const DecodeParams& p) {
  using Tile = DeferredTile<kSpec>;
  __shared__ typename Tile::Smem smem;
  const int warp = WarpNumber();
  const BlockCoord<Tile> at = {p};
  const int32_t read = ReadSlot(p, at.n);
  if (warp >= 1) {
    if (read != kNoSlot) DeferredRows<kSpec>(warp - 1).Run(at, read, smem);
  } else if (read == kNoSlot) {
    DeferredColumns<kSpec>().StoreZeros(at);
  } else {
    DeferredColumns<kSpec>().Run(at, read, smem);
  }
}

}  // namespace jax_gdn

#endif  // JAX_GDN_CUDA_DEFERRED_CUH_
