"""What a launch may cost, counted exactly on the machine."""

import functools

import pytest

from tests.cases import DTYPES, F32, Case
from tests.kernels import launch, module
from tests.ptxcheck.counters import SECTOR

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = module.plain()
INSTANCE = pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.symbol)


def lengths(*lengths: int) -> pytest.MarkDecorator:
    """Every instance with every number of tokens that it takes."""
    found = [
        (one, T) for one in INSTANCES for T in lengths if T == 1 or not one.single_token
    ]
    return pytest.mark.parametrize(
        ("one", "T"),
        [
            pytest.param(
                *(one, T),
                marks=[pytest.mark.slow] * (one.state == "float16"),
                id=f"{one.symbol}-{T}",
            )
            for one, T in found
        ],
    )


@functools.cache
def run(one: module.Instance, T: int = 1, **changes) -> launch.Result:
    return launch.run(one.case(T=T, HV=1, **changes), kernel=one.symbol)


def blocks(result: launch.Result) -> int:
    x, y, z = result.plan["grid"]
    return x * y * z


def state_sectors(result: launch.Result) -> tuple[int, int]:
    """Of the state, read and written, whoever asks; each block asks once for each."""
    counts = []
    for is_write in (False, True):
        distinct = result.counters.distinct_sectors("state", is_write)
        assert result.counters.requested_sectors("state", is_write) >= distinct
        counts.append(result.counters.requested_sectors("state", is_write))
    return counts[0], counts[1]


def of_one_slot(result: launch.Result) -> int:
    return result.arrays["state"][0].nbytes // SECTOR


@lengths(1, 4)
def test_state_moves_once_whatever_the_length(one, T):
    for per_channel in {one.per_channel, one.per_channel or not one.single_token}:
        result = run(one, T, per_channel=per_channel)
        least = 2 * of_one_slot(result)
        assert state_sectors(result) == (least, least)


@lengths(1, 4)
def test_every_snapshot_is_written_once(one, T):
    writes = tuple(tuple(range(2 + n * T, 2 + n * T + T)) for n in range(2))
    result = run(one, T, N=2 + 2 * T, reads=(1, 0), writes=writes)
    least = of_one_slot(result)
    assert state_sectors(result) == (2 * least, 2 * T * least)


@lengths(1, 4)
def test_padding_touches_no_state(one, T):
    result = run(one, T, N=3, reads=(-1, 3), writes=(0, 2))
    assert state_sectors(result) == (0, 0)
    assert not result.arrays["out"].any()
    # Beside a row that is none, too.
    mixed = run(one, T, N=3, reads=(-1, 1), writes=(0, 2))
    assert state_sectors(mixed) == (of_one_slot(mixed),) * 2


@lengths(1, 2)
def test_write_slot_outside_the_pool_is_not_written(one, T):
    result = run(one, T, N=3, reads=(0, 1), writes=(-1, 3))
    assert state_sectors(result) == (2 * of_one_slot(result), 0)


@INSTANCE
def test_every_state_access_is_of_full_sectors(one):
    result = run(one, 1 if one.single_token else 4)
    accesses = [
        traffic
        for (_, name), traffic in result.counters.traffic.items()
        if name == "state"
    ]
    assert len(accesses) == 2 * one.accesses
    for traffic in accesses:
        assert traffic.width == one.access_bytes
        assert traffic.bytes == traffic.sectors * SECTOR
        # The least for 32 accesses.
        assert traffic.sectors == 32 * one.access_bytes // SECTOR * traffic.requests


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_all_else_is_small_beside_the_state(layout, dtype):
    """For the largest tile of a float32 state."""
    dtypes = dict.fromkeys(("q", "k", "v", "a", "b", "dt_bias"), dtype)
    case = Case(B=2, H=1, HV=2, layout=layout, **dtypes)
    result = launch.run(
        case, kernel=max(launch.fitting(case), key=lambda one: one.VT).symbol
    )
    moved = {
        name: sum(result.counters.distinct_sectors(name, w) for w in (False, True))
        for name in result.counters.buffers
    }
    share = sum(moved.values()) * SECTOR / (2 * result.arrays["state"].nbytes) - 1
    assert share < 0.03
    # Eight bfloat16 values are half a sector.
    assert moved["out"] == max(result.arrays["out"].nbytes // SECTOR, blocks(result))


@INSTANCE
def test_no_bank_conflict(one):
    wide = {"T": 4, "per_channel": True, **F32}
    result = run(one) if one.single_token else run(one, **wide)
    conflicts = {
        result.program.kernel.code[pc].text: traffic.conflicts
        for pc, traffic in result.counters.shared.items()
        if traffic.conflicts
    }
    assert conflicts == {}
    assert result.counters.shared


@lengths(1, 4)
def test_barriers(one, T):
    """None but for what the rows wait for: gates, staged tokens, and sums of "KV"."""
    if one.single_token:
        allowed = 1 + (one.layout == "KV" and one.per_channel)
    else:
        rounds = -(-T // (one.row_threads // 32))
        allowed = 2 * rounds - 1 + (T if one.layout == "KV" else 0)
    result = run(one, T)
    assert result.counters.barriers == allowed * blocks(result)
