"""Times `decode` beside the other implementations that are installed.

Every peer is first checked against the tests' float64 loop; one that is not installed,
or fails, is a row that says so. All take turns in one run, over the same state bytes
and with the same threads; on a GPU over states that leave the cache, unless `--warm`.
`--defects` tries, on a GPU, what FlashInfer's decode is said to get silently wrong.
Peers are in `peers_cpu.py` and `peers_cuda.py`.
"""

import argparse
import dataclasses
import datetime
import functools as ft
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracle import decode64

from . import bench, machine, peers_cpu, peers_cuda, roofline, timing
from .loops import COMMAND_BUFFERS, DeviceLoop, HostLoop, reference_loop
from .options import output_file, positive, seconds, write_json
from .workload import (
    WEIGHTS,
    Config,
    Inputs,
    Step,
    decode_step,
    on_gpu,
    rows_of,
    split_state,
)

# Where the peers come from.
PACKAGES = ("torch", "transformers", "onnxruntime", "llama-cpp-python", "triton")
PACKAGES += ("flashinfer-python", "nvidia-cutlass-dsl", "fla-core", "lalamo")


class Own:
    """The library, through the same interface as a peer."""

    def __init__(
        self,
        inputs: list[dict[str, np.ndarray]],
        repeats: int = 1,
        implementation: str = "native",
        layout: str = "KV",
        state_dtype: str = "float32",
    ):
        self.layout, self.state_dtype = layout, state_dtype
        pairs = [split_state(self._arrays(x, repeats)) for x in inputs]
        states, rests = [s for s, _ in pairs], [rest for _, rest in pairs]
        step = decode_step(implementation, layout)
        self.once = lambda: jax.jit(step)(states[0], rests[0])[::-1]
        compiled = implementation == "xla"
        self._loop = loop_of(step, states, rests, compiled)
        self.calls = self._loop.calls
        self.run, self.wait = self._loop.run, self._loop.wait

    def _arrays(self, inputs: dict[str, np.ndarray], repeats: int) -> Inputs:
        # What models have, and what the peers on a GPU are given.
        narrow = jnp.bfloat16 if on_gpu() else jnp.float32
        x = {
            n: jnp.asarray(y, None if n in WEIGHTS else narrow)
            for n, y in inputs.items()
        }
        state = inputs["state"]
        state = state.swapaxes(-1, -2) if self.layout == "VK" else state
        x |= {"state": jnp.asarray(state, self.state_dtype)}
        return {n: y if n in WEIGHTS else tiled(y, repeats) for n, y in x.items()}


def tiled(x: jax.Array, repeats: int) -> jax.Array:
    """Returns all rows of x, over and over."""
    return x if repeats == 1 else jnp.tile(x, (repeats, *[1] * (x.ndim - 1)))


def loop_of(
    step: Step, states: list[Any], rests: list[Any], compiled: bool = False
) -> Any:
    if on_gpu():
        if compiled:  # with the options that XLA has for its own
            return reference_loop(step, states, rests)
        return DeviceLoop(step, states, rests, compiler_options=COMMAND_BUFFERS)
    return HostLoop(step, states[:1], rests[:1])


OWN: dict[str, Any] = {
    "jax_gdn native": Own,
    "jax_gdn native, V-major": ft.partial(Own, layout="VK"),
    "jax_gdn reference, donated": ft.partial(Own, implementation="xla"),
}
OWN_ON_GPU: dict[str, Any] = {
    "jax_gdn native, bfloat16": ft.partial(Own, state_dtype="bfloat16"),
    "jax_gdn native, V-major, bfloat16": ft.partial(
        Own, layout="VK", state_dtype="bfloat16"
    ),
}


def pass_loop(inputs: list[dict[str, np.ndarray]], repeats: int, dtype: str) -> Any:
    """Returns in-place passes over the state bytes."""
    states = [tiled(jnp.asarray(x["state"], dtype), repeats) for x in inputs]
    return roofline.loop_of(states)


