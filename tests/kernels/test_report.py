"""The report's arithmetic, and one row of it."""

import pytest

from benchmarks import ptx
from tests.kernels import module


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 32, 0, 32),  # blocks
        (32, 1024, 0, 2),  # threads
        (128, 128, 0, 4),  # registers
        (129, 128, 0, 3),
        (73, 128, 0, 6),  # 80 registers a thread are taken
        (255, 256, 0, 1),
        (32, 128, 100 << 10, 2),  # shared memory
        (32, 128, 113 << 10, 2),
        (32, 128, 115 << 10, 1),
    ],
)
def test_resident_blocks(registers, threads, shared, blocks):
    assert ptx.resident_blocks(registers, threads, shared) == blocks


@pytest.mark.usefixtures("built")
def test_every_instance_has_a_row():
    rows = [ptx.measure(one.symbol) for one in module.plain()]
    table = ptx.table(rows)
    for row in rows:
        assert row.symbol in table
        assert row.spill_bytes == row.late_loads == 0
        assert row.state_sectors == row.least_sectors
        # For small batches or 16-bit states the other costs of a block come nearer.
        if "_f32_" in row.symbol:
            assert row.bound == "memory"
