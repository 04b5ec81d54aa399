"""Times a decode step of many layers as a user would write it, on this device.

    python benchmarks/layers.py [--layers N ...] [--batch B ...] [--json FILE]

A step calls `decode` once a layer, each with a state of its own, all donated; a layer's
output is the next one's value. It is stepped from Python, under JAX's default options
and under command buffers, and looped on the device. Beside them stands the kernel's own
time, from a program that holds nothing else, and the call's share that is the host's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import lax

from jax_gdn import _bench, _bench_machine, decode

ON_GPU = jax.devices()[0].platform == "gpu"
STEPS = 20  # of the loop on the device


def model_step(states: list[Any], layers: list[Any], x: Any) -> tuple[list[Any], Any]:
    """One token through all layers."""
    new_states = []
    for state, layer in zip(states, layers, strict=True):
        x, state = decode(**{**layer, "v": x}, state=state, implementation="native")
        new_states.append(state)
    return new_states, x


class Steps:
    """A chain of model steps; `looped` of them are one program."""

    def __init__(self, layers: int, B: int, options: dict[str, Any], looped: int = 1):
        inputs = [_bench.model_inputs(_bench.Config(B=B), i) for i in range(layers)]
        pairs = [_bench.split_state(x) for x in inputs]
        self._states, self._layers = [s for s, _ in pairs], [rest for _, rest in pairs]
        self._x = self._layers[0]["v"]
        self.calls = layers * looped

        def program(states, layers, x):
            if looped == 1:
                return model_step(states, layers, x)
            return lax.fori_loop(
                0,
                looped,
                lambda _, carry: model_step(carry[0], layers, carry[1]),
                (states, x),
            )

        self._call = jax.jit(program, donate_argnums=0, compiler_options=options)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._states, self._x = self._call(self._states, self._layers, self._x)

    def wait(self) -> None:
        jax.block_until_ready((self._states, self._x))

    def buffers(self) -> list[int]:
        return [state.unsafe_buffer_pointer() for state in self._states]


def kernel_alone(layers: int, B: int) -> Any:
    """The same calls, over as many states, with nothing that links them."""
    inputs = [_bench.model_inputs(_bench.Config(B=B), i) for i in range(layers)]
    pairs = [_bench.split_state(x) for x in inputs]
    states, rests = [state for state, _ in pairs], [rest for _, rest in pairs]
    return _bench.DeviceChain(
        _bench.decode_step("native"), states, rests, compiler_options=options_of(True)
    )


def options_of(command_buffers: bool) -> dict[str, Any]:
    return _bench.COMMAND_BUFFERS if command_buffers and ON_GPU else {}


def measure(layers: int, B: int, seconds: float) -> dict[str, Any]:
    graphs, plain = options_of(True), {}
    if ON_GPU:
        plain = {"xla_gpu_enable_command_buffer": ""}
    make: dict[str, Callable[[], Any]] = {
        "kernel alone": lambda: kernel_alone(layers, B),
        "looped, command buffers": lambda: Steps(layers, B, graphs, STEPS),
        "looped, none": lambda: Steps(layers, B, plain, STEPS),
        "stepped, command buffers": lambda: Steps(layers, B, graphs),
        "stepped, JAX's defaults": lambda: Steps(layers, B, {}),
        "stepped, none": lambda: Steps(layers, B, plain),
    }
    chains = {name: build() for name, build in make.items()}
    for chain in chains.values():
        chain.run(2)
        chain.wait()
    before = {n: c.buffers() for n, c in chains.items() if isinstance(c, Steps)}
    timings = _bench.measure(chains, seconds)
    stayed = {name: chains[name].buffers() == where for name, where in before.items()}
    alone = timings["kernel alone"].median
    return {
        "layers": layers,
        "B": B,
        "rows": {
            name: {
                "us_a_layer": 1e6 * timing.median,
                "quartiles": [1e6 * timing.low, 1e6 * timing.high],
                "host_share": 1 - alone / timing.median,
                "buffers_stayed": stayed.get(name),
            }
            for name, timing in timings.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="a line")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for B in arguments.batch:
        for layers in arguments.layers:
            results.append(result := measure(layers, B, arguments.seconds))
            print(f"B {B}, {layers} layers, us a layer:")
            for name, row in result["rows"].items():
                stayed = {True: "states stayed", False: "states MOVED", None: ""}
                share = f"host's share {max(0, row['host_share']):4.0%}"
                where = stayed[row["buffers_stayed"]]
                print(f"  {name:26} {row['us_a_layer']:9.2f}  {share}  {where}")
    if arguments.json:
        report = {"machine": _bench_machine.machine(), "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
