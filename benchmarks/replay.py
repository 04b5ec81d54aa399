"""Times the CUDA kernels alone, replayed from a CUDA graph over cold states.

Neither XLA nor Python is in the time: a graph holds calls of `decode`'s handler over
states that together leave the L2 cache, each with operands of its own. All take turns
in one run with in-place passes over the same states. The last rows of a first call are
checked against float64. Without options, every kernel that ships is timed. To compare
two builds, install each into an environment and run both from here. Needs a GPU.
"""

import argparse
import dataclasses
import functools as ft
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jax_gdn import _registration
from tests.cases import DTYPES, LAYOUTS, SIZES
from tests.ffi_client import plain_attributes

from . import machine, options, roofline, timing
from .cuda_driver import Buffer, Driver, Graph, StreamClient
from .workload import WEIGHTS, Config, rows_of, verify

BYTES_A_GRAPH = 2 * 10**9  # read and written: the start of a graph must not count
# Seconds: a graph starts and ends on a stream of its own, in some 20 us.
GRAPH_ROUND = 0.012
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Of K other than 128.
SIZE_BATCHES = (1, 8, 16, 64)
# Of what is not Qwen3-Next's form, with one token.
FORM_BATCHES = (1, 8, 64, 256)
FORMS: tuple[dict[str, Any], ...] = ({"per_channel": True}, {"gate_dtype": "float32"})


class Replay:
    """The graphs over the same states: one B, K and dtype."""

    def __init__(self, cuda: Driver, decode: Any, passes: Any, config: Config):
        self._cuda, self._decode, self._passes = cuda, decode, passes
        self._rows, self._repeats = rows_of(config.B)
        self._buffers: list[Buffer] = []
        self._state = self._small(config).arrays()["state"]
        self._states = [self._buffer(self._state) for _ in range(config.cold_sets)]
        round_bytes = 2 * config.cold_sets * config.state_bytes
        self._rounds = math.ceil(BYTES_A_GRAPH / round_bytes)

    def _small(self, config: Config) -> Config:
        """Returns the rows that a batch repeats."""
        return dataclasses.replace(config, B=self._rows)

    def _buffer(self, array: np.ndarray, repeats: int | None = None) -> Buffer:
        repeats = self._repeats if repeats is None else repeats
        self._buffers.append(Buffer(self._cuda, array, repeats))
        return self._buffers[-1]

    def decode(self, config: Config) -> tuple[str, Graph]:
        """Returns the kernel's symbol, and the graph; raises if a result is wrong."""
        inputs = self._small(config).arrays()
        fresh = self._buffer(inputs["state"])
        symbol, out, enqueue = self._call(config, inputs, fresh)
        enqueue()
        self._cuda.StreamSynchronize(self._cuda.stream)
        results = out.last(self._rows), fresh.last(self._rows)
        verify(symbol, inputs, *results, config.layout)
        calls = [self._call(config, inputs, state)[2] for state in self._states]
        return symbol, Graph(self._cuda, calls * self._rounds)

    def _call(
        self, config: Config, inputs: dict[str, np.ndarray], state: Buffer
    ) -> tuple[str, Buffer, Callable[[], None]]:
        """Returns a call over a state: the kernel's symbol, `out`, what enqueues it."""
        operands = {
            name: self._buffer(x, 1 if name in WEIGHTS else None)
            for name, x in inputs.items()
            if name not in ("state", "output")
        }
        operands |= {"state": state}
        order = [operands[name] for name in inputs if name != "output"]
        out = self._buffer(np.zeros_like(inputs.get("output", inputs["v"])))
        symbol = symbol_of(config, {**operands, "out": out})
        attributes = plain_attributes(config.K, config.layout)

        def enqueue() -> None:
            if error := self._decode.call(order, [out, state], attributes):
                raise RuntimeError(error)

        return symbol, out, enqueue

    def passes(self) -> dict[str, Graph]:
        """Returns the in-place passes by their names."""
        graphs = {}
        entry_bytes = self._state.dtype.itemsize
        for number, name in enumerate(self._passes.PASSES):
            calls = [
                ft.partial(
                    self._passes.launch,
                    *(number, x.address, x.nbytes, entry_bytes),
                    self._cuda.stream.value,
                )
                for x in self._states
            ]
            calls[0]()  # loads the kernel
            graphs[f"pass {name}"] = Graph(self._cuda, calls * self._rounds)
        return graphs

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()


