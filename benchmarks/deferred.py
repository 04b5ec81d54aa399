"""Times the CUDA kernels of `decode_deferred` beside `decode`, in CUDA graphs.

A window's whole cycle: rows stand at staggered counts of pending tokens, so in every
call as many fold as in the mean of all calls. The cheapest and the dearest call are
timed too: no row folds, every row does. With several tokens `decode` that leaves a
snapshot a token stands beside, which is what deferred writes replace. Needs a GPU.
"""

import argparse
import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_gdn import _registration
from tests.cases import DTYPES, LAYOUTS
from tests.ffi_client import plain_attributes
from tests.oracle import OUT_TOLERANCE, assert_close, deferred64

from . import machine, options, roofline, timing
from .cuda_driver import Buffer, Driver, Graph, StreamClient
from .replay import BYTES_A_GRAPH, GRAPH_ROUND
from .workload import WEIGHTS, Config, rows_of

WINDOW = 16
BATCHES = (1, 4, 8, 32, 64, 256, 512)
PASS = "256 x 1, loads streaming, stores streaming"  # one of the fastest everywhere
# Where the rows of a call stand in their windows.
PHASES = ("whole cycle", "no row folds", "all rows fold")
SNAPSHOT_BYTES = 40 * 2**30  # of a pool that fits beside the states


def counts_of(phase: str, B: int, T: int, start: int = 0) -> np.ndarray:
    """How many tokens each row has pending before a call; rows from `start` on."""
    steady = np.arange(T, WINDOW + 1, T)  # a fold leaves the call's T
    if phase == "no row folds":
        steady = steady[:-1]
    if phase == "all rows fold":
        steady = steady[-1:]
    return steady[(start + np.arange(B)) % len(steady)]


def bytes_of(config: Config, phase: str) -> float:
    """What a call must move: the state, and entries of the rings."""
    counts = counts_of(phase, WINDOW, config.T)
    folds = np.mean(counts + config.T > WINDOW)
    entry = config.HV * (4 * config.V + 4) + config.H * 2 * config.K
    entries = config.B * (np.mean(counts) + config.T)  # read, and appended
    return float(config.state_bytes * (1 + folds) + entry * entries)


class Calls:
    """Graphs of calls over states that together leave the L2 cache."""

    def __init__(self, cuda: Driver, clients: dict[str, StreamClient], config: Config):
        self._cuda, self._clients, self.config = cuda, clients, config
        self._rows, self._repeats = rows_of(config.B)
        self._buffers: list[Buffer] = []
        small = dataclasses.replace(config, B=self._rows)
        self._inputs = small.arrays()
        sets = config.cold_sets
        self.states = [self.put(self._inputs["state"]) for _ in range(sets)]
        self._rounds = math.ceil(BYTES_A_GRAPH / (2 * sets * config.state_bytes))

    def put(self, array: np.ndarray, repeats: int | None = None) -> Buffer:
        repeats = self._repeats if repeats is None else repeats
        self._buffers.append(Buffer(self._cuda, array, repeats))
        return self._buffers[-1]

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()

    def graph(self, call_over: Callable[[Buffer], Callable[[], None]]) -> Graph:
        calls = [call_over(state) for state in self.states]
        calls[0]()  # loads the kernel
        return Graph(self._cuda, calls * self._rounds)

    def _call(self, name, state, others=(), results=(), **attributes):
        """Returns what enqueues a call over a state, and its `out`."""
        operands = [
            state if n == "state" else self.put(x, 1 if n in WEIGHTS else None)
            for n, x in self._inputs.items()
        ]
        out = self.put(np.zeros_like(self._inputs["v"]))
        config = self.config
        attributes = plain_attributes(config.K, config.layout) | attributes

        def enqueue() -> None:
            given = [*operands, *others], [out, state, *results]
            if error := self._clients[name].call(*given, attributes):
                raise RuntimeError(error)

        return enqueue, out

    def decode(self, state: Buffer) -> Callable[[], None]:
        return self._call("decode", state)[0]

    def snapshots(self) -> Callable[[Buffer], Callable[[], None]] | None:
        """Calls that leave a state after each token; None where that is too much."""
        B, T = self.config.B, self.config.T
        if self.config.state_bytes * (T + 1) > SNAPSHOT_BYTES:
            return None
        pool = self.put(self._inputs["state"][:1], B * (T + 1))
        slots = np.arange(B * (T + 1), dtype=np.int32).reshape(B, T + 1)
        reads, writes = slots[:, 0].copy(), slots[:, 1:].copy()
        others = [self.put(reads, 1), self.put(writes, 1)]
        bits = np.int32(6)  # state_indices and output_state_indices
        return lambda _: self._call("decode", pool, others, optional_operands=bits)[0]

    def ring(self, phase: str, start: int = 0) -> dict[str, np.ndarray]:
        """What the rows that a batch repeats have pending, and all cursors."""
        config, rng = self.config, np.random.default_rng(0)
        R = WINDOW + config.T
        k = rng.standard_normal((self._rows, config.H, R, config.K))
        u = 0.1 * rng.standard_normal((self._rows, config.HV, R, config.V))
        first = np.arange(config.B) * 5 % R
        counts = counts_of(phase, config.B, config.T, start)
        return {
            "pending.k": k.astype(DTYPES["bfloat16"]),
            "pending.u": u.astype(np.float32),
            "pending.decay": np.full(u.shape[:3], 0.99, np.float32),
            "cursors": np.stack([first, counts], axis=1).astype(np.int32),
        }

    def deferred(self, phase: str) -> Callable[[Buffer], Callable[[], None]]:
        # Over the states in turn, a small batch too goes through the whole window.
        starts = {x.address: i * self.config.B for i, x in enumerate(self.states)}
        return lambda x: self._deferred(phase, x, starts[x.address])[0]

    def _deferred(self, phase: str, state: Buffer, start: int = 0):
        *rings, cursors = self.ring(phase, start).values()
        others = [*map(self.put, rings), self.put(cursors, 1)]
        window = np.int32(WINDOW)
        return self._call("deferred", state, others, others[:3], window=window)

    def verify(self) -> None:
        """Raises `ArithmeticError` unless `out` is that of the float64 loop."""
        for phase in PHASES:
            enqueue, out = self._deferred(phase, self.put(self._inputs["state"]))
            enqueue()
            self._cuda.StreamSynchronize(self._cuda.stream)
            *pending, cursors = self.ring(phase).values()
            want, _, _ = deferred64(
                **self._inputs,
                pending=pending,
                cursors=cursors,
                window=WINDOW,
                state_layout=self.config.layout,
            )
            try:
                assert_close(out.last(self._rows), want, OUT_TOLERANCE, "out")
            except AssertionError as error:
                raise ArithmeticError(f"{self.config.family}: {error}") from error


