"""`jax-gdn bench`: what is timed, and in which order."""

import argparse
import dataclasses
import datetime
import functools as ft
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jax_gdn import _bench, _bench_machine, _bench_report, _registration
from jax_gdn._bench import Config, DeviceChain, SteppedChain, Timing

BATCHES = (1, 8, 64)
FULL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Qwen3-Next and its relatives; 2/8 is one rank of eight.
SHAPES = {"16/32": (16, 32), "16/48": (16, 48), "16/64": (16, 64), "2/8": (2, 8)}
ROUNDS = 15
# The L2 caches of the GPUs that there are kernels for have 50 to 60 MB. Of 128 MB in
# turn they still keep a part, and some loads are 2 to 4 % faster; of 512 MB nothing.
COLD_BYTES = 512 * 2**20
# In a loop, which is compiled with a call for each. At B = 1 that is less: 256 MB with
# float32, 128 MB with bfloat16.
MOST_SETS = 128
XLA_STATES = 2
# Random rows that a large batch on a GPU may consist of, over and over: making all of
# it on the host takes longer than everything else.
ROWS = 8
# A state for each of the chains and passes, and what the XLA form holds beside its own.
STATES_HELD = 14


def add_options(parser: argparse.ArgumentParser, positive: Callable) -> None:
    add = parser.add_argument
    batches = parser.add_mutually_exclusive_group()
    batches.add_argument(
        "--batch", type=positive, nargs="+", default=BATCHES, help="sequences (1 8 64)"
    )
    batches.add_argument(
        "--full",
        action="store_const",
        dest="batch",
        const=FULL_BATCHES,
        help="every power of two up to 512",
    )
    add("--shape", nargs="+", choices=SHAPES, default=["16/32"], help="H/HV (16/32)")
    add(
        "--state-dtype",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["float32"],
        help="(float32)",
    )
    add("--layout", nargs="+", choices=("KV", "VK"), default=["KV"], help="(KV)")
    add("--tokens", type=positive, nargs="+", default=[1], help="T (1)")
    add("--seconds", type=_seconds, default=5.0, help="per configuration (5)")
    add("--warm", action="store_true", help="GPU: one state, left in the cache")
    add("--json", type=Path, metavar="FILE", help="write everything there is")
    add("--plot", type=Path, metavar="FILE.png", help="time and percent of the limit")
    add("--readme", type=Path, metavar="FILE", help="write the table between markers")


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    # What can fail fails before minutes of timing, not after.
    _bench_report.require("rich", *(["matplotlib"] if arguments.plot else []))
    _bench_report.check_files(arguments.json, arguments.plot, arguments.readme)
    from rich.console import Console
    from rich.progress import Progress

    configs, skipped = _fitting(
        _configs(arguments), arguments.warm, _bench_machine.free_bytes()
    )
    if not configs:
        raise ValueError("jax-gdn bench: nothing to time; " + "; ".join(skipped))
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": arguments.seconds,
        "cache": _cache(arguments.warm),
        "results": [],
        "skipped": skipped,
    }
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=(len(configs) + 1) * ROUNDS)

        def after_round() -> None:
            progress.advance(task)

        progress.update(task, description="overhead")
        report["overhead"] = _overhead(arguments.seconds, after_round)
        for config in configs:
            progress.update(task, description=f"{config.family}, B {config.B}")
            report["results"].append(
                measure_config(config, arguments.seconds, arguments.warm, after_round)
            )
            # What is measured so far, and the clocks that the machine then has.
            report["machine"] = _bench_machine.machine()
            if arguments.json:
                _bench_report.write_json(report, arguments.json)
    # A file or a pipe has no width; rich would take 80.
    console = Console(width=None if sys.stdout.isatty() else 120)
    _bench_report.print_table(report, console)
    for line in skipped:
        console.print(line, highlight=False)
    if arguments.plot:
        _bench_report.write_plot(report, arguments.plot)
    if arguments.readme:
        _bench_report.write_readme(report, arguments.readme)
    return 0


def _configs(arguments: argparse.Namespace) -> list[Config]:
    return [
        Config(B, *SHAPES[shape], T=T, state_dtype=dtype, layout=layout)
        for shape in arguments.shape
        for T in arguments.tokens
        for dtype, layout in itertools.product(arguments.state_dtype, arguments.layout)
        for B in sorted(set(arguments.batch))
    ]


def _fitting(
    configs: list[Config], warm: bool, free: int | None
) -> tuple[list[Config], list[str]]:
    """Splits off what memory has no room for, each with a line that says so."""
    fitting, skipped = [], []
    for config in configs:
        needed = config.state_bytes * STATES_HELD * sets(config, warm)
        if free is not None and needed > free:
            skipped.append(
                f"{config.family}, B {config.B} skipped: needs {needed / 2**30:.1f} "
                f"GiB, {free / 2**30:.1f} GiB are free"
            )
        else:
            fitting.append(config)
    return fitting, skipped


