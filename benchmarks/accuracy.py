"""Prints how exact `decode` is, against the tests' float64 loop.

`errors`: the largest error of the state and of a float32 output, for every layout,
state dtype, form of decay, number of tokens and K. `drift`: the rms error of the state
and of a float32 output after 1, 100 and 1000 steps, for each dtype of the state, as
`decode` and as `decode_deferred` with a window of 16 leave it.
`tokens`: the time of eight tokens in one call against eight calls.
"""

import argparse
import dataclasses
import functools as ft
import itertools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jax_gdn
from tests.cases import DTYPES, F32, LAYOUTS, SIZES, Case
from tests.oracle import decode64

from .options import output_file, write_json


def relative_error(actual, expected) -> float:
    """Returns the largest error over the largest value."""
    error = np.abs(np.asarray(actual).astype(np.float64) - expected).max()
    return float(error / np.abs(expected).max())


def rms_error(actual, expected) -> float:
    """Returns the root mean square of the error over that of the values."""
    error = np.asarray(actual).astype(np.float64) - expected
    return float(np.sqrt(np.mean(error**2) / np.mean(expected**2)))


def errors() -> list[dict]:
    rows = []
    forms = itertools.product(LAYOUTS, DTYPES, (False, True), (1, 2, 5, 33))
    for layout, state, per_channel, T in forms:
        form: dict = {
            "layout": layout,
            "state": state,
            "per_channel": per_channel,
            "T": T,
        }
        row: dict = dict(form)
        for K in SIZES:
            case = Case(**form, **F32, K=K, V=64, B=1)
            out, new = jax_gdn.decode(
                **case.inputs(), state_layout=layout, implementation="native"
            )
            exact_out, exact = decode64(**case.inputs(), state_layout=layout)
            row[f"K {K}"] = [
                relative_error(new, exact),
                relative_error(out, exact_out),
            ]
        rows.append(row)
    return rows


# What is remembered, and the `A_log` that makes it so.
DECAYS = {"a hundred steps": -4.0, "almost everything": -12.0}
AFTER = (1, 100, 1000)


def drift() -> list[dict]:
    """Many steps with a state of each dtype, stored after every one or every 16th."""
    rows = []
    forms = itertools.product(DECAYS.items(), DTYPES, (False, True))
    for (remembers, A_log), state, deferred in forms:
        errors = dict(_errors_along(state, A_log, deferred))
        name = f"{state}, deferred" if deferred else state
        for what, of in (("state", 0), ("out", 1)):
            row: dict = {"remembers": remembers, "state": name, "error of": what}
            rows.append(row | {f"{n} steps": errors[n][of] for n in AFTER})
    return rows


def _errors_along(
    state: str, A_log: float, deferred: bool
) -> Iterator[tuple[int, tuple]]:
    """Yields a number of steps, and the errors of the state and of `out`, rms."""
    case = Case(B=1, H=1, HV=2, state=state, **F32)
    first = case.inputs()
    first["A_log"][:] = A_log
    now, exact = jnp.asarray(first["state"]), first["state"].astype(np.float64)
    pending = jax_gdn.new_pending(now, case.H, k_dtype=jnp.float32)
    ring = (pending, jax_gdn.new_cursors(1)) if deferred else ()

    @ft.partial(jax.jit, donate_argnums=(0, 1))
    def step(state, ring, rest):
        if not ring:
            out, state = jax_gdn.decode(state=state, **rest)
            return out, state, ring
        pending, cursors = ring
        out, state, pending = jax_gdn.decode_deferred(
            state=state, pending=pending, cursors=cursors, **rest
        )
        return out, state, (pending, jax_gdn.advance_cursors(cursors, pending, 1))

    for n in range(1, max(AFTER) + 1):
        rest: dict = dataclasses.replace(case, seed=n).inputs()
        rest |= {"A_log": first["A_log"], "dt_bias": first["dt_bias"]}
        del rest["state"]
        out, now, ring = step(now, ring, rest)
        exact_out, exact = decode64(state=exact, **rest)
        if n in AFTER:
            whole = now.astype(jnp.float32)
            whole = jax_gdn.materialize(whole, *ring) if ring else whole
            yield n, (rms_error(whole, exact), rms_error(out, exact_out))


def tokens() -> list[dict]:
    rows = []
    for B in (1, 32):
        case = Case(B=B, T=8, H=16, HV=32)
        inputs = {name: jnp.asarray(x) for name, x in case.inputs().items()}
        state = inputs.pop("state")
        sliced = ("q", "k", "v", "a", "b")
        singles = [
            {n: x[:, t : t + 1] if n in sliced else x for n, x in inputs.items()}
            for t in range(8)
        ]

        def call(state, rest):
            return jax_gdn.decode(state=state, **rest)[::-1]

        step = jax.jit(call, donate_argnums=0)
        together, apart = jnp.array(state), jnp.array(state)
        times: dict[str, list[float]] = {"one call": [], "eight calls": []}
        for _ in range(30):
            start = time.perf_counter()
            together = jax.block_until_ready(step(together, inputs)[0])
            middle = time.perf_counter()
            for single in singles:
                apart, _ = step(apart, single)
            jax.block_until_ready(apart)
            times["one call"].append(middle - start)
            times["eight calls"].append(time.perf_counter() - middle)
        medians = {n: statistics.median(t[3:]) * 1e6 for n, t in times.items()}
        ratio = medians["eight calls"] / medians["one call"]
        rows.append({"B": B, **{f"{n}, us": t for n, t in medians.items()}})
        rows[-1]["ratio"] = ratio
    return rows


def _text(value) -> str:
    if isinstance(value, list):
        return " / ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.1 else f"{value:.3g}"
    return str(value)


TABLES = {"errors": errors, "drift": drift, "tokens": tokens}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", nargs="?", choices=TABLES, help="(all)")
    parser.add_argument("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    results: dict = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jax_gdn": jax_gdn.__version__,
    }
    for name in [given.what] if given.what else TABLES:
        results[name] = rows = TABLES[name]()
        print(f"\n{name}, on {results['device']}\n")
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(map(_text, row.values())) + " |")
    write_json(results, given.json)
