"""Times `decode` beside the other implementations that are installed.

    python benchmarks/compare.py [--batch B ...] [--seconds S] [--json FILE]
    python benchmarks/compare.py --defects

Every peer is first checked against the tests' float64 loop; one that is not installed,
or fails, is a row that says so. All take turns in one run, over the same state bytes
and with the same threads. `--defects` tries, on a GPU, what FlashInfer's decode is said
to get silently wrong. Peers are in `peers_cpu.py` and `peers_cuda.py`.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_gdn import _bench, _bench_machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))
import peers_cpu
import peers_cuda
from oracle import decode64

ON_GPU = jax.devices()[0].platform == "gpu"


class Own:
    """The library, through the same interface as a peer."""

    layout, state_dtype, calls = "KV", "float32", 1

    def __init__(self, inputs: dict[str, np.ndarray], implementation: str):
        state, rest = _bench.split_state(jax.tree.map(jax.numpy.asarray, inputs))
        step = _bench.decode_step(implementation)
        self._chain = _bench.SteppedChain(step, [state], [rest])
        self.run, self.wait = self._chain.run, self._chain.wait

    def result(self) -> tuple[Any, Any]:
        return self._chain.result()


def native(inputs: dict[str, np.ndarray]) -> Own:
    return Own(inputs, "native")


def xla(inputs: dict[str, np.ndarray]) -> Own:
    return Own(inputs, "xla")


class Limit:
    """An in-place pass over the state bytes."""

    calls = 1

    def __init__(self, inputs: dict[str, np.ndarray]):
        state = jax.numpy.asarray(inputs["state"])
        chain = _bench.SteppedChain(_bench.in_place_pass, [state], [{}])
        self.run, self.wait = chain.run, chain.wait


def numpy_inputs(B: int) -> dict[str, np.ndarray]:
    # float32: some peers take nothing else, and every 16-bit value is one.
    inputs = _bench.model_inputs(_bench.Config(B=B))
    return {name: np.asarray(x).astype(np.float32) for name, x in inputs.items()}


def errors_of(make, inputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns a peer's largest errors against float64, relative to the largest value.

    Raises `ArithmeticError` for more than rounding explains: 1e-4 in float32, 2e-2
    where anything is stored in bfloat16.
    """
    peer = make(inputs)
    # The state as this peer stores it is what float64 must start from.
    layout, dtype = peer.layout, jax.numpy.dtype(peer.state_dtype)
    start = np.asarray(inputs["state"]).astype(dtype).astype(np.float64)
    expected = decode64(**{**inputs, "state": start})
    peer.run(1)
    peer.wait()
    out, state = (np.asarray(x).astype(np.float64) for x in peer.result())
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


def compare(B: int, seconds: float) -> list[dict[str, Any]]:
    inputs, small = numpy_inputs(B), numpy_inputs(3)
    peers = {"jax_gdn native": native, "jax_gdn XLA form, donated": xla}
    peers |= peers_cuda.PEERS if ON_GPU else peers_cpu.PEERS
    rows, chains = {}, {}
    for name, make in peers.items():
        try:
            rows[name] = {"peer": name, "B": B, "error": errors_of(make, small)}
            chains[name] = make(inputs)
        except ImportError as missing:
            rows[name] = {"peer": name, "B": B, "note": f"not installed ({missing})"}
        except Exception as failure:  # a peer that fails must not stop the others
            rows[name] = {"peer": name, "B": B, "note": f"failed: {failure}"[:200]}
    chains["in-place pass"] = Limit(inputs)
    rows["in-place pass"] = {"peer": "in-place pass", "B": B}
    timings = _bench.measure(chains, seconds)
    for name, timing in timings.items():
        rows[name] |= {n: 1e6 * getattr(timing, n) for n in ("median", "low", "high")}
        rows[name]["times_native"] = timing.median / timings["jax_gdn native"].median
    return list(rows.values())


def _line(row: dict[str, Any]) -> str:
    if "median" not in row:
        return f"{row['peer']:28} {row['B']:4}  {row['note']}"
    error = row.get("error")
    checked = f"{error['out']:.1e} / {error['state']:.1e}" if error else ""
    quartiles = f"({row['low']:,.1f} to {row['high']:,.1f})"
    return (
        f"{row['peer']:28} {row['B']:4} {row['median']:11,.1f} us {quartiles:24} "
        f"{row['times_native']:6.2f} x native  {checked}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=10.0, help="per batch size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--defects", action="store_true")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": _bench_machine.machine()}
    if arguments.defects:
        report["defects"] = [dataclasses.asdict(x) for x in peers_cuda.defects()]
        for defect in report["defects"]:
            print(f"{defect['what']}: {defect['seen']}")
    else:
        threads = len(os.sched_getaffinity(0))
        print(f"{_bench_machine.cpu_name()}, {threads} threads; errors: out / state")
        report["rows"] = []
        for B in arguments.batch:
            report["rows"] += (rows := compare(B, arguments.seconds))
            print("\n".join(map(_line, rows)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
