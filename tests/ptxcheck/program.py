"""A kernel made ready to run: a step for each instruction.

A step is a function of a batch and lanes. What the machine does not know is found
here, before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .fault import OUT_OF_BOUNDS, UnsupportedError
from .memory import SHARED_BASE
from .opcodes import NUMPY_TYPES, OPERATIONS
from .parser import (
    Address,
    Immediate,
    Instruction,
    Kernel,
    Operand,
    Register,
    Symbol,
    Vector,
)

PARAM_BASE = 0x10000  # where the machine puts the arguments' bytes
SPECIAL = (
    "%tid.x",
    *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"),
)
CACHE_HINTS = ("cs", "L2::256B")  # of ld.global and st.global; no effect on results
CLASSES = {  # of the instructions that OPERATIONS leaves out
    "ld.param": "constant",
    "ld.global": "global",
    "st.global": "global",
    "ld.shared": "shared",
    "st.shared": "shared",
    "shfl": "shuffle",
    "mma": "tensor",
    "bar": "control",
    "nanosleep": "control",
    "cp": "control",
    "bra": "control",
    "ret": "control",
    "mov": "move",
    "cvta": "move",
}
SHUFFLES = ("shfl.sync.bfly.b32", "shfl.sync.idx.b32")
MULTIPLY = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
BARRIERS = ("bar.sync", "bar.arrive", "bar.warp.sync")
PREFETCH = "cp.async.bulk.prefetch.L2.global"
SLEEP = "nanosleep.u32"
CONTROL = ("bra", "bra.uni", "ret", *BARRIERS, *SHUFFLES, MULTIPLY)

MOVES = ("mov.u16", "mov.b32", "mov.b64", "mov.u32", "mov.u64", "mov.f32", "mov.pred")

Step = Callable  # (batch, lanes) -> None
Getter = Callable  # (batch, lanes) -> array, or a scalar


@dataclasses.dataclass(frozen=True)
class Access:
    """What an opcode of memory says: space, element type and how many."""

    is_store: bool
    space: str
    kind: str
    items: int

    @property
    def dtype(self) -> np.dtype:
        return NUMPY_TYPES[self.kind]

    @property
    def width(self) -> int:
        return self.dtype.itemsize * self.items


def memory_access(instruction: Instruction) -> Access | None:
    """Reads ld.* and st.* opcodes; None for any other."""
    name, *modifiers = instruction.opcode.split(".")
    if name not in ("ld", "st"):
        return None
    space, *modifiers, kind = modifiers
    items = 1
    if modifiers and modifiers[-1] in ("v2", "v4"):
        items = int(modifiers.pop()[1])
    hints = CACHE_HINTS if space == "global" else ()
    spaces = ("param", "global", "shared") if name == "ld" else ("global", "shared")
    if space not in spaces or kind not in NUMPY_TYPES or set(modifiers) - set(hints):
        raise unknown(instruction)
    return Access(name == "st", space, kind, items)


def unknown(instruction: Instruction) -> UnsupportedError:
    """The error for what the machine does not know."""
    return UnsupportedError(
        f"line {instruction.line}: opcode {instruction.opcode} of `{instruction.text}`"
    )


def class_of(instruction: Instruction) -> str:
    """The class that an instruction is counted in."""
    if operation := OPERATIONS.get(instruction.opcode):
        return operation.kind
    parts = instruction.opcode.split(".")
    return CLASSES.get(".".join(parts[:2])) or CLASSES[parts[0]]


def constant(immediate: Immediate, kind: str):
    """An immediate as a scalar of a type."""
    dtype = NUMPY_TYPES[kind]
    bits = immediate.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """A register's bits as a type of its size, or the low bits as a smaller one."""
    dtype = NUMPY_TYPES[kind]
    if values.itemsize != dtype.itemsize:
        values = values.view(f"u{values.itemsize}").astype(f"u{dtype.itemsize}")
    return values.view(dtype)


