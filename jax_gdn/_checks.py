"""The checks of `decode`, every one before anything runs, and `check_slots`."""

import numbers
from collections.abc import Container, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.experimental import checkify
from jax.typing import ArrayLike, DTypeLike

from jax_gdn._operands import (
    ARGUMENTS,
    CHOICES,
    GIVEN_GATES,
    OPTIONAL,
    SLOTS,
    UPDATED,
    Operands,
    Settings,
)
from jax_gdn._reference import FLOAT32_MAX


def _must(name: str, what: str, got: object, hint: str = "") -> str:
    name = name.replace("pending_", "pending.")
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
    place = {gate: place for place, gate in GIVEN_GATES.items()}.get(name, name)
    axes = ", ".join(ARGUMENTS[place][0][0].split())
    raise TypeError(_must(name, f"be an array [{axes}]", type(x).__name__, hint))


def gate_form(given: Mapping[str, Any], lower_bound: Any, allow_neg_eigval: Any) -> str:
    """Returns how the gates come; raises where two ways are mixed."""
    there = [name for name, x in given.items() if x is not None]
    gates = [name for name in there if name in GIVEN_GATES.values()]
    others = [name for name in there if name not in gates]
    others += ["lower_bound"] * (lower_bound is not None)
    neg = isinstance(allow_neg_eigval, bool | np.bool_) and bool(allow_neg_eigval)
    others += ["allow_neg_eigval"] * neg
    if gates and others:
        raise ValueError(
            "jax_gdn: `g` and `beta` come in place of `A_log`, `a`, `dt_bias`, `b`, "
            f"`lower_bound` and `allow_neg_eigval`; got `{gates[0]}` beside "
            f"`{others[0]}`."
        )
    if not there:
        raise TypeError(
            "jax_gdn: give `A_log`, `a`, `dt_bias` and `b`, or `g` and `beta`; got "
            "none of them."
        )
    if len(gates) == 1:
        missing = "beta" if gates[0] == "g" else "g"
        hint = " `g` and `beta` come together."
        raise TypeError(_must(missing, "be an array", "None", hint))
    if gates:
        return "given"
    return "softplus" if lower_bound is None else "sigmoid"


def as_layer(layer: Any) -> tuple[int | None, Array | None]:
    """Returns a layer that is known, or one that a program computes."""
    if not isinstance(layer, Array) and hasattr(layer, "__jax_array__"):
        layer = layer.__jax_array__()
    if isinstance(layer, np.ndarray) and layer.ndim == 0:
        layer = layer[()]
    if layer is None:
        return None, None
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        known = int(layer)
        if not 0 <= known <= np.iinfo(np.int32).max:
            raise ValueError(_must("layer", "be in [0, L) of `state`", known))
        return known, None
    if not isinstance(layer, Array) or not jnp.issubdtype(layer.dtype, jnp.integer):
        got = layer.dtype.name if hasattr(layer, "dtype") else type(layer).__name__
        raise TypeError(_must("layer", "be an int or an integer scalar", got))
    if layer.dtype == jnp.int32:
        return None, layer
    int32 = jnp.iinfo(jnp.int32)  # such a layer does not come to be inside by wrapping
    inside = (layer >= 0) & (layer <= jnp.array(int32.max).astype(layer.dtype))
    return None, jnp.where(inside, layer, 0).astype(jnp.int32) - jnp.where(inside, 0, 1)


def _to_int32(name: str, slots: np.ndarray) -> np.ndarray:
    """Returns whole numbers of NumPy as int32, which JAX makes by wrapping around."""
    if slots.dtype.kind not in "iu":
        return slots
    int32 = np.iinfo(np.int32)
    beyond = slots[(slots < int32.min) | (slots > int32.max)]
    if beyond.size:
        raise ValueError(_must(name, "hold slots that fit into int32", beyond.flat[0]))
    return slots.astype(np.int32)


