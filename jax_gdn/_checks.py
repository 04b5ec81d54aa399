"""The checks of `decode`: every one before anything runs, in the table's words."""

import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jax_gdn._operands import (
    ARGUMENTS,
    IMPLEMENTATIONS,
    SLOTS,
    STATE_LAYOUTS,
    Operands,
    axes_of,
)
from jax_gdn._reference import FLOAT32_MAX


def _must(name: str, what: str, got: object, hint: str = "") -> str:
    return f"jax_gdn.decode: `{name}` must {what}; got {got}.{hint}"


def _shape_text(axes: list[str], sizes: Mapping[str, int]) -> str:
    letters = f"[{', '.join(axes)}]"
    known = f"[{', '.join(str(sizes.get(axis, axis)) for axis in axes)}]"
    return letters if known == letters else f"{letters} = {known}"


def as_array(name: str, x: Any) -> Array:
    """Returns an argument as a JAX array if jnp would: NumPy's, and `__jax_array__`."""
    if hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    if isinstance(x, Array):
        return x
    if isinstance(x, np.ndarray | np.generic):
        return jnp.asarray(_to_int32(name, np.asarray(x)) if name in SLOTS else x)
    hint = f" Pass np.array({name})." if name in SLOTS and x is not None else ""
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


def check_operands(operands: Operands, state_layout: str) -> None:
    """Raises unless the operands fit the table and each other."""
    sizes: dict[str, int] = {}
    sources: dict[str, str] = {}  # the argument that an axis has its size from
    for name, x in operands.items():
        axes = axes_of(name, operands, state_layout)
        wrong = len(x.shape) != len(axes)
        # Of the axes that disagree; where their number does, of all that are known.
        origins = [
            f"{axis} = {sizes[axis]} from `{sources[axis]}`"
            for axis, size in zip(axes, axes if wrong else x.shape, strict=True)
            if sizes.get(axis, size) != size
        ]
        if wrong or origins:
            got = f"{list(x.shape)}" + (f" ({', '.join(origins)})" if origins else "")
            hint = _pool_hint(name, axes, x.shape, sizes)
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
            "jax_gdn.decode: `output_state_indices` needs `state_indices`, the slots "
            "that the rows read; got none."
        )


def _pool_hint(name: str, axes: list[str], shape: Any, sizes: Mapping[str, int]) -> str:
    """Says what a pool needs where the number of states is not that of rows."""
    if name != "state" or axes[0] != "B" or len(shape) != 4 or shape[0] == sizes["B"]:
        return ""
    return " A pool of slots, [N, ...], needs `state_indices`, the slot of each row."


def _dtype_hint(name: str, x: Array) -> str:
    """Says how to cast where another width of the right kind came."""
    wanted = jnp.integer if name in SLOTS else jnp.floating
    if not jnp.issubdtype(x.dtype, wanted):
        return ""
    return f" Cast it: {name}.astype(jnp.{ARGUMENTS[name][1][0]})."


def _check_sizes(name: str, axes: list[str], sizes: Mapping[str, int]) -> None:
    for axis in axes:
        if axis not in ("B", "T", "N") and export.is_symbolic_dim(sizes[axis]):
            what = f"have a known {axis}, only B, T and N may be symbolic"
            raise ValueError(_must(name, what, sizes[axis]))
        if axis not in ("B", "N") and sizes[axis] < 1:
            raise ValueError(_must(name, f"have {axis} >= 1", sizes[axis]))
    if "HV" in sizes and sizes["HV"] % sizes["H"] != 0:
        what = f"have HV a multiple of H = {sizes['H']} from `q`"
        raise ValueError(_must(name, what, f"HV = {sizes['HV']}"))


def _fits_float32(number: numbers.Real) -> bool:
    try:
        return not abs(float(number)) > FLOAT32_MAX
    except OverflowError:  # of a whole number
        return False


def check_settings(
    scale: object, use_qk_l2norm: object, state_layout: object, implementation: object
) -> None:
    """Raises unless the static arguments are what they may be."""
    if scale is not None and not isinstance(scale, numbers.Real):
        what, got = "be a Python number or None", type(scale).__name__
        raise TypeError(_must("scale", what, got))
    if scale is not None and not _fits_float32(scale):
        raise ValueError(_must("scale", "fit into float32", f"{scale!r:.20}"))
    if not isinstance(use_qk_l2norm, bool | np.bool_):
        got = type(use_qk_l2norm).__name__
        raise TypeError(_must("use_qk_l2norm", "be a bool", got))
    if state_layout not in STATE_LAYOUTS:
        what = 'be "KV" or "VK"'
        raise ValueError(_must("state_layout", what, repr(state_layout)))
    if implementation not in IMPLEMENTATIONS:
        what = 'be None, "native" or "xla"'
        raise ValueError(_must("implementation", what, repr(implementation)))
