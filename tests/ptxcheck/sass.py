"""Questions to the machine code, and what it is held against in the PTX."""

from __future__ import annotations

import collections
import re

from .parser import Address, Kernel, Operand, Register, Vector
from .program import Access, memory_access

_GUARD = re.compile(r"@!?U?P\w+\s+")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?")


def opcode(text: str) -> str:
    """The opcode of an instruction with its modifiers."""
    return _GUARD.sub("", text).split()[0]


def is_local(text: str) -> bool:
    """Whether an instruction touches local memory: a spill."""
    return opcode(text).split(".")[0] in ("LDL", "STL")


def is_wide(text: str, name: str, size: int = 16) -> bool:
    """Whether it is a global load (LDG) or store (STG) of `size` bytes a thread."""
    first, *modifiers = opcode(text).split(".")
    return first == name and str(8 * size) in modifiers


def _registers(text: str, items: int = 1) -> set[int]:
    """The registers in a text; `items` of them where one is named."""
    found = set()
    for number, is_pair in _REGISTER.findall(text):
        found |= set(range(int(number), int(number) + (2 if is_pair else items)))
    return found


def _split_load(text: str) -> tuple[set[int], str]:
    """What a global load fills, and the rest of its text."""
    target, rest = _GUARD.sub("", text).split(",", 1)
    modifiers = opcode(text).split(".")
    items = next((int(m) // 32 for m in modifiers if m in ("64", "128")), 1)
    return _registers(target, items), rest


def first_wait(code: list[str], name: str = "LDG") -> int:
    """Place of the first instruction that needs what a global load brings.

    `name` may be "LDG.128" to look at 16-byte loads alone. An instruction that names a
    register which a load before it fills has to wait for that load.
    """
    arriving: set[int] = set()
    for at, text in enumerate(code):
        if opcode(text).split(".")[0] == "LDG":
            filled, rest = _split_load(text)
            if arriving & (filled | _registers(rest)):
                return at
            if name == "LDG" or is_wide(text, "LDG"):
                arriving |= filled
        elif arriving & _registers(text):
            return at
    return len(code)


def late_loads(code: list[str], size: int = 16) -> int:
    """Loads of `size` bytes issued after something has waited since the first of them.

    What comes before the first is left out: a pool's slot has to arrive before any
    address of the state is known.
    """
    loads = wide_loads(code, size)
    wait = loads[0] + first_wait(code[loads[0] :])
    return sum(at > wait for at in loads)


def wide_loads(code: list[str], size: int = 16) -> list[int]:
    """Places of the global loads of `size` bytes."""
    return [at for at, text in enumerate(code) if is_wide(text, "LDG", size)]


def widths(code: list[str]) -> collections.Counter:
    """Global loads (LDG) and stores (STG), by name and bytes of a thread."""
    found = collections.Counter()
    for text in code:
        name, *modifiers = opcode(text).split(".")
        if name in ("LDG", "STG"):
            sizes = {"U8": 1, "U16": 2, "64": 8, "128": 16}
            found[name, next((sizes[m] for m in modifiers if m in sizes), 4)] += 1
    return found


def ptx_accesses(kernel: Kernel) -> list[tuple[int, Access]]:
    """Places and kinds of a kernel's accesses to global memory."""
    found = ((at, memory_access(i)) for at, i in enumerate(kernel.code))
    return [(at, a) for at, a in found if a is not None and a.space == "global"]


def ptx_widths(kernel: Kernel) -> collections.Counter:
    """What `widths` is of the PTX."""
    return collections.Counter(
        ("STG" if access.is_store else "LDG", access.width)
        for _, access in ptx_accesses(kernel)
    )


def _ptx_registers(operand: Operand) -> set[str]:
    if isinstance(operand, Register):
        return {operand.name}
    if isinstance(operand, Vector):
        return set().union(*map(_ptx_registers, operand.items))
    return _ptx_registers(operand.base) if isinstance(operand, Address) else set()


def late_ptx_loads(kernel: Kernel, size: int = 16) -> list[int]:
    """Places of the loads that `late_loads` counts, in the PTX."""
    accesses = dict(ptx_accesses(kernel))
    loads = [at for at, a in accesses.items() if not a.is_store]
    wide = [at for at in loads if accesses[at].width == size]
    arriving: set[str] = set()
    for at, instruction in enumerate(kernel.code[wide[0] :], wide[0]):
        named = set().union(*map(_ptx_registers, instruction.operands))
        named |= {instruction.guard[0]} if instruction.guard else set()
        if arriving & named:
            return [load for load in wide if load > at]
        if at in loads:
            arriving |= _ptx_registers(instruction.operands[0])
    return []
