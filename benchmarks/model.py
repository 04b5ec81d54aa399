"""Times decode steps of a whole model, examples/qwen with random weights of a size.

A row is a way to decode, or a model without one of its parts; what a part takes is the
difference. 16 steps are one program, looped on the device, over rows of a full context;
milliseconds a step. Beside stand what the weights weigh, prompts, and speculation at a
stated acceptance: the draft head's tokens are made right at random, so often.
"""

import argparse
import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

import jax_gdn
from examples.qwen import config as sizes
from examples.qwen import generate, layers, model, weights
from examples.qwen.model import Options

from . import timing
from .loops import Program, compile_all
from .machine import machine
from .options import output_file, positive, seconds, write_json

STEPS = 16  # a program's

WAYS: dict[str, dict[str, Any]] = {
    "native": {},
    "xla": {"implementation": "xla"},
    "deferred": {"deferred": True},
    "bfloat16 state": {"state": "bfloat16"},
    "deferred, bfloat16 state": {"deferred": True, "state": "bfloat16"},
}


def _as_it_came(config: Any, w: Any, x: Any, cache: Any, at: Any) -> Any:
    return x, cache


# Where the example calls a part, and what stands in for it.
PARTS: dict[str, list[tuple[Any, str, Callable]]] = {
    "the gated delta rule": [
        (jax_gdn, "decode", lambda **given: (given["v"], given["state"]))
    ],
    "the short convolution": [
        (layers, "convolution", lambda w, x, ring, at: (x, ring))
    ],
    "GDN layers": [(layers, "linear_attention", _as_it_came)],
    "full attention": [(layers, "attention", _as_it_came)],
    "MLPs": [(layers, "mlp", lambda config, w, x: x)],
    "the head": [(model, "logits_of", lambda weights, x: x)],
}


