"""The references, in jnp; the formula is in the docstring of `jax_gdn.decode`."""

import dataclasses
import functools as ft
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_gdn._operands import PENDING

FLOAT32_MAX = float(np.finfo(np.float32).max)


def reference_decode(
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
    g: Array | None = None,
    beta: Array | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_layout: str = "KV",
    layer: int | Array | None = None,
    state_indices: Array | None = None,
    output_state_indices: Array | None = None,
) -> tuple[Array, Array]:
    """Computes what `jax_gdn.decode` computes; see there for the arguments."""
    if layer is not None:
        given: dict[str, Any] = dict(locals(), layer=None)
        given |= one_pool(given, ["state"], layer)
        out, pool = reference_decode(**given)
        return out, pool.reshape(state.shape)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    gates: Any = [a, b] if g is None else [g, beta]
    gates_of = ft.partial(as_gates, A_log, dt_bias, lower_bound, allow_neg_eigval)
    S, write, valid = states_of_rows(state, state_indices, output_state_indices)
    # Cut off here: no derivative may depend on what padding holds.
    tokens = [only(x, valid) for x in (q, k, v, *gates)]
    every_token = write is not None and write.ndim == 2
    S = S.astype(jnp.float32) if state_layout == "KV" else S.astype(jnp.float32).mT

    def step(S, token):
        out, S, _ = _decode_token(S, token, gates_of, use_qk_l2norm)
        return S, (factor * out, S if every_token else None)

    tokens = [jnp.moveaxis(x, 1, 0).astype(jnp.float32) for x in tokens]
    S, (out, snapshots) = lax.scan(step, S, tokens)
    S = S if snapshots is None else jnp.moveaxis(snapshots, 0, 1)
    state = stored(S if state_layout == "KV" else S.mT, state, write, valid)
    out = only(jnp.moveaxis(out, 0, 1), valid)
    return out.astype(q.dtype if output is None else output.dtype), state


def states_of_rows(state, read, write):
    """The state that each row reads, the slots it writes, and whether it is no padding.

    The latter two are None where there are no slots.
    """
    if read is None:
        return state, None, None
    valid = (read >= 0) & (read < state.shape[0])
    # Not what is in the slot of a padding row: no derivative may depend on it.
    S = _read(state, jnp.where(valid, read, state.shape[0]))
    return S, read if write is None else write, valid


def only(x, valid):
    """What of x is valid, [B] or [B, T], and 0 for the rest; None: all is."""
    if valid is None:
        return x
    return jnp.where(jnp.expand_dims(valid, range(valid.ndim, x.ndim)), x, 0)


def _read(state, slots):
    """The states in slots of a pool, and 0 for those that it does not have."""
    if state.shape[0] == 0:
        return jnp.zeros((*slots.shape, *state.shape[1:]), state.dtype)
    return state.at[slots].get(mode="fill", fill_value=0)


def one_pool(given, names, layer):
    """Returns the stacks among the arguments as one pool each, and a layer's slots."""
    L, N = given[names[0]].shape[:2]
    rows = jnp.arange(N, dtype=jnp.int32)
    slots = {n: given[n] for n in ("state_indices", "output_state_indices")}
    if slots["state_indices"] is None:
        slots["state_indices"] = rows
    slots = {
        n: slots_of_layer(layer, L, N, x) for n, x in slots.items() if x is not None
    }
    return slots | {n: given[n].reshape(L * N, *given[n].shape[2:]) for n in names}


def slots_of_layer(layer, L, N, slots):
    """Returns the slots of a layer of a stack as those of one pool of L N slots.

    What is outside the layer, or of a layer outside the stack, becomes -1.
    """
    layer = jnp.asarray(layer, jnp.int32)
    inside = (slots >= 0) & (slots < N) & (layer >= 0) & (layer < L)
    return jnp.where(inside, layer * N + slots, -1)


def as_gates(A_log, dt_bias, lower_bound, allow_neg_eigval, a, b):
    """Log decay and write strength; without `A_log`, a and b are these."""
    if A_log is None:
        return a, b
    lead = a.ndim - dt_bias.ndim  # B, or B and T, or more
    x = a + jnp.expand_dims(dt_bias.astype(jnp.float32), range(lead))
    others = [i for i in range(a.ndim) if i != lead]
    A_log = jnp.expand_dims(A_log.astype(jnp.float32), others)
    beta = jax.nn.sigmoid(b) * (2 if allow_neg_eigval else 1)
    if lower_bound is None:
        return -decay_rate(A_log, x), beta
    return lower_bound * jax.nn.sigmoid(scaled(A_log, x)), beta


