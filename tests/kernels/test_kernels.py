"""The kernels that ship, on the machine, judged as every implementation is."""

import numpy as np
import pytest

from tests.cases import (
    CASES,
    DTYPE_CASES,
    DTYPES,
    FORM_CASES,
    GATE_CASES,
    POOL_CASES,
    SLOW_CASES,
    VALUE_CASES,
    Case,
)
from tests.kernels import launch, module
from tests.kernels.launch import FIRST_ADDRESS, SPACING, fitting, run
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64
from tests.ptxcheck.memory import Buffer
from tests.ptxcheck.program import PREFETCH, SLEEP

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = module.plain()
SINGLE = [one for one in INSTANCES if one.single_token]
PREFETCHING = [one for one in INSTANCES if one.prefetch_distance]


def each(instances) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("one", instances, ids=lambda one: one.symbol)


LAYOUTS = pytest.mark.parametrize("layout", ["KV", "VK"])
STATES = pytest.mark.parametrize("state", DTYPES)
PER_CHANNEL = pytest.mark.parametrize("per_channel", [False, True])
GATES = [case for case in CASES if case.x is not None or case.b_value is not None]
# Sizes are those of `test_every_instance`, which takes every kernel.
QUICK = [
    case
    for case in DTYPE_CASES + GATE_CASES + VALUE_CASES + FORM_CASES + POOL_CASES
    if case not in SLOW_CASES
]
# Of what a kernel of bfloat16 q, k and v takes in any dtype.
MIXTURES = [
    {"a": "float32", "b": "float16", "dt_bias": "bfloat16", "output": "float32"},
    {"a": "float16", "b": "float32", "dt_bias": "float32", "output": "float16"},
    {"a": "bfloat16", "b": "bfloat16", "dt_bias": "float16", "output": "bfloat16"},
]


def judge(case: Case, result: launch.Result) -> None:
    out, state = decode64(**case.inputs(), **case.slots, **case.settings)
    assert_close(result.arrays["state"], state, STATE_TOLERANCE, "state")
    assert_close(result.arrays["out"], out, OUT_TOLERANCE, "out")


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


@each(INSTANCES)
def test_every_kernel_is_chosen_for_some_number_of_states(one):
    """And those of one token before the others, where they fit."""
    T = 1 if one.single_token or one.K != 128 or one.state == "float16" else 2
    cases = (one.case(B=2**i, H=1, HV=1, T=T) for i in range(14))
    assert one.symbol in map(launch.planned, cases)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK))
        for x in CASES
        # More states are more of the same blocks, and minutes.
        if x.B * x.HV * x.K * x.V <= 2**21
    ],
    ids=lambda case: case.id,
)
def test_float64(case):
    judge(case, run(case))


@pytest.mark.parametrize("approximate_by", [-1, 1])
@pytest.mark.parametrize("case", GATES, ids=lambda case: case.id)
def test_float64_whatever_approx_instructions_answer(case, approximate_by):
    judge(case, run(case, approximate_by=approximate_by))


@each(INSTANCES)
def test_every_instance(one):
    """Each with a pool, and several tokens, snapshots and a decay a channel."""
    slots = {"N": 12, "reads": (4, -1)}
    if one.single_token:
        pool = one.case(writes=(2, 3), **slots)
    else:
        # More tokens than are staged at once.
        writes = ((1, 4, 6, 7, 8), (2, 3, 5, 9, 10))
        pool = one.case(T=5, per_channel=True, writes=writes, **slots)
    for case in (one.case(), pool):
        result = run(case, kernel=one.symbol)
        assert result.plan["symbol"] == one.symbol
        judge(case, result)


@each(SINGLE)
@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda dtypes: dtypes["output"])
def test_other_dtypes_of_gates_and_output(one, dtypes):
    case = one.case(**dtypes)
    judge(case, run(case, kernel=one.symbol))


