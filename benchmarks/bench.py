"""Times `decode` beside the reference and an in-place pass over the same bytes.

They take turns in one run, each result checked against float64 first. On a GPU the time
is that of a loop on the device, over more states than the L2 cache holds. Prints a
Markdown table.
"""

import argparse
import dataclasses
import datetime
import functools as ft
import itertools
from typing import Any

import jax

from . import bench_report, machine, options, roofline, timing, workload
from .loops import COMMAND_BUFFERS, DeviceLoop, HostLoop, reference_loop
from .workload import Config

BATCHES = (1, 8, 64)
FULL_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Qwen3-Next and its relatives; 2/8 is one rank of eight.
SHAPES = {"16/32": (16, 32), "16/48": (16, 48), "16/64": (16, 64), "2/8": (2, 8)}
# In a loop, which is compiled with a call for each. At B = 1 that is less than is cold:
# 256 MB with float32, 128 MB with bfloat16.
MOST_SETS = 128
# A state for each of the loops and passes, and what the reference holds beside its own.
STATES_HELD = 14


def add_options(parser: argparse.ArgumentParser) -> None:
    batches = parser.add_mutually_exclusive_group()
    batches.add_argument(
        "--batch",
        type=options.positive,
        nargs="+",
        default=BATCHES,
        help="sequences (1 8 64)",
    )
    batches.add_argument(
        "--full",
        action="store_const",
        dest="batch",
        const=FULL_BATCHES,
        help="every power of two up to 512",
    )
    add = parser.add_argument
    many = ft.partial(add, nargs="+")
    many("--shape", choices=SHAPES, default=["16/32"], help="H/HV (16/32)")
    dtypes = ("float32", "bfloat16", "float16")
    many("--state-dtype", choices=dtypes, default=["float32"], help="(float32)")
    many("--layout", choices=("KV", "VK"), default=["KV"], help="(KV)")
    many("--tokens", type=options.positive, default=[1], help="T (1)")
    add("--per-channel", action="store_true", help="a decay per channel")
    add("--gate-dtype", choices=dtypes, default="bfloat16", help="of a, b and output")
    add("--seconds", type=options.seconds, default=5.0, help="per configuration (5)")
    add("--warm", action="store_true", help="GPU: one state, left in the cache")
    add("--json", type=options.output_file, help="write everything there is")
    add("--plot", type=options.picture_file, help="draw time and percent, a PNG")


def run(given: argparse.Namespace) -> None:
    if workload.on_gpu():
        roofline.native_module()
    configs, skipped = _fitting(_configs(given), given.warm, machine.free_bytes())
    if not configs:
        raise SystemExit("nothing to time; " + "; ".join(skipped))
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": given.seconds,
        "cache": _cache(given.warm),
        "machine": machine.machine(),
        "overhead": _overhead(given.seconds),
        "results": [],
        "skipped": skipped,
    }
    print(bench_report.heading(report), flush=True)
    for config in configs:
        result = measure_config(config, given.seconds, given.warm)
        print(bench_report.line(result), flush=True)
        report["results"].append(result)
        # What is measured so far, and the clocks that the machine then has.
        report["machine"] = machine.machine()
        options.write_json(report, given.json)
    print("\n".join([bench_report.footer(report), *skipped]))
    if given.plot:
        bench_report.write_plot(report, given.plot)


def _configs(given: argparse.Namespace) -> list[Config]:
    return [
        Config(
            *(B, *SHAPES[shape], T, dtype, layout),
            per_channel=given.per_channel,
            gate_dtype=given.gate_dtype,
        )
        for shape in given.shape
        for T in given.tokens
        for dtype, layout in itertools.product(given.state_dtype, given.layout)
        for B in sorted(set(given.batch))
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
    if not workload.on_gpu():
        return "one state, whatever of it the caches hold"
    return "one state, warm L2" if warm else "states larger than L2, in turn"


def sets(config: Config, warm: bool) -> int:
    """How many states take turns, so that little of one is cached when it is next."""
    return 1 if warm or not workload.on_gpu() else min(config.cold_sets, MOST_SETS)


def _loops(config: Config, inputs: list[workload.Inputs]) -> dict[str, Any]:
    pairs = [workload.split_state(x) for x in inputs]
    states, rests = [state for state, _ in pairs], [rest for _, rest in pairs]
    native = workload.decode_step("native", config.layout)
    reference = workload.decode_step("xla", config.layout)
    if not workload.on_gpu():
        make = ft.partial(HostLoop, states=states[:1], rests=rests)
        return {
            "native": make(native),
            "reference, donated": make(reference),
            "reference, not donated": make(reference, donate=False),
            "roofline": roofline.loop_of(states),
        }
    graphs = {"compiler_options": COMMAND_BUFFERS}
    return {
        "native": DeviceLoop(native, states, rests, **graphs),
        "native, stepped from Python": HostLoop(native, states, rests, **graphs),
        "reference, donated": reference_loop(reference, states, rests),
        "reference, not donated": reference_loop(
            reference, states, rests, donate=False
        ),
        "roofline": roofline.loop_of(states),
    }


def measure_config(
    config: Config, seconds: float, warm: bool = False
) -> dict[str, Any]:
    """Returns one entry of `results`; raises if an output is wrong."""
    held = sets(config, warm)
    # A set has its own inputs; one state alone gets new ones every call.
    seeds = range(held if workload.on_gpu() else 4)
    inputs = [workload.model_inputs(config, seed) for seed in seeds]
    state, rest = workload.split_state(inputs[0])
    for name, implementation in (("native", "native"), ("reference", "xla")):
        step = jax.jit(workload.decode_step(implementation, config.layout))
        new_state, out = step(state, rest)
        workload.verify(name, inputs[0], out, new_state, config.layout)
    timings = timing.measure(_loops(config, inputs), seconds)
    native, bound = timings["native"].median, timings["roofline"].median
    references = ("reference, donated", "reference, not donated")
    best = min(references, key=lambda name: timings[name].median)
    return {
        **dataclasses.asdict(config),
        "family": config.family,
        "form": config.form,
        "state_bytes": config.state_bytes,
        "sets": held,
        "timings": {name: times.microseconds for name, times in timings.items()},
        "best_reference": best,
        "GB/s": 2 * config.state_bytes / native / 1e9,
        "of_roofline": bound / native,
        "times_faster": timings[best].median / native,
    }


def _overhead(seconds: float) -> dict[str, Any]:
    """Times a call with little to do beside a no-op with the same arguments."""
    inputs = workload.model_inputs(Config(B=1, H=1, HV=1, K=64, V=16))
    state, rest = workload.split_state(inputs)

    def no_op(state: Any, rest: workload.Inputs) -> tuple[Any, Any]:
        # Arguments returned as they came would not make a program at all.
        return state + 1, rest["v"] + 1

    make = ft.partial(HostLoop, states=[state], rests=[rest])
    loops = {"decode": make(workload.decode_step("native")), "no-op": make(no_op)}
    timings = timing.measure(loops, seconds)
    return {
        "timings": {name: times.microseconds for name, times in timings.items()},
        "ratio": timings["decode"].median / timings["no-op"].median,
        "import_ms": 1e3 * machine.import_seconds(),
    }
