"""The chunked form of prefill, in jnp, on any platform.

A chunk of C tokens takes a state S to the next one linearly. With G_i the log decay
from the chunk's start to its token i, and v' what the tokens add at their keys::

    (I + L) v' = beta (v - exp(G) k S)     L_ij = beta_i exp(G_i - G_j) k_i.k_j, i > j
    out_i      = scale (exp(G_i) q_i S + sum_j exp(G_i - G_j) (q_i.k_j) v'_j),  i >= j
    S          = exp(G_C) S + sum_j exp(G_C - G_j) k_j v'_j^T

With X = (I + L)^-1, U = X beta v and W = X beta exp(G) k, v' is U - W S: all but the
products with S is known of all chunks at once, and the walk through them is one product
a chunk. Sources: arXiv:2406.06484 for the form, arXiv:2412.06464 for the decay.
"""

import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, export, lax

from jax_gdn._reference import as_gates, norm, one_pool, only, states_of_rows, stored

_CHUNK = 64
# Tokens within which a decay a channel is multiplied out, which takes their square.
_BLOCK = 16
# Tokens times value heads that are worked on at once; each takes some 8 KB meanwhile.
_SEGMENT = 2**16
# Not TF32's: there is none on a CPU, and a choice by platform does not survive JAX's
# derivatives.
_PRESETS = {
    "bf16x6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
    "bf16x3": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    "bf16": lax.DotAlgorithmPreset.BF16_BF16_F32,
}


def chunked_prefill(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    A_log: Array | None = None,
    a: Array | None = None,
    dt_bias: Array | None = None,
    b: Array | None = None,
    scale: float | None = None,
    output: Array | None = None,
    use_qk_l2norm: bool = True,
    *,
    precision: str,
    g: Array | None = None,
    beta: Array | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_layout: str = "KV",
    layer: int | Array | None = None,
    state_indices: Array | None = None,
    output_state_indices: Array | None = None,
    lengths: Array | None = None,
) -> tuple[Array, Array]:
    """Computes what `jax_gdn.prefill` computes; see there for the arguments."""
    if layer is not None:
        given: dict[str, Any] = dict(locals(), layer=None)
        given |= one_pool(given, ["state"], layer)
        out, pool = chunked_prefill(**given)
        return out, pool.reshape(state.shape)
    B, T = q.shape[:2]
    S, write, valid = states_of_rows(state, state_indices, output_state_indices)
    there = tokens_there(T, lengths, valid)
    # Cut off here: no derivative may depend on what padding holds.
    gates: Any = [a, b] if g is None else [g, beta]
    tokens = [only(x.astype(jnp.float32), there) for x in (q, k, v, *gates)]
    gates_of = ft.partial(as_gates, A_log, dt_bias, lower_bound, allow_neg_eigval)
    g, beta = (only(x, there) for x in gates_of(*tokens[3:]))
    g = jnp.where(g < -128, -128, g)  # exp(-128) is 0, as exp(-inf) is
    if use_qk_l2norm:
        tokens[:2] = (x / norm(x) for x in tokens[:2])
    tokens[0] = (q.shape[-1] ** -0.5 if scale is None else scale) * tokens[0]

    size = min(_CHUNK, 1 << (T - 1).bit_length())
    number = math.ceil(T / size)
    rows = 1 if export.is_symbolic_dim(B) else max(B, 1)
    segments = math.ceil(number * size * rows * v.shape[2] / _SEGMENT)
    number = math.ceil(number / segments)
    tokens = [_in_chunks(x, segments, number, size) for x in (*tokens[:3], g, beta)]
    S = S.astype(jnp.float32) if state_layout == "KV" else S.astype(jnp.float32).mT
    S, out = lax.scan(jax.checkpoint(ft.partial(_segment, precision)), S, tokens)
    out = jnp.moveaxis(out, (0, 4), (1, 3)).reshape(B, -1, *v.shape[2:])[:, :T]
    out = only(out, there)  # which a state that is NaN would make NaN
    state = stored(S if state_layout == "KV" else S.mT, state, write, valid)
    return out.astype(q.dtype if output is None else output.dtype), state


def tokens_there(T: int, lengths: Array | None, valid: Array | None) -> Array | None:
    """Which tokens are no padding, [B, T] or, where all of a row are alike, [B]."""
    if lengths is None:
        return valid
    numbers = lax.broadcasted_iota(jnp.int32, (*lengths.shape, T), lengths.ndim)
    there = numbers < lengths[..., None]
    return there if valid is None else there & valid[:, None]


def _in_chunks(x, segments, number, size):
    """[B, T, heads, ...] as [segments, B, number, heads, size, ...], padded by zeros.

    A token of zeros changes nothing: it has no decay and no strength.
    """
    B, T = x.shape[:2]
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, segments * number * size - T)
    x = jnp.pad(x, padding).reshape(B, segments, number, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 4), (0, 3))


