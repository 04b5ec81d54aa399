"""Meshes: every device works on its own shard, and none waits for another.

Sequences and value heads do not know of each other. So one choice of mesh axes for B
and for HV, taken from the state's sharding, is imposed on all operands, and the state
stays where it is. A device that holds only some value heads of a key head has that key
head whole. Where types say how arrays are sharded (Explicit axes) the call becomes a
`shard_map`; where XLA decides (Auto axes), a `custom_partitioning`.
"""

import functools as ft
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_gdn._operands import Call, Operands, Results, Settings
from jax_gdn._reference import one_pool, plan_rows

Sizes = Mapping[str, int]  # of mesh axes


def _axes_with_batch_dims(settings: Settings, name: str) -> list[str]:
    """Returns the axes of an operand, or of `out`; other results have their donors'."""
    operand = "v" if name == "out" else name
    axes = getattr(settings.axes, operand)
    batch = [f"E{i}" for i in range(settings.num_batch_dims)]
    return [*batch, *axes] if getattr(settings.has_batch_dims, operand) else list(axes)


def _mesh_axes_of(spec: Iterable[Any]) -> list[str]:
    """Returns all mesh axes that a spec names."""
    return [
        name
        for names in spec
        for name in ((names,) if isinstance(names, str) else names or ())
    ]


def _count(names: Iterable[str], sizes: Sizes) -> int:
    return math.prod(sizes[name] for name in names)


def _choose_shards(
    settings: Settings, sizes: Sizes, arrays: Iterable[tuple[str, Any, Any]]
) -> dict[str, tuple[str, ...]]:
    """Returns the mesh axes that split an axis."""
    # Any row of a pool may write any slot, so neither B nor N is split.
    free = {f"E{i}" for i in range(settings.num_batch_dims)} | {"HV"}
    free |= set() if settings.has_pool else {"B"}
    shards = {}
    for name, shape, spec in arrays:
        axes = _axes_with_batch_dims(settings, name)
        for axis, size, entry in zip(axes, shape, spec, strict=False):
            names = tuple(_mesh_axes_of([entry]))
            taken = any(set(names) & set(others) for others in shards.values())
            fits = names and not taken and size % _count(names, sizes) == 0
            if fits and axis in free - shards.keys():
                shards[axis] = names
    return shards


def _split(
    settings: Settings,
    call: Call,
    sizes: Sizes,
    arrays: Iterable[tuple[str, Any, Any]],
    H: int,
) -> tuple[Operands, Results, Callable[[Operands], Results]]:
    """Returns the specs of operands and results, and the call on a device's shards.

    Axes are split as by the first of the arrays, then by what the others can add.
    """
    shards = _choose_shards(settings, sizes, arrays)
    of_heads = of_keys = shards.get("HV", ())
    while H % _count(of_keys, sizes):
        of_keys = of_keys[:-1]
    of_groups = of_heads[len(of_keys) :]
    shards["H"] = of_keys

    def spec(name: str) -> PartitionSpec:
        axes = _axes_with_batch_dims(settings, name)
        return PartitionSpec(*(shards.get(axis) or None for axis in axes))

    def on_shard(operands: Operands) -> Results:
        if of_groups:
            HV = operands.v.shape[-2]
            group = HV * _count(of_heads, sizes) // H
            heads = (lax.axis_index(of_groups) * HV + jnp.arange(HV)) // group
            # Each value head gets a key head of its own.
            axes = {"q": -2, "k": -2, "pending_k": -3}
            expanded = {
                name: jnp.take(x, heads, axes[name], mode="clip")
                for name, x in operands.items()
                if name in axes
            }
            results = call(settings, operands._replace(**expanded))
            if settings.window is None:
                return results
            # The ring of keys stays whole on every device, and so the same.
            return results._replace(pending_k=_with_keys(settings, operands))
        return call(settings, operands)

    there = settings.axes._asdict().items()
    specs = Operands(*(None if axes is None else spec(name) for name, axes in there))
    return specs, settings.results(spec), on_shard


def _with_keys(settings: Settings, operands: Operands) -> Array:
    """Returns the ring of keys after a call, of all key heads."""

    def append(operands: Operands) -> Array:
        given, ring = operands._asdict(), operands.pending_k
        R, T = ring.shape[-2], operands.k.shape[1]
        layer = settings.layer if operands.layer is None else operands.layer
        if layer is not None:
            given |= one_pool(given, ["pending_k"], layer)
            given["cursors"] = jnp.tile(operands.cursors, (ring.shape[0], 1))
        names = ("state_indices", "output_state_indices", "fold")
        slots = [given[name] for name in names]
        rows = plan_rows(given["cursors"], R, settings.window, T, *slots)
        return rows.append(given["pending_k"], operands.k).reshape(ring.shape)

    in_axes = Operands(*(0 if batch else None for batch in settings.has_batch_dims))
    for _ in range(settings.num_batch_dims):
        append = jax.vmap(append, (in_axes,))
    return append(operands)


