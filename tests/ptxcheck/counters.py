"""What a launch costs, counted exactly.

Global memory moves in sectors of 32 bytes. They are counted as requested (the distinct
sectors of each instruction of each warp) and as distinct for each block (what is left
where L1 serves every repetition within a block). The budgets use the second for what
is not state, and both for the state.

Shared memory moves in wavefronts of 128 bytes over 32 banks of 4. An access of 8 bytes
a thread goes in two halves of a warp, one of 16 in four quarters: the least that it
takes. What distinct words of one bank add to that is a conflict. Where several halves
or quarters ask for the same words the chip may need fewer; this is an upper bound.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from .lanes import WARP, Site
from .memory import GlobalMemory

SECTOR = 32
BANKS = 32


@dataclasses.dataclass
class Traffic:
    """Accesses of one instruction to one buffer."""

    width: int  # bytes a thread
    is_write: bool
    requests: int = 0  # instructions of a warp
    sectors: int = 0
    bytes: int = 0  # that the threads asked for


@dataclasses.dataclass
class SharedTraffic:
    """Accesses of one instruction to shared memory."""

    requests: int = 0
    wavefronts: int = 0
    least: int = 0  # wavefronts without conflicts

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.least


class Counters:
    """Of one launch. `executed` counts warps, by place in the code."""

    def __init__(self, instructions: int):
        self.executed = [0] * instructions
        self.traffic: dict[tuple[int, str], Traffic] = {}
        self.shared: dict[int, SharedTraffic] = collections.defaultdict(SharedTraffic)
        self.barriers = 0  # releases of a whole block
        self.prefetched: list[tuple[int, int]] = []  # addresses and bytes
        self._keys: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._distinct: dict[tuple[str, bool], int] = {}

    def count_global(
        self,
        pc: int,
        site: Site,
        memory: GlobalMemory,
        places,
        width: int,
        is_write: bool,
    ) -> None:
        """Counts the sectors of one instruction."""
        sectors = np.sort(site.lanes.by_warp(places // SECTOR, -1), axis=1)
        distinct = sectors >= 0
        distinct[:, 1:] &= sectors[:, 1:] != sectors[:, :-1]
        row, column = np.nonzero(distinct)
        sector = sectors[row, column]
        buffer = memory.buffer_at(sector * SECTOR)
        asked = np.bincount(memory.buffer_at(places))
        for number in np.unique(buffer):
            here = buffer == number
            name = memory.buffers[number].name
            new = Traffic(width, is_write)
            traffic = self.traffic.setdefault((pc, name), new)
            traffic.requests += len(np.unique(row[here]))
            traffic.sectors += int(here.sum())
            traffic.bytes += int(asked[number]) * width
        block = (site.lanes.first_of_warp + site.first_thread) // site.launch.threads
        all_sectors = len(memory.arena) // SECTOR
        self._keys[is_write].append(block[row] * all_sectors + sector)

    def finish(self, memory: GlobalMemory) -> None:
        """Adds up the sectors that are distinct for each block."""
        all_sectors = len(memory.arena) // SECTOR
        for is_write, keys in self._keys.items():
            if keys:
                sector = np.unique(np.concatenate(keys)) % all_sectors
                counts = np.bincount(memory.buffer_at(sector * SECTOR))
                for number, count in enumerate(counts):
                    name = memory.buffers[number].name
                    self._distinct[name, is_write] = int(count)
            keys.clear()

    def count_shared(self, pc: int, site: Site, addresses, width: int) -> None:
        """Counts the wavefronts of one instruction."""
        words = max(width // 4, 1)
        lanes = WARP // words  # that go together
        address = site.lanes.by_warp(addresses.astype(np.int64), -1)
        word = address[:, :, None] // 4 + np.arange(words)
        word[address < 0] = -1
        word = np.sort(word.reshape(-1, lanes * words), axis=1)
        distinct = word >= 0
        distinct[:, 1:] &= word[:, 1:] != word[:, :-1]
        row, column = np.nonzero(distinct)
        slots = row * BANKS + word[row, column] % BANKS
        banks = np.bincount(slots, minlength=len(word) * BANKS).reshape(-1, BANKS)
        traffic = self.shared[pc]
        traffic.requests += site.lanes.warps
        traffic.wavefronts += int(banks.max(axis=1).sum())
        traffic.least += int((banks.max(axis=1) > 0).sum())

    def distinct_sectors(self, buffer: str, is_write: bool) -> int:
        """Sectors of a buffer, counted once for each block that touches them."""
        return self._distinct.get((buffer, is_write), 0)

    def requested_sectors(self, buffer: str, is_write: bool) -> int:
        """Sectors of a buffer, counted for each instruction of each warp."""
        return sum(
            traffic.sectors
            for (_, name), traffic in self.traffic.items()
            if name == buffer and traffic.is_write == is_write
        )

    @property
    def buffers(self) -> set[str]:
        """Those that the launch touched."""
        return {name for _, name in self.traffic}
