"""The call itself: the native one, and the reference with batch dimensions."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gdn import _registration
from jax_gdn._operands import (
    OPTIONAL,
    SLOTS,
    STATE_LAYOUTS,
    Operands,
    Results,
    Settings,
)
from jax_gdn._reference import reference_decode


def reference(settings: Settings, operands: Operands) -> Results:
    """The reference, for operands with any number of batch dimensions."""
    call = ft.partial(_reference, settings)
    in_axes = Operands(*(0 if batch else None for batch in settings.has_batch_dims))
    for _ in range(settings.num_batch_dims):
        call = jax.vmap(call, (in_axes,))
    return call(operands)


def _reference(settings: Settings, operands: Operands) -> Results:
    out, state = reference_decode(
        **operands._asdict(),
        scale=settings.scale,
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=settings.state_layout,
    )
    output = operands.output
    # Written whole into `output`, so that a donated buffer finds its use.
    return Results(out if output is None else output.at[...].set(out), state)


def native(settings: Settings, operands: Operands) -> Results:
    """The native call, for operands with any number of batch dimensions."""
    # Types from the reference carry shardings and varying axes too.
    results = jax.eval_shape(ft.partial(reference, settings), operands)
    given = dict(_merge_batch_dims(settings, operands).items())
    names = list(given)
    aliases = {names.index("state"): 1}
    if "output" in given:
        aliases[names.index("output")] = 0
    bits = sum(1 << i for i, name in enumerate(OPTIONAL) if name in given)
    call = jax.ffi.ffi_call(
        _registration.DECODE_TARGET, list(results), input_output_aliases=aliases
    )
    results = call(
        *given.values(),
        scale=np.float32(settings.scale),
        use_qk_l2norm=settings.use_qk_l2norm,
        state_layout=np.int32(STATE_LAYOUTS.index(settings.state_layout)),
        optional_operands=np.int32(bits),
    )
    return Results(*results)


def _merge_batch_dims(settings: Settings, operands: Operands) -> Operands:
    """Makes one axis of the batch dimensions and B, or N."""
    dims = settings.num_batch_dims
    if dims == 0:
        return operands

    def merged(x: Array, batch: bool) -> Array:
        first = math.prod(x.shape[: dims + 1])
        return x.reshape(first, *x.shape[dims + 1 :]) if batch else x

    has = settings.has_batch_dims
    result = {name: merged(x, getattr(has, name)) for name, x in operands.items()}
    for name in SLOTS:
        if name in result:
            *pools, N = operands.state.shape[: dims + 1]
            first = N * jnp.arange(math.prod(pools), dtype=jnp.int32)
            slots = result[name].reshape(math.prod(pools), -1)
            inside = (slots >= 0) & (slots < N)
            # Outside its own pool must not become inside the next one.
            slots = jnp.where(inside, slots + first[:, None], -1)
            result[name] = slots.reshape(result[name].shape)
    # Handlers merge those of the others: XLA's host code would copy what is reshaped.
    result |= {"state": operands.state, "output": operands.output}
    return Operands(**result)
