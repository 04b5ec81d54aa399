"""Slots of a pool: what may be one, and whether two rows are in each other's way."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify


def to_int32(name: str, slots: np.ndarray) -> np.ndarray:
    """Returns whole numbers of NumPy as int32, which JAX makes by wrapping around."""
    if slots.dtype.kind not in "iu":
        return slots
    int32 = np.iinfo(np.int32)
    beyond = slots[(slots < int32.min) | (slots > int32.max)]
    if beyond.size:
        raise ValueError(
            f"jax_gdn.decode: `{name}` must hold slots that fit into int32; got "
            f"{beyond.flat[0]}."
        )
    return slots.astype(np.int32)


def check_slots(
    state_indices: Array,
    output_state_indices: Array | None = None,
    *,
    num_slots: int,
) -> None:
    """Checks that no two rows of a `decode` call are in each other's way in the pool.

    For debugging a server's bookkeeping. What two rows leave in a slot that both
    write, or that one writes and another reads, is undefined, and `decode` does not
    look. The check is a `jax.experimental.checkify.check`: in eager code it raises at
    once; under `jax.jit`, transform the function by `checkify.checkify`, as for any
    such check. Padding rows and writes outside the pool are in nobody's way, and a row
    may write a slot twice.

    Args:
        state_indices: The slot that each row reads, [B].
        output_state_indices: The slot that each row writes, [B], or one after each
            token, [B, T]. Default: `state_indices`.
        num_slots: Slots of the pool, N.

    Raises:
        checkify.JaxRuntimeError: Two rows share a slot; it names them and the slot.
    """
    reads = jnp.asarray(state_indices)
    writes = (
        reads if output_state_indices is None else jnp.asarray(output_state_indices)
    )
    if len(reads) < 2:
        return
    live = ((reads >= 0) & (reads < num_slots))[:, None]
    writes = writes.reshape(len(reads), -1)
    writes = jnp.where(live & (writes < num_slots), writes, -1)
    reads = jnp.where(live, reads[:, None], -1)
    _check_apart(writes, writes, "rows {row} and {other} both write slot {slot}")
    _check_apart(reads, writes, "row {row} reads slot {slot}, which row {other} writes")


def _check_apart(mine: Array, theirs: Array, message: str) -> None:
    """Checks that no row names a slot, [B, T], that another row names; -1 is none."""
    B, T = mine.shape
    same = (mine[:, :, None, None] == theirs[None, None]) & (mine >= 0)[
        :, :, None, None
    ]
    clash = (same & ~jnp.eye(B, dtype=bool)[:, None, :, None]).reshape(-1)
    row, token, other, _ = jnp.unravel_index(jnp.argmax(clash), (B, T, *theirs.shape))
    checkify.check(
        ~jnp.any(clash),
        f"jax_gdn.check_slots: {message}",
        row=row,
        other=other,
        slot=mine[row, token],
    )
