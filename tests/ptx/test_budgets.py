"""What a launch may cost, counted exactly on the machine."""

import functools

import pytest
from cases import DTYPES, Case

from ptx import launch
from ptx.counters import SECTOR

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = [(K, VT) for K in (64, 128, 192, 256) for VT in (16, 32, 64)]
INSTANCE = pytest.mark.parametrize(("K", "VT"), INSTANCES)
# Without streaming hints, nvcc makes four stores of 4 bytes of one of the K / 8.
SPLIT_STORE = pytest.mark.xfail(reason="nvcc splits one store of the state")
WHOLE_STORES = pytest.mark.parametrize(
    ("K", "VT"),
    [pytest.param(K, VT, marks=SPLIT_STORE if VT == 64 else ()) for K, VT in INSTANCES],
)


@functools.cache
def run(K: int, VT: int, V: int = 64, dtype: str = "bfloat16") -> launch.Result:
    dtypes = dict.fromkeys(("q", "k", "v", "a", "b", "dt_bias"), dtype)
    case = Case(B=2, H=1, HV=2, K=K, V=V, **dtypes)
    return launch.decode(case.inputs(), out_dtype=case.out_dtype, VT=VT)


def blocks(result: launch.Result) -> int:
    x, y, z = result.plan["grid"]
    return x * y * z


@INSTANCE
@pytest.mark.parametrize("is_write", [False, True])
def test_state_moves_once(K, VT, is_write):
    result = run(K, VT)
    least = result.arrays["state"].nbytes // SECTOR
    assert result.counters.distinct_sectors("state", is_write) == least


@WHOLE_STORES
def test_no_warp_asks_for_a_sector_of_the_state_twice(K, VT):
    result = run(K, VT)
    least = result.arrays["state"].nbytes // SECTOR
    assert result.counters.requested_sectors("state", is_write=False) == least
    assert result.counters.requested_sectors("state", is_write=True) == least


@WHOLE_STORES
def test_every_state_access_is_16_bytes_wide_and_of_full_sectors(K, VT):
    result = run(K, VT)
    accesses = [
        traffic
        for (_, name), traffic in result.counters.traffic.items()
        if name == "state"
    ]
    # A thread's K / 8 rows, read and written.
    assert len(accesses) == 2 * K // 8
    for traffic in accesses:
        assert traffic.width == 16
        assert traffic.bytes == traffic.sectors * SECTOR
        assert traffic.sectors == 16 * traffic.requests  # the least for 32 x 16 bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_else_is_below_3_percent_of_the_state(dtype):
    result = run(128, 64, V=128, dtype=dtype)
    moved = {
        name: sum(result.counters.distinct_sectors(name, w) for w in (False, True))
        for name in result.counters.buffers
    }
    assert sum(moved.values()) * SECTOR < 1.03 * 2 * result.arrays["state"].nbytes
    assert moved["out"] * SECTOR == result.arrays["out"].nbytes


@INSTANCE
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bank_conflict(K, VT, dtype):
    result = run(K, VT, dtype=dtype)
    conflicts = {
        result.program.kernel.code[pc].text: traffic.conflicts
        for pc, traffic in result.counters.shared.items()
        if traffic.conflicts
    }
    assert conflicts == {}


@INSTANCE
def test_at_most_two_barriers(K, VT):
    result = run(K, VT)
    assert result.counters.barriers <= 2 * blocks(result)