def _segment(precision, S, tokens):
    """The states after some chunks of all rows, and `out` of their tokens."""
    B, number = tokens[0].shape[:2]
    # Chunks of all rows are one axis: with more, jaxlib 0.10.2 crashes on some CPUs.
    q, k, v, g, beta = (x.reshape(B * number, *x.shape[2:]) for x in tokens)
    dot = ft.partial(_dot, precision)
    of_pairs, start, end, total = (_per_head if g.ndim == 3 else _per_channel)(g)
    kk, qk = of_pairs(dot, k, k), of_pairs(dot, q, k)
    q, k = (_of_value_heads(x, v.shape[1]) for x in (q, k))
    L = jnp.tril(beta[..., None] * kk, -1)
    right = beta[..., None] * jnp.concatenate([v, jnp.exp(start) * k], -1)
    UW = dot("ij,jx->ix", _inverse(dot, L), right)
    inside = dot("ij,jx->ix", jnp.tril(qk), UW)
    added = dot("jk,jx->kx", jnp.exp(end) * k, UW)
    V = v.shape[-1]
    # What `out` and the next state take from S: one product for both.
    of_S = jnp.concatenate([jnp.exp(start) * q - inside[..., V:], -added[..., V:]], -2)

    def chunk(S, x):
        of_S, inside, added, total = x
        out, moved = jnp.split(dot("ik,kv->iv", of_S, S), [inside.shape[-2]], axis=-2)
        return jnp.exp(total) * S + (moved + added), out + inside

    parts = of_S, inside[..., :V], added[..., :V], jnp.swapaxes(total, -1, -2)
    parts = [x.reshape(B, number, *x.shape[1:]) for x in parts]
    S, out = lax.scan(chunk, S, [jnp.moveaxis(x, 1, 0) for x in parts])
    return S, jnp.moveaxis(out, 0, 1)


def _dot(precision, spec, x, y):
    """A product of matrices behind any leading axes, such as "ij,jk->ik"."""
    spec = "..." + spec.replace(",", ",...").replace("->", "->...")
    if precision == "bf16":  # which a CPU would not do to float32
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    preset, dtype = _PRESETS[precision], jnp.float32
    return jnp.einsum(spec, x, y, precision=preset, preferred_element_type=dtype)


def _of_value_heads(x, HV):
    return jnp.repeat(x, HV // x.shape[1], axis=1)


# Decays of the tokens of a chunk, from their logs: a function that multiplies products
# of pairs by what lies between the two, and the logs from the chunk's start to each
# token, from each token to the chunk's end, and of the chunk. They are sums, never
# differences of sums, which lose bits behind a strong decay.


def _per_head(g):
    """Decays of one number a token: g [chunks, HV, C]."""
    between = _between(g[..., None])[..., 0]
    D = jnp.exp(between)

    def of_pairs(dot, x, k):
        return D * _of_value_heads(dot("ik,jk->ij", x, k), g.shape[1])

    start = g[..., :1] + between[..., 0]
    return of_pairs, start[..., None], between[..., -1, :, None], start[..., -1:, None]


def _between(g):
    """The sum of g [..., C, K] behind token j up to token i; -inf where j > i."""
    C = g.shape[-2]
    behind = _masked(jnp.tri(C, k=-1)[..., None], g[..., None, :], 0)  # [..., l, j, K]
    sums = jnp.einsum("il,...ljk->...ijk", jnp.tri(C), behind, precision="highest")
    return _masked(jnp.tri(C)[..., None], sums, -jnp.inf)


def _masked(mask, x, other):
    """Returns x where the mask of its last axes is 1, and the other elsewhere."""
    mask = jnp.expand_dims(mask.astype(bool), range(x.ndim - mask.ndim))
    return jnp.where(mask, x, other)


def _per_channel(g):
    """Decays of K numbers a token: g [chunks, HV, C, K].

    Within blocks they are multiplied out; between blocks a decay is that to the end of
    the earlier block, that from the start of the later one, and what is between.
    """
    *lead, C, K = g.shape
    c = min(_BLOCK, C)
    n = C // c
    blocks = g.reshape(*lead, n, c, K)
    between = _between(blocks)
    head, tail = blocks[..., :1, :] + between[..., 0, :], between[..., -1, :, :]
    sums = ft.partial(jnp.einsum, precision="highest")
    whole, earlier = head[..., -1, :], jnp.tri(n, k=-1)
    before = sums("ib,...bk->...ik", earlier, whole)[..., None, :]
    after = sums("bj,...bk->...jk", earlier, whole)[..., None, :]
    # Of blocks i > b > j.
    gaps = sums("ib,bj,...bk->...ijk", earlier, earlier, whole)[..., None, :]

    def of_pairs(dot, x, k):
        x, k = (_of_value_heads(x, g.shape[1]).reshape(*lead, n, c, K) for x in (x, k))
        pairs = x[..., :, None, :] * k[..., None, :, :]
        near = jnp.sum(jnp.exp(between) * pairs, -1)
        decay = tail[..., None, :, :, :] + gaps  # of blocks i, of tokens in blocks j
        decay = jnp.exp(_masked(earlier[..., None, None], decay, -jnp.inf))
        right = (k[..., None, :, :, :] * decay).reshape(*lead, n, C, K)
        product = dot("ik,jk->ij", x * jnp.exp(head), right).reshape(*lead, n, c, n, c)
        near = jnp.broadcast_to(near[..., None, :], product.shape)
        near = _masked(jnp.eye(n)[:, None, :, None], near, 0)
        return (product + near).reshape(*lead, C, C)

    start, end = (x.reshape(*lead, C, K) for x in (head + before, tail + after))
    return of_pairs, start, end, start[..., -1:, :]


def _inverse(dot, L):
    """(I + L)^-1 of strictly lower L: its halves, and what is between them.

    The halves of all are one more axis, however deep.
    """
    return _inverses(dot, L[None])[0]


def _inverses(dot, L):
    n = L.shape[-1]
    if n == 1:
        return jnp.ones_like(L)
    h = n // 2
    halves = jnp.concatenate([L[..., :h, :h], L[..., h:, h:]])
    first, second = jnp.split(_inverses(dot, halves), 2)
    below = -dot("ij,jk->ik", second, dot("ij,jk->ik", L[..., h:, :h], first))
    upper = jnp.concatenate([first, jnp.zeros_like(below)], -1)
    return jnp.concatenate([upper, jnp.concatenate([below, second], -1)], -2)
