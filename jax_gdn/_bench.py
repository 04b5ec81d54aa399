"""Timing, the same for the command line and the comparisons with peers."""

import dataclasses
import functools as ft
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_gdn import _registration
from jax_gdn._decode import decode

Inputs = dict[str, Any]
# (state, the other operands) -> (state, out)
Step = Callable[[Array, Inputs], tuple[Array, Any]]

# XLA leaves runs of fewer than five calls out of command buffers unless told.
COMMAND_BUFFERS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "CUSTOM_CALL",
    "xla_gpu_graph_min_graph_size": 1,
}


CALLS_IN_A_ROW = 32
BYTES_A_PROGRAM = 10**10
QUEUED_ROUND = 0.03  # seconds: starts and ends differ by 0.1 to 0.5 ms


@dataclasses.dataclass(frozen=True)
class Config:
    """One call that is timed, in the axis letters of `decode`."""

    B: int
    H: int = 16
    HV: int = 32
    T: int = 1
    state_dtype: str = "float32"
    layout: str = "KV"
    K: int = 128
    V: int = 128

    @property
    def state_shape(self) -> tuple[int, ...]:
        tile = (self.K, self.V) if self.layout == "KV" else (self.V, self.K)
        return (self.B, self.HV, *tile)

    @property
    def state_bytes(self) -> int:
        entries = self.B * self.HV * self.K * self.V
        return entries * jnp.dtype(self.state_dtype).itemsize

    @property
    def family(self) -> str:
        """What stays when only B changes."""
        return f"{self.H}/{self.HV} heads, T {self.T}, {self.state_dtype} {self.layout}"


def model_inputs(config: Config, seed: int = 0) -> Inputs:
    """Returns random operands of `decode` by name, bfloat16 where models have it."""
    rng = np.random.default_rng(seed)
    B, T, H, HV = config.B, config.T, config.H, config.HV

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    half = jnp.bfloat16
    return {
        "q": normal(B, T, H, config.K).astype(half),
        "k": normal(B, T, H, config.K).astype(half),
        "v": normal(B, T, HV, config.V).astype(half),
        "state": normal(*config.state_shape).astype(config.state_dtype),
        "A_log": jnp.log(jnp.asarray(rng.uniform(0.01, 16, HV), jnp.float32)),
        "a": normal(B, T, HV).astype(half),
        "dt_bias": normal(HV),
        "b": normal(B, T, HV).astype(half),
    }


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def split_state(inputs: Inputs) -> tuple[Array, Inputs]:
    """Returns the state, and the operands without it."""
    return inputs["state"], {n: x for n, x in inputs.items() if n != "state"}


def decode_step(implementation: str | None, layout: str = "KV") -> Step:
    def step(state: Array, rest: Inputs) -> tuple[Array, Array]:
        out, state = decode(
            state=state, **rest, state_layout=layout, implementation=implementation
        )
        return state, out

    return step


def in_place_pass(state: Array, _: Inputs) -> tuple[Array, tuple[()]]:
    """Reads and writes the state once and does no more.

    A change of sign: repeated, it neither decays into denormals nor overflows. Of bits,
    because XLA's host code takes detours through float32 where a dtype is bfloat16.
    """
    width = 8 * state.dtype.itemsize
    bits = lax.bitcast_convert_type(state, f"uint{width}")
    signs = jnp.array(1 << (width - 1), bits.dtype)
    return lax.bitcast_convert_type(bits ^ signs, state.dtype), ()


def native_pass(shape: int) -> Step:
    """Returns the same as a CUDA kernel, in one of `_cuda.PASS_SHAPES` shapes.

    XLA's own is several percent short of the best.
    """

    def step(state: Array, after: Inputs) -> tuple[Array, tuple[()]]:
        call = jax.ffi.ffi_call(
            _registration.PASS_TARGET,
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            input_output_aliases={0: 0},
        )
        return call(state, *after.values(), shape=np.int32(shape)), ()

    return step


class Chain(Protocol):
    """A decode loop: every call takes the state that the one before it left."""

    calls: int  # that one step of `run` makes

    def run(self, steps: int) -> None:
        """Starts this many steps."""
        ...

    def wait(self) -> None:
        """Returns when they are done."""
        ...


class OwnChain:
    """A chain of jitted calls; its kinds differ in what one program holds."""

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
        self._out: Any = jax.tree.map(jnp.array, rests[0].get("v", ()))
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


class SteppedChain(OwnChain):
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


class DeviceChain(OwnChain):
    """Calls over every set in turn, in one program, so that no host is between them.

    Donated, the repetition is in the program too; not donated, it makes one round.
    Calls that could run at once would: so each is given what the one before it made,
    its output as `v`, or, where there is none, its state. The last output is donated,
    too: a program all of whose buffers stay starts without its command buffers being
    recorded anew.
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
                return rest | {"v": out}
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


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, over rounds of many calls."""

    median: float
    low: float  # quartiles
    high: float
    rounds: int
    calls: int  # a round

    @classmethod
    def of(cls, samples: list[float], calls: int) -> "Timing":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, len(samples), calls)


