"""A runtime that calls FFI handlers as XLA does, with whatever it is told to hand over.

XLA never hands over a wrong program, two buffers that overlap, or a pool whose threads
come late; this client does. The structs are those of xla/ffi/api/c_api.h, FFI API 0.3.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.cases import LAYOUTS

DTYPES = {  # XLA_FFI_DataType
    "bool": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "uint8": 6,
    "uint32": 8,
    "float16": 10,
    "float32": 11,
    "float64": 12,
    "bfloat16": 16,
}
BUFFER, SCALAR, EXECUTE = 1, 3, 3  # XLA_FFI_ArgType, _AttrType, _ExecutionStage
Pointer, Size, Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
FUNCTIONS = (
    *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register"),
    *("Stream_Get", "Type_Register", "ExecutionContext_Get", "State_Set", "State_Get"),
    *("DeviceMemory_Allocate", "DeviceMemory_Free", "ThreadPool_Schedule"),
    *("ThreadPool_NumThreads", "Future_Create", "Future_SetAvailable"),
    *("Future_SetError", "RunId_Get", "DeviceOrdinal_Get"),
)
Function = ctypes.CFUNCTYPE(Pointer, Pointer)
Task = ctypes.CFUNCTYPE(None, Pointer)


def struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """Returns a struct that begins as all do: its size, and extensions, of none."""
    every = [("struct_size", Size), ("extension_start", Pointer), *fields.items()]
    return type(name, (ctypes.Structure,), {"_fields_": every})


Buffer = struct("Buffer", dtype=ctypes.c_int, data=Pointer, rank=Int, dims=Pointer)
Buffers = struct("Buffers", size=Int, types=Pointer, items=Pointer)
Attributes = struct("Attributes", size=Int, types=Pointer, names=Pointer, items=Pointer)
CallFrame = struct(
    "CallFrame",
    api=Pointer,
    ctx=Pointer,
    stage=ctypes.c_int,
    args=Buffers,
    rets=Buffers,
    attrs=Attributes,
    future=Pointer,
)
Version = struct("Version", major=ctypes.c_int, minor=ctypes.c_int)
Api = struct(
    "Api", version=Version, internal=Pointer, **dict.fromkeys(FUNCTIONS, Function)
)
ErrorArgs = struct("ErrorArgs", message=ctypes.c_char_p, code=ctypes.c_int)
StreamArgs = struct("StreamArgs", ctx=Pointer, stream=Pointer)
ScheduleArgs = struct("ScheduleArgs", ctx=Pointer, task=Pointer, data=Pointer)
ThreadsArgs = struct("ThreadsArgs", ctx=Pointer, count=ctypes.POINTER(Int))


class Span(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("length", Size))


class Scalar(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("value", Pointer))


class Array:
    """An operand or a result: memory, and what the program says of it."""

    def __init__(self, data: np.ndarray | int, dtype=None, shape=None):
        of = data if isinstance(data, np.ndarray) else np.empty(0)
        self.kept = data
        self.address = data if isinstance(data, int) else data.ctypes.data
        self.dtype = str(of.dtype if dtype is None else dtype)
        self.shape = of.shape if shape is None else shape


def plain_attributes(
    K: int, state_layout: str, optional_operands: int = 0
) -> dict[str, Any]:
    """Returns what XLA hands over beside the buffers of a plain call of `decode`."""
    return {
        "scale": np.float32(K**-0.5),
        "use_qk_l2norm": np.bool_(True),
        "state_layout": np.int32(LAYOUTS.index(state_layout)),
        "optional_operands": np.int32(optional_operands),
        "gates": np.int32(0),
        "lower_bound": np.float32(0),
        "beta_scale": np.float32(1),
        "layer": np.int32(-1),
    }


class Client:
    """Calls one handler. Tasks for the thread pool wait in `tasks` for `run_tasks`."""

    def __init__(self, handler: Any, threads: int = 1):
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = Pointer, [ctypes.py_object, ctypes.c_char_p]
        self.handler = Function(get(handler, None))
        self.threads = threads
        self.tasks: list[tuple[Any, int]] = []
        self.scheduled = 0
        self.at_once = False  # tasks run when they are scheduled, not when asked for
        self.message = ""
        known = {
            "Error_Create": self._error_create,
            "Stream_Get": self._stream_get,
            "ThreadPool_Schedule": self._schedule,
            "ThreadPool_NumThreads": self._num_threads,
        }
        functions = [Function(known.get(name, self._unknown)) for name in FUNCTIONS]
        size = ctypes.sizeof
        version = Version(size(Version), None, 0, 3)
        self.api = Api(size(Api), None, version, None, *functions)

    def _unknown(self, _):
        raise AssertionError("the handler calls what this client does not offer")

    def _error_create(self, pointer):
        self.message = ErrorArgs.from_address(pointer).message.decode()
        return 1

    def _stream_get(self, pointer):
        StreamArgs.from_address(pointer).stream = None  # CUDA's default stream

    def _schedule(self, pointer):
        args = ScheduleArgs.from_address(pointer)
        self.tasks.append((Task(args.task), args.data))
        self.scheduled += 1
        if self.at_once:
            self.run_tasks()

    def _num_threads(self, pointer):
        ThreadsArgs.from_address(pointer).count[0] = self.threads

    def run_tasks(self) -> None:
        while self.tasks:
            task, data = self.tasks.pop()
            task(data)

    def call(
        self,
        operands: Sequence[Array],
        results: Sequence[Array],
        attributes: Mapping[str, Any],
    ) -> str | None:
        """Executes the handler; returns its error's message, or None."""
        self.kept: list[Any] = []
        frame = CallFrame(
            CallFrame.future.offset,  # which XLA does not count
            None,
            ctypes.addressof(self.api),
            None,
            EXECUTE,
            self._buffers(operands),
            self._buffers(results),
            self._attributes(attributes),
            None,
        )
        return self.message if self.handler(ctypes.addressof(frame)) else None

    def _table(self, kind: Any, items: Sequence[Any]) -> int:
        """Returns the address of an array, which lives as long as the call."""
        self.kept.append((kind * max(1, len(items)))(*items))
        return ctypes.addressof(self.kept[-1])

    def _pointers(self, items: Sequence[Any]) -> int:
        self.kept += items
        return self._table(Pointer, [ctypes.addressof(item) for item in items])

    def _buffers(self, arrays: Sequence[Array]) -> ctypes.Structure:
        buffers = [
            Buffer(
                ctypes.sizeof(Buffer),
                None,
                DTYPES[x.dtype],
                x.address,
                len(x.shape),
                self._table(Int, x.shape),
            )
            for x in arrays
        ]
        types = self._table(ctypes.c_int, [BUFFER] * len(arrays))
        size = ctypes.sizeof(Buffers)
        return Buffers(size, None, len(arrays), types, self._pointers(buffers))

    def _attributes(self, given: Mapping[str, Any]) -> ctypes.Structure:
        names = sorted(given)  # handlers look them up by bisection
        spans = [Span(name.encode(), len(name)) for name in names]
        values = [np.asarray(given[name]) for name in names]
        self.kept += values
        scalars = [Scalar(DTYPES[str(x.dtype)], x.ctypes.data) for x in values]
        return Attributes(
            ctypes.sizeof(Attributes),
            None,
            len(names),
            self._table(ctypes.c_int, [SCALAR] * len(names)),
            self._pointers(spans),
            self._pointers(scalars),
        )
