"""The machine code that ships: what ptxas made of the PTX that the machine runs."""

import pytest

from benchmarks import ptx
from tests.kernels import launch, module
from tests.ptxcheck import sass

pytestmark = pytest.mark.usefixtures("built")
INSTANCE = pytest.mark.parametrize(
    "one", module.instances(), ids=lambda one: one.symbol
)


def test_every_kernel_is_looked_at():
    symbols = [one.symbol for one in module.instances()]
    binary = module.binary()
    assert sorted(symbols) == sorted(binary.entries)
    assert set(symbols) == set(binary.sass) == set(binary.resources)


@INSTANCE
def test_nothing_in_local_memory(one):
    code = module.binary().sass[one.symbol]
    assert [text for text in code if sass.is_local(text)] == []
    resources = module.binary().resources[one.symbol]
    assert resources.local_bytes == 0
    assert resources.stack_bytes == 0


@INSTANCE
def test_as_many_blocks_are_resident_as_the_table_says(one):
    resources = module.binary().resources[one.symbol]
    blocks = ptx.resident_blocks(
        resources.registers, one.threads, resources.shared_bytes
    )
    assert blocks >= one.min_blocks


@INSTANCE
def test_accesses_are_as_wide_as_in_the_PTX(one):
    """There the machine sees that those to the state are, and are the fewest."""
    code, kernel = module.binary().sass[one.symbol], launch.shipped(one.symbol).kernel
    found, expected = sass.widths(code), sass.ptx_widths(kernel)
    # Of a deferred kernel, loads that both kinds of warps begin with are joined.
    assert found <= expected if one.deferred else found == expected


@pytest.mark.parametrize("one", module.plain(), ids=lambda one: one.symbol)
def test_all_state_loads_are_issued_before_anything_waits(one):
    """In the PTX, where the machine knows which they are; and ptxas delays none."""
    late = sass.late_ptx_loads(launch.shipped(one.symbol).kernel, one.access_bytes)
    traffic = launch.run(one.case(), kernel=one.symbol).counters.traffic
    state = {pc for pc, name in traffic if name == "state"}
    assert len(state) == 2 * one.accesses
    assert state.isdisjoint(late)
    assert module.late_loads(one) == 0