def measure(
    chains: dict[str, Any],
    seconds: float,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[], None] = lambda: None,
    queued: bool | None = None,
) -> dict[str, Timing]:
    """Times chains against each other.

    They take turns, so that whatever else the machine does meets all of them. Before a
    chain's turn some steps are run uncounted: what the others left in the caches, and a
    program's first start after another's, are no part of a decode loop.

    Where work is queued (`None`: on a GPU), starting and noticing the end take about a
    millisecond, however many steps lie between. So a round is timed with few steps and
    with many, either first in turn, and what counts is the difference. It lasts
    `QUEUED_ROUND` at least, whatever `seconds` says, and a turn 1.75 times as long.
    """
    queued = on_gpu() if queued is None else queued
    a_round = max(seconds / rounds / len(chains), QUEUED_ROUND if queued else 0)

    def timed(chain: Chain, steps: int) -> float:
        start = clock()
        chain.run(steps)
        chain.wait()
        return clock() - start

    def added(chain: Chain, steps: int, few: int, few_first: bool) -> float:
        if few_first:
            return -timed(chain, few) + timed(chain, few + steps)
        return timed(chain, few + steps) - timed(chain, few)

    def filling(chain: Chain) -> int:
        timed(chain, 1)
        if not queued:
            return max(1, int(a_round / max(timed(chain, 1), 1e-6)))
        steps = 1
        while (took := added(chain, steps, few=1, few_first=True)) < a_round / 2:
            steps *= 2
        return math.ceil(steps * a_round / took)

    steps = {name: filling(chain) for name, chain in chains.items()}
    samples: dict[str, list[float]] = {name: [] for name in chains}
    for turn in range(rounds):
        for name, chain in chains.items():
            few = -(-steps[name] // 4)
            timed(chain, few)
            if queued:
                took = added(chain, steps[name], few, few_first=turn % 2 == 0)
            else:
                took = timed(chain, steps[name])
            samples[name].append(took / (steps[name] * chain.calls))
        after_round()
    return {
        name: Timing.of(samples[name], steps[name] * chain.calls)
        for name, chain in chains.items()
    }


def decode64(inputs: Inputs, rows: list[int], layout: str) -> tuple[Any, Any]:
    """Returns `(out, state)` of these rows in float64, by NumPy alone.

    Not by `reference_decode`: that is the XLA form, which is one of those timed, and
    its arithmetic is float32.
    """
    shared = ("A_log", "dt_bias")
    x = {
        n: np.asarray(x if n in shared else x[np.array(rows)]).astype(np.float64)
        for n, x in inputs.items()
    }
    heads = x["v"].shape[2] // x["q"].shape[2]
    q, k = (
        (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6)).repeat(heads, axis=2)
        for y in (x["q"], x["k"])
    )
    decay = np.exp(-np.exp(x["A_log"]) * np.logaddexp(0, x["a"] + x["dt_bias"]))
    beta = 1 / (1 + np.exp(-x["b"]))
    S = x["state"] if layout == "KV" else x["state"].swapaxes(-1, -2)
    out = np.empty_like(x["v"])
    for t in range(q.shape[1]):
        S = decay[:, t, :, None, None] * S
        u = x["v"][:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + k[:, t, ..., None] * (beta[:, t, :, None] * u)[:, :, None]
        out[:, t] = q.shape[-1] ** -0.5 * np.einsum("bhk,bhkv->bhv", q[:, t], S)
    return out, S if layout == "KV" else S.swapaxes(-1, -2)


def verify(name: str, inputs: Inputs, out: Any, state: Any, layout: str) -> None:
    """Raises `ArithmeticError` unless results are those of float64.

    Looks at up to eight rows, the first and the last among them: all of a large batch
    in float64 would need more memory than the batch.
    """
    B = inputs["q"].shape[0]
    rows = sorted({round(i) for i in np.linspace(0, B - 1, min(B, 8))})
    expected = decode64(inputs, rows, layout)
    # Some 30 roundings of float32 go into a state entry in a bad case, 2e-6 of the
    # largest; `out` sums K entries once more. Storing in 16 bits adds a last place.
    checks = zip(("out", "state"), (out, state), expected, (2e-5, 1e-5), strict=True)
    for what, array, right, tolerance in checks:
        actual = np.asarray(array[np.array(rows)])
        eps = float(jnp.finfo(actual.dtype).eps) if actual.dtype.itemsize == 2 else 0
        allowed = tolerance * max(1.0, np.abs(right).max()) + eps * np.abs(right)
        error = np.abs(actual.astype(np.float64) - right)
        if not (error <= allowed).all():
            raise ArithmeticError(
                f"{name}: `{what}` is {np.nanmax(error):.3g} away from float64, "
                f"{np.isnan(error).sum()} entries are NaN; not timed"
            )


def overhead_chains(implementation: str) -> dict[str, SteppedChain]:
    """A call with nothing to do beside a no-op that is handed the same arguments."""
    inputs = model_inputs(Config(B=1, H=1, HV=1, K=64, V=16))
    state, rest = split_state(inputs)

    def no_op(state: Array, rest: Inputs) -> tuple[Array, Array]:
        # Arguments returned as they came would not make a program at all.
        return state + 1, rest["v"] + 1

    make = ft.partial(SteppedChain, states=[state], rests=[rest])
    return {"decode": make(decode_step(implementation)), "no-op": make(no_op)}