def measure(cuda: Driver, clients, passes: Any, config: Config, seconds: float) -> dict:
    calls = Calls(cuda, clients, config)
    graphs = {"decode": calls.graph(calls.decode)}
    if config.T > 1 and (snapshots := calls.snapshots()):
        graphs["snapshots"] = calls.graph(snapshots)
    for phase in PHASES:
        graphs[phase] = calls.graph(calls.deferred(phase))
    entry_bytes = DTYPES[config.state_dtype].itemsize
    launch = ft.partial(passes.launch, passes.PASSES.index(PASS))
    graphs["pass"] = calls.graph(
        lambda x: ft.partial(
            launch, x.address, x.nbytes, entry_bytes, cuda.stream.value
        )
    )
    timings = timing.measure(graphs, seconds, 9, queued=True, shortest=GRAPH_ROUND)
    for graph in graphs.values():
        graph.free()
    calls.free()
    bytes_a_second = 2 * config.state_bytes / timings["pass"].median
    rows = {
        name: {
            "median_us": 1e6 * times.median,
            "quartiles_us": [1e6 * times.low, 1e6 * times.high],
        }
        for name, times in timings.items()
    }
    base = rows.get("snapshots", rows["decode"])["median_us"]
    for phase in PHASES:
        own = 1e6 * bytes_of(config, phase) / bytes_a_second
        row = rows[phase]
        row["of_roofline"] = own / row["median_us"]
        row["times_faster"] = base / row["median_us"]
    sizes = {
        name: getattr(config, name) for name in ("B", "T", "layout", "state_dtype")
    }
    return {**sizes, "window": WINDOW, "rows": rows}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = ft.partial(parser.add_argument, nargs="+")
    add("--batch", type=options.positive, default=BATCHES)
    add("--layout", choices=LAYOUTS, default=LAYOUTS)
    add("--state-dtype", choices=DTYPES, default=list(DTYPES))
    add("--tokens", type=options.positive, default=(1, 4, 8))
    parser.add_argument("--seconds", type=options.seconds, default=0.15, help="a group")
    parser.add_argument("--json", type=options.output_file)


def run(given: argparse.Namespace) -> None:
    passes, cuda = roofline.native_module(), Driver()
    assert _registration.cuda is not None
    handlers = _registration.cuda.handlers()
    targets = {
        "decode": _registration.DECODE_TARGET,
        "deferred": _registration.DEFERRED_TARGET,
    }
    clients = {
        name: StreamClient(handlers[target]["execute"], cuda.stream)
        for name, target in targets.items()
    }
    results = []
    for dtype in given.state_dtype:
        for layout in given.layout:
            for T in given.tokens:
                base = Config(8, T=T, state_dtype=dtype, layout=layout)
                check = Calls(cuda, clients, base)
                check.verify()
                check.free()
                for B in given.batch:
                    config = dataclasses.replace(base, B=B)
                    result = measure(cuda, clients, passes, config, given.seconds)
                    results.append(result)
                    _print(result)
                    options.write_json(
                        {"machine": machine.host(), "results": results}, given.json
                    )


def _print(result: dict) -> None:
    head = "{state_dtype} {layout}, T {T}, B {B}:".format(**result)
    times = ", ".join(f"{n} {r['median_us']:.2f}" for n, r in result["rows"].items())
    cycle = result["rows"]["whole cycle"]
    print(
        f"{head} {times}; {cycle['times_faster']:.2f} times faster, "
        f"{cycle['of_roofline']:.0%} of its roofline",
        flush=True,
    )
