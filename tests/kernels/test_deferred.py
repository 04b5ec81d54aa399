"""The kernels of `decode_deferred` on the machine: their results and their traffic."""

import functools

import numpy as np
import pytest

from tests.kernels import launch, module
from tests.kernels.deferred import Row, inputs_of, rows_of
from tests.kernels.launch import PENDING
from tests.oracle import (
    OUT_TOLERANCE,
    STATE_TOLERANCE,
    assert_close,
    deferred64,
    deferred_rows,
)
from tests.ptxcheck.counters import SECTOR

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = module.deferred()
EACH = pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.symbol)


def judge(inputs: dict, result: launch.Result, window: int, **settings) -> None:
    """Compares all that the call wrote with float64.

    Products of bfloat16 are exact and so are the pieces that a state's entries and u
    are split into; what tensor cores round is sums of float32, as all else is.
    """
    out, state, pending = deferred64(**inputs, window=window, **settings)
    arrays = result.arrays
    _, written = launch.touched_entries(inputs, window)
    assert_close(arrays["out"], out, OUT_TOLERANCE, "out")
    expected = dict(zip(PENDING, pending, strict=True)) | {"state": state}
    for name, x in expected.items():
        at = written[name]
        assert_close(arrays[name][at], x[at], STATE_TOLERANCE, name)
    k, at = "pending.k", written["pending.k"]
    assert (arrays[k][at] == expected[k][at]).all()  # as it came


CALLS = [  # T, window, entries beyond the fewest, changes
    (1, 16, 0, {"H": 1, "HV": 2}),
    (1, 7, 3, {"H": 2, "HV": 2, "given": True}),
    (2, 7, 0, {"H": 1, "HV": 2, "use_qk_l2norm": False, "qk_norm": 1.0}),
    (4, 16, 2, {"H": 1, "HV": 2, "given": True}),
    (8, 16, 0, {"H": 2, "HV": 2, "lower_bound": -5.0, "allow_neg_eigval": True}),
    (7, 11, 1, {"H": 1, "HV": 2}),
]


def calls(chosen: list[int]) -> pytest.MarkDecorator:
    """Every kernel with those of the calls that it takes."""
    return pytest.mark.parametrize(
        ("one", "call"),
        [
            pytest.param(
                *(one, i),
                marks=[pytest.mark.slow] * (one.state == "float16"),
                id=f"{one.symbol}-{i}",
            )
            for one in INSTANCES
            for i in chosen
            if CALLS[i][0] == 1 or not one.single_token
        ],
    )


def run_call(one: module.Instance, call: int, **options) -> None:
    T, window, spare, changes = CALLS[call]
    case = one.case(T=T, **changes)
    inputs = inputs_of(case, rows_of(window, T), window, window + T + spare)
    options |= {**case.settings, "window": window, "kernel": one.symbol}
    judge(inputs, launch.decode(inputs, **options), window, **case.settings)


@calls([0, 1, 2, 3, 4, 5])
def test_float64(one, call):
    run_call(one, call)


@calls([0, 4])
@pytest.mark.parametrize(
    "approximate_by", [-1, pytest.param(1, marks=pytest.mark.slow)]
)
def test_float64_whatever_a_chip_rounds(one, call, approximate_by):
    """At both ends of what tensor cores and .approx instructions may answer."""
    run_call(one, call, approximate_by=approximate_by)


@EACH
def test_no_bit_of_an_entry_is_lost(one):
    """In pieces or not: with q and k that pick a row of S, results are exact."""
    row, exact = 37, {"use_qk_l2norm": False, "scale": 1.0, "output": "float32"}
    case = one.case(given=True, g_value=0.0, beta_value=0.0, **exact)
    inputs = inputs_of(case, [Row(0), Row(1, fold=True)], 4, 5)
    plain, folded = inputs["state_indices"]
    inputs["k"][:], inputs["q"][:], inputs["q"][..., row] = 0, 0, 1
    k, u, decay = inputs["pending"]
    k[folded, :, 0], k[folded, :, 0, row], decay[folded, :, 0] = 0, 1, 1
    inputs["state"][folded] = 0
    options = {**case.settings, "window": 4, "kernel": one.symbol}
    result = launch.decode(inputs, out_dtype=case.out_dtype, **options).arrays
    rows = [
        x if one.layout == "KV" else x.swapaxes(-1, -2)
        for x in (inputs["state"][plain], result["state"][folded])
    ]
    assert (result["out"][0, 0] == rows[0][:, row].astype(np.float32)).all()
    assert (result["out"][1, 0] == u[folded, :, 0]).all()
    assert (rows[1][:, row] == u[folded, :, 0].astype(rows[1].dtype)).all()
    assert np.count_nonzero(rows[1]) == np.count_nonzero(rows[1][:, row])