@each(INSTANCES)
def test_a_kernel_that_does_not_fit_is_refused(one):
    other_layout = {"KV": "VK", "VK": "KV"}[one.layout]
    changes = [{"layout": other_layout}, {"K": 320 - one.K}]
    changes += [{"state": state} for state in DTYPES if state != one.state]
    if one.VT > 16:
        changes.append({"V": one.VT // 2})
    if one.single_token:
        changes += [{"T": 2}, {"V": 2 * one.K}, {"per_channel": not one.per_channel}]
        changes += [{n: dtype} for n in "qkv" for dtype in ("float32", "float16")]
    for change in changes:
        with pytest.raises(ValueError, match="fit"):
            launch.planned(one.case(**change), one.symbol)


@LAYOUTS
@STATES
@PER_CHANNEL
@pytest.mark.parametrize("dtypes", [{}, *MIXTURES], ids=lambda x: x.get("output", ""))
def test_every_kernel_has_the_same_bits(layout, state, per_channel, dtypes):
    """Those of one token, of every tile, as those of many."""
    form = {"layout": layout, "state": state, "per_channel": per_channel}
    case = Case(B=1, H=1, HV=2, **form, **dtypes)
    first, *others = fitting(case)
    assert others
    assert {one.single_token for one in fitting(case)} == {False, state != "float16"}
    expected = run(case, kernel=first.symbol).arrays
    for one in others:
        again = run(case, kernel=one.symbol).arrays
        for name in ("out", "state"):
            assert_same_bits(again[name], expected[name])


@LAYOUTS
@STATES
@PER_CHANNEL
@pytest.mark.parametrize("T", [1, 2])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(layout, state, per_channel, T):
    form = {"layout": layout, "state": state, "per_channel": per_channel}
    case = Case(B=2, T=T, H=1, HV=2, **form)
    inputs, per_head = case.inputs(), ("A_log", "dt_bias")
    for one in fitting(case):
        batch = run(case, kernel=one.symbol)
        for row in range(case.B):
            own = {n: x if n in per_head else x[[row]] for n, x in inputs.items()}
            alone = launch.decode(own, **case.settings, kernel=one.symbol)
            for name in ("out", "state"):
                assert_same_bits(alone.arrays[name][0], batch.arrays[name][row])


@LAYOUTS
@PER_CHANNEL
def test_five_calls_have_the_bits_of_one(layout, per_channel):
    case = Case(B=2, T=5, H=1, HV=2, layout=layout, per_channel=per_channel)
    one, state = run(case), case.inputs()["state"]
    assert not module.of_symbol(one.plan["symbol"]).single_token
    for t in range(case.T):
        step = {n: x[:, [t]] for n, x in case.inputs().items() if n in "qkvab"}
        call = {**case.inputs(), **step, "state": state}
        result = launch.decode(call, **case.settings)
        assert module.of_symbol(result.plan["symbol"]).single_token
        assert_same_bits(result.arrays["out"][:, 0], one.arrays["out"][:, t])
        state = result.arrays["state"]
    assert_same_bits(state, one.arrays["state"])


def test_nan_stays_in_its_row():
    case = Case(B=3, H=1, HV=2, V=64)
    inputs = case.inputs()
    clean = launch.decode(inputs, out_dtype=case.out_dtype)
    for name in ("q", "k", "v", "state", "a", "b"):
        poisoned = {**inputs, name: inputs[name].copy()}
        poisoned[name][1] = np.nan
        result = launch.decode(poisoned, out_dtype=case.out_dtype)
        for row in (0, 2):
            for array in ("out", "state"):
                assert_same_bits(result.arrays[array][row], clean.arrays[array][row])


@each(INSTANCES)
def test_offsets_beyond_32_bits(one):
    """One slot of a pool of more than 2**32 elements, with nothing else behind it."""
    N, slot = 1 << 20, (1 << 20) - 2
    case = one.case(B=1)
    inputs = case.inputs() | {"state_indices": np.array([slot], np.int32)}
    arrays = {**inputs, "out": np.zeros(inputs["v"].shape, case.out_dtype)}
    operands, buffers = {}, []
    for number, (name, array) in enumerate(arrays.items()):
        address = (1 << 44) + (number << 40)  # 1 TiB apart
        pool = name == "state"
        shape = [N, *array.shape[1:]] if pool else list(array.shape)
        operands[name] = (address, str(array.dtype), shape)
        window = address + slot * array.nbytes * pool
        buffers.append(Buffer(name, window, array, name != "out"))
    assert N * inputs["state"].size > 2**32
    plan = launch.plan_decode(
        operands, scale=case.K**-0.5, state_layout=one.layout, kernel=one.symbol
    )
    whole = np.ones(1, bool)
    judge(case, launch.run_plan(plan, buffers, written={"out": whole, "state": whole}))


def test_the_table_says_who_prefetches():
    found = {
        one.symbol
        for one in module.instances()
        if PREFETCH in {i.opcode for i in launch.shipped(one.symbol).kernel.code}
    }
    assert found == {one.symbol for one in module.instances() if one.prefetch_distance}


@each(PREFETCHING)
def test_later_rows_are_prefetched(one):
    """Into the L2 cache, the share of a block that comes so many later."""
    HV, ahead, shares = 2, 132 * one.prefetch_distance, one.K // one.VT
    a_row = HV * shares  # blocks
    B = ahead // a_row + 4
    slots = np.random.default_rng(0).permutation(B).astype(np.int32)
    # The first whose rows are prefetched, whole; the next; the last, which is padding.
    first = (B - 3) * a_row - ahead
    padding = first // a_row + 1, B - 1
    slots[list(padding)] = -1
    case = one.case(B=B, H=HV, HV=HV)
    inputs = case.inputs() | {"state_indices": slots}
    options = {**case.settings, "out_dtype": case.out_dtype, "kernel": one.symbol}
    share = one.K * one.VT * one.item_bytes
    prefetched, expected = [], []
    for block in range(first, first + 3 * a_row + 1):  # and beyond the grid
        result = launch.decode(inputs, **options, blocks=range(block, block + 1))
        prefetched += result.counters.prefetched
        n, i = divmod(block + ahead, a_row)
        # Of padding no gates are made, so nobody prefetches after them.
        does = one.prefetch_first or block // a_row != padding[0]
        if does and n < B - 1:
            base = FIRST_ADDRESS + list(result.arrays).index("state") * SPACING
            expected.append((base + (int(slots[n]) * a_row + i) * share, share))
    assert prefetched == expected
    assert len(prefetched) >= a_row


@each([one for one in INSTANCES if one.VT >= 64 and not one.single_token])
def test_the_first_wave_of_a_large_grid_is_staggered(one):
    wave = 132 * one.min_blocks
    for B, slept in ((3 * wave // 8, False), (3 * wave // 8 + 1, True)):
        # Of padding: rows are not what it is about.
        case = one.case(B=B, H=8, HV=8, T=2, N=1, reads=(-1,) * B)
        for block, in_first_wave in ((0, True), (wave - 1, True), (wave, False)):
            result = run(case, kernel=one.symbol, blocks=range(block, block + 1))
            code = result.program.kernel.code
            sleeps = [pc for pc, i in enumerate(code) if i.opcode == SLEEP]
            executed = [result.counters.executed[pc] for pc in sleeps]
            assert any(executed) == (slept and in_first_wave)
