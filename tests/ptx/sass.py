"""Questions to the machine code."""

from __future__ import annotations

import re

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
