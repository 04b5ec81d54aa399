"""Times a decode step of many layers as a user would write it, on this device.

A step calls `decode` once a layer; a layer's output is the next one's value. All else,
which a model computes inside its step, is the same for every layer here. The states are
a list of arrays, one a layer; one pool in which every layer has its slots; or one
stack, of which a call names the layer: by a number, in a step that is unrolled, or by
the index of a scan over layers. Deferred writes have a list too, a ring beside each
state, and one array of cursors for all. It is stepped from Python, under JAX's default
options and under command buffers, and looped on the device. Beside stand the kernel's
own time, from a program that holds nothing else, a program that does nothing with the
same arguments, which is what JAX itself takes to start one, and the share that is not
the kernel's.
"""

import argparse
import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_gdn import advance_cursors, decode, decode_deferred, new_pending

from . import timing
from .loops import COMMAND_BUFFERS, DeviceLoop
from .machine import machine
from .options import output_file, positive, seconds, write_json
from .workload import (
    WEIGHTS,
    Config,
    Inputs,
    decode_step,
    model_inputs,
    on_gpu,
    split_state,
)

STEPS = 20  # of the loop on the device
# What is measured where all of it would have more states than these.
MOST_BYTES = 70 * 10**9
FEW = ("kernel alone", "looped, command buffers", "looped, deferred writes")


def list_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """One token through all layers, each with a state of its own."""
    new_states = []
    for state in states:
        x, state = decode(**{**rest, "v": x}, state=state, implementation="native")
        new_states.append(state)
    return new_states, x


def pool_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """The same where one pool holds all layers' slots, B a layer."""
    (pool,) = states
    B = x.shape[0]
    for first in range(0, pool.shape[0], B):
        x, pool = decode(
            **{**rest, "v": x},
            state=pool,
            # Constants of the program: computed, they would be a kernel a layer.
            state_indices=np.arange(first, first + B, dtype=np.int32),
            implementation="native",
        )
    return [pool], x


def stack_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """The same where one stack holds all layers' states, the step unrolled."""
    (stack,) = states
    for i in range(stack.shape[0]):
        x, stack = decode(
            **{**rest, "v": x}, state=stack, layer=i, implementation="native"
        )
    return [stack], x


def scan_step(
    states: list[Any], rest: Any, x: Any, unroll: int = 1
) -> tuple[list[Any], Any]:
    """The same in a scan over layers, which carries the stack."""
    (stack,) = states

    def layer(carry, i):
        stack, x = carry
        x, stack = decode(
            **{**rest, "v": x}, state=stack, layer=i, implementation="native"
        )
        return (stack, x), ()

    layers = jnp.arange(stack.shape[0], dtype=jnp.int32)
    (stack, x), _ = lax.scan(layer, (stack, x), layers, unroll=unroll)
    return [stack], x


def stacked_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """The same in a scan that takes the stack apart and puts it together again."""
    (stack,) = states

    def layer(x, state):
        return decode(**{**rest, "v": x}, state=state, implementation="native")

    x, stack = lax.scan(layer, x, stack)
    return [stack], x


def rows_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """Unrolled, with a stack a row, [B, L, ...]: rows are mapped."""
    (stacks,) = states
    axes = {name: None if name in WEIGHTS else 0 for name in rest}

    for i in range(stacks.shape[1]):
        slot = np.array([i], np.int32)

        def row(stack, x, slot=slot):
            x = {n: y if n in WEIGHTS else y[None] for n, y in x.items()}
            out, stack = decode(
                **x, state=stack, state_indices=slot, implementation="native"
            )
            return out[0], stack

        x, stacks = jax.vmap(row, (0, axes))(stacks, {**rest, "v": x})
    return [stacks], x


def deferred_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """With a list, and rings of 16 tokens."""
    ((states, rings, cursors),) = states
    results = []
    for state, ring in zip(states, rings, strict=True):
        given = {**rest, "v": x, "state": state, "pending": ring, "cursors": cursors}
        x, *updated = decode_deferred(**given, implementation="native")
        results.append(updated)
    cursors = advance_cursors(cursors, rings[0], 1)
    states, rings = map(list, zip(*results, strict=True))
    return [(states, rings, cursors)], x


def with_rings(states: list[Any]) -> tuple[list[Any], list[Any], Any]:
    """The states, empty rings, and cursors of rows that do not fold together."""
    H = Config(B=1).H
    rows = jnp.arange(states[0].shape[0], dtype=jnp.int32)
    cursors = jnp.stack([rows * 0, rows % 16 + 1], axis=1)
    return states, [new_pending(state, H) for state in states], cursors


def no_step(states: list[Any], rest: Any, x: Any) -> tuple[list[Any], Any]:
    """Nothing, with the arguments of a step."""
    return states, x + 1