@contextlib.contextmanager
def _replaced(parts: list[tuple[Any, str, Callable]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, other in parts:
            stack.enter_context(mock.patch.object(where, name, other))
        yield


def accepting(share: float) -> list[tuple[Any, str, Callable]]:
    """A head that takes so many of the drafts: these are always token 0.

    The true head's product stays, and what it says is overruled by digits of x.
    """
    true_logits = model.logits_of

    def logits_of(params: Any, x: Any) -> Any:
        logits = true_logits(params, x)
        digits = jnp.abs(x[..., 0].astype(jnp.float32)) * 1e4 % 1.0
        wrong = (digits >= share) & (x.shape[1] > 1)
        return logits.at[..., 0].set(jnp.where(wrong, -1e9, 1e9))

    return [(model, "logits_of", logits_of)]


class Model:
    """Weights of a size, and the loops over them."""

    def __init__(
        self,
        config: Any,
        params: Any,
        context: int,
        mesh: Mesh | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        self.config, self.params, self.context = config, params, context
        self.mesh = mesh
        self.compiler_options = compiler_options
        self._carries: dict[Any, list[Any]] = {}

    @property
    def weight_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self.params))

    def carry(self, options: Options) -> list[Any]:
        """Full caches of rows at staggered counts, their last tokens, and drafts."""
        B, dtype = options.places, jnp.bfloat16
        cache = generate.new_cache(self.config, options, dtype, self.mesh)
        if options.deferred:
            rows = jnp.arange(B + 1, dtype=jnp.int32)
            # As after a whole cycle: windows begin at different tokens.
            cache["cursors"] = jnp.stack([rows * 0, rows % 16 + 1], axis=1)
        drafted = jnp.zeros((B, 1, self.config.hidden_size), dtype)
        carry = (cache, jnp.zeros(B, jnp.int32), drafted, jnp.zeros((), jnp.int32))
        key = str(jax.tree.map(lambda x: (x.shape, x.dtype), carry))
        return self._carries.setdefault(key, [carry])

    def forget(self) -> None:
        self._carries.clear()

    def loop(self, parts: list[Any] = (), prompts: int = 0, **given: Any) -> Program:
        options = Options(context=max(self.context, prompts), **given)
        program = self._prompt(options, prompts) if prompts else self._steps(options)
        carry, calls = self.carry(options), 1 if prompts else STEPS
        with _replaced(list(parts)):
            return Program(program, self.params, carry, calls, self.compiler_options)

    def _steps(self, options: Options) -> Callable:
        B, room = options.places, STEPS * (1 + options.drafted)

        def steps(params: Any, carry: Any) -> Any:
            cache, token, drafted, kept = carry
            cache = cache | {"lengths": jnp.full(B, self.context - room, jnp.int32)}
            left = jnp.full(B, room + 1, jnp.int32)
            given = self.config, options, params, cache, token, drafted, left
            result = inspect.unwrap(model.decode)(*given, jax.random.key(0), STEPS)
            made, token, drafted, _, cache = result
            return cache, token, drafted, kept + jnp.sum(made >= 0, dtype=jnp.int32)

        return steps

    def _prompt(self, options: Options, T: int) -> Callable:
        rows = jnp.arange(options.places, dtype=jnp.int32)

        def prompt(params: Any, carry: Any) -> Any:
            cache, token, drafted, kept = carry
            tokens = lax.broadcasted_iota(jnp.int32, (options.places, T), 1)
            tokens = (tokens + token[:, None]) % self.config.vocab_size
            token, drafted, cache = inspect.unwrap(model.prompt)(
                self.config, options, params, cache, tokens, rows,
                jnp.full_like(rows, T), jax.random.key(0),
            )  # fmt: skip
            return cache, token, drafted, kept

        return prompt


def measure(loops: dict[str, Program], given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each, and the tokens that all rows together keep a step."""
    compile_all(loops.values())
    kept = {}
    for name, loop in loops.items():
        loop.run(1)
        before = int(loop.carry[0][3])
        loop.run(4)
        kept[name] = (int(loop.carry[0][3]) - before) / (4 * loop.calls)
    timings = timing.measure(loops, given.seconds * len(loops), rounds=given.rounds)
    return {
        name: {
            "ms": 1e3 * x.median,
            "quartiles_ms": [1e3 * x.low, 1e3 * x.high],
            "tokens_a_step": kept[name],
        }
        for name, x in timings.items()
    }


def _xla_option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False}.get(value.lower(), value)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", choices=sizes.SIZES, default="tiny")
    add("--directory", type=Path, help="weights to read; default: random ones")
    add("--batch", type=positive, nargs="*", default=[1, 8], help="rows (1 8)")
    add("--context", type=positive, default=1024, help="tokens of a row (1024)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--parts", nargs="*", choices=PARTS, default=["the gated delta rule"],
        help="to leave out, one at a time")  # fmt: skip
    add("--drafted", type=positive, metavar="N", help="speculation with so many drafts")
    add("--acceptance", type=float, nargs="+", default=[0.7], help="of a draft (0.7)")
    add("--prompts", nargs="*", default=[], help="B x T, as 1x4096")
    add("--mesh", type=positive, default=1, help="devices to split over (1)")
    add("--xla", nargs="*", type=_xla_option, default=[], metavar="NAME=VALUE",
        help="options of XLA's compiler")  # fmt: skip
    add("--seconds", type=seconds, default=2.0, help="a row")
    add("--rounds", type=positive, default=7)
    add("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    devices = np.array(jax.devices()[: given.mesh])
    mesh = Mesh(devices, ("heads",)) if given.mesh > 1 else None
    config, xla = sizes.SIZES[given.size], dict(given.xla)
    if given.directory:
        config = sizes.read(given.directory)
        params = weights.load(config, given.directory, mesh, jnp.bfloat16)
    else:
        drafts = int(bool(given.drafted))
        config = dataclasses.replace(config, mtp_num_hidden_layers=drafts)
        params = weights.random(config, mesh)
    timed = Model(config, params, given.context, mesh, xla)
    report: dict[str, Any] = {"machine": machine(), "size": given.size}
    report |= {"context": given.context, "mesh": given.mesh, "xla": xla}
    report["results"] = []
    report["weight_gb"] = timed.weight_bytes / 1e9
    print(f"{given.size}: {report['weight_gb']:.2f} GB of weights")

    def done(name: str, B: int, loops: dict[str, Program], **more: Any) -> None:
        rows = measure(loops, given)
        timed.forget()
        report["results"].append({"B": B, "rows": rows, **more})
        print(name, flush=True)
        for row, x in rows.items():
            print(f"  {row:36} {x['ms']:9.3f} ms, {x['tokens_a_step']:.2f} tokens")
        write_json(report, given.json)

    for B in given.batch:
        loops = {n: timed.loop(places=B, **WAYS[n]) for n in given.ways}
        for name in given.parts:
            loops[f"without {name}"] = timed.loop(PARTS[name], places=B)
        for share in given.acceptance if given.drafted else ():
            loops[f"{given.drafted} drafts, {share:.0%} accepted"] = timed.loop(
                accepting(share), places=B, deferred=True, drafted=given.drafted
            )
        done(f"B = {B}", B, loops)
    for shape in given.prompts:
        B, T = map(positive, shape.split("x"))
        parts = {"prompts": [], "without the gated delta rule": _NO_PREFILL}
        loops = {n: timed.loop(x, prompts=T, places=B) for n, x in parts.items()}
        done(f"prompts, {shape}", B, loops, T=T)


_NO_PREFILL: list[tuple[Any, str, Callable]] = [
    (jax_gdn, "prefill", lambda **given: (given["v"], given["state"]))
]
