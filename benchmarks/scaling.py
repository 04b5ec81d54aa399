"""Prints what decoding costs a device of a pod, on paper: state bytes and collectives.

Compiles one layer's step (Qwen3-Next: 16 key heads, 32 value heads of 128 x 128,
float32 states) for eight virtual devices, reads from the compiled program the bytes of
state that a device holds and the collectives, and scales rows with the devices: what
one device does stays the same. The time is the state read and written once at the
bandwidth given, in TB/s (4.8: an H200), and no kernel reaches more.
"""

import argparse

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.hlo import collectives

from .options import positive
from .workload import Config, decode_step, split_state

COMPILED = 8


def compiled_step(config: Config, shape: tuple[int, int]):
    """Returns the compiled step on a mesh of rows x heads, and a device's bytes."""
    mesh = jax.make_mesh(
        shape, ("b", "h"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")
    )
    specs = {"state": P("b", "h"), "A_log": P("h"), "dt_bias": P("h")}
    types = {
        name: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, specs.get(name, P("b", None, "h"))),
        )
        for name, x in config.arrays().items()
    }
    step = jax.jit(decode_step(None), donate_argnums=0)
    compiled = step.lower(*split_state(types)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled, memory.alias_size_in_bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=positive, default=64)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s")


def run(options: argparse.Namespace) -> None:
    jax.config.update("jax_num_cpu_devices", COMPILED)
    print(
        f"| rows x heads of {COMPILED} | collectives | state a device, read and ",
        end="",
    )
    print(f"written | at least | rows on {options.devices} devices |")
    print("|---|---|---|---|---|")
    for shape in ((8, 1), (2, 4), (1, 8)):
        config = Config(B=64)
        compiled, held = compiled_step(config, shape)
        waits = len(collectives(compiled.as_text()))
        traffic = 2 * held
        microseconds = traffic / options.bandwidth / 1e6
        rows = config.B * options.devices // COMPILED
        print(
            f"| {shape[0]} x {shape[1]} | {waits} | {traffic / 2**20:.0f} MiB "
            f"| {microseconds:.1f} us | {rows} |"
        )
