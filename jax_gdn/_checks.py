"""The checks of `decode`: every one before anything runs, in the table's words."""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

_FLOAT32 = ("float32",)
_FLOATS = ("float32", "bfloat16", "float16")
_INT32 = ("int32",)

# The argument table: axes (or a choice of them) and dtypes. An axis gets its size
# where it first appears.
_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "q": (("B T H K",), _FLOATS),
    "k": (("B T H K",), _FLOATS),
    "v": (("B T HV V",), _FLOATS),
    "state": (("B HV K V",), _FLOATS),
    "A_log": (("HV",), _FLOAT32),
    "a": (("B T HV", "B T HV K"), _FLOATS),
    "dt_bias": (("HV",), _FLOATS),
    "b": (("B T HV",), _FLOATS),
    "output": (("B T HV V",), _FLOATS),
    "state_indices": (("B",), _INT32),
    "output_state_indices": (("B", "B T"), _INT32),
}


def axes_of(name: str, arrays: Mapping[str, Any], state_layout: str) -> list[str]:
    """Returns the axes that an argument must have, given the others."""
    choices = _ARGUMENTS[name][0]
    if name == "state":
        rows = "N" if "state_indices" in arrays else "B"
        return [rows, "HV", *state_layout]
    if name == "dt_bias" and getattr(arrays["a"], "ndim", 0) == 4:
        return ["HV", "K"]
    rank = getattr(arrays[name], "ndim", 0)
    fitting = [axes for axes in choices if len(axes.split()) == rank]
    return (fitting or choices)[0].split()


def _shape_text(axes: list[str], sizes: dict[str, int]) -> str:
    letters = f"[{', '.join(axes)}]"
    known = f"[{', '.join(str(sizes.get(axis, axis)) for axis in axes)}]"
    return letters if known == letters else f"{letters} = {known}"


def check_arrays(arrays: Mapping[str, Any], state_layout: str) -> dict[str, Array]:
    """Returns the arrays, by argument name, if they fit the table and each other."""
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        axes = axes_of(name, arrays, state_layout)
        if not isinstance(x, jax.Array):
            raise TypeError(
                f"jax_gdn.decode: `{name}` must be an array "
                f"{_shape_text(axes, sizes)}; got {type(x).__name__}."
            )
        agrees = len(x.shape) == len(axes) and all(
            sizes.get(axis, size) == size
            for axis, size in zip(axes, x.shape, strict=True)
        )
        if not agrees:
            raise ValueError(
                f"jax_gdn.decode: `{name}` must have shape "
                f"{_shape_text(axes, sizes)}; got {list(x.shape)}."
            )
        sizes.update(zip(axes, x.shape, strict=True))
        dtypes = _ARGUMENTS[name][1]
        if jnp.dtype(x.dtype).name not in dtypes:
            raise TypeError(
                f"jax_gdn.decode: `{name}` must be {' or '.join(dtypes)}; "
                f"got {jnp.dtype(x.dtype).name}."
            )
        _check_sizes(name, axes, sizes)
    if "output_state_indices" in arrays and "state_indices" not in arrays:
        raise ValueError(
            "jax_gdn.decode: `output_state_indices` needs `state_indices`, the slots "
            "that the rows read; got none."
        )
    return dict(arrays)


def _check_sizes(name: str, axes: list[str], sizes: dict[str, int]) -> None:
    for axis in axes:
        if axis not in ("B", "T", "N") and export.is_symbolic_dim(sizes[axis]):
            raise ValueError(
                f"jax_gdn.decode: `{name}` must have a known {axis}, only B, T and N "
                f"may be symbolic; got {sizes[axis]}."
            )
        if axis not in ("B", "N") and sizes[axis] < 1:
            raise ValueError(
                f"jax_gdn.decode: `{name}` must have {axis} >= 1; got {sizes[axis]}."
            )
    if "HV" in sizes and sizes["HV"] % sizes["H"] != 0:
        raise ValueError(
            f"jax_gdn.decode: `{name}` must have HV a multiple of H = {sizes['H']}; "
            f"got HV = {sizes['HV']}."
        )


def check_slots(**slots: object) -> None:
    """Raises if JAX would wrap slots of a 64-bit NumPy array around on the way in."""
    int32 = np.iinfo(np.int32)
    for name, x in slots.items():
        if not isinstance(x, np.ndarray) or x.dtype not in (np.int64, np.uint64):
            continue
        beyond = x[(x < int32.min) | (x > int32.max)]
        if beyond.size:
            raise ValueError(
                f"jax_gdn.decode: `{name}` must hold slots that fit into int32; got "
                f"{beyond.flat[0]}."
            )


def check_settings(
    scale: object, use_qk_l2norm: object, state_layout: object, implementation: object
) -> None:
    """Raises unless the static arguments are what they may be."""
    if scale is not None and not isinstance(scale, numbers.Real):
        raise TypeError(
            "jax_gdn.decode: `scale` must be a Python number or None; "
            f"got {type(scale).__name__}."
        )
    if not isinstance(use_qk_l2norm, bool):
        raise TypeError(
            "jax_gdn.decode: `use_qk_l2norm` must be a bool; "
            f"got {type(use_qk_l2norm).__name__}."
        )
    if state_layout not in ("KV", "VK"):
        raise ValueError(
            'jax_gdn.decode: `state_layout` must be "KV" or "VK"; '
            f"got {state_layout!r}."
        )
    if implementation not in (None, "native", "xla"):
        raise ValueError(
            'jax_gdn.decode: `implementation` must be None, "native" or "xla"; '
            f"got {implementation!r}."
        )
