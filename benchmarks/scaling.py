"""Times a step of many layers over several devices, beside one device.

Every device has as many rows' worth of state whatever their number: the rows are split,
or the heads of as many more rows. Nothing is to wait for another device, so a step
should take what it takes on one; collectives and copies of states in the compiled
program are counted. Looped on the device, with and without command buffers.
"""

import argparse
import functools as ft
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.hlo import collectives, copies

from . import timing
from .layers import NO_GRAPHS, STEPS, Steps, options_of
from .machine import machine
from .options import output_file, positive, seconds, write_json
from .workload import WEIGHTS, Config, Inputs, rows_of


def inputs_of(B: int, devices: int, axis: str) -> Inputs:
    """Returns operands of B rows a device, split over rows ("b") or heads ("h")."""
    mesh = jax.make_mesh(
        (devices,), (axis,), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows, repeats = rows_of(B * devices)
    specs = {"state": P("b", "h"), "A_log": P("h"), "dt_bias": P("h")}

    def put(name: str, x: Any) -> jax.Array:
        spec = specs.get(name, P("b", None, "h"))
        sharding = NamedSharding(mesh, P(*(n if n == axis else None for n in spec)))
        many = 1 if name in WEIGHTS else repeats
        tile = ft.partial(jax.numpy.tile, reps=(many, *[1] * (x.ndim - 1)))
        return jax.jit(tile, out_shardings=sharding)(x)

    return {name: put(name, x) for name, x in Config(B=rows).arrays().items()}


def forms(numbers: list[int]) -> Iterator[tuple[str, int, str]]:
    """Yields a name, how many devices, and the axis that is split."""
    yield "one device", 1, "b"
    for devices in numbers:
        if devices > 1:
            yield f"{devices} devices, rows", devices, "b"
            yield f"{devices} devices, heads", devices, "h"


def measure(layers: int, B: int, numbers: list[int], seconds: float) -> dict[str, Any]:
    loops, program = {}, {}
    for name, devices, axis in forms(numbers):
        inputs = inputs_of(B, devices, axis)
        for graphs in (True, False):
            key = name if graphs else f"{name}, no command buffers"
            options = options_of(graphs, NO_GRAPHS)
            loop = Steps(layers, B, options, looped=STEPS, inputs=inputs)
            state = inputs["state"]
            shard = state.sharding.shard_shape(state.shape)
            text = loop.text()
            program[key] = {
                "collectives": len(collectives(text)),
                "copies": copies(text, shard),
            }
            loop.run(2)
            loop.wait()
            loops[key] = loop
    before = {name: loop.buffers() for name, loop in loops.items()}
    timings = timing.measure(loops, seconds)
    return {
        "B": B,
        "layers": layers,
        "rows": {
            name: {
                "us_a_layer": 1e6 * times.median,
                "quartiles": [1e6 * times.low, 1e6 * times.high],
                "buffers_stayed": loops[name].buffers() == before[name],
                **program[name],
            }
            for name, times in timings.items()
        },
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=positive, nargs="+", help="how many, beside one (all)"
    )
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--batch", type=positive, nargs="+", default=[8, 64, 256])
    parser.add_argument("--seconds", type=seconds, default=5.0, help="a batch size")
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results = []
    for B in given.batch:
        numbers = given.devices or [len(jax.devices())]
        results.append(result := measure(given.layers, B, numbers, given.seconds))
        print(f"B {B} a device, {given.layers} layers, us a layer:")
        for name, row in result["rows"].items():
            stayed = "stayed" if row["buffers_stayed"] else "MOVED"
            print(
                f"  {name:40} {row['us_a_layer']:9.2f}  {row['collectives']} "
                f"collectives, {row['copies']} copies, states {stayed}"
            )
        write_json({"machine": machine(), "results": results}, given.json)
