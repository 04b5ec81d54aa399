"""Prints what each CUDA kernel needs and costs, without a GPU.

Counts come from the tests' PTX machine and from ptxas; the bound is arithmetic on them.
It says what would limit an H200 that hides every latency, not how long a launch takes.
Needs cuobjdump.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses

from tests.kernels import launch, module
from tests.ptxcheck.counters import SECTOR
from tests.ptxcheck.lanes import WARP
from tests.ptxcheck.program import class_of

# A Hopper SM (CUDA programming guide, compute capability 9.0).
REGISTERS = 65536
REGISTER_UNIT = 256  # of a warp
PARTITIONS = 4  # that share the registers and the warps
MAX_THREADS, MAX_BLOCKS = 2048, 32
SHARED_BYTES = 228 << 10
SHARED_UNIT = 128  # of a block
SHARED_RESERVED = 1024  # of a block, for the system; in cuobjdump's figure
# An H200.
SMS, CLOCK_HZ, BYTES_PER_SECOND = 132, 1.98e9, 4.8e12
BYTES_PER_CYCLE = BYTES_PER_SECOND / SMS / CLOCK_HZ  # of one SM
# Instructions of a warp that an SM starts in a cycle.
ISSUE_RATE = 4
RATES = {"integer": 2, "special": 0.5, "conversion": 0.5}
LSU_BYTES = 128  # of a wavefront, one a cycle; a shuffle is one
FOLDED = ("move", "constant")  # into other instructions, by ptxas


@dataclasses.dataclass(frozen=True)
class Row:
    """One instance. Costs are those of one block."""

    symbol: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    resident_blocks: int
    state_in_flight: int  # bytes of one SM's resident blocks
    state_sectors: int  # read and written
    least_sectors: int
    other_share: float  # of bytes that are not state, to state bytes
    wavefronts: int  # of shared memory
    conflicts: int
    per_element: float  # instructions of a thread for one element of the state
    late_loads: int  # of the state, issued after something has waited
    memory_cycles: float
    lsu_cycles: float
    arithmetic_cycles: float

    @property
    def bound(self) -> str:
        costs = {
            "memory": self.memory_cycles,
            "LSU": self.lsu_cycles,
            "arithmetic": self.arithmetic_cycles,
        }
        return max(costs, key=lambda name: costs[name])


def resident_blocks(registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that an SM holds; `shared_bytes` include those reserved."""
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    shared = max(1, -(-shared_bytes // SHARED_UNIT)) * SHARED_UNIT
    return min(by_registers, SHARED_BYTES // shared, MAX_THREADS // threads, MAX_BLOCKS)


def instructions(result: launch.Result) -> collections.Counter:
    """Instructions executed by warps, by class."""
    counts = collections.Counter()
    code = result.program.kernel.code
    for instruction, warps in zip(code, result.counters.executed, strict=True):
        counts[class_of(instruction)] += warps
    return counts


def measure(symbol: str) -> Row:
    """Runs an instance and adds up what one of its blocks costs."""
    one = module.of_symbol(symbol)
    V = one.K if one.single_token else one.VT
    K, VT, blocks = one.K, one.VT, V // one.VT
    result = launch.run(one.case(B=1, HV=1, V=V), kernel=symbol)
    counters, threads = result.counters, one.threads
    resources = module.binary().resources[symbol]
    sectors = {
        name: sum(counters.distinct_sectors(name, write) for write in (False, True))
        / blocks
        for name in counters.buffers
    }
    state = sectors.pop("state")
    counts = {name: n / blocks for name, n in instructions(result).items()}
    issued = sum(n for name, n in counts.items() if name not in FOLDED)
    resident = resident_blocks(resources.registers, threads, resources.shared_bytes)
    wavefronts = sum(t.wavefronts for t in counters.shared.values()) // blocks
    global_wavefronts = sum(
        max(t.requests, -(-t.sectors * SECTOR // LSU_BYTES)) / blocks
        for t in counters.traffic.values()
    )
    state_bytes = K * VT * one.item_bytes
    return Row(
        symbol=symbol,
        registers=resources.registers,
        spill_bytes=resources.local_bytes + resources.stack_bytes,
        shared_bytes=max(0, resources.shared_bytes - SHARED_RESERVED),
        resident_blocks=resident,
        state_in_flight=resident * state_bytes,
        state_sectors=round(state),
        least_sectors=2 * state_bytes // SECTOR,
        other_share=sum(sectors.values()) / state,
        wavefronts=wavefronts,
        conflicts=sum(t.conflicts for t in counters.shared.values()),
        per_element=issued * WARP / (K * VT),
        late_loads=module.late_loads(one),
        memory_cycles=(state + sum(sectors.values())) * SECTOR / BYTES_PER_CYCLE,
        lsu_cycles=wavefronts + global_wavefronts + counts.get("shuffle", 0),
        arithmetic_cycles=max(
            issued / ISSUE_RATE,
            *(counts.get(name, 0) / rate for name, rate in RATES.items()),
        ),
    )


COLUMNS = {
    "kernel": lambda r: f"`{r.symbol}`",
    "registers": lambda r: r.registers,
    "spills, B": lambda r: r.spill_bytes,
    "shared, B": lambda r: r.shared_bytes,
    "blocks / SM": lambda r: r.resident_blocks,
    "state in flight / SM, KB": lambda r: r.state_in_flight >> 10,
    "late loads": lambda r: r.late_loads,
    "state sectors / least": lambda r: f"{r.state_sectors} / {r.least_sectors}",
    "other traffic": lambda r: f"{r.other_share:.1%}",
    "wavefronts": lambda r: r.wavefronts,
    "conflicts": lambda r: r.conflicts,
    "instructions / element": lambda r: f"{r.per_element:.2f}",
    "cycles: memory": lambda r: round(r.memory_cycles),
    "LSU": lambda r: round(r.lsu_cycles),
    "arithmetic": lambda r: round(r.arithmetic_cycles),
    "bound": lambda r: r.bound,
}
NOTES = f"""\
Written by `python -m benchmarks ptx`: counted by the PTX machine and read from what
ptxas made for sm_90; nothing here was timed. One block of each instance, with
bfloat16 operands, T = 1. Sectors have 32 bytes and are distinct for the block.

Late loads are state loads that the machine code issues after it has waited for a load
since the first of them.
Wavefronts are those of shared memory, conflicts what bank conflicts add to them.
Instructions are PTX, without moves and parameter loads, of a thread for each element of
the state. Cycles are what one SM of an H200 needs for a block if all else is free:
{SMS} SMs, {BYTES_PER_SECOND / 1e12} TB/s and {CLOCK_HZ / 1e9} GHz make
{BYTES_PER_CYCLE:.1f} bytes a cycle;
of wavefronts of any memory and shuffles goes one a cycle; instructions go at the rate
of the slowest pipe. The largest is the bound. To hide a latency of 600 ns,
{BYTES_PER_SECOND / SMS * 600e-9 / 1024:.0f} KB must be in flight on each SM.
"""


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        cells = (str(cell(row)) for cell in COLUMNS.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(given: argparse.Namespace) -> None:
    rows = [measure(one.symbol) for one in module.plain()]
    print(f"# The kernels, without a GPU\n\n{table(rows)}\n\n{NOTES}", end="")
