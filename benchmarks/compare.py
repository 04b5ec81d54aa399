"""Times `decode` beside the other implementations that are installed.

    python benchmarks/compare.py [--batch B ...] [--seconds S] [--warm]
                                 [--skip PART ...] [--json FILE]
    python benchmarks/compare.py --defects

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
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_gdn import _bench, _bench_machine, _bench_report, _bench_run
from jax_gdn.cli import positive

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import peers_cpu
import peers_cuda
from oracle import decode64

ON_GPU = _bench.on_gpu()
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
        pairs = [_bench.split_state(self._arrays(x, repeats)) for x in inputs]
        states, rests = [s for s, _ in pairs], [rest for _, rest in pairs]
        step = _bench.decode_step(implementation, layout)
        self.once = lambda: jax.jit(step)(states[0], rests[0])[::-1]
        compiled = implementation == "xla"
        self._chain = chain_of(step, states, rests, compiled)
        self.calls = self._chain.calls
        self.run, self.wait = self._chain.run, self._chain.wait

    def _arrays(self, inputs: dict[str, np.ndarray], repeats: int) -> _bench.Inputs:
        # What models have, and what the peers on a GPU are given.
        wide = ("A_log", "dt_bias")
        narrow = jnp.bfloat16 if ON_GPU else jnp.float32
        x = {
            n: jnp.asarray(y, None if n in wide else narrow) for n, y in inputs.items()
        }
        state = inputs["state"]
        state = state.swapaxes(-1, -2) if self.layout == "VK" else state
        x |= {"state": jnp.asarray(state, self.state_dtype)}
        return {n: y if n in wide else tiled(y, repeats) for n, y in x.items()}


def tiled(x: jax.Array, repeats: int) -> jax.Array:
    """Returns all rows of x, over and over."""
    return x if repeats == 1 else jnp.tile(x, (repeats, *[1] * (x.ndim - 1)))


def chain_of(
    step: _bench.Step, states: list[Any], rests: list[Any], compiled: bool = False
) -> Any:
    if ON_GPU:
        if compiled:  # with the options that XLA has for its own
            return _bench_run.compiled_chain(step, states, rests)
        return _bench.DeviceChain(
            step, states, rests, compiler_options=_bench.COMMAND_BUFFERS
        )
    return _bench.SteppedChain(step, states[:1], rests[:1])


OWN: dict[str, Any] = {
    "jax_gdn native": Own,
    "jax_gdn native, V-major": ft.partial(Own, layout="VK"),
    "jax_gdn XLA form, donated": ft.partial(Own, implementation="xla"),
}
OWN_ON_GPU: dict[str, Any] = {
    "jax_gdn native, bfloat16": ft.partial(Own, state_dtype="bfloat16"),
    "jax_gdn native, V-major, bfloat16": ft.partial(
        Own, layout="VK", state_dtype="bfloat16"
    ),
}


def limit(inputs: list[dict[str, np.ndarray]], repeats: int, dtype: str) -> Any:
    """Returns an in-place pass over the state bytes."""
    states = [tiled(jnp.asarray(x["state"], dtype), repeats) for x in inputs]
    if ON_GPU:
        return _bench_run.best_pass(states)
    return chain_of(_bench.in_place_pass, states, [{}])


def numpy_inputs(B: int, seed: int = 0) -> dict[str, np.ndarray]:
    # float32: some peers take nothing else, and every 16-bit value is one.
    inputs = _bench.model_inputs(_bench.Config(B=B), seed)
    return {name: np.asarray(x).astype(np.float32) for name, x in inputs.items()}


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
    smallest = "bfloat16" if ON_GPU else "float32"
    sets = _bench_run.sets(_bench.Config(B=B, state_dtype=smallest), warm)
    rows, repeats = _bench_run.rows_of(B) if ON_GPU else (B, 1)
    inputs = [numpy_inputs(rows, seed) for seed in range(sets)]
    small = numpy_inputs(3)
    peers = OWN | (OWN_ON_GPU | peers_cuda.PEERS if ON_GPU else peers_cpu.PEERS)
    table, chains = {}, {}
    for name, make in peers.items():
        if any(part in name for part in skip):
            table[name] = {"peer": name, "B": B, "note": "skipped"}
            continue
        try:
            if name not in errors:
                errors[name] = errors_of(make, small)
            table[name] = {"peer": name, "B": B, "error": errors[name]}
            chains[name] = make(inputs, repeats)
            chains[name].run(1)
            chains[name].wait()
        except ImportError as missing:
            table[name] = {"peer": name, "B": B, "note": f"not installed ({missing})"}
        except Exception as failure:  # a peer that fails must not stop the others
            table[name] = {"peer": name, "B": B, "note": f"failed: {failure}"[:200]}
            chains.pop(name, None)
    for dtype in ("float32", "bfloat16") if ON_GPU else ("float32",):
        name = f"in-place pass, {dtype}"
        chains[name] = limit(inputs, repeats, dtype)
        table[name] = {"peer": name, "B": B}
    timings = _bench.measure(chains, seconds)
    for name, timing in timings.items():
        table[name] |= {n: 1e6 * getattr(timing, n) for n in ("median", "low", "high")}
        if native := timings.get("jax_gdn native"):
            table[name]["times_native"] = timing.median / native.median
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="per batch size")
    parser.add_argument("--warm", action="store_true", help="GPU: one state")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="PART",
        help="what has this in its name: programs of XLA's are slow to compile",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--defects", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Where the file lies is the reader's affair.
        "arguments": {n: x for n, x in vars(arguments).items() if n != "json"},
        "machine": _bench_machine.machine(),
        "peers": {name: version(name) for name in PACKAGES},
    }
    if arguments.defects:
        report["defects"] = [dataclasses.asdict(x) for x in peers_cuda.defects()]
        for defect in report["defects"]:
            print(f"{defect['what']}: {defect['seen']}")
    else:
        threads = len(os.sched_getaffinity(0))
        print(f"{_bench_machine.cpu_name()}, {threads} threads; errors: out / state")
        timed = ft.partial(
            compare,
            seconds=arguments.seconds,
            warm=arguments.warm,
            skip=arguments.skip,
            errors={},
        )
        report["rows"] = []
        for B in arguments.batch:
            report["rows"] += (rows := timed(B))
            print("\n".join(map(_line, rows)), flush=True)
            write(report, arguments.json)
    write(report, arguments.json)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path:
        _bench_report.write_json(report, path)


if __name__ == "__main__":
    main()
