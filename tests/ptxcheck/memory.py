"""Global buffers at fake addresses and the shared memory of a batch, with shadows.

Every access is checked for bounds, alignment and memory that nothing wrote. Shadows
hold one entry a granule, the smallest element that the kernel accesses, so that they
are exact.

Global memory: a location that a launch writes belongs to one thread. A second thread
that reads or writes it, in whatever order, is a defect (no order is promised between
blocks, and our kernels pass nothing between threads through global memory).

Shared memory: two threads that touch a location, one of them writing, need bar.sync
between, or, within a warp, bar.warp.sync. shfl.sync orders no memory accesses (PTX
promises that of bar.warp.sync alone). Where a part of a block meets in bar.sync, the
rest of it may touch no shared memory between two barriers of the whole block. Bounds
are those of the block's allocation: an index that runs from one array into the next of
the same struct is not seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from . import fault
from .lanes import WARP, Launch, Site

ALIGNMENT = 256  # of buffers in the arena, and of what JAX allocates
SHARED_BASE = 0x400  # so that a lost base address is out of bounds
NOBODY = -1
MANY = np.iinfo(np.int32).max  # above every thread


def _rows(x: np.ndarray, items: int) -> np.ndarray:
    return x.reshape(-1, items)


def _ascending(index: np.ndarray, values: np.ndarray, into: np.ndarray) -> None:
    """into[index] = max(into[index], values), values ascending.

    Of entries with one index NumPy keeps the last assigned, which is the largest.
    """
    into[index] = np.maximum(into[index], values[:, None])


def _descending(index: np.ndarray, values: np.ndarray, into: np.ndarray) -> None:
    """into[index] = min(into[index], values), likewise."""
    index, values = index[::-1], values[::-1]
    into[index] = np.minimum(into[index], values[:, None])


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An operand: `data` as bytes, at an address.

    Results hold nothing at first; of others, what `is_initialised` says, a mask of the
    first axes.
    """

    name: str
    address: int
    data: np.ndarray
    is_initialised: bool | np.ndarray = True