def shard_explicit(call: Call) -> Call:
    """Returns the call on every device's shard, where types say what that is."""

    def shard_explicit(settings: Settings, operands: Operands) -> Results:
        types = {name: jax.typeof(x) for name, x in operands.items()}
        state = types["state"]
        mesh = state.sharding.mesh
        # Types name Explicit axes only.
        named = {n for x in types.values() for n in _mesh_axes_of(x.sharding.spec)}
        if not named:
            return call(settings, operands)
        H, sizes = types["q"].shape[-2], dict(mesh.shape)
        # The state alone decides: it has to come back as it was, and the rest is small.
        in_specs, out_specs, on_shard = _split(
            settings, call, sizes, [("state", state.shape, state.sharding.spec)], H
        )
        operands = jax.tree.map(
            lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
            operands,
            in_specs,
        )
        if AxisType.Auto in mesh.axis_types:
            # XLA has a say too: let it split the axes of both kinds.
            places = jax.tree.map(ft.partial(NamedSharding, mesh), out_specs)
            auto: Any = ft.partial(
                jax.sharding.auto_axes, axes=tuple(named), out_sharding=places
            )
            results = auto(ft.partial(call, settings))(operands)
        else:
            results = jax.shard_map(
                on_shard,
                mesh=mesh,
                in_specs=(in_specs,),
                out_specs=out_specs,
                # By default all that a vmap has not taken away.
                axis_names=named if mesh.manual_axes else set(),
            )(operands)
        # What was split otherwise (a state over K, say) goes back to how it was.
        updated = {
            name: jax.sharding.reshard(x, types[name].sharding)
            for name, x in results._asdict().items()
            if name in types
        }
        return results._replace(**updated)

    return shard_explicit


def shard_auto(native: Call) -> Call:
    """Returns the native call such that XLA gives every device its shard of it."""

    def shard_auto(settings: Settings, operands: Operands) -> Results:
        mesh = jax.sharding.get_abstract_mesh()
        auto = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
        if mesh.manual_axes and auto:
            raise NotImplementedError(
                f"jax_gdn.{settings.name}: inside jax.shard_map the native call needs "
                f"all axes of the mesh to be manual; got {auto} that are not. Wrap the "
                f"call in another jax.shard_map(..., axis_names={set(auto)})."
            )
        if mesh.manual_axes:
            return native(settings, operands)
        # Not `static_argnums`, whose closures JAX's leak checker takes for leaks.
        # Nor a function whose trace has constants, which it refuses: jit keeps them.
        call = custom_partitioning(jax.jit(ft.partial(native, settings)))
        call.def_partition(
            ft.partial(_partition, settings, native, mesh),
            sharding_rule=ft.partial(_sharding_rule, settings),
        )
        return call(operands)

    return shard_auto


def _spec_of(x: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
    """Returns which axes of the mesh split an array, in names.

    JAX hands over shardings without names where the mesh comes from the context alone
    (up to 0.12 at least).
    """
    if isinstance(x.sharding, NamedSharding):
        return x.sharding.spec
    parts = x.sharding.shard_shape(x.shape)
    wide = [name for name, size in mesh.shape.items() if size > 1]
    choices = [x for n in range(len(wide) + 1) for x in itertools.permutations(wide, n)]
    fitting = [
        [names for names in choices if part * _count(names, mesh.shape) == size]
        for size, part in zip(x.shape, parts, strict=True)
    ]
    for names in itertools.product(*fitting):
        if len({*itertools.chain(*names)}) == sum(map(len, names)):
            spec = PartitionSpec(*(n or None for n in names))
            if NamedSharding(mesh, spec).is_equivalent_to(x.sharding, len(x.shape)):
                return spec
    return PartitionSpec()


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
    # How the new state is wanted decides first, then how the operands come.
    given = [("state", results.state), ("state", operands.state), ("v", operands.v)]
    specs = [(name, x.shape, _spec_of(x, mesh)) for name, x in given]
    *specs, call = _split(settings, native, sizes, specs, H)
    in_shardings, out_shardings = jax.tree.map(ft.partial(NamedSharding, mesh), specs)
    return mesh, call, out_shardings, (in_shardings,)


def _sharding_rule(settings: Settings, mesh, operands, results):
    """Says which axes are split alike, for shardings to spread through the call."""
    q, _, v, *_ = operands  # those that are there, in their order
    H, HV = q.shape[-2], v.shape[-2]
    sizes: dict[str, Any] = {}
    heads = "h" if H == HV else "(h g)"
    splits = list(mesh.shape.values())
    if settings.window is not None:  # then H is an axis of a result, too
        splits.append(math.prod(splits))
    if any(H % size for size in splits):
        heads = "j"  # Not all splits of HV are splits of H, so they say nothing of it.
    elif H != HV:
        sizes["g"] = HV // H

    def factors(name: str) -> str:
        axes = _axes_with_batch_dims(settings, name)
        names = {"HV": heads, "2": "c"}
        return " ".join(names.get(axis, axis.lower()) for axis in axes)

    rule = "{} -> {}".format(
        ", ".join(factors(name) for name, _ in settings.axes.items()),
        ", ".join(filter(None, settings.results(factors))),
    )
    whole = {"t", "k", "v", "l", "r", "c"} | (
        {"b", "n"} if settings.has_pool else set()
    )
    # In the order in which the rule names them first.
    ordered = tuple(n for n in dict.fromkeys(re.findall(r"\w+", rule)) if n in whole)
    return rule, {"need_replication_factors": ordered, **sizes}