def symbol_of(config: Config, operands: dict[str, Any]) -> str:
    """Returns the kernel that the library takes for buffers, `out` among them."""
    assert _registration.cuda is not None
    plan = _registration.cuda.plan(
        {name: (x.address, x.dtype, list(x.shape)) for name, x in operands.items()},
        scale=config.K**-0.5,
        use_qk_l2norm=True,
        state_layout=LAYOUTS.index(config.layout),
    )
    return plan["symbol"]


def groups(given: argparse.Namespace) -> Iterator[dict[str, Config]]:
    """Yields the rows that share their states, by name."""
    for dtype in given.state_dtype:
        for K in given.size:
            sizes = BATCHES if K == 128 else SIZE_BATCHES
            for B in given.batch or sizes:
                base = Config(B, state_dtype=dtype, K=K, V=K)
                yield dict(_rows(base, given.layout, given.tokens))


def _rows(
    base: Config, layouts: list[str], tokens: list[int]
) -> Iterator[tuple[str, Config]]:
    for layout in layouts:
        for T in tokens:
            config = dataclasses.replace(base, layout=layout, T=T)
            yield f"{layout} T={T}", config
            if T == 1 and base.K == 128 and base.B in FORM_BATCHES:
                for form in FORMS:
                    other = dataclasses.replace(config, **form)
                    differs = other.form.removeprefix(config.form)
                    yield f"{layout} T={T}{differs}", other


def measure(replay: Replay, rows: dict[str, Config], seconds: float) -> dict[str, Any]:
    graphs: dict[str, Graph] = {}
    kernels = {}
    for name, config in rows.items():
        kernels[name], graphs[name] = replay.decode(config)
    graphs |= replay.passes()
    timings = timing.measure(graphs, seconds, 9, queued=True, shortest=GRAPH_ROUND)
    for graph in graphs.values():
        graph.free()
    best = min(t.median for name, t in timings.items() if name not in kernels)
    base = next(iter(rows.values()))
    return {
        "B": base.B,
        "state_dtype": base.state_dtype,
        "K": base.K,
        "roofline_us": 1e6 * best,
        "rows": {
            name: {
                "kernel": kernels.get(name),
                "median_us": 1e6 * times.median,
                "quartiles_us": [1e6 * times.low, 1e6 * times.high],
                "of_roofline": best / times.median,
            }
            for name, times in timings.items()
        },
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    add = ft.partial(parser.add_argument, nargs="+")
    add("--batch", type=options.positive, help="(1 to 512; other K: 1 8 16 64)")
    add("--size", type=int, choices=SIZES, default=(128, 64, 192, 256), help="K")
    add("--layout", choices=LAYOUTS, default=LAYOUTS)
    add("--state-dtype", choices=DTYPES, default=list(DTYPES))
    add("--tokens", type=options.positive, default=(1, 4))
    parser.add_argument("--seconds", type=options.seconds, default=0.5, help="a group")
    parser.add_argument("--json", type=options.output_file)


def run(given: argparse.Namespace) -> None:
    passes, cuda = roofline.native_module(), Driver()
    assert _registration.cuda is not None
    decode = _registration.cuda.handlers()[_registration.DECODE_TARGET]["execute"]
    client = StreamClient(decode, cuda.stream)
    results = []
    for rows in groups(given):
        replay = Replay(cuda, client, passes, next(iter(rows.values())))
        results.append(result := measure(replay, rows, given.seconds))
        replay.free()
        print(f"{result['state_dtype']}, K {result['K']}, B {result['B']}, us a call:")
        for name, row in result["rows"].items():
            low, high = row["quartiles_us"]
            print(
                f"  {name:48} {row['median_us']:8.2f} ({low:.2f} to {high:.2f}) "
                f"{row['of_roofline']:6.1%} {row['kernel'] or ''}",
                flush=True,
            )
        # What is measured so far, and the clocks that the GPU then has.
        options.write_json({"machine": machine.host(), "results": results}, given.json)
