"""Which threads execute an instruction, and where to say that it happened.

A batch is a run of consecutive blocks, executed together. Threads of a batch are
numbered from 0; numbers plus `first_thread` are unique in the launch.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .fault import FaultError
from .parser import Instruction

WARP = 32


@dataclasses.dataclass(frozen=True)
class Launch:
    """What every block of a launch has in common."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int  # of a block

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def block_of(self, number: int) -> tuple[int, int, int]:
        """Coordinates of a block; x runs fastest."""
        x, y, _ = self.grid
        return (number % x, number // x % y, number // (x * y))

    def fault(
        self,
        kind: str,
        detail: str = "",
        thread: int | None = None,
        instruction: Instruction | None = None,
        address: int | None = None,
    ) -> FaultError:
        """A defect; `thread` is its number in the launch."""
        fault = FaultError(kind, self.kernel, detail, address=address)
        if thread is not None:
            fault.block = self.block_of(thread // self.threads)
            fault.thread = thread % self.threads
        if instruction is not None:
            fault.instruction, fault.line = instruction.text, instruction.line
        return fault


class Lanes:
    """Threads of a batch, ascending. `at` indexes arrays of the whole batch."""

    def __init__(self, index: np.ndarray, batch_threads: int):
        self.index = index
        self.is_full = len(index) == batch_threads
        self.at = slice(None) if self.is_full else index

    def __len__(self) -> int:
        return len(self.index)

    @functools.cached_property
    def lane(self) -> np.ndarray:
        """Place within the warp."""
        return self.index % WARP

    @functools.cached_property
    def row(self) -> np.ndarray:
        """Warps counted from 0, leaving out those with no thread here."""
        warp = self.index // WARP
        return np.concatenate([[0], np.cumsum(np.diff(warp) != 0)])

    @functools.cached_property
    def warps(self) -> int:
        """Warps with a thread here: what executes one instruction."""
        return int(self.row[-1]) + 1

    @functools.cached_property
    def first_of_warp(self) -> np.ndarray:
        """One thread of every warp."""
        return self.index[np.searchsorted(self.row, np.arange(self.warps))]

    def by_warp(self, values: np.ndarray, fill) -> np.ndarray:
        """[warps, 32], with `fill` for threads that are not here."""
        if len(self) == self.warps * WARP:
            return values.reshape(self.warps, WARP)
        padded = np.full((self.warps, WARP), fill, values.dtype)
        padded[self.row, self.lane] = values
        return padded


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction being executed by some threads."""

    launch: Launch
    instruction: Instruction
    lanes: Lanes
    first_thread: int  # of the batch

    @property
    def threads(self) -> np.ndarray:
        """Numbers in the launch."""
        return self.lanes.index + self.first_thread

    def raise_if(self, bad: np.ndarray, kind: str, addresses=None, detail="") -> None:
        """Raises for the first thread (or row of a thread's items) that is bad.

        `detail` may be a function of that thread's position among the lanes.
        """
        if not bad.any():
            return
        at = int(np.argmax(bad.reshape(len(self.lanes), -1).any(axis=1)))
        raise self.launch.fault(
            kind,
            detail(at) if callable(detail) else detail,
            int(self.threads[at]),
            self.instruction,
            None if addresses is None else int(addresses[at]),
        )
