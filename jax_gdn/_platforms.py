"""Which platform runs what, and what is said where it is not the native call."""

import functools as ft
import math
import warnings

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_gdn import _registration
from jax_gdn._primitive import Settings, xla
from jax_gdn._sharding import partitioned

_WAY_OUT = 'Pass implementation="xla" for the jnp form, which runs anywhere.'

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
    warnings.warn(f"jax_gdn.decode falls back to the XLA form: {reason}.", stacklevel=2)
    return [x]


mlir.register_lowering(_without_native_p, _lower_without_native)


def _why_not_cuda(settings: Settings, q: Array, v: Array) -> str | None:
    """Returns why the CUDA kernel cannot take these shapes, or None."""
    if _registration.cuda is None:
        return "this build of jax_gdn has no CUDA kernels"
    B = math.prod(v.shape[: settings.mapped + 1])
    HV, V = v.shape[-2:]
    # The handler itself checks a symbolic B, when it has a value.
    return _registration.cuda.why_unsupported(
        B if isinstance(B, int) else 1, HV, q.shape[-1], V
    )


def on_platform(settings: Settings, *operands: Array) -> list[Array]:
    """Stages the call; what runs is decided when it is lowered for a platform."""
    if settings.implementation == "xla":
        return xla(settings, *operands)
    _registration.require_handlers()

    def without_native(reason: str | None, *operands: Array) -> list[Array]:
        q = _without_native_p.bind(
            operands[0], reason=reason, required=settings.implementation == "native"
        )
        return xla(settings, q, *operands[1:])

    native = ft.partial(partitioned, settings)
    q, v = (operands[settings.index(name)] for name in ("q", "v"))
    why_not_cuda = _why_not_cuda(settings, q, v)
    return jax.lax.platform_dependent(
        *operands,
        cpu=native,
        cuda=ft.partial(without_native, why_not_cuda) if why_not_cuda else native,
        default=ft.partial(without_native, None),
    )
