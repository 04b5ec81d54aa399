"""Derivatives: forward by the call, tangents and cotangents by the jnp form.

What reverse mode keeps from the forward pass are the operands, among them the state
as it was, and nothing else: the jnp form runs again on the way back. So a state that is
differentiated through is not updated in place, and a scan of steps keeps one state a
step. `jax.checkpoint` around some steps trades that for time, as elsewhere.
"""

import functools as ft

import jax
from jax import Array
from jax.custom_derivatives import SymbolicZero

from jax_gdn._batching import batchable
from jax_gdn._primitive import Settings, xla
from jax_gdn._sharding import on_mesh


def differentiable(settings: Settings, *operands: Array) -> list[Array]:
    """Stages the call."""
    call = jax.custom_jvp(ft.partial(on_mesh, settings, batchable))
    call.defjvp(ft.partial(_jvp, settings, call), symbolic_zeros=True)
    return call(*operands)


def _jvp(settings: Settings, call, primals, tangents):
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

    # Nothing of the jnp form is kept for the way back, and XLA may merge what it can.
    @ft.partial(jax.checkpoint, prevent_cse=False)
    def definition(*moved: Array) -> list[Array]:
        operands = list(primals)
        for i, x in zip(moving, moved, strict=True):
            operands[i] = x
        return on_mesh(settings, xla, *operands)

    _, results = jax.jvp(
        definition, [primals[i] for i in moving], [tangents[i] for i in moving]
    )
    return call(*primals), results