class GlobalMemory:
    """The buffers of one launch, copied into one array of bytes, the arena."""

    def __init__(self, launch: Launch, buffers: list[Buffer], granule: int):
        self.launch = launch
        self.granule = granule
        self.buffers = sorted(buffers, key=lambda buffer: buffer.address)
        sizes = [buffer.data.nbytes for buffer in self.buffers]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT for size in sizes]
        self.starts = np.array([b.address for b in self.buffers], np.uint64)
        self.ends = self.starts + np.array(sizes, np.uint64)
        if (self.starts[1:] < self.ends[:-1]).any():
            raise ValueError("buffers overlap")
        # Places in the arena keep the addresses' alignment.
        self.bases = np.concatenate([[0], np.cumsum(padded)]).astype(np.int64)
        self.places = self.bases[:-1] + (self.starts % ALIGNMENT).astype(np.int64)
        self.arena = np.zeros(self.bases[-1], np.uint8)
        self.initialised = np.zeros(self.bases[-1], bool)
        for buffer, place, size in zip(self.buffers, self.places, sizes, strict=True):
            self.arena[place : place + size] = buffer.data.reshape(-1).view(np.uint8)
            known = np.ravel(buffer.is_initialised)
            self.initialised[place : place + size] = np.repeat(
                known, size // max(1, len(known))
            )
        granules = self.bases[-1] // granule
        self.writer = np.full(granules, NOBODY, np.int32)
        self.last_reader = np.full(granules, NOBODY, np.int32)
        self.first_reader = np.full(granules, MANY, np.int32)

    def _place(self, site: Site, addresses: np.ndarray, width: int) -> np.ndarray:
        """Where the accesses lie in the arena, after all checks of addresses."""
        widths = np.full(len(addresses), width)
        buffer = self.check_pieces(site, addresses, widths, width)
        return (addresses - self.starts[buffer]).astype(np.int64) + self.places[buffer]

    def check_pieces(
        self, site: Site, addresses: np.ndarray, widths: np.ndarray, alignment: int
    ) -> np.ndarray:
        """Returns the buffers' numbers; raises unless each piece lies in one."""
        unaligned = (addresses | widths.astype(np.uint64)) % np.uint64(alignment) != 0
        site.raise_if(unaligned, fault.MISALIGNED, addresses)
        buffer = np.searchsorted(self.starts, addresses, side="right") - 1
        ends = addresses + widths.astype(np.uint64)
        site.raise_if(
            (buffer < 0) | (ends > self.ends[buffer]),
            fault.OUT_OF_BOUNDS,
            addresses,
            lambda at: self._near(addresses[at]),
        )
        return buffer

    def _near(self, address: np.uint64) -> str:
        before = np.flatnonzero(self.starts <= address)
        if len(before) == 0:
            return "below every buffer"
        buffer = self.buffers[before[-1]]
        beyond = int(address) - buffer.address - buffer.data.nbytes
        return f"{beyond} bytes behind the end of {buffer.name}"

    def name_at(self, place: int) -> str:
        """The buffer at a place of the arena."""
        return self.buffers[int(self.buffer_at(np.array(place)))].name

    def buffer_at(self, places: np.ndarray) -> np.ndarray:
        """The buffers' numbers at places of the arena."""
        return np.searchsorted(self.bases, places, side="right") - 1

    def read(self, site: Site, addresses, dtype, items: int):
        """Returns [lanes, items] of a type, and the places in the arena."""
        width = dtype.itemsize * items
        places = self._place(site, addresses, width)
        row = places // width
        known = _rows(self.initialised, width)[row].all(axis=1)
        site.raise_if(
            ~known,
            fault.UNINITIALISED,
            addresses,
            lambda at: f"buffer {self.name_at(places[at])}",
        )
        threads = site.threads.astype(np.int32)
        granules = width // self.granule
        self._check(site, addresses, row, _rows(self.writer, granules), threads)
        _ascending(row, threads, _rows(self.last_reader, granules))
        _descending(row, threads, _rows(self.first_reader, granules))
        return _rows(self.arena.view(dtype), items)[row], places

    def write(self, site: Site, addresses, values: np.ndarray) -> np.ndarray:
        """Stores [lanes, items] and returns the places in the arena."""
        width = values.dtype.itemsize * values.shape[1]
        places = self._place(site, addresses, width)
        row = places // width
        threads = site.threads.astype(np.int32)
        granules = width // self.granule
        writer = _rows(self.writer, granules)
        self._check(site, addresses, row, writer, threads)
        for reader in (self.first_reader, self.last_reader):
            self._check(site, addresses, row, _rows(reader, granules), threads)
        writer[row] = threads[:, None]
        # Two threads in this very instruction: all but the last find another's name.
        self._check(site, addresses, row, writer, threads)
        _rows(self.arena.view(values.dtype), values.shape[1])[row] = values
        _rows(self.initialised, width)[row] = True
        return places

    def _check(self, site: Site, addresses, row, owners, threads) -> None:
        """Raises where `owners` names a thread other than the one accessing."""
        owner = owners[row]
        bad = (owner != threads[:, None]) & (owner != NOBODY) & (owner != MANY)
        if not bad.any():
            return
        at = int(np.argmax(bad.any(axis=1)))
        other = int(owner[at][bad[at]][0])
        block = self.launch.block_of(other // self.launch.threads)
        same = other // self.launch.threads == threads[at] // self.launch.threads
        site.raise_if(
            bad,
            fault.THREAD_CONFLICT if same else fault.BLOCK_CONFLICT,
            addresses,
            f"thread {other % self.launch.threads} of block {block} was there too",
        )

    def contents(self, name: str) -> np.ndarray:
        """A buffer's bytes now."""
        place, size = self._extent(name)
        return self.arena[place : place + size].copy()

    def written(self, name: str) -> np.ndarray:
        """Which bytes of a buffer the launch wrote."""
        place, size = self._extent(name)
        written = np.repeat(self.writer != NOBODY, self.granule)
        return written[place : place + size]

    def _extent(self, name: str) -> tuple[int, int]:
        names = [buffer.name for buffer in self.buffers]
        number = names.index(name)
        return int(self.places[number]), self.buffers[number].data.nbytes


class SharedMemory:
    """Shared memory of the blocks of a batch."""

    def __init__(self, launch: Launch, blocks: int, size: int, granule: int):
        self.threads = launch.threads
        self.size = size
        self.granule = granule
        self.stride = -(-size // 16) * 16
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.initialised = np.zeros(blocks * self.stride, bool)
        granules = blocks * self.stride // granule
        # A thread of the batch; or, above all those, one of its warps: a whole warp
        # that has met in bar.warp.sync since.
        self.first_warp = blocks * self.threads
        self.writer = np.full(granules, NOBODY, np.int32)
        self.last_reader = np.full(granules, NOBODY, np.int32)
        self.first_reader = np.full(granules, MANY, np.int32)
        # Threads that were here since the last barrier of their whole block.
        self.touched = np.zeros(blocks * self.threads, bool)

    def _row(self, site: Site, addresses: np.ndarray, width: int) -> np.ndarray:
        site.raise_if(addresses % width != 0, fault.MISALIGNED, addresses)
        offset = addresses.astype(np.int64) - SHARED_BASE
        inside = (offset >= 0) & (offset + width <= self.size)
        site.raise_if(
            ~inside, fault.OUT_OF_BOUNDS, addresses, f"of {self.size} shared bytes"
        )
        self.touched[site.lanes.index] = True
        block = site.lanes.index // self.threads
        return (block * self.stride + offset) // width

    def read(self, site: Site, addresses, dtype, items: int) -> np.ndarray:
        """Returns [lanes, items] of a type."""
        width = dtype.itemsize * items
        row = self._row(site, addresses, width)
        known = _rows(self.initialised, width)[row].all(axis=1)
        site.raise_if(~known, fault.UNINITIALISED, addresses, "shared memory")
        threads, granules = site.lanes.index.astype(np.int32), width // self.granule
        self._check(site, addresses, row, _rows(self.writer, granules))
        _ascending(row, threads, _rows(self.last_reader, granules))
        _descending(row, threads, _rows(self.first_reader, granules))
        return _rows(self.data.view(dtype), items)[row]

    def write(self, site: Site, addresses, values: np.ndarray) -> None:
        """Stores [lanes, items]."""
        width = values.dtype.itemsize * values.shape[1]
        row = self._row(site, addresses, width)
        threads, granules = site.lanes.index.astype(np.int32), width // self.granule
        writer = _rows(self.writer, granules)
        for toucher in (self.writer, self.first_reader, self.last_reader):
            self._check(site, addresses, row, _rows(toucher, granules))
        writer[row] = threads[:, None]
        self._check(site, addresses, row, writer)
        _rows(self.data.view(values.dtype), values.shape[1])[row] = values
        _rows(self.initialised, width)[row] = True

    def _check(self, site: Site, addresses, row, touchers) -> None:
        toucher = touchers[row]
        thread = site.lanes.index[:, None]
        bad = (toucher != thread) & (toucher != NOBODY) & (toucher != MANY)
        if bad.any():
            bad &= toucher != self.first_warp + thread // WARP

        def other(at: int) -> str:
            number = int(toucher[at][bad[at]][0])
            if number >= self.first_warp:
                warp = (number - self.first_warp) % (self.threads // WARP)
                return f"warp {warp} was there, no barrier since"
            return f"thread {number % self.threads} was there, no barrier since"

        site.raise_if(bad, fault.SHARED_RACE, addresses, other)

    def barrier(self, blocks: np.ndarray) -> None:
        """Orders all accesses of some blocks before all that follow."""
        for shadow, value in (
            (self.writer, NOBODY),
            (self.last_reader, NOBODY),
            (self.first_reader, MANY),
        ):
            _rows(shadow, self.stride // self.granule)[blocks] = value

    def warp_barrier(self, warps: np.ndarray) -> None:
        """Orders accesses of each of these warps among its own threads."""
        for warp in warps:
            block = warp * WARP // self.threads
            extent = self.stride // self.granule
            here = slice(block * extent, (block + 1) * extent)
            name = self.first_warp + warp

            def own(toucher, warp=warp, name=name):
                return (toucher // WARP == warp) | (toucher == name)

            writer, first, last = (
                shadow[here]
                for shadow in (self.writer, self.first_reader, self.last_reader)
            )
            writer[own(writer)] = name
            only_own = own(first) & own(last)
            first[only_own] = last[only_own] = name
