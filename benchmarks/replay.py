"""Times the CUDA kernels alone, replayed from a CUDA graph over cold states.

    python benchmarks/replay.py [--batch B ...] [--layout L ...] [--state-dtype D ...]
                                [--tokens T ...] [--seconds S] [--json FILE]

Neither XLA nor Python is in the time: a graph holds calls over states that together
leave the L2 cache, each with operands of its own, planned as `decode` plans them, of
the machine code that ships. All take turns in one run with in-place passes over the
same states, the best of which is the limit. The last rows of a first call are checked
against float64. Needs a GPU and cuobjdump.
"""

import argparse
import ctypes
import dataclasses
import functools as ft
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The inputs are made on the host; the GPU is this program's own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from jax_gdn import _bench, _bench_machine, _bench_report, _bench_run, _cuda
from jax_gdn.cli import positive

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from ptx.launch import plan_decode
from ptx.module import find_cuobjdump

BYTES_A_GRAPH = 2 * 10**9  # read and written: the start of a graph must not count
CACHING = ("plain", "streaming", "around")  # in the order of cuda/state.cuh


class Cuda:
    """The driver's functions by name, without their `cu`; errors raise."""

    def __init__(self):
        self._library = ctypes.CDLL("libcuda.so.1")
        self.Init(0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.DeviceGet(ctypes.byref(device), 0)
        self.DevicePrimaryCtxRetain(ctypes.byref(context), device)
        self.CtxSetCurrent(context)
        self.stream = ctypes.c_void_p()
        self.StreamCreate(ctypes.byref(self.stream), 1)  # non-blocking

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, f"cu{name}")

        def call(*arguments: Any) -> None:
            if status := function(*arguments):
                text = ctypes.c_char_p()
                self._library.cuGetErrorString(status, ctypes.byref(text))
                raise RuntimeError(f"cu{name}: {(text.value or b'').decode()}")

        return call


class Buffer:
    """Memory of the GPU that holds an array, its first axis repeated."""

    def __init__(self, cuda: Cuda, array: np.ndarray, repeats: int = 1):
        self._cuda = cuda
        self.dtype, self.row = array.dtype, array.shape[1:]
        self.shape = (array.shape[0] * repeats, *self.row)
        self.row_bytes = array.nbytes // len(array)
        pointer = ctypes.c_uint64()
        cuda.MemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(array.nbytes * repeats))
        self.address = pointer.value
        data = np.ascontiguousarray(array)
        for i in range(repeats):
            cuda.MemcpyHtoD_v2(
                ctypes.c_uint64(self.address + i * array.nbytes),
                data.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_size_t(array.nbytes),
            )
        # Else the copy may still be under way, and other streams do not wait for it.
        cuda.CtxSynchronize()

    def last(self, rows: int) -> np.ndarray:
        result = np.empty((rows, *self.row), self.dtype)
        first = self.shape[0] - rows
        self._cuda.MemcpyDtoH_v2(
            result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(self.address + first * self.row_bytes),
            ctypes.c_size_t(result.nbytes),
        )
        return result

    def free(self) -> None:
        self._cuda.MemFree_v2(ctypes.c_uint64(self.address))


class Functions:
    """Kernels by symbol, of the machine code in the built module."""

    def __init__(self, cuda: Cuda):
        self._cuda = cuda
        self._modules = []
        if find_cuobjdump() is None:
            raise FileNotFoundError("no cuobjdump: pip install nvidia-cuda-cuobjdump")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [str(find_cuobjdump()), "-xelf", "all", _cuda.__file__],
                check=True,
                capture_output=True,
                cwd=folder,
            )
            for path in sorted(Path(folder).glob("*.cubin")):
                module = ctypes.c_void_p()
                cuda.ModuleLoadData(ctypes.byref(module), path.read_bytes())
                self._modules.append(module)

    @ft.cached_property
    def by_symbol(self) -> dict[str, ctypes.c_void_p]:
        found = {}
        for module in self._modules:
            count, name = ctypes.c_uint(), ctypes.c_char_p()
            self._cuda.ModuleGetFunctionCount(ctypes.byref(count), module)
            functions = (ctypes.c_void_p * count.value)()
            self._cuda.ModuleEnumerateFunctions(functions, count, module)
            for function in functions:
                pointer = ctypes.c_void_p(function)
                self._cuda.FuncGetName(ctypes.byref(name), pointer)
                found[(name.value or b"").decode()] = pointer
        return found


