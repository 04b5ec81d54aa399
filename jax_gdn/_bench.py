"""Timing, the same for the command line and the comparisons with peers."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gdn._decode import decode

State = Array
Step = Callable[[State], State]


def model_inputs(B: int, H: int, HV: int, K: int, V: int) -> dict[str, Any]:
    """Returns random operands of `decode` by name, bfloat16 where models have it."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    half = jnp.bfloat16
    return {
        "q": normal(B, 1, H, K).astype(half),
        "k": normal(B, 1, H, K).astype(half),
        "v": normal(B, 1, HV, V).astype(half),
        "state": normal(B, HV, K, V),
        "A_log": jnp.log(jnp.asarray(rng.uniform(0.01, 16, HV), jnp.float32)),
        "a": normal(B, 1, HV).astype(half),
        "dt_bias": normal(HV),
        "b": normal(B, 1, HV).astype(half),
    }


def decode_step(inputs: dict[str, Any], implementation: str | None) -> Step:
    """Returns a jitted, donating state -> state step."""
    rest = {name: x for name, x in inputs.items() if name != "state"}

    def step(state: State, rest: dict[str, Any]) -> tuple[State, Array]:
        out, state = decode(state=state, **rest, implementation=implementation)
        return state, out

    call = jax.jit(step, donate_argnums=0)
    return lambda state: call(state, rest)[0]


def in_place_pass() -> Step:
    """Returns a jitted step that reads and writes the state once and does no more."""
    return jax.jit(lambda state: state * jnp.float32(0.999), donate_argnums=0)


def seconds_a_step(
    steps: dict[str, Step], state: State, rounds: int, seconds: float
) -> dict[str, float]:
    """Times steps against each other: median seconds of each.

    They take turns, so that whatever else the machine does meets all of them; each
    turn chains calls through its own donated state, as a decode loop does.
    """
    states = {name: jnp.array(state) for name in steps}
    repeats = {}
    for name, step in steps.items():
        states[name] = jax.block_until_ready(step(states[name]))
        start = time.perf_counter()
        states[name] = jax.block_until_ready(step(states[name]))
        once = max(time.perf_counter() - start, 1e-6)
        repeats[name] = max(1, int(seconds / rounds / len(steps) / once))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                states[name] = step(states[name])
            jax.block_until_ready(states[name])
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in samples.items()}