def _cache(warm: bool) -> str:
    if not _bench.on_gpu():
        return "one state, whatever of it the caches hold"
    return "one state, warm L2" if warm else "states larger than L2, in turn"


def sets(config: Config, warm: bool) -> int:
    """How many states take turns, so that little of one is cached when it is next."""
    return 1 if warm or not _bench.on_gpu() else min(cold_sets(config), MOST_SETS)


def rows_of(B: int) -> tuple[int, int]:
    """Returns of how many rows B sequences on a GPU consist, and how often of each."""
    rows = ROWS if B % ROWS == 0 else B
    return rows, B // rows


def cold_sets(config: Config) -> int:
    return max(2, math.ceil(COLD_BYTES / config.state_bytes))


def _chains(config: Config, inputs: list[_bench.Inputs]) -> dict[str, Any]:
    pairs = [_bench.split_state(x) for x in inputs]
    rests = [rest for _, rest in pairs]
    native = _bench.decode_step("native", config.layout)
    xla = _bench.decode_step("xla", config.layout)
    if not _bench.on_gpu():
        states = [pairs[0][0]]
        return {
            "native": SteppedChain(native, states, rests),
            "XLA donated": SteppedChain(xla, states, rests),
            "XLA not donated": SteppedChain(xla, states, rests, donate=False),
            "limit": SteppedChain(_bench.in_place_pass, states, [{}]),
        }
    states = [state for state, _ in pairs]
    under_graphs = ft.partial(
        DeviceChain, states=states, compiler_options=_bench.COMMAND_BUFFERS
    )
    return {
        "native": under_graphs(native, rests=rests),
        "native, stepped from Python": SteppedChain(
            native, states, rests, compiler_options=_bench.COMMAND_BUFFERS
        ),
        "XLA donated": compiled_chain(xla, states, rests),
        "XLA not donated": compiled_chain(xla, states, rests, donate=False),
        "limit": best_pass(states),
    }


def compiled_chain(
    step: _bench.Step, states: list[Any], rests: list[Any], **options: Any
) -> DeviceChain:
    """Returns a chain of a step that XLA compiles itself, anew for each of its calls.

    That takes it many seconds, so there are two calls, over two states. Where those
    stay in the L2 cache, that is to the step's advantage.
    """
    few = states[:XLA_STATES], rests[:XLA_STATES]
    return DeviceChain(step, *few, in_a_row=1, **options)


def best_pass(states: list[jax.Array]) -> DeviceChain:
    """Returns the fastest of the in-place passes over these states, on a GPU."""
    assert _registration.cuda is not None
    shapes = {
        str(shape): DeviceChain(
            _bench.native_pass(shape),
            states,
            [{}] * len(states),
            compiler_options=_bench.COMMAND_BUFFERS,
        )
        for shape in range(_registration.cuda.PASS_SHAPES)
    }
    timings = _bench.measure(shapes, seconds=0.5, rounds=5)
    return shapes[min(shapes, key=lambda name: timings[name].median)]


def measure_config(
    config: Config,
    seconds: float,
    warm: bool = False,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Returns one entry of `results`; raises if an output is wrong."""
    held = sets(config, warm)
    # A set has its own inputs; one state alone gets new ones every call.
    seeds = range(held if _bench.on_gpu() else 4)
    inputs = [_bench.model_inputs(config, seed) for seed in seeds]
    state, rest = _bench.split_state(inputs[0])
    for name, implementation in (("native", "native"), ("XLA form", "xla")):
        step = jax.jit(_bench.decode_step(implementation, config.layout))
        new_state, out = step(state, rest)
        _bench.verify(name, inputs[0], out, new_state, config.layout)
    chains = _chains(config, inputs)
    timings = _bench.measure(chains, seconds, ROUNDS, after_round=after_round)
    native, limit = timings["native"].median, timings["limit"].median
    xla = min(("XLA donated", "XLA not donated"), key=lambda n: timings[n].median)
    return {
        **dataclasses.asdict(config),
        "family": config.family,
        "state_bytes": config.state_bytes,
        "sets": held,
        "timings": {name: _microseconds(timing) for name, timing in timings.items()},
        "xla": xla,
        "GB/s": 2 * config.state_bytes / native / 1e9,
        "of_limit": limit / native,
        "times_faster": timings[xla].median / native,
    }


def _overhead(seconds: float, after_round: Callable[[], None]) -> dict[str, Any]:
    chains = _bench.overhead_chains("native")
    timings = _bench.measure(chains, seconds, ROUNDS, after_round=after_round)
    return {
        "timings": {name: _microseconds(timing) for name, timing in timings.items()},
        "ratio": timings["decode"].median / timings["no-op"].median,
        "import_ms": 1e3 * _bench_machine.import_seconds(),
    }


def _microseconds(timing: Timing) -> dict[str, Any]:
    return {
        "median_us": timing.median * 1e6,
        "quartiles_us": [timing.low * 1e6, timing.high * 1e6],
        "rounds": timing.rounds,
        "calls_a_round": timing.calls,
    }
