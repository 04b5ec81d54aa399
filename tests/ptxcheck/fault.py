"""What a kernel does wrong, where, and in which instruction."""

from __future__ import annotations

import dataclasses

OUT_OF_BOUNDS = "out of bounds"
MISALIGNED = "misaligned"
UNINITIALISED = "read of memory that nothing wrote"
SHARED_RACE = "race in shared memory"
BLOCK_CONFLICT = "two blocks share a written location"
THREAD_CONFLICT = "two threads share a written global location"
BARRIER = "barrier that part of a block does not reach"
WARP_SYNC = "warp synchronisation that part of its mask does not reach"
UNWRITTEN = "result that nothing wrote"
UNADDRESSED = "write to what the call does not address"
RUNAWAY = "kernel that does not end"
BLOCK_SIZE = "block size that the kernel does not take"
REGISTER = "read of a register that nothing wrote"


class UnsupportedError(Exception):
    """An opcode, modifier or directive that the machine does not know."""


@dataclasses.dataclass
class FaultError(Exception):
    """A defect of a kernel. Fields that have no meaning are empty."""

    kind: str
    kernel: str
    detail: str = ""
    block: tuple[int, int, int] | None = None
    thread: int | None = None
    instruction: str = ""
    line: int | None = None  # of the PTX text
    address: int | None = None

    def __str__(self) -> str:
        parts = [f"{self.kernel}: {self.kind}"]
        if self.detail:
            parts.append(self.detail)
        if self.block is not None:
            parts.append(f"block {self.block}")
        if self.thread is not None:
            parts.append(f"thread {self.thread}")
        if self.address is not None:
            parts.append(f"address {self.address:#x}")
        if self.instruction:
            parts.append(f"line {self.line}: {self.instruction}")
        return "; ".join(parts)
