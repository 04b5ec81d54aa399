"""Meshes of real GPUs: nobody waits, nothing is copied, the bits are those of one."""

import functools as ft

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import test_deferred_transformations as deferred
from tests.cases import Case
from tests.hlo import DEFERRED_TARGET, calls, collectives, copies, state_aliases
from tests.meshes import (
    KINDS,
    assert_same_bits,
    buffers,
    compile_and_run,
    host_arrays,
    label,
    mesh_of,
    specs_of,
    split,
    step,
)


@pytest.fixture
def gpus() -> list[jax.Device]:
    """All CUDA devices; the test is skipped where there are fewer than two."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        devices = []
    if len(devices) < 2:
        pytest.skip(f"needs two CUDA devices, JAX sees {len(devices)}")
    return devices


SHAPES = {
    "rows": lambda n: (n, 1),
    "heads": lambda n: (1, n),
    "both": lambda n: (n // 2, 2),
}
SIZES = {"B": 8, "H": 8, "HV": 16}
CASES = [
    Case(**SIZES),
    Case(**SIZES, T=3),
    Case(**SIZES, T=2, layout="VK", per_channel=True, state="bfloat16"),
]
NAMES = {"float32": "f32", "bfloat16": "bf16"}


def assert_in_place(this: Case, mesh, *functions) -> None:
    text, shard, kept, _ = compile_and_run(this, mesh, specs_of(this), *functions)
    assert collectives(text) == []
    # XLA may peel a loop.
    assert 0 < calls(text) == state_aliases(text)
    assert copies(text, shard, NAMES[this.state]) == 0
    assert kept


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("this", CASES, ids=label)
def test_rows_and_heads_split_in_place(this, shape, kind, gpus):
    mesh = mesh_of(kind, SHAPES[shape](len(gpus)), devices=gpus)
    assert_in_place(this, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_pool_split_over_heads(kind, gpus):
    slots = {"reads": (5, 0, 3, -1, 1, 8, 4, 11), "writes": (5, 2, 3, 6, 1, 9, 4, -1)}
    this = Case(**SIZES, N=11, **slots)
    mesh = mesh_of(kind, (1, len(gpus)), devices=gpus)
    assert_in_place(this, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scan_of_steps(kind, gpus):
    this = CASES[0]

    def scan(state, rest):
        return lax.scan(lambda s, _: step(this)(s, rest), state, length=3)

    mesh = mesh_of(kind, (1, len(gpus)), devices=gpus)
    assert_in_place(this, mesh, scan)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shard_map(kind, gpus):
    this = CASES[0]
    mesh = mesh_of(kind, (len(gpus), 1), devices=gpus)
    specs = specs_of(this)
    state_spec, rest_specs = split({n: specs[n] for n in host_arrays(this)})
    mapped = jax.shard_map(
        step(this),
        mesh=mesh,
        in_specs=(state_spec, rest_specs),
        out_specs=(state_spec, P("b", None, "h")),
    )
    assert_in_place(this, mesh, mapped, step(this))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 3])  # with 4, `out` is as large as a ring of keys
def test_deferred_writes(T, shape, kind, gpus):
    given = deferred.call_of(T, **SIZES, K=128, V=128)
    with jax.default_device(gpus[0]):
        given = jax.device_put(given, gpus[0])
        want = jax.tree.map(np.asarray, jax.jit(deferred.step)(*given))
    mesh = mesh_of(kind, SHAPES[shape](len(gpus)), devices=gpus)
    shardings = jax.tree.map(
        ft.partial(NamedSharding, mesh),
        deferred.specs_of_call("b", "h", "h"),
        is_leaf=lambda x: isinstance(x, P),
    )
    given = jax.device_put(jax.tree.map(np.asarray, given), shardings)
    compiled = jax.jit(deferred.step, donate_argnums=(0, 1)).lower(*given).compile()
    text, updated = compiled.as_text(), jax.tree.leaves(given[:2])
    assert collectives(text) == []
    assert calls(text, DEFERRED_TARGET) == 1
    assert copies(text, given[0].sharding.shard_shape(given[0].shape)) == 0
    where = list(map(buffers, updated))
    got = compiled(*given)
    assert list(map(buffers, jax.tree.leaves(got[1:]))) == where
    assert_same_bits(got, want)
