"""Prints what decoding costs a device of a pod, on paper: state bytes and collectives.

    python benchmarks/scaling.py [--devices 64] [--bandwidth 4.8]

Compiles one layer's step (Qwen3-Next: 16 key heads, 32 value heads of 128 x 128,
float32 states) for eight virtual devices, reads from the compiled program the bytes of
state that a device holds and the collectives, and scales rows with the devices: what
one device does stays the same. The time is the state read and written once at the
bandwidth given, in TB/s (4.8: an H200), and no kernel reaches more.
"""

import argparse
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import Case
from hlo import collectives
from jax.sharding import AxisType, NamedSharding
from meshes import host_arrays, mesh_of, specs_of, split, step

COMPILED = 8


def compiled_step(case: Case, shape: tuple[int, int]):
    """Returns the compiled step on a mesh of rows x heads, and a device's bytes."""
    mesh, specs = mesh_of(AxisType.Auto, shape), specs_of(case)
    types = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, specs[name])
        )
        for name, x in host_arrays(case).items()
    }
    state, rest = split(types)
    compiled = jax.jit(step(case), donate_argnums=0).lower(state, rest).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled, memory.alias_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Decode on a pod, on paper.")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", COMPILED)
    print(
        f"| rows x heads of {COMPILED} | collectives | state a device, read and ",
        end="",
    )
    print(f"written | at least | rows on {options.devices} devices |")
    print("|---|---|---|---|---|")
    for shape in ((8, 1), (2, 4), (1, 8)):
        case = Case(B=64, H=16, HV=32)
        compiled, held = compiled_step(case, shape)
        waits = len(collectives(compiled.as_text()))
        traffic = 2 * held
        microseconds = traffic / options.bandwidth / 1e6
        rows = case.B * options.devices // COMPILED
        print(
            f"| {shape[0]} x {shape[1]} | {waits} | {traffic / 2**20:.0f} MiB "
            f"| {microseconds:.1f} us | {rows} |"
        )


if __name__ == "__main__":
    main()
