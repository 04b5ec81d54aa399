"""Derivatives: forward by the call, tangents and cotangents by the reference.

What reverse mode keeps from the forward pass are the operands, among them the state
as it was, and nothing else: the reference runs again on the way back. So a state that
is differentiated through is not updated in place, and a scan of steps keeps one state
a step. `jax.checkpoint` around some steps trades that for time, as elsewhere.
"""

import functools as ft

import jax
from jax.custom_derivatives import SymbolicZero

from jax_gdn._operands import Operands, Results, Settings
from jax_gdn._sharding import Call


def differentiable(call: Call, reference: Call) -> Call:
    """Returns the call with the derivatives of the reference, of either mode."""

    def differentiable(settings: Settings, operands: Operands) -> Results:
        primal = jax.custom_jvp(ft.partial(call, settings))

        def jvp(primals, tangents):
            (operands,), (moves,) = primals, tangents
            moving = {
                name: t for name, t in moves.items() if not isinstance(t, SymbolicZero)
            }

            # Nothing of it is kept for the way back, and XLA may merge what it can.
            @ft.partial(jax.checkpoint, prevent_cse=False)
            def of_moving(moved: dict) -> Results:
                return reference(settings, operands._replace(**moved))

            moved = {name: getattr(operands, name) for name in moving}
            _, results = jax.jvp(of_moving, [moved], [moving])
            return primal(operands), results

        primal.defjvp(jvp, symbolic_zeros=True)
        return primal(operands)

    return differentiable
