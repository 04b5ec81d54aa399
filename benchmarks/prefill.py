"""Times `prefill` of one layer: in chunks, and token by token by `decode`.

Both ways, and the one that `prefill` takes by itself, at several lengths and batches,
looped on the device: an output is the next call's value. Milliseconds a call.
"""

import argparse
from typing import Any

import jax
from jax import lax

from jax_gdn import prefill

from . import timing
from .machine import machine
from .options import output_file, positive, seconds, write_json
from .workload import Config, Inputs, model_inputs, split_state

SHAPES = ("1x64", "1x128", "1x256", "1x1024", "1x4096", "1x16384")
SHAPES += ("4x64", "4x256", "4x4096", "8x64", "8x256", "8x4096", "64x64", "64x256")
WAYS: dict[str, dict[str, Any]] = {
    "token by token": {"implementation": "native"},
    "chunks, bf16x6": {"implementation": "xla"},
    "chunks, bf16x3": {"implementation": "xla", "precision": "bf16x3"},
    "chunks, bf16": {"implementation": "xla", "precision": "bf16"},
    "what prefill takes": {},
}


class Prefills:
    """A `benchmarks.loops.Loop` of one way."""

    calls = 2

    def __init__(self, B: int, T: int, options: dict[str, Any]):
        state, rest = split_state(model_inputs(Config(B=B, T=T)))

        def calls(carry: Any, rest: Inputs) -> Any:
            def call(_: Any, carry: Any) -> Any:
                state, v = carry
                v, state = prefill(**rest, v=v, state=state, **options)
                return state, v

            return lax.fori_loop(0, self.calls, call, carry)

        self._carry = state, rest.pop("v")
        self._rest = rest
        self._call = jax.jit(calls, donate_argnums=0)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._carry = self._call(self._carry, self._rest)

    def wait(self) -> None:
        jax.block_until_ready(self._carry)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T, as 1x4096")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="a shape")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine(), "results": []}
    for shape in given.shapes:
        B, T = map(positive, shape.split("x"))
        loops = {way: Prefills(B, T, options) for way, options in WAYS.items()}
        for loop in loops.values():
            loop.run(1)
            loop.wait()
        timings = timing.measure(loops, given.seconds, rounds=given.rounds)
        rows = {way: times.microseconds for way, times in timings.items()}
        results["results"].append({"B": B, "T": T, "rows": rows})
        cells = (f"{way} {x['median_us'] / 1000:.3f} ms" for way, x in rows.items())
        print(f"B = {B}, T = {T}: {', '.join(cells)}", flush=True)
        write_json(results, given.json)
