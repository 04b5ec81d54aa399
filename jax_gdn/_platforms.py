"""Which platform runs what, and what is said where it is not the native call."""

import functools as ft
import math
import warnings

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_gdn import _registration
from jax_gdn._operands import Operands, Results, Settings
from jax_gdn._sharding import Call

_WAY_OUT = 'Pass implementation="xla" for the reference, which runs anywhere.'

# Says, when a program is lowered for a platform without a native kernel, that it
# is: an identity on one operand that leaves nothing behind. Which platform that is
# is known no earlier.
_without_native_p = Primitive("jax_gdn_without_native")
_without_native_p.def_impl(lambda x, **_: x)
_without_native_p.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_without_native_p)


def _lower_without_native(ctx, x, *, reason: str | None, required: bool):
    if reason is None:
        names = set(ctx.module_context.platforms or ()) - {"cpu", "cuda"}
        where = ", ".join(sorted(names)) or "this platform"
        reason = f"there is no native kernel for {where}"
    if required:
        raise NotImplementedError(
            f'jax_gdn.decode: implementation="native" cannot run: {reason}. {_WAY_OUT}'
        )
    warnings.warn(
        f"jax_gdn.decode falls back to the reference: {reason}.", stacklevel=2
    )
    return [x]


mlir.register_lowering(_without_native_p, _lower_without_native)


def _why_not_cuda(settings: Settings, q: Array, v: Array) -> str | None:
    """Returns why the CUDA kernel cannot take these shapes, or None."""
    if _registration.cuda is None:
        return "this build of jax_gdn has no CUDA kernels"
    B = math.prod(v.shape[: settings.num_batch_dims + 1])
    HV, V = v.shape[-2:]
    # The handler itself checks a symbolic B, when it has a value.
    return _registration.cuda.why_unsupported(
        B if isinstance(B, int) else 1, HV, q.shape[-1], V
    )


def by_platform(native: Call, reference: Call) -> Call:
    """Returns a call that is either, decided when it is lowered for a platform."""

    def by_platform(settings: Settings, operands: Operands) -> Results:
        if settings.implementation == "xla":
            return reference(settings, operands)
        _registration.require_handlers()

        def without_native(reason: str | None, operands: Operands) -> Results:
            required = settings.implementation == "native"
            q = _without_native_p.bind(operands.q, reason=reason, required=required)
            return reference(settings, operands._replace(q=q))

        with_native = ft.partial(native, settings)
        why_not_cuda = _why_not_cuda(settings, operands.q, operands.v)
        return jax.lax.platform_dependent(
            operands,
            cpu=with_native,
            cuda=ft.partial(without_native, why_not_cuda)
            if why_not_cuda
            else with_native,
            default=ft.partial(without_native, None),
        )

    return by_platform
