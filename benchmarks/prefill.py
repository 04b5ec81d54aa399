"""Times `prefill` of one layer: in chunks, and token by token by `decode`.

Both ways, and the one that `prefill` takes by itself, at several lengths and batches,
looped on the device: an output is the next call's value. Milliseconds a call.
"""

import argparse
from typing import Any

from jax import lax

from jax_gdn import prefill

from . import timing
from .loops import Program, compile_all
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


CALLS = 2  # a program's


def prefills(B: int, T: int, options: dict[str, Any]) -> Program:
    """Calls of one way, the output of one the value of the next."""
    state, rest = split_state(model_inputs(Config(B=B, T=T)))
    first = state, rest.pop("v")

    def calls(rest: Inputs, carry: Any) -> Any:
        def call(_: Any, carry: Any) -> Any:
            state, v = carry
            v, state = prefill(**rest, v=v, state=state, **options)
            return state, v

        return lax.fori_loop(0, CALLS, call, carry)

    return Program(calls, rest, [first], CALLS)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T, as 1x4096")
    parser.add_argument("--seconds", type=seconds, default=3.0, help="a shape")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine(), "results": []}
    for shape in given.shapes:
        B, T = map(positive, shape.split("x"))
        loops = {way: prefills(B, T, options) for way, options in WAYS.items()}
        compile_all(loops.values())
        timings = timing.measure(loops, given.seconds, rounds=given.rounds)
        rows = {way: times.microseconds for way, times in timings.items()}
        results["results"].append({"B": B, "T": T, "rows": rows})
        cells = (f"{way} {x['median_us'] / 1000:.3f} ms" for way, x in rows.items())
        print(f"B = {B}, T = {T}: {', '.join(cells)}", flush=True)
        write_json(results, given.json)