def numpy_inputs(B: int, seed: int = 0) -> dict[str, np.ndarray]:
    # float32: some peers take nothing else, and every 16-bit value is one.
    arrays = Config(B).arrays(seed)
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def errors_of(make, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns a peer's largest errors against float64, relative to the largest value.

    Raises `ArithmeticError` for more than rounding explains: 1e-4 in float32, 2e-2
    where anything is stored in bfloat16.
    """
    peer = make([inputs])
    # The state as this peer stores it is what float64 must start from.
    layout, dtype = peer.layout, jax.numpy.dtype(peer.state_dtype)
    start = np.asarray(inputs["state"]).astype(dtype).astype(np.float64)
    expected = decode64(**{**inputs, "state": start})
    out, state = (np.asarray(x).astype(np.float64) for x in peer.once())
    state = state.swapaxes(-1, -2) if layout == "VK" else state
    errors = {
        what: float(np.abs(x.reshape(y.shape) - y).max() / np.abs(y).max())
        for what, x, y in zip(("out", "state"), (out, state), expected, strict=True)
    }
    # `out` may be bfloat16 whatever the state is.
    limits = {"out": 2e-2, "state": 1e-4 if dtype.itemsize == 4 else 2e-2}
    if not all(errors[what] <= limits[what] for what in errors):
        raise ArithmeticError(f"wrong: {errors}")
    return errors


def compare(
    B: int, seconds: float, warm: bool, skip: list[str], errors: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns a row a peer; `errors` keeps what was checked for the next B."""
    smallest = "bfloat16" if on_gpu() else "float32"
    sets = bench.sets(Config(B=B, state_dtype=smallest), warm)
    rows, repeats = rows_of(B) if on_gpu() else (B, 1)
    inputs = [numpy_inputs(rows, seed) for seed in range(sets)]
    small = numpy_inputs(3)
    peers = OWN | (OWN_ON_GPU | peers_cuda.PEERS if on_gpu() else peers_cpu.PEERS)
    table, loops = {}, {}
    for name, make in peers.items():
        if any(part in name for part in skip):
            table[name] = {"peer": name, "B": B, "note": "skipped"}
            continue
        try:
            if name not in errors:
                errors[name] = errors_of(make, small)
            table[name] = {"peer": name, "B": B, "error": errors[name]}
            loops[name] = make(inputs, repeats)
            loops[name].run(1)
            loops[name].wait()
        except ImportError as missing:
            table[name] = {"peer": name, "B": B, "note": f"not installed ({missing})"}
        except Exception as failure:  # a peer that fails must not stop the others
            table[name] = {"peer": name, "B": B, "note": f"failed: {failure}"[:200]}
            loops.pop(name, None)
    for dtype in ("float32", "bfloat16") if on_gpu() else ("float32",):
        name = f"in-place pass, {dtype}"
        loops[name] = pass_loop(inputs, repeats, dtype)
        table[name] = {"peer": name, "B": B}
    timings = timing.measure(loops, seconds)
    for name, times in timings.items():
        table[name] |= {n: 1e6 * getattr(times, n) for n in ("median", "low", "high")}
        if native := timings.get("jax_gdn native"):
            table[name]["times_native"] = times.median / native.median
    return list(table.values())


def _line(row: dict[str, Any]) -> str:
    if "median" not in row:
        return f"{row['peer']:34} {row['B']:4}  {row['note']}"
    error = row.get("error")
    checked = f"{error['out']:.1e} / {error['state']:.1e}" if error else ""
    quartiles = f"({row['low']:,.1f} to {row['high']:,.1f})"
    share = f"{row['times_native']:6.2f} x native" if "times_native" in row else ""
    return (
        f"{row['peer']:34} {row['B']:4} {row['median']:11,.1f} us {quartiles:24} "
        f"{share}  {checked}"
    )


def version(package: str) -> str | None:
    """Returns the version of a package that is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch", type=positive, nargs="+", default=[1, 8, 64])
    add("--seconds", type=seconds, default=10.0, help="per batch size")
    add("--warm", action="store_true", help="GPU: one state")
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="PART",
        help="what has this in its name: the reference is slow to compile",
    )
    add("--json", type=output_file)
    add("--defects", action="store_true")


def run(given: argparse.Namespace) -> None:
    if on_gpu():
        roofline.native_module()
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Where the file lies is the reader's affair, and `run` is a function.
        "arguments": {n: x for n, x in vars(given).items() if n not in ("json", "run")},
        "machine": machine.machine(),
        "peers": {name: version(name) for name in PACKAGES},
    }
    if given.defects:
        report["defects"] = [dataclasses.asdict(x) for x in peers_cuda.defects()]
        for defect in report["defects"]:
            print(f"{defect['what']}: {defect['seen']}")
    else:
        threads = machine.cpu_threads()
        print(f"{machine.cpu_name()}, {threads} threads; errors: out / state")
        errors: dict[str, Any] = {}
        report["rows"] = []
        for B in given.batch:
            rows = compare(B, given.seconds, given.warm, given.skip, errors)
            report["rows"] += rows
            print("\n".join(map(_line, rows)), flush=True)
            write_json(report, given.json)
    write_json(report, given.json)