def _axes_of(name: str, operands: Operands, settings: Settings) -> tuple[str, ...]:
    """Returns the axes that an argument must have, given the others."""
    choices = [tuple(axes.split()) for axes in ARGUMENTS[name][0]]
    if name == "state":
        choices = [choices[settings.state_layout == "VK"]]
    elif name in ("dt_bias", "pending_decay"):
        choices = [choices[operands.a.ndim == 4]]
    has_pool = operands.state_indices is not None
    if has_pool and name in (*UPDATED, "cursors"):
        choices = [("N", *axes) for _, *axes in choices]
    has_stack = settings.layer is not None or operands.layer is not None
    if has_stack and name in UPDATED:
        choices = [("L", *axes) for axes in choices]
    one_slot = settings.window is not None or settings.precision is not None
    if name == "output_state_indices" and one_slot:
        choices = choices[:1]
    fitting = [axes for axes in choices if len(axes) == getattr(operands, name).ndim]
    return (fitting or choices)[0]


def check_operands(operands: Operands, settings: Settings) -> Operands:
    """Returns the axes of each operand; raises unless they fit table and each other."""
    result = {}
    names = GIVEN_GATES if settings.gate_form == "given" else {}
    sizes: dict[str, int] = {"2": 2}
    sources: dict[str, str] = {}  # the argument that an axis has its size from
    for place, x in operands.items():
        name = names.get(place, place)
        axes = result[place] = _axes_of(place, operands, settings)
        wrong = len(x.shape) != len(axes)
        # Of the axes that disagree; where their number does, of all that are known.
        origins = [
            f"{axis} = {sizes[axis]} from `{sources[axis]}`"
            for axis, size in zip(axes, axes if wrong else x.shape, strict=True)
            if axis in sources and sizes[axis] != size
        ]
        fixed = "2" in axes and not wrong and x.shape[axes.index("2")] != 2
        if wrong or origins or fixed:
            got = f"{list(x.shape)}" + (f" ({', '.join(origins)})" if origins else "")
            hint = ""
            if name == "state":
                hint = _state_hint(axes, x.shape, sizes)
            what = f"have shape {_shape_text(axes, sizes)}"
            raise ValueError(_must(name, what, got, hint))
        for axis, size in zip(axes, x.shape, strict=True):
            sizes.setdefault(axis, size)
            sources.setdefault(axis, name.replace("pending_", "pending."))
        dtypes, dtype = ARGUMENTS[place][1], jnp.dtype(x.dtype).name
        if name == "pending_k":
            dtypes = (jnp.dtype(operands.k.dtype).name,)
        if dtype not in dtypes:
            what, hint = f"be {' or '.join(dtypes)}", _dtype_hint(name, dtypes, x)
            if name == "pending_k":
                what += ", k's dtype"
                hint = f" Make it by new_pending(..., k_dtype=jnp.{dtypes[0]})."
            raise TypeError(_must(name, what, dtype, hint))
        _check_sizes(name, axes, sizes)
    if "L" in sizes:
        _check_stack(settings.layer, sizes["L"], sizes.get("N", sizes["B"]))
    if settings.precision is not None and export.is_symbolic_dim(sizes["T"]):
        raise ValueError(_must("q", "have a known T", sizes["T"]))
    if settings.window is not None:
        check_ring(settings.window, sizes["R"], sizes["T"])
    if operands.output_state_indices is not None and operands.state_indices is None:
        raise ValueError(
            "jax_gdn: `output_state_indices` needs `state_indices`, the slots "
            "that the rows read; got none."
        )
    return Operands(**result)


def check_ring(window: int, R: int, T: int) -> None:
    """Raises unless a ring of R entries has room for T tokens beside its window."""
    room = R - window
    # The handler checks a symbolic T, when it has a value.
    if not export.is_symbolic_dim(T) and room < T:
        raise ValueError(
            f"jax_gdn: `pending` must have room for T = {T} tokens; got one made with "
            f"max_tokens={room} (R = {R} entries, window {window})."
        )