def test_every_kernel_is_chosen():
    for one in INSTANCES:
        case, rows = one.case(T=1 if one.single_token else 2), [Row(1)]
        inputs = inputs_of(case, rows, 4, 6)
        result = launch.decode(inputs, **case.settings, window=4, blocks=range(0))
        assert result.plan["symbol"] == one.symbol


COUNTS = (0, 3, 16, 5)  # of which 16 is a full window, and 5 are told to fold


@functools.cache
def small(one: module.Instance, T: int) -> launch.Result:
    """A call of rings that do not wrap, of two value heads a key head."""
    rows = [Row(count, fold=count == 5) for count in COUNTS]
    case = one.case(T=T)
    inputs = inputs_of(case, rows, 16, 16 + T)
    return launch.decode(inputs, **case.settings, window=16, kernel=one.symbol)


@EACH
def test_traffic(one):
    """States are read once, folded ones once more; only those are written."""
    T, HV = 1 if one.single_token else 4, 2
    result = small(one, T)
    counters = result.counters

    def sectors(name: str) -> tuple[int, int]:
        read, written = (counters.requested_sectors(name, w) for w in (False, True))
        return read, written

    slot = result.arrays["state"][0].nbytes // SECTOR
    folded = 2
    assert sectors("state") == ((len(COUNTS) + folded) * slot, folded * slot)
    assert counters.distinct_sectors("state", False) == len(COUNTS) * slot
    k, u = (result.arrays[n][0, 0, 0].nbytes // SECTOR for n in PENDING[:2])
    # Of u a block reads its own columns, of k all; each is written once.
    tiles, pending, appended = one.K // one.VT, sum(COUNTS), T * len(COUNTS)
    assert counters.distinct_sectors("pending.u", False) == HV * pending * u
    assert counters.distinct_sectors("pending.k", False) == HV * tiles * pending * k
    assert counters.distinct_sectors("pending.u", True) == HV * appended * u
    assert sectors("pending.k")[1] == appended * k
    x, y, z = result.plan["grid"]
    assert counters.barriers == x * y * z


@EACH
def test_bank_conflicts(one):
    """No more than there are: of what the column warp adds up, and of some sums."""
    result = small(one, 1)
    x, y, z = result.plan["grid"]
    conflicts = sum(t.conflicts for t in result.counters.shared.values())
    if one.single_token:
        allowed = 3 + 8 * (one.state == "float32")
    else:
        allowed = 32 + 64 * (one.layout == "KV")
    assert conflicts == allowed * x * y * z


def bits_of(arrays: dict, row: int, inputs: dict, tokens: slice) -> list[bytes]:
    """What a row leaves: `out`, its state, and what its tokens append."""
    T, R = inputs["q"].shape[1], inputs["pending"][0].shape[2]
    slots = {name: inputs[name] for name in launch.SLOTS}
    done = deferred_rows(inputs["cursors"], R, WINDOW, T, **slots)[row]
    entries = [done.write, slice(None), list(done.appended[tokens])]
    left = [arrays["out"][row, tokens], arrays["state"][done.write]]
    left += [arrays[name][tuple(entries)] for name in PENDING]
    return [x.tobytes() for x in left]


WINDOW = 16
EVERY = slice(None)
ROWS = [Row(0), Row(9, first=-2), Row(16), Row(5, fold=True)]


@EACH
def test_a_row_alone_has_the_same_bits(one):
    T = 1 if one.single_token else 3
    inputs = inputs_of(one.case(T=T), ROWS, WINDOW, WINDOW + T)
    options = {"scale": 0.1, "window": WINDOW, "state_layout": one.layout}
    options["kernel"] = one.symbol
    together = launch.decode(inputs, **options).arrays
    of_rows = ("q", "k", "v", "a", "b", *launch.SLOTS)
    for n in range(len(ROWS)):
        own = inputs | {name: inputs[name][n : n + 1] for name in of_rows}
        alone = launch.decode(own, **options).arrays
        left = bits_of(alone, 0, own, EVERY)
        assert left == bits_of(together, n, inputs, EVERY)


@pytest.mark.parametrize(
    "one", [x for x in INSTANCES if not x.single_token], ids=lambda one: one.symbol
)
def test_later_tokens_change_no_bit_of_earlier_ones(one):
    """Nor of a state: what is taken back may hold anything."""
    T, kept = 4, 2
    inputs = inputs_of(one.case(T=T), ROWS, WINDOW, WINDOW + T)
    options = {"scale": 0.1, "window": WINDOW, "state_layout": one.layout}
    options["kernel"] = one.symbol
    first = launch.decode(inputs, **options).arrays
    changed = {name: inputs[name].copy() for name in ("q", "k", "v", "a", "b")}
    for x in changed.values():
        x[:, kept:] = np.nan
    again = launch.decode(inputs | changed, **options).arrays
    assert np.isnan(again["out"][:, kept:]).all()
    for n in range(len(ROWS)):
        left = bits_of(again, n, inputs, slice(kept))
        assert left == bits_of(first, n, inputs, slice(kept))


def test_a_layer_of_stacks_is_what_it_is_alone():
    one = INSTANCES[0]
    case = one.case()
    inputs = inputs_of(case, rows_of(4, 1), 4, 5)
    options = {**case.settings, "window": 4, "kernel": one.symbol}
    alone = launch.decode(inputs, **options).arrays

    def stack(x):
        return np.stack([np.full_like(x, np.nan), x])

    stacks = {"state": stack(inputs["state"]), "pending": map(stack, inputs["pending"])}
    stacks["pending"] = list(stacks["pending"])
    result = launch.decode(inputs | stacks, **options, layer=1).arrays
    for name in ("state", *PENDING):
        assert result[name][1].tobytes() == alone[name].tobytes()
    assert result["out"].tobytes() == alone["out"].tobytes()


@pytest.mark.parametrize(
    "one", [one for one in INSTANCES if one.prefetch_distance], ids=lambda x: x.symbol
)
def test_later_rows_are_prefetched(one):
    """The block's share of a later state, and what is pending there."""
    HV, ahead, tiles = 2, 132 * one.prefetch_distance, one.K // one.VT
    a_row, window = HV * tiles, 4
    B = ahead // a_row + 2
    case, rows = one.case(B=B), [Row(3, first=-1)] * (B - 1) + [Row(0, read=-1)]
    inputs = inputs_of(case, rows, window, window + 1)
    options = {**case.settings, "window": window, "kernel": one.symbol}
    for block in (0, 1, 2, a_row, 2 * a_row):
        result = launch.decode(inputs, **options, blocks=range(block, block + 1))
        later, at = divmod(block + ahead, a_row)
        head, tile = divmod(at, tiles)
        expected = []
        if later < B - 1:
            slot = inputs["state_indices"][later]
            entries = [
                (window + n) % (window + 1) for n in range(3) if n % tiles == tile
            ]
            places = [("state", (slot, head), tile)]
            places += [("pending.u", (slot, head, i), 0) for i in entries]
            places += [("pending.k", (slot, 0, i), 0) for i in entries if head == 0]
            for name, index, part in places:
                x = result.arrays[name]
                size = x[index].nbytes // (tiles if name == "state" else 1)
                start = np.ravel_multi_index(index, x.shape[: len(index)])
                address = (
                    launch.FIRST_ADDRESS
                    + list(result.arrays).index(name) * launch.SPACING
                )
                expected.append(
                    (address + int(start) * x[index].nbytes + part * size, size)
                )
        assert sorted(result.counters.prefetched) == sorted(expected)
