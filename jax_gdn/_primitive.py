"""The operation as XLA sees it: which platform runs what, and what is aliased."""

import functools as ft
import warnings

import jax
import numpy as np
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_gdn import _registration
from jax_gdn._reference import reference_decode

_WAY_OUT = 'Pass implementation="xla" for the jnp form, which runs anywhere.'


def _why_not_cuda(q: Array, v: Array) -> str | None:
    """Returns why the CUDA kernel cannot take these shapes, or None."""
    if _registration.cuda is None:
        return "this build of jax_gdn has no CUDA kernels"
    B, _, HV, V = v.shape
    return _registration.cuda.why_unsupported(B, HV, q.shape[-1], V)


def _native(*operands: Array, scale: float, use_qk_l2norm: bool) -> list[Array]:
    # Operands are (q, k, v, state, A_log, a, dt_bias, b[, output]).
    # Types from the definition carry shardings and varying axes too.
    results = jax.eval_shape(_xla, *operands)
    aliases = {3: 1} | ({8: 0} if len(operands) == 9 else {})
    call = jax.ffi.ffi_call(
        _registration.DECODE_TARGET, results, input_output_aliases=aliases
    )
    return call(*operands, scale=np.float32(scale), use_qk_l2norm=bool(use_qk_l2norm))


def _xla(*operands: Array, scale: float = 1.0, use_qk_l2norm: bool = True):
    q, k, v, state, A_log, a, dt_bias, b, *rest = operands
    output = rest[0] if rest else None
    out, state = reference_decode(
        *(q, k, v, state, A_log, a, dt_bias, b), scale, output, use_qk_l2norm
    )
    # Written whole into `output`, so that a donated buffer finds its use.
    return [out if output is None else output.at[...].set(out), state]


# Says, when a program is lowered for a platform without a native kernel, that it
# is: an identity on one operand that leaves nothing behind. Which platform that is
# is known no earlier.
_without_native_p = Primitive("jax_gdn_without_native")
_without_native_p.def_impl(lambda x, **_: x)
_without_native_p.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_without_native_p)


def _lower_without_native(ctx, x, *, reason: str | None, required: bool):
    if reason is None:
        names = ctx.module_context.platforms or ("this platform",)
        reason = f"there is no native kernel for {', '.join(names)}"
    if required:
        raise NotImplementedError(
            f'jax_gdn.decode: implementation="native" cannot run: {reason}. {_WAY_OUT}'
        )
    warnings.warn(f"jax_gdn.decode falls back to the XLA form: {reason}.", stacklevel=2)
    return [x]


mlir.register_lowering(_without_native_p, _lower_without_native)


def bind_decode(
    *operands: Array, scale: float, use_qk_l2norm: bool, implementation: str | None
) -> tuple[Array, Array]:
    """Stages the call; what runs is decided when it is lowered for a platform."""
    settings = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    xla = ft.partial(_xla, **settings)
    if implementation == "xla":
        out, state = xla(*operands)
        return out, state

    def without_native(reason: str | None, *operands: Array) -> list[Array]:
        q = _without_native_p.bind(
            operands[0], reason=reason, required=implementation == "native"
        )
        return xla(q, *operands[1:])

    native = ft.partial(_native, **settings)
    why_not_cuda = _why_not_cuda(operands[0], operands[2])
    out, state = jax.lax.platform_dependent(
        *operands,
        cpu=native,
        cuda=ft.partial(without_native, why_not_cuda) if why_not_cuda else native,
        default=ft.partial(without_native, None),
    )
    return out, state
