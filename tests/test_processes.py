"""More than one process, and more than one thread."""

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.cases import Case
from tests.meshes import (
    KINDS,
    host_arrays,
    mesh_of,
    on_one_device,
    put,
    specs_of,
    split,
    step,
)

TESTS = Path(__file__).parent
STEPS = 3
CASES = [
    Case(B=4, T=2, H=4, HV=8, K=64, V=32),
    Case(B=4, H=2, HV=8, K=16, V=8, layout="VK", per_channel=True, state="bfloat16"),
]


def steps(case: Case):
    """Returns (state, rest) -> (state, out) after some steps."""

    def call(state, rest):
        for _ in range(STEPS):
            state, out = step(case)(state, rest)
        return state, out

    return call


def digest(x) -> str:
    """Returns few characters that tell arrays apart: a full pipe blocks a process."""
    x = np.asarray(x)
    return f"{x.dtype} {hashlib.sha256(x.tobytes()).hexdigest()}"


# What each of two processes runs: its half of the mesh, its half of the arrays.
WORKER = """
import sys
import jax
address, process = sys.argv[1], int(sys.argv[2])
sys.path.append(sys.argv[4])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=process)
from tests.hlo import collectives, state_aliases
from jax.sharding import AxisType, NamedSharding
from tests.meshes import host_arrays, mesh_of, specs_of, split
from tests.test_processes import CASES, STEPS, digest, steps

assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
for case in CASES:
    mesh = mesh_of(AxisType[sys.argv[3]], devices=jax.devices())
    arrays = {}
    for name, x in host_arrays(case).items():
        spec = specs_of(case, key_heads=None)[name]
        place = NamedSharding(mesh, spec)
        arrays[name] = jax.make_array_from_callback(x.shape, place, lambda i: x[i])
    state, rest = split(arrays)
    compiled = jax.jit(steps(case), donate_argnums=0).lower(state, rest).compile()
    text = compiled.as_text()
    assert collectives(text) == [], collectives(text)
    assert state_aliases(text) == STEPS
    for result in compiled(state, rest):
        for shard in result.addressable_shards:
            print("shard", shard.index, digest(shard.data))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def shards_of_two_processes(kind: AxisType) -> list[str]:
    address = f"localhost:{free_port()}"
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with contextlib.ExitStack() as stack:
        workers = []
        for i in range(2):
            command = [sys.executable, "-c", WORKER, address, str(i), kind.name]
            command.append(str(TESTS.parent))
            pipe = subprocess.PIPE
            worker = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=TESTS
            )
            workers.append(stack.enter_context(worker))
            stack.callback(worker.kill)
        lines = []
        for worker in workers:
            out, err = worker.communicate(timeout=60)
            assert worker.returncode == 0, err
            lines += [x for x in out.split("\n") if x.startswith("shard")]
    return lines


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_processes_equal_one(kind):
    """Four devices each, one mesh over both: rows in "b" are split between them."""
    want = []
    for case in CASES:
        results = on_one_device(steps(case), *split(host_arrays(case)))
        arrays = put(host_arrays(case), mesh_of(kind), specs_of(case, key_heads=None))
        for result, sharded in zip(
            results, [arrays["state"], arrays["v"]], strict=True
        ):
            want += [
                f"shard {shard.index} {digest(result[shard.index])}"
                for shard in sharded.addressable_shards
            ]
    assert sorted(shards_of_two_processes(kind)) == sorted(want)


def test_threads():
    """Eight threads, each with its own state, 1000 calls each, all exact."""
    # Enough state for every call to be spread over XLA's threads.
    case, calls = Case(B=2, T=2, H=2, HV=4, K=128, V=64), 1000
    call = jax.jit(step(case), donate_argnums=0)
    first, rest = split(jax.device_put(host_arrays(case), jax.devices("cpu")[0]))
    starts = [jnp.asarray(np.roll(np.asarray(first), i, axis=1)) for i in range(8)]

    def decode(state):
        outs = []
        state = jnp.array(state)
        for _ in range(calls):
            state, out = call(state, rest)
            outs.append(out)
        return np.asarray(state), np.stack(outs)

    want = [decode(state) for state in starts]
    got: list = [None] * len(starts)
    ready = threading.Barrier(len(starts))

    def run(i: int) -> None:
        ready.wait()
        got[i] = decode(starts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(starts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, alone in zip(got, want, strict=True):
        assert results is not None
        for x, y in zip(results, alone, strict=True):
            np.testing.assert_array_equal(x, y)
