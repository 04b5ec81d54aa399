"""vmap: mapped axes go in front of B, so that it is one call however many there are.

A mapped axis that leads already costs nothing; another one is moved, which for the
state is a copy. The weights, `A_log` and `dt_bias`, have no B: where they are mapped
(an ensemble of models), they move into `a`, which has.
"""

import dataclasses
import functools as ft

import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from jax_gdn._platforms import on_platform
from jax_gdn._primitive import Settings
from jax_gdn._reference import decay_rate
from jax_gdn._sharding import on_mesh


def batchable(settings: Settings, *operands: Array) -> list[Array]:
    """Stages the call, for operands with any number of mapped axes."""
    call = custom_vmap(ft.partial(on_platform, settings))
    call.def_vmap(ft.partial(_map, settings))
    return call(*operands)


def _map(
    settings: Settings, axis_size: int, in_batched: list[bool], *operands: Array
) -> tuple[list[Array], list[bool]]:
    mapped = dict(zip(settings.operands, in_batched, strict=True))
    if settings.has_pool and not mapped["state"]:
        raise ValueError(
            "jax_gdn.decode: under jax.vmap `state` must be mapped too where it is a "
            f"pool (`state_indices` is given); got one pool for {axis_size} mapped "
            "calls, which would each return their own. Map the pool, or make the "
            "mapped axis part of B."
        )
    arrays = dict(zip(settings.operands, operands, strict=True))
    if mapped["A_log"] or mapped["dt_bias"]:
        arrays |= _weights_into_a(settings, arrays, mapped)
        mapped["a"] = True
    for name, rows in zip(settings.operands, settings.has_rows, strict=True):
        if rows and not mapped[name]:
            shape = (axis_size, *arrays[name].shape)
            arrays[name] = jnp.broadcast_to(arrays[name][None], shape)
    inner = dataclasses.replace(settings, mapped=settings.mapped + 1)
    # A mapped axis may be split over the mesh too.
    return on_mesh(inner, batchable, *arrays.values()), [True, True]


def _weights_into_a(
    settings: Settings, arrays: dict[str, Array], mapped: dict[str, bool]
) -> dict[str, Array]:
    """Returns a mapped `a`, and `A_log` and `dt_bias` that are not, of the same decay.

    The kernel adds `dt_bias` in float32, so adding it here changes no bit. Where
    `A_log` is mapped, the new `a` is what softplus takes to the same decay at
    `A_log` = 0, to within a few roundings of float32.
    """

    def widened(name: str) -> Array:
        x = arrays[name].astype(jnp.float32)
        x = x if mapped[name] else x[None]
        if name == "a":
            return x
        # [E, HV] or [E, HV, K] beside an `a` of [E, ..., B, T, HV] or [.., HV, K].
        x = jnp.expand_dims(x, range(1, settings.mapped + 3))
        return jnp.expand_dims(x, range(x.ndim, a_rank))

    a_rank = 1 + settings.mapped + len(settings.axes[settings.index("a")])
    x = widened("a") + widened("dt_bias")
    dt_bias = jnp.zeros(x.shape[settings.mapped + 3 :], jnp.float32)
    if not mapped["A_log"]:
        return {"a": x, "dt_bias": dt_bias}
    rate = decay_rate(widened("A_log"), x)
    x = rate + jnp.log(-jnp.expm1(-rate))
    return {
        "a": x,
        "A_log": jnp.zeros(x.shape[settings.mapped + 3], jnp.float32),
        "dt_bias": dt_bias,
    }
