"""The checks of `decode`, every one before anything runs, and `check_slots`."""

import numbers
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.experimental import checkify
from jax.typing import ArrayLike

from jax_gdn._operands import ARGUMENTS, CHOICES, OPTIONAL, SLOTS, Operands, Settings
from jax_gdn._reference import FLOAT32_MAX


def _must(name: str, what: str, got: object, hint: str = "") -> str:
    return f"jax_gdn: `{name}` must {what}; got {got}.{hint}"


def _shape_text(axes: Sequence[str], sizes: Mapping[str, int]) -> str:
    letters = f"[{', '.join(axes)}]"
    known = f"[{', '.join(str(sizes.get(axis, axis)) for axis in axes)}]"
    return letters if known == letters else f"{letters} = {known}"


def as_array(name: str, x: Any, optional: Container[str] = OPTIONAL) -> Any:
    """Returns an argument as a JAX array if jnp would: NumPy's, and `__jax_array__`."""
    if not isinstance(x, Array) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if isinstance(x, Array) or (x is None and name in optional):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return jnp.asarray(_to_int32(name, np.asarray(x)) if name in SLOTS else x)
    hint = f" Pass np.array({name})." if name in SLOTS else ""
    axes = ", ".join(ARGUMENTS[name][0][0].split())
    raise TypeError(_must(name, f"be an array [{axes}]", type(x).__name__, hint))


def _to_int32(name: str, slots: np.ndarray) -> np.ndarray:
    """Returns whole numbers of NumPy as int32, which JAX makes by wrapping around."""
    if slots.dtype.kind not in "iu":
        return slots
    int32 = np.iinfo(np.int32)
    beyond = slots[(slots < int32.min) | (slots > int32.max)]
    if beyond.size:
        raise ValueError(_must(name, "hold slots that fit into int32", beyond.flat[0]))
    return slots.astype(np.int32)


def _axes_of(name: str, operands: Operands, state_layout: str) -> tuple[str, ...]:
    """Returns the axes that an argument must have, given the others."""
    choices = [tuple(axes.split()) for axes in ARGUMENTS[name][0]]
    if name == "state":
        own = ("B" if operands.state_indices is None else "N", "HV", *state_layout)
        choices = [axes for axes in choices if axes == own]
    elif name == "dt_bias":
        choices = [choices[operands.a.ndim == 4]]
    fitting = [axes for axes in choices if len(axes) == getattr(operands, name).ndim]
    return (fitting or choices)[0]


def check_operands(operands: Operands, state_layout: str) -> Operands:
    """Returns the axes of each operand; raises unless they fit table and each other."""
    result = {}
    sizes: dict[str, int] = {}
    sources: dict[str, str] = {}  # the argument that an axis has its size from
    for name, x in operands.items():
        axes = result[name] = _axes_of(name, operands, state_layout)
        wrong = len(x.shape) != len(axes)
        # Of the axes that disagree; where their number does, of all that are known.
        origins = [
            f"{axis} = {sizes[axis]} from `{sources[axis]}`"
            for axis, size in zip(axes, axes if wrong else x.shape, strict=True)
            if sizes.get(axis, size) != size
        ]
        if wrong or origins:
            got = f"{list(x.shape)}" + (f" ({', '.join(origins)})" if origins else "")
            hint = ""
            if name == "state" and axes[0] == "B" and x.shape[:1] != (sizes["B"],):
                hint = " A pool of slots, [N, ...], needs `state_indices`."
            what = f"have shape {_shape_text(axes, sizes)}"
            raise ValueError(_must(name, what, got, hint))
        for axis, size in zip(axes, x.shape, strict=True):
            sizes.setdefault(axis, size)
            sources.setdefault(axis, name)
        dtypes, dtype = ARGUMENTS[name][1], jnp.dtype(x.dtype).name
        if dtype not in dtypes:
            what = f"be {' or '.join(dtypes)}"
            raise TypeError(_must(name, what, dtype, _dtype_hint(name, x)))
        _check_sizes(name, axes, sizes)
    if operands.output_state_indices is not None and operands.state_indices is None:
        raise ValueError(
            "jax_gdn: `output_state_indices` needs `state_indices`, the slots "
            "that the rows read; got none."
        )
    return Operands(**result)


