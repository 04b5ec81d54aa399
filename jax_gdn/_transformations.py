"""JAX's transformations of a call: derivatives and vmap."""

import functools as ft

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jax_gdn._operands import SLOTS, Call, Operands, Results, Settings
from jax_gdn._reference import decay_rate, scaled
from jax_gdn._sharding import shard_explicit


def differentiable(call: Call, reference: Call) -> Call:
    """Returns the call with the derivatives of the reference, of either mode.

    Reverse mode keeps the operands, among them the state as it was, and nothing else:
    the reference runs again on the way back. So a state that is differentiated through
    is not updated in place, and a scan of steps keeps one state a step.
    """

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


def batched(call: Call) -> Call:
    """Returns the call, which vmap gives one batch dimension more, in front of B.

    A mapped axis that leads already costs nothing; another one is moved, which for the
    state is a copy. `A_log` and `dt_bias` have no B: where they are mapped (an ensemble
    of models), they move into `a`, which has.
    """

    def batched(settings: Settings, operands: Operands) -> Results:
        mapped_call = custom_vmap(ft.partial(call, settings))

        @mapped_call.def_vmap
        def rule(axis_size: int, in_batched: list[Operands], operands: Operands):
            (mapped,) = in_batched
            inner = settings._replace(num_batch_dims=settings.num_batch_dims + 1)
            operands = _with_batch_dim(settings, axis_size, mapped, operands)
            # A mapped axis may be split over the mesh too.
            results = shard_explicit(batched)(inner, operands)
            return results, jax.tree.map(lambda _: True, results)

        return mapped_call(operands)

    return batched


def _with_batch_dim(
    settings: Settings, axis_size: int, mapped: Operands, operands: Operands
) -> Operands:
    """Returns operands that all have the new batch dimension but for the weights."""
    if (settings.has_pool or settings.has_stack) and not mapped.state:
        kind, by = ("stack", "layer") if settings.has_stack else ("pool", SLOTS[0])
        raise ValueError(
            f"jax_gdn.{settings.name}: under jax.vmap `state` must be mapped too where "
            f"it is a {kind} (`{by}` is given); got one {kind} for {axis_size} mapped "
            f"calls, which would each return their own. Map the {kind}, or make the "
            "mapped axis part of B."
        )
    if mapped.A_log or mapped.dt_bias:
        operands = operands._replace(**_weights_into_a(settings, operands, mapped))
        mapped = mapped._replace(a=True)
    missing = {
        name: jnp.broadcast_to(x[None], (axis_size, *x.shape))
        for name, x in operands.items()
        if getattr(settings.has_batch_dims, name) and not getattr(mapped, name)
    }
    return operands._replace(**missing)


def _weights_into_a(
    settings: Settings, operands: Operands, mapped: Operands
) -> dict[str, Array]:
    """Returns a mapped `a`, and `A_log` and `dt_bias` that are not, of the same decay.

    The kernel adds `dt_bias` in float32, so adding it here changes no bit. Where
    `A_log` is mapped, the new `a` is what softplus takes to the same decay at
    `A_log` = 0, to within a few roundings of float32.
    """
    dims = settings.num_batch_dims

    def widened(name: str) -> Array:
        x = getattr(operands, name).astype(jnp.float32)
        x = x if getattr(mapped, name) else x[None]
        # [E, HV] or [E, HV, K] beside an `a` of [E, ..., B, T, HV] or [.., HV, K].
        x = x if name == "a" else jnp.expand_dims(x, range(1, dims + 3))
        return jnp.expand_dims(x, range(x.ndim, 1 + dims + len(settings.axes.a)))

    x = widened("a") + widened("dt_bias")
    dt_bias = jnp.zeros(x.shape[dims + 3 :], jnp.float32)
    if not mapped.A_log:
        return {"a": x, "dt_bias": dt_bias}
    if settings.gate_form == "sigmoid":
        x = scaled(widened("A_log"), x)
    else:
        rate = decay_rate(widened("A_log"), x)
        x = rate + jnp.log(-jnp.expm1(-rate))
    A_log = jnp.zeros(x.shape[dims + 3], jnp.float32)
    return {"a": x, "A_log": A_log, "dt_bias": dt_bias}
