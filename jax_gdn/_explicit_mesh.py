"""Meshes whose types say how arrays are sharded (Explicit axes): a `shard_map`."""

import functools as ft
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from jax_gdn._operands import Operands, Results, Settings
from jax_gdn._sharding import Call, choose_shards, mesh_axes_of, on_shard, specs_of


def shard_explicit(call: Call) -> Call:
    """Returns the call on every device's shard, where types say what that is."""

    def shard_explicit(settings: Settings, operands: Operands) -> Results:
        types = {name: jax.typeof(x) for name, x in operands.items()}
        state = types["state"]
        mesh = state.sharding.mesh
        # Types name Explicit axes only.
        named = {name for x in types.values() for name in mesh_axes_of(x.sharding.spec)}
        if not named:
            return call(settings, operands)
        H, sizes = types["q"].shape[-2], dict(mesh.shape)
        # The state alone decides: it has to come back as it was, and the rest is small.
        shards = choose_shards(settings, sizes, [("state", state)])
        in_specs, out_specs = specs_of(settings, sizes, shards, H)
        operands = jax.tree.map(
            lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
            operands,
            in_specs,
        )
        if AxisType.Auto in mesh.axis_types:
            # XLA has a say too: let it split the axes of both kinds.
            out_shardings = Results(*(NamedSharding(mesh, spec) for spec in out_specs))
            auto: Any = jax.sharding.auto_axes(
                ft.partial(call, settings),
                axes=tuple(named),
                out_sharding=out_shardings,
            )
            out, new_state = auto(operands)
        else:
            out, new_state = jax.shard_map(
                on_shard(settings, call, sizes, shards, H),
                mesh=mesh,
                in_specs=(in_specs,),
                out_specs=out_specs,
                # By default all that a vmap has not taken away.
                axis_names=named if mesh.manual_axes else set(),
            )(operands)
        # A state that was split otherwise (over K, say) goes back to how it was.
        return Results(out, jax.sharding.reshard(new_state, state.sharding))

    return shard_explicit