def _decode_token(S, token, gates_of, use_qk_l2norm):
    """The formula: q, k [B, H, K], v [B, HV, V], a, b [B, HV], S [B, HV, K, V].

    Returns `out`, S, and what the token does to S: see `_apply`.
    """
    q, k, v, a, b = token
    key, k_norm = k, jnp.ones_like(k[..., :1])
    if use_qk_l2norm:
        q, k, k_norm = q / norm(q), k / norm(k), norm(k)
        # Else XLA computes norms anew for every entry of S: at B = 64 1.6 times slower
        # on a GPU, and ten times longer to compile.
        q, k = lax.optimization_barrier((q, k))
    q, k, k_norm = (_of_value_heads(x, v.shape[1]) for x in (q, k, k_norm))
    g, beta = gates_of(a, b)

    decay = jnp.exp(g)
    S = _decayed(decay, S)
    u = beta[..., None] * (v - jnp.sum(k[..., None] * S, axis=2))
    S = S + k[..., None] * u[:, :, None]
    return jnp.sum(q[..., None] * S, axis=2), S, (key, u / k_norm, decay)


def norm(x):
    return jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)


def _of_value_heads(x, HV):
    """What key heads, [B, H, ...], have, for each of their value heads."""
    return jnp.repeat(x, HV // x.shape[1], axis=1)


def _decayed(decay, S):
    """S times a decay a head, [B, HV], or a key channel, [B, HV, K]."""
    return decay.reshape(*decay.shape, *[1] * (S.ndim - decay.ndim)) * S


def _apply(S, entry):
    """S after a pending token: k as it came, u with its norm, and the decay."""
    k, u, decay = entry
    k = _of_value_heads(k.astype(jnp.float32), u.shape[1])
    return _decayed(decay, S) + k[..., None] * u[:, :, None]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rows of a deferred call do; slots are N where there is none."""

    valid: Array  # [B]; the other rows are padding
    read: Array  # [B]
    write: Array  # [B]
    first: Array  # [B], the oldest pending entry of the ring
    count: Array  # [B], how many are pending
    folds: Array  # [B], whether these are written into the state

    def entries(self, ring, start, number):
        """Indices of so many entries of a ring [N, H, R, ..], the first `start` on."""
        after = start + jnp.arange(number, dtype=jnp.int32)[None]
        return (self.first[:, None] + after) % ring.shape[2]

    def pending(self, ring, empty, window):
        """The pending entries, [window, B, ...]; `empty` where there is none."""
        numbers = jnp.arange(window, dtype=jnp.int32)[None]
        there = self.valid[:, None] & (numbers < self.count[:, None])
        slots = jnp.where(there, self.read[:, None], ring.shape[0])
        entries = self.entries(ring, 0, window)
        pending = ring.at[slots, :, entries].get(mode="fill", fill_value=empty)
        return jnp.moveaxis(pending, 1, 0)

    def append(self, ring, tokens):
        """The ring with the call's tokens, [B, T, ...], behind what is pending."""
        entries = self.entries(ring, self.count[:, None], tokens.shape[1])
        tokens = tokens.astype(ring.dtype)
        return ring.at[self.write[:, None], :, entries].set(tokens, mode="drop")


def plan_rows(
    cursors, R, window, T, state_indices=None, output_state_indices=None, fold=None
):
    """Returns what the rows of a call of T tokens do."""
    N = cursors.shape[0]
    rows = jnp.arange(N, dtype=jnp.int32)
    reads = rows if state_indices is None else state_indices
    writes = reads if output_state_indices is None else output_state_indices
    there = (reads >= 0) & (reads < N)
    # Rows that are the slots need no gather, for which devices would wait.
    first, count = (
        cursors if state_indices is None else _read(cursors, jnp.where(there, reads, N))
    ).T
    valid = there & (first >= 0) & (first < R) & (count >= 0) & (count <= window)
    keeps = valid & (writes >= 0) & (writes < N)
    full = (count + T > window) | (False if fold is None else fold)
    folds = keeps & ((writes != reads) | ((count > 0) & full))
    read, write = jnp.where(valid, reads, N), jnp.where(keeps, writes, N)
    return Rows(valid, read, write, first, count, folds)


def reference_decode_deferred(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    pending: Sequence[Array],
    cursors: Array,
    A_log: Array | None = None,
    a: Array | None = None,
    dt_bias: Array | None = None,
    b: Array | None = None,
    scale: float | None = None,
    output: Array | None = None,
    use_qk_l2norm: bool = True,
    *,
    window: int,
    g: Array | None = None,
    beta: Array | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_layout: str = "KV",
    layer: int | Array | None = None,
    state_indices: Array | None = None,
    output_state_indices: Array | None = None,
    fold: Array | None = None,
) -> tuple[Array, Array, list[Array]]:
    """Computes what `jax_gdn.decode_deferred` computes: replays what is pending."""
    if layer is not None:
        given: dict[str, Any] = dict(locals(), layer=None)
        stacks = dict(zip(PENDING, pending, strict=True)) | {"state": state}
        given |= one_pool(given | stacks, list(stacks), layer)
        given["pending"] = [given.pop(name) for name in PENDING]
        given["cursors"] = jnp.tile(cursors, (state.shape[0], 1))
        out, pool, rings = reference_decode_deferred(**given)
        rings = [x.reshape(ring.shape) for x, ring in zip(rings, pending, strict=True)]
        return out, pool.reshape(state.shape), rings
    T, R = q.shape[1], pending[0].shape[2]
    gates: Any = [a, b] if g is None else [g, beta]
    rows = plan_rows(cursors, R, window, T, state_indices, output_state_indices, fold)
    gates_of = ft.partial(as_gates, A_log, dt_bias, lower_bound, allow_neg_eigval)
    S = _read(state, rows.read).astype(jnp.float32)
    S = S if state_layout == "KV" else S.mT
    entries = [rows.pending(*x, window) for x in zip(pending, (0, 0, 1), strict=True)]
    S, _ = lax.scan(lambda S, entry: (_apply(S, entry), None), S, entries)
    folded = (S if state_layout == "KV" else S.mT).astype(state.dtype)
    slots = jnp.where(rows.folds, rows.write, state.shape[0])
    state = state.at[slots].set(folded, mode="drop")

    def step(S, token):
        out, S, entry = _decode_token(S, token, gates_of, use_qk_l2norm)
        return S, (out, entry)

    tokens = [only(x, rows.valid).astype(jnp.float32) for x in (q, k, v, *gates)]
    _, (out, entries) = lax.scan(step, S, [jnp.moveaxis(x, 1, 0) for x in tokens])
    entries = [jnp.moveaxis(x, 0, 1) for x in entries]
    pending = [rows.append(x, new) for x, new in zip(pending, entries, strict=True)]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out = only(factor * jnp.moveaxis(out, 0, 1), rows.valid)
    return out.astype(q.dtype if output is None else output.dtype), state, pending


def scaled(A_log, x):
    """exp(A_log) * x, at most 128 and at least -128, where a sigmoid is 1 or 0.

    Finite for all finite inputs: exp(A_log) comes in two steps. So are its derivatives,
    which are those of an A_log of at most 60.
    """

    def product(limit):
        half = jnp.exp(jnp.where(A_log > limit, limit, A_log) / 2)
        y = half * x
        y = half * jnp.where(jnp.abs(y) < 1e37, y, jnp.where(x < 0, -1e37, 1e37))
        return jnp.where(jnp.abs(y) < 128, y, jnp.where(x < 0, -128.0, 128.0))

    smooth = product(60)
    return smooth + lax.stop_gradient(product(176) - smooth)


def decay_rate(A_log, x):
    """exp(A_log) * softplus(x), at most 128, where exp(-128) is 0 as exp(-inf) is.

    Finite for all finite inputs, with its derivatives of either mode for cotangents up
    to 1e29: an A_log whose exp, times one, may overflow or vanish is added to
    log softplus(x), which is x, to rounding, up to x = -17. What a `where` does not
    take is finite, too.
    """
    extreme = jnp.abs(A_log) > 20
    softplus = jax.nn.softplus(x)
    softplus = jnp.where(softplus > FLOAT32_MAX, FLOAT32_MAX, softplus)
    tiny = x < -17
    log_rate = A_log + jnp.where(tiny, x, jnp.log(jnp.where(tiny, 1, softplus)))
    rate = jnp.exp(jnp.where(log_rate > 5, 5, log_rate))
    rate = jnp.where(extreme, rate, jnp.exp(jnp.where(extreme, 0, A_log)) * softplus)
    return jnp.where(rate > 128, 128, rate)


def stored(S, state, write, valid):
    """Puts S [B, HV, ..], or [B, T, HV, ..], where `write` [B], or [B, T], says."""
    if write is None:
        return S.astype(state.dtype)
    valid = valid[:, None] if write.ndim == 2 else valid
    inside = valid & (write >= 0) & (write < state.shape[0])
    slots = jnp.where(inside, write, state.shape[0])
    return state.at[slots].set(S.astype(state.dtype), mode="drop")
