"""Meshes: every device works on its own shard, and none waits for another.

Sequences and value heads do not know of each other. So one choice of mesh axes for B
and for HV, taken from the state's sharding, is imposed on all operands, and the state
stays where it is. A device that holds only some value heads of a key head has that key
head whole. Here is what both kinds of mesh axes have in common; see _explicit_mesh.py
and _auto_mesh.py.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jax_gdn._operands import Operands, Results, Settings

Call = Callable[[Settings, Operands], Results]
Shards = Mapping[str, tuple[str, ...]]  # the mesh axes that split an axis
Sizes = Mapping[str, int]  # of mesh axes


def axes_with_batch_dims(settings: Settings, name: str) -> list[str]:
    """Returns the axes of an operand, or of the results, `out` and `new_state`."""
    operand = {"out": "v", "new_state": "state"}.get(name, name)
    axes = getattr(settings.axes, operand)
    batch = [f"E{i}" for i in range(settings.num_batch_dims)]
    return [*batch, *axes] if axes[0] in ("B", "N") else list(axes)


def mesh_axes_of(spec: Iterable[Any]) -> list[str]:
    """Returns all mesh axes that a spec names."""
    return [
        name
        for names in spec
        for name in ((names,) if isinstance(names, str) else names or ())
    ]


def _divides(names: Iterable[str], sizes: Sizes, size: int) -> bool:
    return size % math.prod(sizes[name] for name in names) == 0


def choose_shards(
    settings: Settings, sizes: Sizes, arrays: Iterable[tuple[str, Any]]
) -> Shards:
    """Returns how axes are split: as by the first array, then what others can add."""
    # Any row of a pool may write any slot, so neither B nor N is split.
    free = {f"E{i}" for i in range(settings.num_batch_dims)} | {"HV"}
    free |= set() if settings.has_pool else {"B"}
    shards: dict[str, tuple[str, ...]] = {}
    for name, x in arrays:
        axes = axes_with_batch_dims(settings, name)
        for axis, size, entry in zip(axes, x.shape, x.sharding.spec, strict=False):
            names = tuple(mesh_axes_of([entry]))
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


def specs_of(
    settings: Settings, sizes: Sizes, shards: Shards, H: int
) -> tuple[Operands, Results]:
    """Returns the specs of all operands, and of both results."""
    split = {**shards, "H": _key_head_shards(shards, sizes, H)}

    def spec(name: str) -> PartitionSpec:
        axes = axes_with_batch_dims(settings, name)
        return PartitionSpec(*(split.get(axis) or None for axis in axes))

    there = settings.axes._asdict().items()
    operands = Operands(*(axes and spec(name) for name, axes in there))
    return operands, Results(spec("out"), spec("new_state"))


def on_shard(
    settings: Settings, call: Call, sizes: Sizes, shards: Shards, H: int
) -> Callable[[Operands], Results]:
    """Returns the call on one device's shards."""
    of_keys = _key_head_shards(shards, sizes, H)
    of_groups = shards.get("HV", ())[len(of_keys) :]

    def on_shard(operands: Operands) -> Results:
        if of_groups:
            HV = operands.v.shape[-2]
            group = HV * math.prod(sizes[name] for name in shards["HV"]) // H
            heads = (lax.axis_index(of_groups) * HV + jnp.arange(HV)) // group
            q, k = (
                x.at[..., heads, :].get(mode="promise_in_bounds")
                for x in (operands.q, operands.k)
            )
            operands = operands._replace(q=q, k=k)
        return call(settings, operands)

    return on_shard