@dataclasses.dataclass(frozen=True)
class Launch:
    function: ctypes.c_void_p
    grid: tuple[int, int, int]
    threads: int
    arguments: list[Any]  # ctypes values
    shared_bytes: int = 0

    def enqueue(self, cuda: Cuda) -> None:
        pointers = (ctypes.c_void_p * len(self.arguments))(
            *(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in self.arguments)
        )
        cuda.LaunchKernel(
            *(self.function, *self.grid, self.threads, 1, 1),
            *(self.shared_bytes, cuda.stream, pointers, None),
        )


class Graph:
    """A chain, in the sense of `_bench.measure`: a captured graph, launched again."""

    def __init__(self, cuda: Cuda, launches: list[Launch]):
        self._cuda, self.calls = cuda, len(launches)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.StreamBeginCapture_v2(cuda.stream, 2)  # relaxed
        for launch in launches:
            launch.enqueue(cuda)
        cuda.StreamEndCapture(cuda.stream, ctypes.byref(graph))
        cuda.GraphInstantiateWithFlags(
            ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
        )
        cuda.GraphDestroy(graph)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._cuda.GraphLaunch(self._executable, self._cuda.stream)

    def wait(self) -> None:
        self._cuda.StreamSynchronize(self._cuda.stream)

    def free(self) -> None:
        self._cuda.GraphExecDestroy(self._executable)


