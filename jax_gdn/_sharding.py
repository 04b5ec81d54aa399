"""Meshes: every device works on its own shard, and none waits for another.

Sequences and value heads do not know of each other. So one choice of mesh axes for B
and for HV, taken from the state's sharding, is imposed on all operands, and the state
stays where it is. A device that holds only some value heads of a key head has that key
head whole. Where types say how arrays are sharded (Explicit axes) the call becomes a
`shard_map`; where XLA decides (Auto axes), a `custom_partitioning`, which on one
device JAX lowers to the plain call.
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

from jax_gdn._primitive import Settings, native

Call = Callable[..., list[Array]]
Shards = Mapping[str, tuple[str, ...]]  # the mesh axes that split an axis
Sizes = Mapping[str, int]  # of mesh axes


def _axes(settings: Settings, name: str) -> list[str]:
    """Returns the axes of an operand, or of the results, `out` and `new_state`."""
    operand = {"out": "v", "new_state": "state"}.get(name, name)
    axes = settings.axes[settings.index(operand)]
    mapped = [f"E{i}" for i in range(settings.mapped)]
    return [*mapped, *axes] if axes[0] in ("B", "N") else list(axes)


def _names(spec: Iterable[Any]) -> list[str]:
    """Returns all mesh axes that a spec names."""
    return [
        name
        for names in spec
        for name in ((names,) if isinstance(names, str) else names or ())
    ]


def _divides(names: Iterable[str], sizes: Sizes, size: int) -> bool:
    return size % math.prod(sizes[name] for name in names) == 0


def _choose_shards(
    settings: Settings, sizes: Sizes, arrays: Iterable[tuple[str, Any]]
) -> Shards:
    """Returns how axes are split: as by the first array, then what others can add."""
    # Any row of a pool may write any slot, so neither B nor N is split.
    free = {f"E{i}" for i in range(settings.mapped)} | {"HV"}
    free |= set() if settings.has_pool else {"B"}
    shards: dict[str, tuple[str, ...]] = {}
    for name, x in arrays:
        axes = _axes(settings, name)
        for axis, size, entry in zip(axes, x.shape, x.sharding.spec, strict=False):
            names = tuple(_names([entry]))
            taken = any(set(names) & set(others) for others in shards.values())
            fits = names and not taken and _divides(names, sizes, size)
            if fits and axis in free - shards.keys():
                shards[axis] = names
    return shards


def _key_head_shards(shards: Shards, sizes: Sizes, H: int) -> tuple[str, ...]:
    """Returns those of the mesh axes that split HV that split H too: the first ones."""
    names = shards.get("HV", ())
    while not _divides(names, sizes, H):
        names = names[:-1]
    return names


def _specs(
    settings: Settings, sizes: Sizes, shards: Shards, H: int
) -> list[PartitionSpec]:
    """Returns the specs of all operands, then of both results."""
    split = {**shards, "H": _key_head_shards(shards, sizes, H)}
    return [
        PartitionSpec(*(split.get(axis) or None for axis in _axes(settings, name)))
        for name in (*settings.operands, "out", "new_state")
    ]


def _on_shard(
    settings: Settings, call: Call, sizes: Sizes, shards: Shards, H: int
) -> Call:
    """Returns the call on one device's shards."""
    of_keys = _key_head_shards(shards, sizes, H)
    of_groups = shards.get("HV", ())[len(of_keys) :]
    if not of_groups:
        return ft.partial(call, settings)

    def with_own_key_heads(*operands: Array) -> list[Array]:
        own = list(operands)
        HV = operands[settings.index("v")].shape[-2]
        group = HV * math.prod(sizes[name] for name in shards["HV"]) // H
        heads = (lax.axis_index(of_groups) * HV + jnp.arange(HV)) // group
        for i in (settings.index("q"), settings.index("k")):
            own[i] = operands[i].at[..., heads, :].get(mode="promise_in_bounds")
        return call(settings, *own)

    return with_own_key_heads