def _dtype_hint(name: str, x: Array) -> str:
    """Says how to cast where another width of the right kind came."""
    wanted = jnp.integer if name in SLOTS else jnp.floating
    if not jnp.issubdtype(x.dtype, wanted):
        return ""
    return f" Cast it: {name}.astype(jnp.{ARGUMENTS[name][1][0]})."


def _check_sizes(name: str, axes: Sequence[str], sizes: Mapping[str, int]) -> None:
    for axis in axes:
        if axis not in ("B", "T", "N") and export.is_symbolic_dim(sizes[axis]):
            what = f"have a known {axis}, only B, T and N may be symbolic"
            raise ValueError(_must(name, what, sizes[axis]))
        if axis not in ("B", "N") and sizes[axis] < 1:
            raise ValueError(_must(name, f"have {axis} >= 1", sizes[axis]))
    if "HV" in sizes and sizes["HV"] % sizes["H"] != 0:
        what = f"have HV a multiple of H = {sizes['H']} from `q`"
        raise ValueError(_must(name, what, f"HV = {sizes['HV']}"))


def check_settings(settings: Settings) -> None:
    """Raises unless the static arguments are what they may be."""
    scale, use_qk_l2norm = settings.scale, settings.use_qk_l2norm
    if scale is not None and not isinstance(scale, numbers.Real):
        what, got = "be a Python number or None", type(scale).__name__
        raise TypeError(_must("scale", what, got))
    if scale is not None and not abs(scale) <= FLOAT32_MAX:
        raise ValueError(_must("scale", "fit into float32", f"{scale!r:.20}"))
    if not isinstance(use_qk_l2norm, bool | np.bool_):
        got = type(use_qk_l2norm).__name__
        raise TypeError(_must("use_qk_l2norm", "be a bool", got))
    for name, choices in CHOICES.items():
        if (got := getattr(settings, name)) not in choices:
            what = f"be {' or '.join(map(repr, choices))}"
            raise ValueError(_must(name, what, repr(got)))


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
    under `jax.jit`, transform the function by `checkify.checkify`.

    Args:
        state_indices: The slot that each row reads, [B].
        output_state_indices: The slot that each row writes, [B], or one after each
            token, [B, T]. Default: `state_indices`.
        num_slots: Slots of the pool, N.

    Raises:
        ValueError, TypeError: The slots are not such as `decode` takes.
        checkify.JaxRuntimeError: Two rows share a slot; it names them and the slot.
    """
    reads = as_array("state_indices", state_indices, optional=())
    writes = as_array("output_state_indices", output_state_indices)
    given = Operands(state_indices=reads, output_state_indices=writes)
    check_operands(given, state_layout="KV")
    if len(reads) < 2:
        return
    writes = (reads if writes is None else writes).reshape(len(reads), -1)
    live = ((reads >= 0) & (reads < num_slots))[:, None]
    writes = jnp.where(live & (writes < num_slots), writes, -1)
    reads = jnp.where(live, reads[:, None], -1)
    _check_apart(writes, writes, "rows {row} and {other} both write slot {slot}")
    _check_apart(reads, writes, "row {row} reads slot {slot}, which row {other} writes")


def _check_apart(mine: Array, theirs: Array, message: str) -> None:
    """Checks that no row names a slot, [B, T], that another row names; -1 is none."""
    B, T = mine.shape
    mine_there = mine[:, :, None, None]
    same = (mine_there == theirs[None, None]) & (mine_there >= 0)
    clash = (same & ~jnp.eye(B, dtype=bool)[:, None, :, None]).reshape(-1)
    row, token, other, _ = jnp.unravel_index(jnp.argmax(clash), (B, T, *theirs.shape))
    found: dict[str, Any] = {"row": row, "other": other, "slot": mine[row, token]}
    checkify.check(~jnp.any(clash), f"jax_gdn.check_slots: {message}", **found)
