"""The call itself: the native one, and the same in jnp.

What stands around it, outermost first, each in its file:

    _gradient    derivatives, by the jnp form
    _batching    vmap: mapped axes go in front of B
    _sharding    a mesh: every device works on its own shard
    _platforms   the native call where there is one, else the jnp form
"""

import dataclasses
import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gdn import _registration
from jax_gdn._reference import reference_decode

REQUIRED = ("q", "k", "v", "state", "A_log", "a", "dt_bias", "b")
# In the order of the bits that tell the native handlers which of them there are.
OPTIONAL = ("output", "state_indices", "output_state_indices")
STATE_LAYOUTS = ("KV", "VK")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a call is traced; hashable."""

    operands: tuple[str, ...]  # names, in the order of REQUIRED and OPTIONAL
    axes: tuple[tuple[str, ...], ...]  # of each operand, without mapped ones
    scale: float
    use_qk_l2norm: bool
    state_layout: str
    implementation: str | None
    mapped: int = 0  # leading axes, put by vmap before B and before N

    @property
    def has_rows(self) -> list[bool]:
        """Whether each operand has the mapped axes; the weights have not."""
        return [axes[0] in ("B", "N") for axes in self.axes]

    @property
    def has_pool(self) -> bool:
        return "state_indices" in self.operands

    def index(self, name: str) -> int:
        return self.operands.index(name)


def xla(settings: Settings, *operands: Array) -> list[Array]:
    """The definition, for operands with any number of mapped axes."""
    call = ft.partial(_xla_unmapped, settings)
    in_axes = [0 if rows else None for rows in settings.has_rows]
    for _ in range(settings.mapped):
        call = jax.vmap(call, in_axes)
    return call(*operands)


def _xla_unmapped(settings: Settings, *operands: Array) -> list[Array]:
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


def native(settings: Settings, *operands: Array) -> list[Array]:
    """The native call, for operands with any number of mapped axes."""
    folded = _fold(settings, operands) if settings.mapped else list(operands)
    shapes = [operands[settings.index(name)].shape for name in ("v", "state")]

    def definition(*folded: Array) -> list[Array]:
        results = _xla_unmapped(settings, *folded)
        return [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]

    # Types from the definition carry shardings and varying axes too.
    results = jax.eval_shape(definition, *folded)
    aliases = {settings.index("state"): 1}
    if "output" in settings.operands:
        aliases[settings.index("output")] = 0
    for i in aliases:
        folded[i] = operands[i]  # XLA's host code would copy what is reshaped
    call = jax.ffi.ffi_call(
        _registration.DECODE_TARGET, results, input_output_aliases=aliases
    )
    bits = sum(1 << i for i, name in enumerate(OPTIONAL) if name in settings.operands)
    return call(
        *folded,
        scale=np.float32(settings.scale),
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=np.int32(STATE_LAYOUTS.index(settings.state_layout)),
        optional_operands=np.int32(bits),
    )


def _fold(settings: Settings, operands: tuple[Array, ...]) -> list[Array]:
    """Makes one axis of the mapped ones and B, or N."""
    mapped = settings.mapped
    folded = [
        x.reshape(math.prod(x.shape[: mapped + 1]), *x.shape[mapped + 1 :])
        if rows
        else x
        for x, rows in zip(operands, settings.has_rows, strict=True)
    ]
    if settings.has_pool:
        *pools, N = operands[settings.index("state")].shape[: mapped + 1]
        first = N * jnp.arange(math.prod(pools), dtype=jnp.int32)
        for i, name in enumerate(settings.operands):
            if name.endswith("state_indices"):
                slots = operands[i].reshape(math.prod(pools), -1)
                inside = (slots >= 0) & (slots < N)
                # Outside its own pool must not become inside the next one.
                slots = jnp.where(inside, slots + first[:, None], -1)
                folded[i] = slots.reshape(folded[i].shape)
    return folded
