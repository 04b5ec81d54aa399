"""Calls on a mesh of b x h devices: rows over "b", heads over "h"."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gdn
from tests.cases import Case

KINDS = (AxisType.Auto, AxisType.Explicit)
ROWS = {"q": "H", "k": "H", "v": "HV", "a": "HV", "b": "HV", "output": "HV"}


def mesh_of(kind: AxisType, shape=(2, 4), names=("b", "h"), devices=None) -> Mesh:
    devices = jax.devices("cpu") if devices is None else devices
    return Mesh(np.array(devices).reshape(shape), names, (kind,) * len(names))


def specs_of(case: Case, b="b", h="h", key_heads="h", state=None) -> dict[str, P]:
    """Returns a spec for each argument; `state` overrides that of the state."""
    heads = {"H": key_heads, "HV": h}
    specs = {name: P(b, None, heads[axis]) for name, axis in ROWS.items()}
    rows = None if case.N is not None else b
    specs |= {"state": P(rows, h) if state is None else state}
    specs |= {"A_log": P(h), "dt_bias": P(h)}
    return specs | {"state_indices": P(b), "output_state_indices": P(b)}


def host_arrays(case: Case) -> dict[str, np.ndarray]:
    return case.inputs() | case.slots


def label(parameter) -> str:
    """Returns the name of a test's parameter."""
    return parameter.id if isinstance(parameter, Case) else str(parameter)


def split(arrays) -> tuple:
    """Returns the state, and the rest by name: what a step takes."""
    rest = dict(arrays)
    return rest.pop("state"), rest


def put(arrays, mesh: Mesh, specs: dict[str, P]) -> dict[str, jax.Array]:
    # Copies: memory that NumPy owns cannot be donated.
    return {
        name: jax.device_put(jnp.array(x), NamedSharding(mesh, specs[name]))
        for name, x in arrays.items()
    }


def step(case: Case, **settings):
    """Returns (state, rest) -> (state, out), to be jitted."""

    def call(state, rest):
        out, state = jax_gdn.decode(state=state, **rest, **case.settings, **settings)
        return state, out

    return call


def on_one_device(function, *arguments, device=None):
    """Returns what a function returns where nothing is sharded."""
    with jax.default_device(device or jax.devices("cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def buffers(x: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def compile_and_run(
    case: Case, mesh: Mesh, specs: dict[str, P], function=None, alone=None
):
    """Compiles a donating step, checks its results against one device of the mesh.

    `alone` is what runs there, where the function names a mesh. Returns the HLO, the
    shape of a device's state, whether it stayed in its buffers, and the results.
    """
    function = function or step(case)
    arrays = host_arrays(case)
    first = mesh.devices.flat[0]
    want = on_one_device(alone or function, *split(arrays), device=first)
    state, rest = split(put(arrays, mesh, specs))
    compiled = jax.jit(function, donate_argnums=0).lower(state, rest).compile()
    where = buffers(state)
    got = compiled(state, rest)
    assert_same_bits(got, want)
    shard = got[0].sharding.shard_shape(got[0].shape)
    return compiled.as_text(), shard, buffers(got[0]) == where, got


def assert_same_bits(got, want) -> None:
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
