"""`decode_deferred`: decode that leaves the states as they are, and its helpers."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.typing import ArrayLike, DTypeLike

from jax_gdn._checks import check_ring
from jax_gdn._decode import run
from jax_gdn._reference import plan_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """Tokens that are not in the states yet: of each slot a ring of R entries.

    A pytree to be donated like the states. The cursors say which entries are pending;
    what the others hold is never read.

    Attributes:
        k: Keys as they came, [N, H, R, K], in the dtype of k.
        u: Of each token, which adds k u^T, k as it is kept: [N, HV, R, V], float32.
        decay: exp(g) of each token, [N, HV, R], or [N, HV, R, K] with a decay a key
            channel; float32.
        window: At most so many tokens are pending when a call begins; static.
    """

    k: Array
    u: Array
    decay: Array
    window: int = dataclasses.field(metadata={"static": True})


export.register_pytree_node_serialization(
    Pending,
    serialized_name="jax_gdn.Pending",
    serialize_auxdata=lambda aux: str(*aux).encode(),
    deserialize_auxdata=lambda data: (int(data),),
)


def new_pending(
    state: Array | np.ndarray | jax.ShapeDtypeStruct,
    num_key_heads: int,
    *,
    window: int = 16,
    max_tokens: int = 1,
    k_dtype: DTypeLike = jnp.bfloat16,
    state_layout: str = "KV",
    per_channel: bool = False,
) -> Pending:
    """Returns empty rings for states, R = window + max_tokens entries each.

    Args:
        state: States as `decode_deferred` takes them: [B, HV, K, V], a pool [N, ...] or
            a stack of either; or their shape.
        num_key_heads: H.
        window: At most so many tokens are pending when a call begins. A larger one
            writes states more seldom and reads more entries; the CUDA kernel takes up
            to 16.
        max_tokens: The most tokens of a call, at most `window`.
        k_dtype: The dtype of the calls' k.
        state_layout: "KV" or "VK".
        per_channel: Whether there is one decay a key channel.

    Raises:
        ValueError: `max_tokens` is not from 1 to `window`, H does not divide HV, or
            `state_layout` is unknown.
        TypeError: `k_dtype` is no float16, bfloat16 or float32.
    """
    if not 1 <= max_tokens <= window:
        raise ValueError(
            f"jax_gdn: `max_tokens` must be from 1 to window = {window}; got "
            f"{max_tokens}."
        )
    _check_layout(state_layout)
    if len(state.shape) < 4:
        raise ValueError(
            "jax_gdn: `state` must have shape [B, HV, K, V], or be a pool or a stack; "
            f"got {list(state.shape)}."
        )
    *slots, HV, rows, columns = state.shape
    if num_key_heads < 1 or HV % num_key_heads:
        raise ValueError(
            f"jax_gdn: `num_key_heads` must divide HV = {HV} of `state`; got "
            f"{num_key_heads}."
        )
    if jnp.dtype(k_dtype).name not in ("float32", "bfloat16", "float16"):
        raise TypeError(
            "jax_gdn: `k_dtype` must be float32, bfloat16 or float16; got "
            f"{jnp.dtype(k_dtype).name}."
        )
    K, V = (rows, columns) if state_layout == "KV" else (columns, rows)
    R = window + max_tokens
    channels = (K,) if per_channel else ()
    return Pending(
        k=jnp.zeros((*slots, num_key_heads, R, K), k_dtype),
        u=jnp.zeros((*slots, HV, R, V), jnp.float32),
        decay=jnp.zeros((*slots, HV, R, *channels), jnp.float32),
        window=window,
    )


def _check_layout(state_layout: str) -> None:
    if state_layout not in ("KV", "VK"):
        raise ValueError(
            f"jax_gdn: `state_layout` must be 'KV' or 'VK'; got {state_layout!r}."
        )


def _check_pending(pending: Pending) -> None:
    if not isinstance(pending, Pending):
        raise TypeError(
            "jax_gdn: `pending` must be a jax_gdn.Pending; got "
            f"{type(pending).__name__}. See jax_gdn.new_pending."
        )


def _as_cursors(cursors: ArrayLike, N: int | None = None) -> Array:
    cursors = jnp.asarray(cursors)
    fits = cursors.ndim == 2 and cursors.shape[1] == 2 and N in (None, len(cursors))
    if not fits or cursors.dtype != jnp.int32:
        rows = "N" if N is None else N
        raise ValueError(
            f"jax_gdn: `cursors` must have shape [{rows}, 2] and be int32; got "
            f"{list(cursors.shape)}, {cursors.dtype.name}."
        )
    return cursors


def new_cursors(num_slots: int) -> Array:
    """Returns cursors of slots with nothing pending: [N, 2], int32, of all layers.

    A slot's are the first pending entry of its ring and how many are pending. A slot
    that gets a new state is made ready by setting its cursors to 0.
    """
    return jnp.zeros((num_slots, 2), jnp.int32)


def decode_deferred(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    state: ArrayLike,
    pending: Pending,
    cursors: ArrayLike,
    A_log: ArrayLike | None = None,
    a: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    b: ArrayLike | None = None,
    scale: float | None = None,
    output: ArrayLike | None = None,
    use_qk_l2norm: bool = True,
    *,
    g: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    state_layout: str = "KV",
    layer: int | ArrayLike | None = None,
    state_dtype: DTypeLike | None = None,
    state_indices: ArrayLike | None = None,
    output_state_indices: ArrayLike | None = None,
    fold: ArrayLike | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array, Pending]:
    """Decodes T tokens and writes a state only when its ring is full: see `decode`.

    What a token adds to a state is kept in a ring beside it, and a state is what it
    holds decayed, plus what is pending. With G_i the decay since pending token i and G
    that of all of them and of the token itself::

        p   = G k^T S_0 + sum_i G_i (k.k_i) u_i     is exp(g) k^T S; likewise r of q
        u   = beta (v - p)
        out = scale (r + (q.k) u)
        append k, u and exp(g) to the ring

    A row whose count of pending tokens plus T is more than the window folds first: the
    state takes in what is pending, in the pass that reads it, and only the call's
    tokens are pending then. So the tokens of the last call can always be taken back, by
    `advance_cursors(..., accepted=...)`: no snapshots.

    `state` and `pending` are updated in place when they are donated. `cursors` are of
    all layers, and the same for every layer's call of a step; after the last of them
    the next step's are `advance_cursors(cursors, pending, T, ...)`. All transformations
    of `decode` apply. Results are those of `decode` to rounding, because sums run in
    another order: bits depend on the row's tokens, on how many come in a call and on
    where the window stands, and not on the batch.

    Args:
        q: See `decode`, as for all that is not said here.
        k: See `decode`; in the dtype of `pending.k`.
        v: See `decode`.
        state: States, see `decode`.
        pending: What is pending, as `new_pending` makes it and a call returns it; of
            at most `pending.window` tokens a slot.
        cursors: Which entries are pending, [B, 2], or [N, 2] with `state_indices`:
            first and count; int32. A row whose cursors are outside the ring or the
            window is padding.
        A_log: See `decode`.
        a: See `decode`.
        dt_bias: See `decode`.
        b: See `decode`.
        scale: See `decode`.
        output: See `decode`.
        use_qk_l2norm: See `decode`.
        g: See `decode`.
        beta: See `decode`.
        lower_bound: See `decode`.
        allow_neg_eigval: See `decode`.
        state_layout: See `decode`.
        layer: See `decode`; the rings are stacks too.
        state_dtype: See `decode`.
        state_indices: The slot of each row, [B]; see `decode`.
        output_state_indices: The slot that each row writes, [B]. A row that writes
            another slot than it reads folds into that slot, and its tokens are pending
            there. One outside [0, N): the row leaves no trace.
        fold: Which rows fold in any case, [B], bool: their states are then those before
            the call's tokens, for prefix caches.
        implementation: See `decode`. The CUDA kernel takes K = V = 128, bfloat16 q, k
            and v, T up to 8, a window up to 16 and one decay a head.

    Returns:
        `(out, state, pending)`.

    Raises:
        ValueError, TypeError, ImportError, NotImplementedError: As `decode`; and where
            the rings have no room for T tokens, or another shape.

    Source: ReplaySSM, dao-lab.ai/blog/2026/replayssm, for the idea of keeping tokens.
    """
    arguments = locals()
    _check_pending(arguments.pop("pending"))
    arguments |= {"pending_k": pending.k, "pending_u": pending.u}
    arguments |= {"pending_decay": pending.decay}
    results = run(arguments, window=pending.window)
    rings = Pending(
        results.pending_k, results.pending_u, results.pending_decay, pending.window
    )
    return results.out, results.state, rings


def advance_cursors(
    cursors: Array,
    pending: Pending,
    num_tokens: int,
    *,
    state_indices: ArrayLike | None = None,
    output_state_indices: ArrayLike | None = None,
    fold: ArrayLike | None = None,
    accepted: ArrayLike | None = None,
) -> Array:
    """Returns the cursors after calls of T tokens, one a layer, on the same rows.

    To be called once a step, with the slots and the mask that the calls had: cursors
    that are advanced otherwise stand for other tokens, and nothing can tell.

    Args:
        cursors: Those of the calls, [N, 2].
        pending: The rings of any layer, or those that a call was given.
        num_tokens: T.
        state_indices: As the calls had them.
        output_state_indices: Likewise.
        fold: Likewise.
        accepted: How many of the T tokens are kept, [B], int32; the last ones are taken
            back. Default: all. Below 0 is 0, above T is T.

    Raises:
        ValueError: The rings have no room for T tokens, or a shape is wrong.
        TypeError: A dtype is wrong.
    """
    _check_pending(pending)
    cursors, R = _as_cursors(cursors), pending.k.shape[-2]
    check_ring(pending.window, R, num_tokens)
    given = {"state_indices": state_indices, "fold": fold}
    given |= {"output_state_indices": output_state_indices, "accepted": accepted}
    arrays = {name: None if x is None else jnp.asarray(x) for name, x in given.items()}
    for name, x in arrays.items():
        kind = jnp.bool_ if name == "fold" else jnp.integer
        if x is not None and not jnp.issubdtype(x.dtype, kind):
            what = "bool" if name == "fold" else "integers"
            raise TypeError(f"jax_gdn: `{name}` must be {what}; got {x.dtype.name}.")
        if x is not None and x.ndim != 1:
            raise ValueError(
                f"jax_gdn: `{name}` must have shape [B]; got {list(x.shape)}."
            )
    kept = arrays.pop("accepted")
    rows = plan_rows(cursors, R, pending.window, num_tokens, **arrays)
    kept = num_tokens if kept is None else jnp.clip(kept, 0, num_tokens)
    first = jnp.where(rows.folds, (rows.first + rows.count) % R, rows.first)
    count = jnp.where(rows.folds, 0, rows.count) + kept
    after = jnp.stack([first, count], axis=1).astype(jnp.int32)
    if state_indices is None and output_state_indices is None:
        return jnp.where(rows.valid[:, None], after, cursors)
    return cursors.at[rows.write].set(after, mode="drop")


def materialize(
    state: Array, pending: Pending, cursors: Array, *, state_layout: str = "KV"
) -> Array:
    """Returns the states with what is pending folded in, of every slot; pure.

    The states that `decode` would have left, to rounding: for a prefix cache, to move
    a sequence, or to go back to `decode`. Of some slots, give their rows alone:
    `materialize(state[slots], jax.tree.map(lambda x: x[slots], pending),
    cursors[slots])`. To go on with the states that it returns, set `cursors` to 0.

    Args:
        state: States, [N, HV, K, V] or [N, HV, V, K], or a stack of them, [L, N, ...].
        pending: Their rings.
        cursors: Their cursors, [N, 2], of all layers.
        state_layout: "KV" or "VK".
    """
    _check_pending(pending)
    _check_layout(state_layout)
    cursors = _as_cursors(cursors, state.shape[-4])
    if state.ndim == 5:
        of_layer = ft.partial(materialize, cursors=cursors, state_layout=state_layout)
        return jax.vmap(of_layer)(state, pending)
    rows = plan_rows(cursors, pending.k.shape[-2], pending.window, 1)
    numbers = jnp.arange(pending.window, dtype=jnp.int32)[None]
    entries = rows.entries(pending.k, 0, pending.window)
    there = rows.valid[:, None] & (numbers < rows.count[:, None])

    # Of each row by itself, so that rows on several devices wait for nobody.
    @jax.vmap
    def in_order(x, entries, there, empty):
        x = jnp.moveaxis(x[:, entries], 1, 0).astype(jnp.float32)
        return jnp.where(jnp.expand_dims(there, range(1, x.ndim)), x, empty)

    def of_ring(x, empty):
        return in_order(x, entries, there, jnp.full(len(x), empty))

    k, u = of_ring(pending.k, 0.0), of_ring(pending.u, 0.0)
    decay = of_ring(pending.decay, 1.0)
    S = (state if state_layout == "KV" else state.mT).astype(jnp.float32)
    k = jnp.repeat(k, u.shape[2] // k.shape[2], axis=2)
    if decay.ndim == 3:
        decay = decay[..., None]
    # Of what comes after each entry, and of all.
    after = lax.cumprod(decay, axis=1, reverse=True)
    S = after[:, 0, :, :, None] * S
    after = jnp.concatenate([after[:, 1:], jnp.ones_like(after[:, :1])], axis=1)
    S += jnp.einsum("nwhk,nwhv->nhkv", after * k, u, precision="highest")
    return (S if state_layout == "KV" else S.mT).astype(state.dtype)
