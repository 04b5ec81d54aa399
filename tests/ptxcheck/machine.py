"""Executes a grid of one kernel, vectorised over the threads of many blocks.

Threads that stand at one place in the code form a group. The group at the lowest place
runs until it branches, ends, waits, or meets the next group and joins it: so threads
come together again as soon as the code lets them. Nothing measured or detected depends
on this order, except how warps that diverged are counted.

bar.sync waits for every thread of the block, or as many as it names, at the same
instruction; one that has ended or stands elsewhere is a defect. Where a named barrier
is one of the whole block, some may have come to it by bar.arrive, after which they
touch no shared memory until it passes. What a warp does together waits likewise for
its lanes.
"""

from __future__ import annotations

import functools as ft

import numpy as np

from . import fault, warps
from .counters import Counters
from .lanes import WARP, Lanes, Launch, Site
from .memory import GlobalMemory, SharedMemory
from .parser import Instruction
from .program import Program, unknown

BATCH_THREADS = 8192  # together; more fall out of the cache
WAITING = ("bar.sync", *warps.CONTROLS)  # count when they pass
MAX_STEPS = 1_000_000  # of a batch, before it is taken for endless


def run(
    program: Program,
    launch: Launch,
    memory: GlobalMemory,
    arguments: bytes,
    approximate_by: float = 0,
    blocks: range | None = None,
) -> Counters:
    """Runs a grid; changes `memory`; raises `FaultError` at a defect.

    `approximate_by`, -1 to 1, moves what .approx instructions return by that much of
    their largest error. `blocks` are those to run, by number; all of them by default.
    """
    kernel = program.kernel
    limit = kernel.max_threads
    if launch.threads % WARP or (limit is not None and launch.threads > limit):
        raise launch.fault(fault.BLOCK_SIZE, f"{launch.threads} threads of {limit}")
    counters = Counters(len(kernel.code))
    together = max(1, BATCH_THREADS // launch.threads)
    blocks = range(launch.blocks) if blocks is None else blocks
    with np.errstate(all="ignore"):
        for first in range(blocks.start, blocks.stop, together):
            count = min(together, blocks.stop - first)
            shared = SharedMemory(
                launch, count, kernel.shared_bytes, program.granule["shared"]
            )
            batch = Batch(program, launch, first, count, memory, shared, counters)
            batch.arguments = np.frombuffer(arguments, np.uint8)
            batch.approximate_by = approximate_by
            batch.run()
    counters.finish(memory)
    return counters


class Batch:
    """A run of consecutive blocks: their registers, shared memory and places."""

    arguments: np.ndarray
    approximate_by: float

    def __init__(
        self,
        program: Program,
        launch: Launch,
        first_block: int,
        blocks: int,
        memory: GlobalMemory,
        shared: SharedMemory,
        counters: Counters,
    ):
        self.program, self.launch, self.memory = program, launch, memory
        self.shared, self.counters = shared, counters
        self.code = program.kernel.code
        self.blocks = blocks
        self.count = blocks * launch.threads
        self.first_thread = first_block * launch.threads
        self.registers: dict[str, np.ndarray] = {}
        self.special = self._special(first_block)
        # Groups by place; `waiting` at bar.sync or for lanes of a warp.
        self.ready: dict[int, Lanes] = {}
        self.waiting: dict[int, Lanes] = {}
        # Numbers of the named barriers that threads have come to by bar.arrive.
        self.arrived = np.zeros(self.count, np.int8)
        # Threads that are to touch no shared memory before the whole block has met.
        self.apart = np.zeros(self.count, bool)
        self.steps = 0
        self.controls = {
            "bra": self._branch,
            "bra.uni": self._branch,
            "ret": lambda pc, lanes: None,
            "bar.sync": self._barrier,
            "bar.arrive": self._arrive,
            **{name: ft.partial(run, self) for name, run in warps.CONTROLS.items()},
        }

    def _special(self, first_block: int) -> dict[str, np.ndarray]:
        threads = self.launch.threads
        block = first_block + np.repeat(np.arange(self.blocks), threads)
        x, y, z = self.launch.block_of(block)
        values = {"tid": np.tile(np.arange(threads), self.blocks)}
        return {
            "%tid.x": values["tid"].astype(np.uint32),
            "%ctaid.x": x.astype(np.uint32),
            "%ctaid.y": y.astype(np.uint32),
            "%ctaid.z": z.astype(np.uint32),
            **{
                f"%nctaid.{axis}": np.full(len(block), size, np.uint32)
                for axis, size in zip("xyz", self.launch.grid, strict=True)
            },
        }

    def site(self, instruction: Instruction, lanes: Lanes) -> Site:
        """Where something happens."""
        return Site(self.launch, instruction, lanes, self.first_thread)

    # Registers are never changed in place: one array may stand for several.

    def read(self, name: str, lanes: Lanes) -> np.ndarray:
        """A register; one that some thread of the batch wrote counts as written."""
        if name not in self.registers:
            raise self.launch.fault(fault.REGISTER, name)
        return self.registers[name][lanes.at]

    def write(self, name: str, lanes: Lanes, values: np.ndarray) -> None:
        """Sets a register of some threads."""
        if not lanes.is_full:
            old = self.registers.get(name)
            whole = np.zeros(self.count, values.dtype) if old is None else old.copy()
            whole[lanes.index] = values
            values = whole
        self.registers[name] = values

    def load_global(self, pc, lanes, addresses, access) -> np.ndarray:
        """Returns [lanes, items]."""
        site = self.site(self.code[pc], lanes)
        values, places = self.memory.read(site, addresses, access.dtype, access.items)
        self.counters.count_global(pc, site, self.memory, places, access.width, False)
        return values

    def store_global(self, pc, lanes, addresses, values) -> None:
        """Stores [lanes, items]."""
        site = self.site(self.code[pc], lanes)
        places = self.memory.write(site, addresses, values)
        width = values.dtype.itemsize * values.shape[1]
        self.counters.count_global(pc, site, self.memory, places, width, True)

    def load_shared(self, pc, lanes, addresses, access) -> np.ndarray:
        """Returns [lanes, items]."""
        self._require_not_apart(pc, lanes)
        site = self.site(self.code[pc], lanes)
        values = self.shared.read(site, addresses, access.dtype, access.items)
        self.counters.count_shared(pc, site, addresses, access.width)
        return values

    def store_shared(self, pc, lanes, addresses, values) -> None:
        """Stores [lanes, items]."""
        self._require_not_apart(pc, lanes)
        site = self.site(self.code[pc], lanes)
        self.shared.write(site, addresses, values)
        width = values.dtype.itemsize * values.shape[1]
        self.counters.count_shared(pc, site, addresses, width)

    def run(self) -> None:
        """Until every thread has ended."""
        self.ready[0] = Lanes(np.arange(self.count), self.count)
        while self.ready or self.waiting:
            if not self.ready:
                self._release()
            pc = min(self.ready)
            self._advance(pc, self.ready.pop(pc))

    def join(self, groups: dict[int, Lanes], pc: int, lanes: Lanes) -> None:
        if len(lanes) == 0:
            return
        if pc in groups:
            both = np.sort(np.concatenate([groups[pc].index, lanes.index]))
            lanes = Lanes(both, self.count)
        groups[pc] = lanes

    def subset(self, lanes: Lanes, chosen: np.ndarray) -> Lanes:
        return lanes if chosen.all() else Lanes(lanes.index[chosen], self.count)

    def _advance(self, pc: int, lanes: Lanes) -> None:
        """Runs one group until it branches, ends, waits or meets another."""
        meets = min(self.ready, default=len(self.code))
        executed = self.counters.executed
        while pc < meets:
            self.steps += 1
            if self.steps > MAX_STEPS:
                thread = int(lanes.index[0]) + self.first_thread
                raise self.launch.fault(fault.RUNAWAY, "", thread, self.code[pc])
            step = self.program.steps[pc]
            if step is None:
                self._control(pc, lanes)
                return
            # A warp spends its turn on an instruction that the guard stops, too.
            executed[pc] += lanes.warps
            active = lanes
            if self.code[pc].guard is not None:
                active = self.subset(lanes, self._guarded(pc, lanes))
            if len(active):
                step(self, active)
            pc += 1
        if pc == len(self.code):
            raise self.launch.fault(fault.RUNAWAY, "it has no ret at its end")
        self.join(self.ready, pc, lanes)

    def _guarded(self, pc: int, lanes: Lanes) -> np.ndarray:
        """Which of the threads an instruction's guard lets through."""
        guard = self.code[pc].guard
        if guard is None:
            return np.ones(len(lanes), bool)
        name, wanted = guard
        return self.read(name, lanes) == wanted

    def _control(self, pc: int, lanes: Lanes) -> None:
        """Runs a CONTROL instruction; threads that its guard stops step over it."""
        chosen = self._guarded(pc, lanes)
        if self.code[pc].opcode not in WAITING:
            self.counters.executed[pc] += lanes.warps
        self.join(self.ready, pc + 1, self.subset(lanes, ~chosen))
        active = self.subset(lanes, chosen)
        if len(active):
            self.controls[self.code[pc].opcode](pc, active)

    def _branch(self, pc: int, lanes: Lanes) -> None:
        target = self.program.kernel.labels[self.code[pc].operands[0].name]
        self.join(self.ready, target, lanes)

    def _barrier_of(self, pc: int) -> tuple[int, int]:
        """Number and threads: 0 is of the whole block, others say whose they are."""
        number, *count = (operand.value for operand in self.code[pc].operands)
        threads = count[0] if count else self.launch.threads
        fits = threads % WARP == 0 and 0 < threads <= self.launch.threads
        if bool(count) != (0 < number < 16) or not fits:
            raise unknown(self.code[pc])
        return number, threads

    def _barrier(self, pc: int, lanes: Lanes) -> None:
        self._barrier_of(pc)
        self.join(self.waiting, pc, lanes)

    def _arrive(self, pc: int, lanes: Lanes) -> None:
        number, threads = self._barrier_of(pc)
        if number == 0 or threads != self.launch.threads:
            raise unknown(self.code[pc])
        self._require_not_apart(pc, lanes)
        self.arrived[lanes.index] = number
        self.apart[lanes.index] = True
        self.join(self.ready, pc + 1, lanes)

    def _require_not_apart(self, pc: int, lanes: Lanes) -> None:
        if self.apart[lanes.index].any():
            raise unknown(self.code[pc])

    def _release(self) -> None:
        """Lets every block go on whose threads all wait at one barrier, or arrived."""
        released = False
        for pc, lanes in list(self.waiting.items()):
            if self.code[pc].opcode != "bar.sync":
                continue
            block = lanes.index // self.launch.threads
            here = np.bincount(block, minlength=self.blocks)
            number, threads = self._barrier_of(pc)
            if number:
                arrived = self.arrived == number
                here += arrived.reshape(self.blocks, -1).sum(axis=1)
            complete = here == threads
            if complete.any():
                if threads == self.launch.threads:
                    self._meet_all(number, complete)
                else:
                    self._meet_in_part(pc, lanes, complete)
                self._pass(pc, lanes, complete[block])
                self.shared.barrier(np.flatnonzero(complete))
                self.counters.barriers += int(complete.sum())
                released = True
        if not released:
            raise self._stuck()

    def _meet_all(self, number: int, blocks: np.ndarray) -> None:
        threads = np.repeat(blocks, self.launch.threads)
        self.arrived[threads & (self.arrived == number)] = 0
        self.apart[threads] = self.arrived[threads] != 0
        self.shared.touched[threads] = False

    def _meet_in_part(self, pc: int, lanes: Lanes, blocks: np.ndarray) -> None:
        """Keeps the rest of some blocks apart: nothing orders what it would touch."""
        rest = np.repeat(blocks, self.launch.threads)
        rest[lanes.index] = False
        if (rest & self.shared.touched).any():
            raise unknown(self.code[pc])
        self.apart |= rest

    def _pass(self, pc: int, lanes: Lanes, chosen: np.ndarray) -> None:
        """Moves waiting threads on to the next instruction."""
        del self.waiting[pc]
        through = self.subset(lanes, chosen)
        self.counters.executed[pc] += through.warps
        self.join(self.ready, pc + 1, through)
        if not chosen.all():
            self.waiting[pc] = self.subset(lanes, ~chosen)

    def _stuck(self) -> fault.FaultError:
        """What keeps the first block that waits from going on."""
        pc = min(self.waiting, key=lambda pc: self.waiting[pc].index[0])
        first = int(self.waiting[pc].index[0])
        threads = self.launch.threads
        number = first // threads
        block = np.arange(number * threads, (number + 1) * threads)
        missing = np.setdiff1d(block, self.waiting[pc].index)
        kind = fault.BARRIER
        if self.code[pc].opcode != "bar.sync":
            kind, missing = fault.WARP_SYNC, missing[missing // WARP == first // WARP]
        elif barrier := self._barrier_of(pc)[0]:
            missing = missing[self.arrived[missing] != barrier]
        detail = "of another number of threads"
        if len(missing):
            detail = f"{len(missing)} threads missing, first {missing[0] % threads}"
        return self.launch.fault(kind, detail, first + self.first_thread, self.code[pc])
