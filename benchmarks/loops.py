"""Decode loops: calls chained through a state that is donated."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from .workload import Inputs, Step

# XLA leaves runs of fewer than five calls out of command buffers unless told.
COMMAND_BUFFERS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
}
CALLS_IN_A_ROW = 32
BYTES_A_PROGRAM = 10**10
REFERENCE_STATES = 2


class Loop(Protocol):
    """A decode loop: every call takes the state that the one before it left."""

    calls: int  # that one step of `run` makes

    def run(self, steps: int) -> None:
        """Starts this many steps."""
        ...

    def wait(self) -> None:
        """Returns when they are done."""
        ...


def _link(rest: Inputs) -> str:
    """Returns which operand a call's output can be: one of its shape and dtype."""
    return "output" if "output" in rest else "v"


class JitLoop:
    """A loop of jitted calls; its kinds differ in what one program holds."""

    calls = 1
    donated: tuple[int, ...] = (0,)

    def __init__(
        self,
        step: Step,
        states: list[Array],
        rests: list[Inputs],
        donate: bool = True,
        compiler_options: dict[str, Any] | None = None,
    ):
        self._states = [jnp.array(x) for x in states]
        self._rests = rests
        # Then the last step's; a copy, because it may be donated.
        self._out: Any = jax.tree.map(jnp.array, rests[0].get(_link(rests[0]), ()))
        # keep_unused: a no-op must be handed what the call it stands beside is.
        self._call = jax.jit(
            self._program(step, donate),
            donate_argnums=self.donated if donate else (),
            keep_unused=True,
            compiler_options=compiler_options,
        )

    def _program(self, step: Step, donate: bool) -> Callable:
        raise NotImplementedError

    def wait(self) -> None:
        jax.block_until_ready((self._states, self._out))


class HostLoop(JitLoop):
    """Calls from Python, one after the other, over one state or several in turn."""

    _next = 0

    def _program(self, step: Step, donate: bool) -> Callable:
        return step

    def run(self, steps: int) -> None:
        for i in range(self._next, self._next + steps):
            at = i % len(self._states)
            self._states[at], self._out = self._call(
                self._states[at], self._rests[i % len(self._rests)]
            )
        self._next += steps


class DeviceLoop(JitLoop):
    """Calls over every set in turn, in one program, so that no host is between them.

    Donated, the repetition is in the program too; not donated, it makes one round.
    Calls that could run at once would: so each is given what the one before it made,
    its output as an operand, or, where there is none, its state. The last output is
    donated, too: a program all of whose buffers stay starts without its command buffers
    being recorded anew.
    """

    donated = (0, 2)

    def __init__(self, *arguments: Any, in_a_row: int | None = None, **options: Any):
        self._in_a_row = in_a_row or CALLS_IN_A_ROW
        super().__init__(*arguments, **options)

    def _program(self, step: Step, donate: bool) -> Callable:
        sets = len(self._states)
        a_round = 2 * sum(x.nbytes for x in self._states)
        rounds = trips = 1
        if donate:
            # Enough calls for one start of a command buffer not to count.
            rounds = math.ceil(min(self._in_a_row / sets, BYTES_A_PROGRAM / a_round))
            trips = math.ceil(BYTES_A_PROGRAM / (rounds * a_round))
        self.calls = trips * rounds * sets

        def linked(rest: Inputs, out: Any, before: Array) -> Inputs:
            if rest:
                return rest | {_link(rest): out}
            return {"after": before} if sets > 1 else {}

        def every_set(rests, states, out):
            states = list(states)
            for _ in range(rounds):
                for i, rest in enumerate(rests):
                    states[i], out = step(states[i], linked(rest, out, states[i - 1]))
            return states, out

        def loop(states, rests, out):
            return lax.fori_loop(
                0, trips, lambda _, carry: every_set(rests, *carry), (states, out)
            )

        return loop

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._states, self._out = self._call(self._states, self._rests, self._out)


def reference_loop(
    step: Step, states: list[Array], rests: list[Inputs], **options: Any
) -> DeviceLoop:
    """Returns a loop of a step that XLA compiles itself, anew for each of its calls.

    That takes it many seconds, so there are two calls, over two states. Where those
    stay in the L2 cache, that is to the step's advantage.
    """
    few = states[:REFERENCE_STATES], rests[:REFERENCE_STATES]
    return DeviceLoop(step, *few, in_a_row=1, **options)


class Program:
    """A loop of one program, `(constants, carry) -> carry`, which makes `calls` calls.

    `carry` is in a list, which several programs may have in common: a carry may be
    gigabytes. Large programs are compiled side by side, by `compile_all`.
    """

    def __init__(
        self,
        program: Callable,
        constants: Any,
        carry: list[Any],
        calls: int = 1,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.calls = calls
        self._constants, self.carry = constants, carry
        call = jax.jit(program, donate_argnums=1, compiler_options=compiler_options)
        self.lowered = call.lower(constants, carry[0])

    def compile(self) -> None:
        self._call = self.lowered.compile()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.carry[0] = self._call(self._constants, self.carry[0])

    def wait(self) -> None:
        jax.block_until_ready(self.carry[0])


def compile_all(programs: Iterable[Program]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Program.compile, programs))
