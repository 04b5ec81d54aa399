"""Meshes on which XLA decides (Auto axes): a `custom_partitioning`.

On one device JAX lowers it to the plain call.
"""

import functools as ft
import itertools
import math
import re
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_gdn import _sharding
from jax_gdn._operands import Operands, Results, Settings
from jax_gdn._sharding import Call, axes_with_batch_dims


def shard_auto(native: Call) -> Call:
    """Returns the native call such that XLA gives every device its shard of it."""

    def shard_auto(settings: Settings, operands: Operands) -> Results:
        mesh = jax.sharding.get_abstract_mesh()
        auto = [
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Auto and mesh.shape[name] > 1
        ]
        if mesh.manual_axes and auto:
            raise NotImplementedError(
                "jax_gdn.decode: inside jax.shard_map the native call needs all axes "
                f"of the mesh to be manual; got {auto} that are not. Wrap the call in "
                f"another jax.shard_map(..., axis_names={set(auto)})."
            )
        if mesh.manual_axes:
            return native(settings, operands)
        # Not `static_argnums`, whose closures JAX's leak checker takes for leaks.
        call = custom_partitioning(ft.partial(native, settings))
        call.def_partition(
            ft.partial(_partition, settings, native, mesh),
            sharding_rule=ft.partial(_sharding_rule, settings),
        )
        return call(operands)

    return shard_auto


def _with_names(mesh: Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the array's type with a sharding that names axes of the mesh.

    JAX hands over shardings without names where the mesh comes from the context alone
    (up to 0.12 at least).
    """
    if isinstance(x.sharding, NamedSharding):
        return x
    parts = x.sharding.shard_shape(x.shape)
    wide = [name for name, size in mesh.shape.items() if size > 1]
    choices = [
        names for n in range(len(wide) + 1) for names in itertools.permutations(wide, n)
    ]
    fitting = [
        [n for n in choices if part * math.prod(mesh.shape[i] for i in n) == size]
        for size, part in zip(x.shape, parts, strict=True)
    ]
    for names in itertools.product(*fitting):
        if len({*itertools.chain(*names)}) == sum(map(len, names)):
            sharding = NamedSharding(mesh, PartitionSpec(*(n or None for n in names)))
            if sharding.is_equivalent_to(x.sharding, len(x.shape)):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )


def _partition(settings: Settings, native: Call, context, mesh, operands, results):
    """Says what every device holds and does; called by XLA's partitioner."""
    (operands,) = operands
    if mesh.empty:
        # JAX hands over a mesh where an argument or a result has one; else there may
        # be one in the context, whose shardings have lost their names.
        of_state = results.state.sharding.devices_indices_map(results.state.shape)
        devices = np.array(list(of_state))
        if context.empty:
            mesh = Mesh(devices, ("devices",))
        else:
            mesh = Mesh(devices.reshape(context.axis_sizes), context.axis_names)
    H, sizes = operands.q.shape[-2], dict(mesh.shape)
    given = {"new_state": results.state, "state": operands.state, "v": operands.v}
    named = [(name, _with_names(mesh, x)) for name, x in given.items()]
    shards = _sharding.choose_shards(settings, sizes, named)
    in_shardings, out_shardings = jax.tree.map(
        ft.partial(NamedSharding, mesh),
        _sharding.specs_of(settings, sizes, shards, H),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    call = _sharding.on_shard(settings, native, sizes, shards, H)
    return mesh, call, out_shardings, (in_shardings,)


def _sharding_rule(settings: Settings, mesh, operands, results):
    """Says which axes are split alike, for shardings to spread through the call."""
    q, _, v, *_ = operands  # those that are there, in their order
    H, HV = q.shape[-2], v.shape[-2]
    sizes: dict[str, Any] = {}
    heads = "h" if H == HV else "(h g)"
    if any(H % size for size in mesh.shape.values()):
        heads = "j"  # Not all splits of HV are splits of H, so they say nothing of it.
    elif H != HV:
        sizes["g"] = HV // H

    def factors(name: str) -> str:
        axes = axes_with_batch_dims(settings, name)
        return " ".join(heads if axis == "HV" else axis.lower() for axis in axes)

    rule = "{} -> {}".format(
        ", ".join(factors(name) for name, _ in settings.axes.items()),
        ", ".join(map(factors, ("out", "new_state"))),
    )
    whole = {"t", "k", "v"} | ({"b", "n"} if settings.has_pool else set())
    # In the order in which the rule names them first.
    ordered = [
        name for name in dict.fromkeys(re.findall(r"\w+", rule)) if name in whole
    ]
    return rule, {"need_replication_factors": tuple(ordered), **sizes}
