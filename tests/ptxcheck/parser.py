"""PTX text to kernels: a list of instructions, and what they name.

Takes a subset of what nvcc writes; a directive outside it raises `UnsupportedError`, as
a scope with declarations of its own does. What an opcode means
is not known here.
"""

from __future__ import annotations

import dataclasses
import re

from .fault import UnsupportedError

SIZES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8},
}


@dataclasses.dataclass(frozen=True)
class Register:
    """A register, or a special one such as %tid.x."""

    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a float."""

    value: int


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A parameter, shared variable or label."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """{a, b, ...}, or the pair of results a|b."""

    items: tuple[Register | Immediate, ...]


Operand = Register | Immediate | Symbol | Address | Vector


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate it waits for and the value wanted."""

    text: str
    line: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None


@dataclasses.dataclass
class Kernel:
    """One entry function. Offsets of parameters and shared symbols are in bytes."""

    name: str
    parameters: dict[str, tuple[int, int]]  # name: (offset, size)
    max_threads: int | None = None
    registers: dict[str, str] = dataclasses.field(default_factory=dict)  # name: type
    shared: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    shared_bytes: int = 0
    code: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_HEADER = re.compile(r"\.(version|target|address_size)\b[^\n]*")
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w$]+)(?:<(\d+)>)?$")
_SHARED = re.compile(
    r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$"
)
# Hints to ptxas that change no result.
_HINT = re.compile(r'\.pragma\s+"(nounroll|used_bytes_mask \w+)"$')
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$]+)\s*:")
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_ADDRESS = re.compile(r"\[\s*([%\w$]+(?:\.\w+)?)\s*(?:\+\s*(-?\w+))?\s*\]$")
_FLOAT32 = re.compile(r"0[fF]([0-9a-fA-F]{8})$")
_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found, end = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.fullmatch(declaration)
        if match is None:
            raise UnsupportedError(f"parameter `{declaration}`")
        align, kind, name, count = match.groups()
        size = SIZES[kind] * int(count or 1)
        offset = _round_up(end, int(align or SIZES[kind]))
        found[name], end = (offset, size), offset + size
    return found


def _scalar(text: str) -> Register | Immediate | Symbol:
    text = text.strip()
    if text.startswith("%"):
        return Register(text)
    if match := _FLOAT32.match(text):
        return Immediate(int(match[1], 16))
    if _INTEGER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[\w$]+", text):
        return Symbol(text)
    raise UnsupportedError(f"operand `{text}`")


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_scalar(item) for item in text[1:-1].split(",")))
    if text.startswith("["):
        match = _ADDRESS.match(text)
        if match is None:
            raise UnsupportedError(f"address `{text}`")
        base = _scalar(match[1])
        if isinstance(base, Immediate):
            raise UnsupportedError(f"address `{text}`")
        return Address(base, int(match[2] or "0", 0))
    if "|" in text:
        return Vector(tuple(_scalar(item) for item in text.split("|")))
    return _scalar(text)


def _instruction(text: str, line: int) -> Instruction:
    guard, rest = None, text
    if match := _GUARD.match(rest):
        guard, rest = (match[2], match[1] == ""), rest[match.end() :]
    opcode, _, rest = rest.partition(" ")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{][^,]*", rest)
    return Instruction(
        " ".join(text.split()), line, opcode, tuple(map(_operand, operands)), guard
    )


class _Body:
    """Fills a kernel from the text between its braces."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.depth = 1

    def read(self, text: str, position: int) -> int:
        """Reads up to the brace that closes the kernel; returns what follows it."""
        line, counted = 1, 0
        while self.depth:
            position = _SPACE.match(text, position).end()
            if text[position] in "{}":
                self.depth += 1 if text[position] == "{" else -1
                position += 1
            elif match := _LABEL.match(text, position):
                self.kernel.labels[match[1]] = len(self.kernel.code)
                position = match.end()
            else:
                end = text.index(";", position)
                line += text.count("\n", counted, position)
                counted = position
                self.statement(text[position:end].strip(), line)
                position = end + 1
        return position

    def statement(self, text: str, line: int) -> None:
        if not text.startswith("."):
            if text:
                self.kernel.code.append(_instruction(text, line))
        elif text.startswith(".pragma"):
            if not _HINT.match(text):
                raise UnsupportedError(f"line {line}: `{text}`")
        elif self.depth > 1:
            raise UnsupportedError(f"line {line}: declaration in a scope, `{text}`")
        elif match := _REGISTERS.match(text):
            kind, name, count = match.groups()
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            self.kernel.registers.update(dict.fromkeys(names, kind))
        elif match := _SHARED.match(text):
            self._declare_shared(match)
        else:
            raise UnsupportedError(f"line {line}: `{text}`")

    def _declare_shared(self, match: re.Match) -> None:
        """Lays a shared variable out behind those before it."""
        align, kind, name, count = match.groups()
        offset = _round_up(self.kernel.shared_bytes, int(align or SIZES[kind]))
        size = SIZES[kind] * int(count or 1)
        self.kernel.shared[name] = (offset, size)
        self.kernel.shared_bytes = offset + size


def _max_threads(directives: str) -> int | None:
    found = None
    for directive in re.findall(r"\.\w+[^.]*", directives):
        name, _, values = directive.strip().partition(" ")
        if name in (".maxntid", ".reqntid"):
            found = 1
            for value in values.split(","):
                found *= int(value)
        elif name != ".minnctapersm":
            raise UnsupportedError(f"directive `{directive.strip()}`")
    return found


def parse(text: str) -> dict[str, Kernel]:
    """Returns the entry functions of a PTX module by name."""
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    kernels: dict[str, Kernel] = {}
    position = 0
    while (position := _SPACE.match(text, position).end()) < len(text):
        if header := _HEADER.match(text, position):
            position = header.end()
        elif entry := _ENTRY.match(text, position):
            kernel = Kernel(entry[1], _parameters(entry[2]), _max_threads(entry[3]))
            position = _Body(kernel).read(text, entry.end())
            kernels[kernel.name] = kernel
        else:
            line = text.count("\n", 0, position) + 1
            raise UnsupportedError(f"line {line}: `{text[position:].split()[0]}`")
    return kernels