def _check_stack(layer: int | None, L: int, N: int) -> None:
    """Raises where a known layer is outside, or a slot has no int32 number."""
    # The handler checks a symbolic L, when it has a value.
    if layer is not None and not export.is_symbolic_dim(L) and not 0 <= layer < L:
        raise ValueError(_must("layer", f"be in [0, L) = [0, {L}) of `state`", layer))
    slots = L * N
    if not export.is_symbolic_dim(slots) and slots > np.iinfo(np.int32).max:
        what = "have states in all layers that int32 can number"
        raise ValueError(_must("state", what, slots))


def _state_hint(axes: Sequence[str], shape: Sequence[int], sizes: Mapping) -> str:
    """Says which argument a state of this shape may lack, or have too many."""
    if axes[0] == "L":
        if len(shape) == len(axes):
            return " Of a cache [B, L, ...], map the rows: see the documentation."
        return " With `layer` it is a stack of layers."
    hint = ""
    if len(shape) == len(axes) + 1:
        hint = " A stack of layers, [L, ...], needs `layer`."
    if axes[0] == "B" and tuple(shape[:1]) != (sizes["B"],):
        hint += " A pool of slots, [N, ...], needs `state_indices`."
    return hint


def _dtype_hint(name: str, dtypes: Sequence[str], x: Array) -> str:
    """Says how to cast where another width of the right kind came."""
    if not jnp.issubdtype(x.dtype, jnp.integer if "int32" in dtypes else jnp.floating):
        return ""
    return f" Cast it: {name}.astype(jnp.{dtypes[0]})."


def _check_sizes(name: str, axes: Sequence[str], sizes: Mapping[str, int]) -> None:
    for axis in axes:
        if axis not in ("B", "T", "N", "L", "2") and export.is_symbolic_dim(
            sizes[axis]
        ):
            what = f"have a known {axis}, only B, T, N and L may be symbolic"
            raise ValueError(_must(name, what, sizes[axis]))
        if axis not in ("B", "N") and sizes[axis] < 1:
            raise ValueError(_must(name, f"have {axis} >= 1", sizes[axis]))
    if "HV" in sizes and sizes["HV"] % sizes["H"] != 0:
        what = f"have HV a multiple of H = {sizes['H']} from `q`"
        raise ValueError(_must(name, what, f"HV = {sizes['HV']}"))


def check_state_dtype(state: Array, wanted: DTypeLike | None) -> None:
    """Raises where a state was cast on its way from the caller's cache."""
    if wanted is None:
        return
    try:
        wanted = jnp.dtype(wanted)
    except TypeError as error:
        what = "be a dtype or None"
        raise TypeError(_must("state_dtype", what, repr(wanted))) from error
    if state.dtype != wanted:
        what = f"be {wanted.name}, which `state_dtype` says"
        hint = (
            " Cast it before the call of jax_gdn.decode, "
            f"state.astype(jnp.{wanted.name}), or keep a framework's autocast from it. "
            "The new state has the dtype of `state`."
        )
        raise TypeError(_must("state", what, jnp.dtype(state.dtype).name, hint))


def check_settings(settings: Settings) -> None:
    """Raises unless the static arguments are what they may be."""
    scale = settings.scale
    if scale is not None and not isinstance(scale, numbers.Real):
        what, got = "be a Python number or None", type(scale).__name__
        raise TypeError(_must("scale", what, got))
    if scale is not None and not abs(scale) <= FLOAT32_MAX:
        raise ValueError(_must("scale", "fit into float32", f"{scale!r:.20}"))
    for name in ("use_qk_l2norm", "allow_neg_eigval"):
        if not isinstance(got := getattr(settings, name), bool | np.bool_):
            raise TypeError(_must(name, "be a bool", type(got).__name__))
    bound = settings.lower_bound
    if bound is not None and not isinstance(bound, numbers.Real):
        what, got = "be a Python number or None", type(bound).__name__
        raise TypeError(_must("lower_bound", what, got))
    if bound is not None and not -FLOAT32_MAX <= bound < 0:
        what = "be below 0 and fit into float32"
        raise ValueError(_must("lower_bound", what, f"{bound!r:.20}"))
    for name, choices in CHOICES.items():
        got = getattr(settings, name)
        if got not in choices and (name, got) != ("precision", None):
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
    check_operands(given, Settings())
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
