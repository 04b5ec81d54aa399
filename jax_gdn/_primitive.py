"""The operation as XLA sees it: which platform runs what, and what is aliased."""

import dataclasses
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

REQUIRED = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
# In the order of the bits that tell the native handlers which of them there are.
OPTIONAL = ("output", "state_indices", "output_state_indices")
STATE_LAYOUTS = ("KV", "VK")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a call is traced; hashable."""

    operands: tuple[str, ...]  # names, in the order of REQUIRED and OPTIONAL
    scale: float
    use_qk_l2norm: bool
    state_layout: str


def _why_not_cuda(q: Array, v: Array) -> str | None:
    """Returns why the CUDA kernel cannot take these shapes, or None."""
    if _registration.cuda is None:
        return "this build of jax_gdn has no CUDA kernels"
    B, _, HV, V = v.shape
    return _registration.cuda.why_unsupported(B, HV, q.shape[-1], V)


def _native(settings: Settings, *operands: Array) -> list[Array]:
    # Types from the definition carry shardings and varying axes too.
    results = jax.eval_shape(ft.partial(_xla, settings), *operands)
    index = {name: i for i, name in enumerate(settings.operands)}
    aliases = {index["state"]: 1}
    if "output" in index:
        aliases[index["output"]] = 0
    call = jax.ffi.ffi_call(
        _registration.DECODE_TARGET, results, input_output_aliases=aliases
    )
    bits = sum(1 << i for i, name in enumerate(OPTIONAL) if name in index)
    return call(
        *operands,
        scale=np.float32(settings.scale),
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=np.int32(STATE_LAYOUTS.index(settings.state_layout)),
        optional_operands=np.int32(bits),
    )


def _xla(settings: Settings, *operands: Array) -> list[Array]:
    arguments = dict(zip(settings.operands, operands, strict=True))
    out, state = reference_decode(
        **arguments,
        scale=settings.scale,
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=settings.state_layout,
    )
    output = arguments.get("output")
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
    settings: Settings, *operands: Array, implementation: str | None
) -> tuple[Array, Array]:
    """Stages the call; what runs is decided when it is lowered for a platform."""
    xla = ft.partial(_xla, settings)
    if implementation == "xla":
        out, state = xla(*operands)
        return out, state

    def without_native(reason: str | None, *operands: Array) -> list[Array]:
        q = _without_native_p.bind(
            operands[0], reason=reason, required=implementation == "native"
        )
        return xla(q, *operands[1:])

    native = ft.partial(_native, settings)
    why_not_cuda = _why_not_cuda(operands[0], operands[2])
    out, state = jax.lax.platform_dependent(
        *operands,
        cpu=native,
        cuda=ft.partial(without_native, why_not_cuda) if why_not_cuda else native,
        default=ft.partial(without_native, None),
    )
    return out, state
