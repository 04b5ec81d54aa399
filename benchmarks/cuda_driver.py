"""CUDA without JAX: memory, graphs, and `decode`'s handler on a stream of one's own."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ffi_client import Client, StreamArgs


class Driver:
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
    """Memory of the GPU that holds an array, its first axis repeated.

    An operand of `tests.ffi_client` too: it has an address, a dtype and a shape.
    """

    def __init__(self, cuda: Driver, array: np.ndarray, repeats: int = 1):
        self._cuda, self._dtype, self._row = cuda, array.dtype, array.shape[1:]
        self.dtype = array.dtype.name
        self.shape = (array.shape[0] * repeats, *self._row)
        self.nbytes = array.nbytes * repeats
        pointer = ctypes.c_uint64()
        cuda.MemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(self.nbytes))
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
        result = np.empty((rows, *self._row), self._dtype)
        self._cuda.MemcpyDtoH_v2(
            result.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint64(self.address + self.nbytes - result.nbytes),
            ctypes.c_size_t(result.nbytes),
        )
        return result

    def free(self) -> None:
        self._cuda.MemFree_v2(ctypes.c_uint64(self.address))


class StreamClient(Client):
    """Calls a handler that enqueues on this stream."""

    def __init__(self, handler: Any, stream: ctypes.c_void_p):
        self._stream = stream
        super().__init__(handler)

    def _stream_get(self, pointer: int) -> None:
        StreamArgs.from_address(pointer).stream = self._stream.value


class Graph:
    """A `benchmarks.loops.Loop`: calls captured in a CUDA graph, launched again."""

    def __init__(self, cuda: Driver, calls: Sequence[Callable[[], None]]):
        self._cuda, self.calls = cuda, len(calls)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.StreamBeginCapture_v2(cuda.stream, 2)  # relaxed
        for enqueue in calls:
            enqueue()
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