def on_mesh(settings: Settings, call: Call, *operands: Array) -> list[Array]:
    """Runs a call on every device's shard, where the types say what that is."""
    types = dict(zip(settings.operands, map(jax.typeof, operands), strict=True))
    state = types["state"]
    mesh = state.sharding.mesh
    # Types name Explicit axes only.
    named = {name for x in types.values() for name in _names(x.sharding.spec)}
    if not named:
        return call(settings, *operands)
    H, sizes = types["q"].shape[-2], dict(mesh.shape)
    # The state alone decides: it has to come back as it was, and the rest is small.
    shards = _choose_shards(settings, sizes, [("state", state)])
    specs = _specs(settings, sizes, shards, H)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    operands = tuple(map(jax.sharding.reshard, operands, shardings))
    if AxisType.Auto in mesh.axis_types:
        # XLA has a say too: let it split the axes of both kinds.
        auto: Any = jax.sharding.auto_axes(
            ft.partial(call, settings), axes=tuple(named), out_sharding=shardings[-2:]
        )
        out, new_state = auto(*operands)
    else:
        out, new_state = jax.shard_map(
            _on_shard(settings, call, sizes, shards, H),
            mesh=mesh,
            in_specs=tuple(specs[:-2]),
            out_specs=specs[-2:],
            # By default all that a vmap has not taken away.
            axis_names=named if mesh.manual_axes else set(),
        )(*operands)
    # A state that was split otherwise (over K, say) goes back to how it was.
    return [out, jax.sharding.reshard(new_state, state.sharding)]


def partitioned(settings: Settings, *operands: Array) -> list[Array]:
    """Stages the native call so that XLA gives every device its shard of it."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto and mesh.shape[name] > 1
    ]
    if mesh.manual_axes and auto:
        raise NotImplementedError(
            "jax_gdn.decode: inside jax.shard_map the native call needs all axes of "
            f"the mesh to be manual; got {auto} that are not. Wrap the call in "
            f"another jax.shard_map(..., axis_names={set(auto)})."
        )
    if mesh.manual_axes:
        return native(settings, *operands)
    # Not `static_argnums`, whose closures JAX's leak checker takes for leaks.
    call = custom_partitioning(ft.partial(native, settings))
    call.def_partition(
        ft.partial(_partition, settings, mesh),
        sharding_rule=ft.partial(_sharding_rule, settings),
    )
    return call(*operands)


def _with_names(mesh: Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the array's type with a sharding that names axes of the mesh."""
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


def _partition(settings: Settings, context, mesh, operands, results):
    """Says what every device holds and does; called by XLA's partitioner."""
    if mesh.empty:
        # JAX hands over a mesh where an argument or a result has one; else there may
        # be one in the context, whose shardings have lost their names.
        of_state = results[1].sharding.devices_indices_map(results[1].shape)
        devices = np.array(list(of_state))
        if context.empty:
            mesh = Mesh(devices, ("devices",))
        else:
            mesh = Mesh(devices.reshape(context.axis_sizes), context.axis_names)
    arrays = dict(zip(settings.operands, operands, strict=True))
    H, sizes = arrays["q"].shape[-2], dict(mesh.shape)
    given = {"new_state": results[1], "state": arrays["state"], "v": arrays["v"]}
    named = [(name, _with_names(mesh, x)) for name, x in given.items()]
    shards = _choose_shards(settings, sizes, named)
    shardings = [
        NamedSharding(mesh, spec) for spec in _specs(settings, sizes, shards, H)
    ]
    call = _on_shard(settings, native, sizes, shards, H)
    return mesh, call, shardings[-2:], tuple(shardings[:-2])


def _sharding_rule(settings: Settings, mesh, operands, results):
    """Says which axes are split alike, for shardings to spread through the call."""
    q, v = (settings.index(name) for name in ("q", "v"))
    H, HV = operands[q].shape[-2], operands[v].shape[-2]
    sizes: dict[str, Any] = {}
    heads = "h" if H == HV else "(h g)"
    if any(H % size for size in mesh.shape.values()):
        heads = "j"  # Not all splits of HV are splits of H, so they say nothing of it.
    elif H != HV:
        sizes["g"] = HV // H

    def factors(name: str) -> str:
        axes = _axes(settings, name)
        return " ".join(heads if axis == "HV" else axis.lower() for axis in axes)

    rule = "{} -> {}".format(
        ", ".join(map(factors, settings.operands)),
        ", ".join(map(factors, ("out", "new_state"))),
    )
    whole = {"t", "k", "v"} | ({"b", "n"} if settings.has_pool else set())
    # In the order in which the rule names them first.
    ordered = [
        name for name in dict.fromkeys(re.findall(r"\w+", rule)) if name in whole
    ]
    return rule, {"need_replication_factors": tuple(ordered), **sizes}
