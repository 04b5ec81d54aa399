"""The reference of `jax_gdn.decode`, in jnp; the formula is in its docstring."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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
        given = dict(locals(), layer=None)
        L, N, *_ = state.shape
        rows = jnp.arange(N, dtype=jnp.int32)
        slots = {"state_indices": rows if state_indices is None else state_indices}
        if output_state_indices is not None:
            slots["output_state_indices"] = output_state_indices
        given |= {n: slots_of_layer(layer, L, N, x) for n, x in slots.items()}
        given["state"] = state.reshape(L * N, *state.shape[2:])
        out, pool = reference_decode(**given)
        return out, pool.reshape(state.shape)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    gates = [a, b] if g is None else [g, beta]
    gates_of = ft.partial(_gates, A_log, dt_bias, lower_bound, allow_neg_eigval)
    S, tokens, valid = state, [q, k, v, *gates], None
    read, write = state_indices, output_state_indices
    if read is not None:
        write = read if write is None else write
        valid = (read >= 0) & (read < state.shape[0])  # the other rows are padding
        # Cut off here: no derivative may depend on what padding, or its slot, holds.
        tokens = [_only(x, valid) for x in tokens]
        S = _read(state, jnp.where(valid, read, state.shape[0]))
    every_token = write is not None and write.ndim == 2
    S = S.astype(jnp.float32) if state_layout == "KV" else S.astype(jnp.float32).mT

    def step(S, token):
        out, S = _decode_token(S, token, gates_of, use_qk_l2norm)
        return S, (factor * out, S if every_token else None)

    tokens = [jnp.moveaxis(x, 1, 0).astype(jnp.float32) for x in tokens]
    S, (out, snapshots) = lax.scan(step, S, tokens)
    S = S if snapshots is None else jnp.moveaxis(snapshots, 0, 1)
    state = _stored(S if state_layout == "KV" else S.mT, state, write, valid)
    out = _only(jnp.moveaxis(out, 0, 1), valid)
    return out.astype(q.dtype if output is None else output.dtype), state


def _only(x, valid):
    """The rows of x, [B, ...], that are valid, and 0 for the others; None: all are."""
    if valid is None:
        return x
    return jnp.where(jnp.expand_dims(valid, range(1, x.ndim)), x, 0)


def _read(state, slots):
    """The states in slots of a pool, and 0 for those that it does not have."""
    if state.shape[0] == 0:
        return jnp.zeros((*slots.shape, *state.shape[1:]), state.dtype)
    return state.at[slots].get(mode="fill", fill_value=0)


def slots_of_layer(layer, L, N, slots):
    """Returns the slots of a layer of a stack as those of one pool of L N slots.

    What is outside the layer, or of a layer outside the stack, becomes -1.
    """
    layer = jnp.asarray(layer, jnp.int32)
    inside = (slots >= 0) & (slots < N) & (layer >= 0) & (layer < L)
    return jnp.where(inside, layer * N + slots, -1)


def _gates(A_log, dt_bias, lower_bound, allow_neg_eigval, a, b):
    """Log decay and write strength; without `A_log`, a and b are these."""
    if A_log is None:
        return a, b
    x = a + dt_bias.astype(jnp.float32)[None]
    A_log = jnp.expand_dims(A_log.astype(jnp.float32), [0, *range(2, x.ndim)])
    beta = jax.nn.sigmoid(b) * (2 if allow_neg_eigval else 1)
    if lower_bound is None:
        return -decay_rate(A_log, x), beta
    return lower_bound * jax.nn.sigmoid(scaled(A_log, x)), beta


def _decode_token(S, token, gates_of, use_qk_l2norm):
    """The formula: q, k [B, H, K], v [B, HV, V], a, b [B, HV], S [B, HV, K, V]."""
    q, k, v, a, b = token
    if use_qk_l2norm:
        q, k = (x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
        # Else XLA computes norms anew for every entry of S: at B = 64 1.6 times slower
        # on a GPU, and ten times longer to compile.
        q, k = lax.optimization_barrier((q, k))
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (q, k))
    g, beta = gates_of(a, b)

    S = (jnp.exp(g)[..., None] if g.ndim == 3 else jnp.exp(g)[..., None, None]) * S
    u = beta[..., None] * (v - jnp.sum(k[..., None] * S, axis=2))
    S = S + k[..., None] * u[:, :, None]
    return jnp.sum(q[..., None] * S, axis=2), S


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


def _stored(S, state, write, valid):
    """Puts S [B, HV, ..], or [B, T, HV, ..], where `write` [B], or [B, T], says."""
    if write is None:
        return S.astype(state.dtype)
    valid = valid[:, None] if write.ndim == 2 else valid
    inside = valid & (write >= 0) & (write < state.shape[0])
    slots = jnp.where(inside, write, state.shape[0])
    return state.at[slots].set(S.astype(state.dtype), mode="drop")
