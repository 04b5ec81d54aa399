"""The public function and its checks."""

import functools as ft
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_gdn._primitive import bind_decode

_FLOAT32 = ("float32",)
_FLOATS = ("float32", "bfloat16", "float16")

# The argument table: axes and dtypes, in the order of the signature. An axis gets
# its size where it first appears.
_ARGUMENTS = {
    "q": ("B T H K", _FLOATS),
    "k": ("B T H K", _FLOATS),
    "v": ("B T HV V", _FLOATS),
    "state": ("B HV K V", _FLOAT32),
    "A_log": ("HV", _FLOAT32),
    "a": ("B T HV", _FLOATS),
    "dt_bias": ("HV", _FLOATS),
    "b": ("B T HV", _FLOATS),
    "output": ("B T HV V", _FLOATS),
}


def decode(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    state: ArrayLike,
    A_log: ArrayLike,
    a: ArrayLike,
    dt_bias: ArrayLike,
    b: ArrayLike,
    scale: float | None = None,
    output: ArrayLike | None = None,
    use_qk_l2norm: bool = True,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Advances gated-delta-rule states by one token and reads them.

        g    = -exp(A_log) * softplus(a + dt_bias)                 log decay, <= 0
        beta = sigmoid(b)                                          write strength
        q, k = q / sqrt(sum q^2 + 1e-6), k / sqrt(sum k^2 + 1e-6)  if use_qk_l2norm
        S    = exp(g) S                                            S is [K, V]
        u    = beta (v - k^T S)
        S    = S + k u^T
        out  = scale q^T S

    for every sequence and value head; value head j reads key head j // (HV // H).
    Axis letters: B sequences, T = 1 token, H query/key heads, HV value heads, K and V
    head sizes. Storage types float16, bfloat16 and float32 may be mixed; all
    arithmetic is float32, and `out` and the state are each rounded once.

    The state is updated in place when it is donated to the surrounding `jax.jit`
    (`jax.jit(step, donate_argnums=...)`): same buffer, no copy. The op itself donates
    nothing: in eager code, and where the state is not donated, the caller's array is
    left as it was, at the price of one copy.

    Args:
        q: Queries, [B, T, H, K], float16, bfloat16 or float32.
        k: Keys, [B, T, H, K], float16, bfloat16 or float32.
        v: Values, [B, T, HV, V], float16, bfloat16 or float32.
        state: States, [B, HV, K, V], float32.
        A_log: Logarithm of the decay rate, [HV], float32.
        a: Decay input, [B, T, HV], float16, bfloat16 or float32.
        dt_bias: Bias on `a`, [HV], float16, bfloat16 or float32.
        b: Write-strength logit, [B, T, HV], float16, bfloat16 or float32.
        scale: Factor on q, a Python number. Default K ** -0.5.
        output: Optional [B, T, HV, V]. Gives the result its dtype and, when donated,
            its buffer; what it holds is not read.
        use_qk_l2norm: Whether q and k are normalised.
        implementation: None, "native" or "xla". "native" is the CUDA kernel (compute
            capability 9.0 and newer; K of 64, 128, 192 or 256, V a multiple of 16) or
            the host kernel (any K and V). "xla" is the jnp form, on any platform.
            None takes the native kernel where there is one for the platform and the
            shapes, else the XLA form, with a warning that names the reason.

    Returns:
        `(out, state)`: out [B, T, HV, V] in the dtype of `output`, or q's without
        one; state with the shape and dtype it came with.

    Raises:
        ValueError: Shapes disagree, HV is no multiple of H, or `implementation` is
            unknown.
        TypeError: A dtype or a static argument has the wrong type.
        NotImplementedError: `implementation="native"` where there is no such kernel.

    Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464.
    """
    try:
        return _decode(
            *(q, k, v, state, A_log, a, dt_bias, b),
            output,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
            implementation=implementation,
        )
    except ValueError:
        # A setting that cannot be hashed fails inside jit, which does not name it.
        _check_settings(scale, use_qk_l2norm, implementation)
        raise


@ft.partial(jax.jit, static_argnames=("scale", "use_qk_l2norm", "implementation"))
def _decode(
    *arrays: ArrayLike | None,
    scale: float | None,
    use_qk_l2norm: bool,
    implementation: str | None,
) -> tuple[Array, Array]:
    # Everything but the call itself happens while tracing: an eager call costs what
    # a jitted one does.
    operands = arrays[:8] if arrays[8] is None else arrays
    _check_settings(scale, use_qk_l2norm, implementation)
    checked = _check_arrays(dict(zip(_ARGUMENTS, operands, strict=False)))
    K = checked[0].shape[-1]
    with jax.named_scope("jax_gdn.decode"):
        return bind_decode(
            *checked,
            scale=K**-0.5 if scale is None else float(scale),
            use_qk_l2norm=use_qk_l2norm,
            implementation=implementation,
        )


def _shape_text(axes: list[str], sizes: dict[str, int]) -> str:
    letters = f"[{', '.join(axes)}]"
    known = f"[{', '.join(str(sizes.get(axis, axis)) for axis in axes)}]"
    return letters if known == letters else f"{letters} = {known}"


def _check_arrays(arrays: dict[str, Any]) -> list[Array]:
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        axes, dtypes = _ARGUMENTS[name][0].split(), _ARGUMENTS[name][1]
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
        if jnp.dtype(x.dtype).name not in dtypes:
            raise TypeError(
                f"jax_gdn.decode: `{name}` must be {' or '.join(dtypes)}; "
                f"got {jnp.dtype(x.dtype).name}."
            )
        _check_sizes(name, axes, sizes)
    return list(arrays.values())


def _check_sizes(name: str, axes: list[str], sizes: dict[str, int]) -> None:
    if sizes["T"] != 1:
        raise ValueError(f"jax_gdn.decode: `{name}` must have T = 1; got {sizes['T']}.")
    for axis in axes:
        if axis != "B" and sizes[axis] < 1:
            raise ValueError(
                f"jax_gdn.decode: `{name}` must have {axis} >= 1; got {sizes[axis]}."
            )
    if "HV" in sizes and sizes["HV"] % sizes["H"] != 0:
        raise ValueError(
            f"jax_gdn.decode: `{name}` must have HV a multiple of H = {sizes['H']}; "
            f"got HV = {sizes['HV']}."
        )


def _check_settings(
    scale: object, use_qk_l2norm: object, implementation: object
) -> None:
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
    if implementation not in (None, "native", "xla"):
        raise ValueError(
            'jax_gdn.decode: `implementation` must be None, "native" or "xla"; '
            f"got {implementation!r}."
        )