class Replay:
    """The graphs for one B and dtype, over the same states."""

    def __init__(self, cuda: Cuda, functions: Functions, B: int, state_dtype: str):
        self._cuda, self._functions = cuda, functions.by_symbol
        self._config = ft.partial(_bench.Config, state_dtype=state_dtype)
        self._rows, self._repeats = _bench_run.rows_of(B)
        self._buffers: list[Buffer] = []
        config = self._config(B)
        self.state_bytes = config.state_bytes
        inputs = self._inputs(config.layout, 1)
        sets = _bench_run.cold_sets(config)
        self._states = [self._buffer(inputs["state"]) for _ in range(sets)]
        self._rounds = math.ceil(BYTES_A_GRAPH / (2 * sets * config.state_bytes))

    def _inputs(self, layout: str, T: int) -> dict[str, np.ndarray]:
        config = self._config(self._rows, T=T, layout=layout)
        return {n: np.asarray(x) for n, x in _bench.model_inputs(config).items()}

    def _buffer(self, array: np.ndarray, repeats: int | None = None) -> Buffer:
        repeats = self._repeats if repeats is None else repeats
        self._buffers.append(Buffer(self._cuda, array, repeats))
        return self._buffers[-1]

    def decode(self, layout: str, T: int) -> tuple[str, Graph]:
        """Returns the kernel's symbol, and the graph; raises if a result is wrong."""
        inputs = self._inputs(layout, T)
        fresh = self._buffer(inputs["state"])
        symbol, first, out = self._planned(inputs, fresh, layout)
        first.enqueue(self._cuda)
        self._cuda.StreamSynchronize(self._cuda.stream)
        results = out.last(self._rows), fresh.last(self._rows)
        _bench.verify(symbol, inputs, *results, layout)
        launches = [self._planned(inputs, state, layout)[1] for state in self._states]
        return symbol, Graph(self._cuda, launches * self._rounds)

    def _planned(
        self, inputs: dict[str, np.ndarray], state: Buffer, layout: str
    ) -> tuple[str, Launch, Buffer]:
        """Returns a call over a state: the kernel's symbol, the launch, and `out`."""
        whole = ("A_log", "dt_bias")
        operands = {
            name: self._buffer(x, 1 if name in whole else None)
            for name, x in inputs.items()
            if name != "state"
        }
        operands |= {"state": state, "out": self._buffer(np.zeros_like(inputs["v"]))}
        described = {
            name: (x.address, x.dtype.name, list(x.shape))
            for name, x in operands.items()
        }
        plan = plan_decode(described, scale=128**-0.5, state_layout=layout)
        launch = Launch(
            self._functions[plan["symbol"]],
            plan["grid"],
            plan["block"][0],
            [ctypes.create_string_buffer(plan["arguments"])],
            plan["shared_bytes"],
        )
        return plan["symbol"], launch, operands["out"]

    def passes(self) -> dict[str, Graph]:
        """Returns the in-place passes of cuda/pass.cu by what their symbols say.

        Threads, accesses of each, and how loads and stores treat the caches.
        """
        graphs = {}
        for symbol, function in self._functions.items():
            pattern = r"FlipSignsILi(\d+)ELi(\d+)ELNS_7CachingE(\d)ELb(\d)E"
            if not (found := re.search(pattern, symbol)):
                continue
            threads, each, loads, streaming = map(int, found.groups())
            grid = (self.state_bytes // (16 * threads * each), 1, 1)
            two = self._states[0].dtype.itemsize == 2
            signs = ctypes.c_uint32(0x80008000 if two else 0x80000000)
            launches = [
                Launch(function, grid, threads, [ctypes.c_uint64(x.address), signs])
                for x in self._states
            ]
            name = f"pass {threads} x {each}, loads {CACHING[loads]}, "
            name += f"stores {CACHING[streaming]}"
            graphs[name] = Graph(self._cuda, launches * self._rounds)
        return graphs

    def free(self) -> None:
        for buffer in self._buffers:
            buffer.free()


def measure(
    cuda: Cuda, functions: Functions, B: int, dtype: str, options: argparse.Namespace
) -> dict[str, Any]:
    replay = Replay(cuda, functions, B, dtype)
    graphs: dict[str, Graph] = {}
    kernels = {}
    for layout in options.layout:
        for T in options.tokens:
            name = f"{layout} T={T}"
            kernels[name], graphs[name] = replay.decode(layout, T)
    graphs |= replay.passes()
    timings = _bench.measure(graphs, options.seconds, queued=True)
    for graph in graphs.values():
        graph.free()
    replay.free()
    limit = min(t.median for name, t in timings.items() if name not in kernels)
    return {
        "B": B,
        "state_dtype": dtype,
        "limit_us": 1e6 * limit,
        "rows": {
            name: {
                "kernel": kernels.get(name),
                "median_us": 1e6 * timing.median,
                "quartiles_us": [1e6 * timing.low, 1e6 * timing.high],
                "of_limit": limit / timing.median,
            }
            for name, timing in timings.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = ft.partial(parser.add_argument, nargs="+")
    add("--batch", type=positive, default=[1, 8, 32, 64, 256, 512])
    add("--layout", choices=("KV", "VK"), default=["KV", "VK"])
    add("--state-dtype", choices=("float32", "bfloat16"), default=["float32"])
    add("--tokens", type=positive, default=[1])
    parser.add_argument("--seconds", type=float, default=5.0, help="a batch size")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = Cuda()
    functions = Functions(cuda)
    results = []
    for dtype in options.state_dtype:
        for B in options.batch:
            results.append(result := measure(cuda, functions, B, dtype, options))
            print(f"{dtype}, B {B}, us a call:")
            for name, row in result["rows"].items():
                low, high = row["quartiles_us"]
                print(
                    f"  {name:36} {row['median_us']:8.2f} ({low:.2f} to {high:.2f}) "
                    f"{row['of_limit']:6.1%} {row['kernel'] or ''}",
                    flush=True,
                )
            if options.json:
                write(results, options.json)


def write(results: list[dict[str, Any]], path: Path) -> None:
    """Writes what is measured so far, and the clocks that the GPU then has."""
    machine = _bench_machine.machine() | {"gpu": _bench_machine.nvidia_smi()}
    _bench_report.write_json({"machine": machine, "results": results}, path)


if __name__ == "__main__":
    main()