class Steps:
    """A loop of model steps; `looped` of them are one program."""

    def __init__(
        self,
        layers: int,
        B: int,
        options: dict[str, Any],
        step: Callable = list_step,
        join: Callable | None = None,
        looped: int = 1,
        donate: tuple[int, ...] = (0, 2),
        inputs: Inputs | None = None,
    ):
        state, self._rest = split_state(inputs or model_inputs(Config(B=B)))
        self._states = [jnp.array(state) for _ in range(layers)]
        if join is not None:
            self._states = [join(self._states)]
        self._x = jnp.array(self._rest["v"])
        self.calls = layers * looped

        def program(states, rest, x):
            if looped == 1:
                return step(states, rest, x)
            return lax.fori_loop(
                0,
                looped,
                lambda _, carry: step(carry[0], rest, carry[1]),
                (states, x),
            )

        self._call = jax.jit(
            program, donate_argnums=donate, keep_unused=True, compiler_options=options
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._states, self._x = self._call(self._states, self._rest, self._x)

    def wait(self) -> None:
        jax.block_until_ready((self._states, self._x))

    def text(self) -> str:
        """Returns the compiled program."""
        compiled = self._call.lower(self._states, self._rest, self._x).compile()
        return compiled.as_text() or ""

    def buffers(self) -> list[int]:
        return [
            shard.data.unsafe_buffer_pointer()
            for state in jax.tree.leaves(self._states)
            for shard in state.addressable_shards
        ]


def kernel_alone(layers: int, B: int) -> Any:
    """The same calls over as many states, in a program that runs for long."""
    state, rest = split_state(model_inputs(Config(B=B)))
    return DeviceLoop(
        decode_step("native"),
        [state] * layers,
        [rest] * layers,
        compiler_options=options_of(True),
    )


NO_GRAPHS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}


def options_of(
    command_buffers: bool, otherwise: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns compiler options; nothing on the host."""
    if not on_gpu():
        return {}
    return COMMAND_BUFFERS if command_buffers else otherwise or {}


def measure(layers: int, B: int, seconds: float) -> dict[str, Any]:
    graphs, plain = options_of(True), options_of(False, NO_GRAPHS)
    steps = ft.partial(Steps, layers, B)
    # XLA's loop as a command buffer too, with what stands in its body.
    whole = {**graphs, "xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,WHILE"}
    whole = whole if on_gpu() else {}
    unrolled = ft.partial(scan_step, unroll=8)
    joined: dict[str, tuple[dict, Callable, Callable]] = {
        "one pool": (graphs, pool_step, jnp.concatenate),
        "a stack": (graphs, stack_step, jnp.stack),
        "a stack a row": (graphs, rows_step, ft.partial(jnp.stack, axis=1)),
        "a scan over a stack": ({}, scan_step, jnp.stack),
        "a scan over a stack, command buffers": (whole, scan_step, jnp.stack),
        "a scan over a stack, 8 unrolled": (graphs, unrolled, jnp.stack),
        "states as xs and ys": ({}, stacked_step, jnp.stack),
        "deferred writes": (graphs, deferred_step, with_rings),
    }
    make: dict[str, Callable[[], Any]] = {
        "kernel alone": lambda: kernel_alone(layers, B),
        "looped, command buffers": lambda: steps(graphs, looped=STEPS),
        "looped, none": lambda: steps(plain, looped=STEPS),
        **{
            f"looped, {name}": ft.partial(steps, options, step, join, looped=STEPS)
            for name, (options, step, join) in joined.items()
        },
        "stepped, one pool": lambda: steps({}, pool_step, join=jnp.concatenate),
        "stepped, a stack": lambda: steps({}, stack_step, join=jnp.stack),
        "stepped, a list": lambda: steps({}),
        "the same, x not donated": lambda: steps({}, donate=(0,)),
        "the same, no command buffers": lambda: steps(plain),
        "nothing, one pool": lambda: steps({}, no_step, join=jnp.concatenate),
        "nothing, a list": lambda: steps({}, no_step),
    }
    if len(make) * layers * Config(B=B).state_bytes > MOST_BYTES:
        make = {name: make[name] for name in FEW}
    loops = {name: build() for name, build in make.items()}
    for loop in loops.values():
        loop.run(2)
        loop.wait()
    before = {n: c.buffers() for n, c in loops.items() if isinstance(c, Steps)}
    timings = timing.measure(loops, seconds)
    stayed = {name: loops[name].buffers() == where for name, where in before.items()}
    alone = timings["kernel alone"].median
    return {
        "layers": layers,
        "B": B,
        "rows": {
            name: {
                "us_a_layer": 1e6 * timing.median,
                "quartiles": [1e6 * timing.low, 1e6 * timing.high],
                # Of a program with the kernel in it.
                "host_share": None
                if name.startswith("nothing")
                else 1 - alone / timing.median,
                "buffers_stayed": stayed.get(name),
            }
            for name, timing in timings.items()
        },
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=positive, nargs="+", default=[12, 48])
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=seconds, default=5.0, help="a line")
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results = []
    for B in given.batch:
        for layers in given.layers:
            results.append(result := measure(layers, B, given.seconds))
            print(f"B {B}, {layers} layers, us a layer:")
            for name, row in result["rows"].items():
                stayed = {True: "states stayed", False: "states MOVED", None: ""}
                part = row["host_share"]
                share = "" if part is None else f"host's share {part:4.0%}"
                where = stayed[row["buffers_stayed"]]
                print(f"  {name:44} {row['us_a_layer']:9.2f}  {share:17}  {where}")
            # What is measured so far.
            write_json({"machine": machine(), "results": results}, given.json)
