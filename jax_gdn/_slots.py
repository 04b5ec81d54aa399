"""Whether two rows of a call are in each other's way in a pool."""

import jax.numpy as jnp
from jax import Array
from jax.experimental import checkify
from jax.typing import ArrayLike

from jax_gdn._checks import as_array


def check_slots(
    state_indices: ArrayLike,
    output_state_indices: ArrayLike | None = None,
    *,
    num_slots: int,
) -> None:
    """Checks that no two rows of a `decode` call are in each other's way in the pool.

    For debugging a server's bookkeeping. What two rows leave in a slot that both
    write, or that one writes and another reads, is undefined, and `decode` does not
    look. Padding rows and writes outside the pool are in nobody's way, and a row may
    write a slot twice. Every slot is compared with every other, in (B T)^2 bytes.

    The check is a `jax.experimental.checkify.check`: in eager code it raises at once;
    under `jax.jit`, transform the function by `checkify.checkify`, as for any such
    check.

    Args:
        state_indices: The slot that each row reads, [B].
        output_state_indices: The slot that each row writes, [B], or one after each
            token, [B, T]. Default: `state_indices`.
        num_slots: Slots of the pool, N.

    Raises:
        ValueError, TypeError: The slots are not such as `decode` takes.
        checkify.JaxRuntimeError: Two rows share a slot; it names them and the slot.
    """
    reads = writes = _as_slots("state_indices", state_indices, ["[B]"])
    if output_state_indices is not None:
        B = len(reads)
        choices = [f"[B] = [{B}]", f"[B, T] = [{B}, T]"]
        writes = _as_slots("output_state_indices", output_state_indices, choices, B)
    if len(reads) < 2:
        return
    live = ((reads >= 0) & (reads < num_slots))[:, None]
    writes = writes.reshape(len(reads), -1)
    writes = jnp.where(live & (writes < num_slots), writes, -1)
    reads = jnp.where(live, reads[:, None], -1)
    _check_apart(writes, writes, "rows {row} and {other} both write slot {slot}")
    _check_apart(reads, writes, "row {row} reads slot {slot}, which row {other} writes")


def _as_slots(
    name: str, x: ArrayLike, shapes: list[str], B: int | None = None
) -> Array:
    """Returns slots as an array, if they are such as `decode` takes."""
    slots = x if isinstance(x, Array) else as_array(name, x)
    if slots.dtype != jnp.int32:
        raise TypeError(
            f"jax_gdn.check_slots: `{name}` must be int32; got {slots.dtype}."
        )
    if slots.ndim not in range(1, len(shapes) + 1) or B not in (None, len(slots)):
        raise ValueError(
            f"jax_gdn.check_slots: `{name}` must have shape {' or '.join(shapes)}; got "
            f"{list(slots.shape)}."
        )
    return slots


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
