"""Prints what speculative decoding and gradients cost, in time and in states.

`speculation`: a call of T tokens that keeps one state, beside the two ways to roll
back: a snapshot after every token, and a verifying call that keeps no state followed by
one that replays the accepted tokens, half of them. Over a pool, looped on the device.
`gradients`: the reverse pass through T tokens, in one call or in a scan of calls of one
token, with and without `jax.checkpoint`; memory is what the compiled program needs
beside its arguments and results.
"""

import argparse
import functools as ft
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_gdn import decode

from . import timing
from .layers import options_of
from .machine import machine
from .options import output_file, positive, seconds, write_json
from .workload import Config, Inputs, model_inputs, split_state

STEPS = 16  # in a row: what a loop itself takes must not count
ROUNDS = 8  # of a loop on the device
TOKENS = ("q", "k", "v", "a", "b")


def one_state(pool: Any, rest: Inputs, rows: np.ndarray) -> Any:
    return decode(**rest, state=pool, state_indices=rows)


def snapshots(pool: Any, rest: Inputs, rows: np.ndarray) -> Any:
    B, T = rest["a"].shape[:2]
    writes = B + np.arange(B * T, dtype=np.int32).reshape(B, T)
    return decode(**rest, state=pool, state_indices=rows, output_state_indices=writes)


def verify_and_replay(pool: Any, rest: Inputs, rows: np.ndarray) -> Any:
    out, pool = decode(
        **rest, state=pool, state_indices=rows, output_state_indices=0 * rows - 1
    )
    # Half of the tokens are rejected; the result decides, as a server would.
    T = out.shape[1]
    accepted = jnp.where(out[0, 0, 0, 0] > jnp.inf, T, T // 2)
    off = jnp.arange(T)[None, :, None] >= accepted
    kept = {
        n: jnp.where(off, jnp.array(-jnp.inf, rest[n].dtype), rest[n]) for n in "ab"
    }
    return decode(**rest | kept, state=pool, state_indices=rows)


WAYS = {
    "one state": one_state,
    "snapshots": snapshots,
    "verify, then replay": verify_and_replay,
}


class Steps:
    """A `benchmarks.loops.Loop` of one way."""

    calls = STEPS * ROUNDS

    def __init__(self, way: str, B: int, T: int):
        state, rest = split_state(model_inputs(Config(B=B, T=T)))
        slots = B * (T + 1) if way == "snapshots" else B
        self.slots = slots // B
        rows = np.arange(B, dtype=np.int32)

        def steps(_: Any, carry: Any) -> Any:
            pool, v = carry
            for _ in range(STEPS):
                v, pool = WAYS[way](pool, rest | {"v": v}, rows)
            return pool, v

        self._carry = (
            jnp.concatenate([state, jnp.zeros((slots - B, *state.shape[1:]))]),
            rest["v"],
        )
        self._call = jax.jit(
            lambda carry: lax.fori_loop(0, ROUNDS, steps, carry),
            donate_argnums=0,
            compiler_options=options_of(True),
        )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._carry = self._call(self._carry)

    def wait(self) -> None:
        jax.block_until_ready(self._carry)


def speculation(given: argparse.Namespace) -> list[dict]:
    rows = []
    for B in given.batch:
        for T in given.tokens:
            loops = {way: Steps(way, B, T) for way in WAYS}
            for loop in loops.values():
                loop.run(1)
                loop.wait()
            timings = timing.measure(loops, given.seconds)
            for way, times in timings.items():
                us = times.microseconds
                row = {"B": B, "T": T, "way": way, "slots a row": loops[way].slots}
                rows.append(row | {n: us[n] for n in ("median_us", "quartiles_us")})
    return rows


def _loss(state: Any, rest: Inputs, group: int | None, checkpoint: bool) -> Any:
    """The outputs' sum of squares; tokens in calls of one, in checkpointed groups."""
    if group is None:
        out, _ = decode(**rest, state=state)
        return jnp.sum(out.astype(jnp.float32) ** 2)
    weights = {n: x for n, x in rest.items() if n not in TOKENS}

    def one(state: Any, x: Inputs) -> Any:
        out, state = decode(
            **weights, **{n: y[:, None] for n, y in x.items()}, state=state
        )
        return state, jnp.sum(out.astype(jnp.float32) ** 2)

    def some(state: Any, x: Inputs) -> Any:
        return lax.scan(one, state, x)

    T = rest["a"].shape[1]
    swap = {n: jnp.moveaxis(rest[n], 1, 0) for n in TOKENS}
    groups = {n: x.reshape(T // group, group, *x.shape[1:]) for n, x in swap.items()}
    body = jax.checkpoint(some) if checkpoint else some
    return jnp.sum(lax.scan(body, state, groups)[1])


FORMS: dict[str, tuple[int | None, bool]] = {
    "one call": (None, False),
    "a scan of calls of one token": (1, False),
    "the same, checkpoint around each": (1, True),
    "the same, checkpoint around four": (4, True),
}


def gradients(given: argparse.Namespace) -> list[dict]:
    state, rest = split_state(model_inputs(Config(B=1, T=16)))
    rows = []
    for name, (group, checkpoint) in FORMS.items():
        loss = ft.partial(_loss, group=group, checkpoint=checkpoint)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(state, rest).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        samples = []
        for _ in range(12):
            start = time.perf_counter()
            jax.block_until_ready(compiled(state, rest))
            samples.append(time.perf_counter() - start)
        rows.append(
            {
                "form": name,
                "states": memory.temp_size_in_bytes / state.nbytes,
                "median_us": 1e6 * statistics.median(samples[2:]),
            }
        )
    return rows


TABLES = {"speculation": speculation, "gradients": gradients}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=TABLES, help="(all)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[8])
    parser.add_argument("--tokens", type=positive, nargs="+", default=[4])
    parser.add_argument("--seconds", type=seconds, default=3.0, help="a B and T")
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results: dict[str, Any] = {"machine": machine()}
    for name in [given.what] if given.what else TABLES:
        results[name] = rows = TABLES[name](given)
        for row in rows:
            print(", ".join(f"{n}: {x}" for n, x in row.items()))
        write_json(results, given.json)
