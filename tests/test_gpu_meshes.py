"""Meshes of real GPUs: nobody waits, nothing is copied, the bits are those of one."""

import jax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.cases import Case
from tests.hlo import calls, collectives, copies, state_aliases
from tests.meshes import (
    KINDS,
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