def widened(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values as a register's type, extended by their own sign where it is larger."""
    if values.dtype == dtype:
        return values
    if values.itemsize != dtype.itemsize:
        letter = "i" if values.dtype.kind == "i" else "u"
        values = values.view(f"{letter}{values.itemsize}")
        values = values.astype(f"{letter}{dtype.itemsize}")
    return values.view(dtype)


class Compiler:
    """Turns the instructions of one kernel into steps."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.symbols = {
            **{name: PARAM_BASE + at for name, (at, _) in kernel.parameters.items()},
            **{name: SHARED_BASE + at for name, (at, _) in kernel.shared.items()},
        }

    def getter(self, operand: Operand, kind: str) -> Getter:
        """Reads an operand as a type."""
        if isinstance(operand, Immediate):
            value = constant(operand, kind)
            return lambda batch, lanes: value
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            value = constant(Immediate(self.symbols[operand.name]), kind)
            return lambda batch, lanes: value
        if isinstance(operand, Register):
            name = operand.name
            if name in SPECIAL:
                return lambda batch, lanes: batch.special[name][lanes.at]
            if name in self.kernel.registers:
                return lambda batch, lanes: narrowed(batch.read(name, lanes), kind)
        raise UnsupportedError(f"operand {operand}")

    def setter(self, operand: Operand) -> Callable:
        """Writes a register: (batch, lanes, values)."""
        name = operand.name
        dtype = NUMPY_TYPES[self.kernel.registers[name]]

        def write(batch, lanes, values):
            if np.ndim(values) == 0:
                values = np.full(len(lanes), values)
            batch.write(name, lanes, widened(values, dtype))

        return write

    def address(self, operand: Address, kind: str) -> Getter:
        """Reads base + offset."""
        base = self.getter(operand.base, kind)
        offset = constant(Immediate(operand.offset), kind)
        return lambda batch, lanes: np.broadcast_to(
            base(batch, lanes) + offset, len(lanes)
        )

    def step(self, pc: int, instruction: Instruction) -> Step:
        """The step of any instruction that is not CONTROL."""
        opcode, operands = instruction.opcode, instruction.operands
        if opcode.startswith("selp.") and opcode in OPERATIONS:
            return self.select(instruction)
        if opcode in OPERATIONS:
            return self.arithmetic(instruction)
        if access := memory_access(instruction):
            return self.memory(pc, instruction, access)
        if opcode in MOVES:
            return self.move(operands, opcode.split(".")[1])
        if opcode == "cvta.to.global.u64":  # generic and global addresses agree
            return self.move(operands, "u64")
        if opcode == PREFETCH:
            return self.prefetch(instruction)
        if opcode == SLEEP:  # time does not pass
            return lambda batch, lanes: None
        raise unknown(instruction)

    def prefetch(self, instruction: Instruction) -> Step:
        """Moves nothing, so that no thread can be too early or too late."""
        place, size = instruction.operands
        address, width = self.address(place, "u64"), self.getter(size, "u32")

        def step(batch, lanes):
            widths = np.broadcast_to(width(batch, lanes), len(lanes))
            site = batch.site(instruction, lanes)
            addresses = address(batch, lanes)
            batch.memory.check_pieces(site, addresses, widths, 16)
            pieces = zip(addresses.tolist(), widths.tolist(), strict=True)
            batch.counters.prefetched.extend(pieces)

        return step

    def arithmetic(self, instruction: Instruction) -> Step:
        """Of the table of operations."""
        operation = OPERATIONS[instruction.opcode]
        target, *sources = instruction.operands
        if len(sources) != len(operation.operands):
            raise unknown(instruction)
        write = self.setter(target)
        getters = [
            self.getter(source, kind)
            for source, kind in zip(sources, operation.operands, strict=True)
        ]

        def step(batch, lanes):
            values = (get(batch, lanes) for get in getters)
            if operation.is_bounded:
                result = operation.compute(*values, batch.approximate_by)
            else:
                result = operation.compute(*values)
            write(batch, lanes, result)

        return step

    def move(self, operands: tuple[Operand, ...], kind: str) -> Step:
        """Copies bits."""
        write, get = self.setter(operands[0]), self.getter(operands[1], kind)
        return lambda batch, lanes: write(batch, lanes, get(batch, lanes))

    def select(self, instruction: Instruction) -> Step:
        """selp: what it does not choose may hold nothing; nvcc writes such."""
        kind = instruction.opcode.split(".")[1]
        target, *sources, predicate = instruction.operands
        write, chosen = self.setter(target), self.getter(predicate, "pred")
        getters = [self.getter(source, kind) for source in sources]

        def step(batch, lanes):
            first = np.broadcast_to(chosen(batch, lanes), len(lanes))
            if first.all() or not first.any():
                write(batch, lanes, getters[0 if first.all() else 1](batch, lanes))
            else:
                values = [get(batch, lanes) for get in getters]
                write(batch, lanes, np.where(first, *values))

        return step

    def memory(self, pc: int, instruction: Instruction, access: Access) -> Step:
        """A load or store."""
        first, second = instruction.operands
        place, value = (first, second) if access.is_store else (second, first)
        items = value.items if isinstance(value, Vector) else (value,)
        if len(items) != access.items:
            raise unknown(instruction)
        if access.space == "param":
            return self.load_parameter(instruction, place, items, access)
        address = self.address(place, "u64" if access.space == "global" else "u32")
        if access.is_store:
            getters = [self.getter(item, access.kind) for item in items]
            store = "store_global" if access.space == "global" else "store_shared"

            def step(batch, lanes):
                values = np.empty((len(lanes), access.items), access.dtype)
                for column, get in enumerate(getters):
                    values[:, column] = get(batch, lanes)
                getattr(batch, store)(pc, lanes, address(batch, lanes), values)

            return step
        setters = [self.setter(item) for item in items]
        load = "load_global" if access.space == "global" else "load_shared"

        def step(batch, lanes):
            values = getattr(batch, load)(pc, lanes, address(batch, lanes), access)
            for column, write in enumerate(setters):
                write(batch, lanes, np.ascontiguousarray(values[:, column]))

        return step

    def load_parameter(self, instruction, place, items, access: Access) -> Step:
        """A load of the arguments' bytes."""
        address = self.address(place, "u64")
        setters = [self.setter(item) for item in items]

        def step(batch, lanes):
            start = address(batch, lanes).astype(np.int64) - PARAM_BASE
            site = batch.site(instruction, lanes)
            inside = (start >= 0) & (start + access.width <= len(batch.arguments))
            site.raise_if(~inside, OUT_OF_BOUNDS, start, "offset in the parameters")
            row = batch.arguments[start[:, None] + np.arange(access.width)]
            values = np.ascontiguousarray(row).view(access.dtype)
            for column, write in enumerate(setters):
                write(batch, lanes, np.ascontiguousarray(values[:, column]))

        return step


class Program:
    """A kernel's steps; None for CONTROL, which the machine runs itself."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        compiler = Compiler(kernel)
        self.steps: list[Step | None] = []
        self.compiler = compiler
        for pc, instruction in enumerate(kernel.code):
            control = instruction.opcode in CONTROL
            self.steps.append(None if control else compiler.step(pc, instruction))
        accesses = [a for i in kernel.code if (a := memory_access(i)) is not None]
        self.granule = {
            space: min(
                (a.dtype.itemsize for a in accesses if a.space == space), default=4
            )
            for space in ("global", "shared")
        }
