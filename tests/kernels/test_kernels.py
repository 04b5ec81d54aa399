"""The kernels that ship, on the machine, judged as every implementation is."""

import dataclasses

import numpy as np
import pytest
from tests.cases import CASES, DTYPES, Case
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

from tests.kernels import launch, module
from tests.kernels.launch import FIRST_ADDRESS, SPACING
from tests.ptxcheck.memory import Buffer
from tests.ptxcheck.program import PREFETCH, SLEEP

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = module.instances()
INSTANCE = pytest.mark.parametrize("one", INSTANCES, ids=lambda one: one.symbol)
LAYOUTS = pytest.mark.parametrize("layout", ["KV", "VK"])
STATES = pytest.mark.parametrize("state", DTYPES)
GATES = [case for case in CASES if case.x is not None or case.b_value is not None]
# V for which every tile is possible, and one state a block's K x V in a batch.
SMALL = Case(B=2, H=1, HV=2, V=64)


def run(case: Case, **options) -> launch.Result:
    options = {**case.settings, "out_dtype": case.out_dtype, **options}
    return launch.decode(case.inputs() | case.slots, **options)


def judge(case: Case, result: launch.Result) -> None:
    out, state = decode64(**case.inputs(), **case.slots, **case.settings)
    assert_close(result.arrays["state"], state, STATE_TOLERANCE, "state")
    assert_close(result.arrays["out"], out, OUT_TOLERANCE, "out")


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def of_instance(one: module.Instance, **changes) -> Case:
    sizes = {"K": one.K, "layout": one.layout, "state": one.state}
    sizes["V"] = one.K if one.step else SMALL.V
    return dataclasses.replace(SMALL, **{**sizes, **changes})


def fitting(case: Case) -> list[str]:
    """The kernels that may be chosen for a call."""
    return [one.symbol for one in INSTANCES if one.fits(case)]


def test_these_are_all_instances():
    symbols = {one.symbol for one in INSTANCES}
    assert len(symbols) == 88
    assert symbols == set(module.kernels())


def chosen(one: module.Instance, states: int) -> str:
    """The kernel planned for as many states as `one` computes."""
    case = of_instance(one, B=1, H=1, HV=1, T=1 if one.step else 2)
    arrays = case.inputs()
    arrays["out"] = arrays["v"].astype(case.out_dtype)
    operands = {}
    for i, (name, x) in enumerate(arrays.items()):
        shape = list(x.shape) if x.ndim == 1 else [states, *x.shape[1:]]
        operands[name] = (FIRST_ADDRESS + i * SPACING, str(x.dtype), shape)
    return launch.plan_decode(operands, scale=1.0, state_layout=one.layout)["symbol"]


@INSTANCE
def test_every_kernel_is_chosen_for_some_number_of_states(one):
    assert one.symbol in {chosen(one, 2**i) for i in range(14)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64(case):
    judge(case, run(case))


@pytest.mark.parametrize("approximate_by", [-1, 1])
@pytest.mark.parametrize("case", GATES, ids=lambda case: case.id)
def test_float64_whatever_approx_instructions_answer(case, approximate_by):
    judge(case, run(case, approximate_by=approximate_by))


@INSTANCE
def test_every_instance(one):
    """Each with a pool, and several tokens, snapshots and a decay a channel."""
    slots = {"N": 12, "reads": (4, -1)}
    if one.step:
        pool = of_instance(one, writes=(2, 3), **slots)
    else:
        # More tokens than are staged at once.
        writes = ((1, 4, 6, 7, 8), (2, 3, 5, 9, 10))
        pool = of_instance(one, T=5, per_channel=True, writes=writes, **slots)
    for case in (of_instance(one), pool):
        result = run(case, kernel=one.symbol)
        assert result.plan["symbol"] == one.symbol
        judge(case, result)


@INSTANCE
def test_a_kernel_that_does_not_fit_is_refused(one):
    cases = [of_instance(one, V=one.VT // 2)]
    if one.step:
        changes = ({"T": 2}, {"per_channel": True}, {"V": 2 * one.K}, {"b": "float32"})
        cases += [of_instance(one, **change) for change in changes]
        cases += [of_instance(one, output="float32"), of_instance(one, q="float16")]
    for case in cases:
        assert not one.fits(case)
        if case.V % 16 == 0:
            with pytest.raises(ValueError, match="fit"):
                run(case, kernel=one.symbol)


@LAYOUTS
@STATES
@pytest.mark.parametrize("K", [64, 128, 192, 256])
def test_every_kernel_has_the_same_bits(layout, state, K):
    case = dataclasses.replace(SMALL, K=K, V=K, layout=layout, state=state)
    found = fitting(case)
    assert len(found) > 1
    first = run(case, kernel=found[0])
    for kernel in found[1:]:
        again = run(case, kernel=kernel)
        for name in ("out", "state"):
            assert_same_bits(again.arrays[name], first.arrays[name])


@LAYOUTS
@STATES
@pytest.mark.parametrize("T", [1, 2])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(layout, state, T):
    case = Case(B=5, T=T, H=1, HV=3, K=64, V=64, layout=layout, state=state)
    inputs, per_head = case.inputs(), ("A_log", "dt_bias")
    for kernel in fitting(case):
        batch = run(case, kernel=kernel)
        for row in range(case.B):
            own = {n: x if n in per_head else x[[row]] for n, x in inputs.items()}
            alone = launch.decode(own, **case.settings, kernel=kernel)
            for name in ("out", "state"):
                assert_same_bits(alone.arrays[name][0], batch.arrays[name][row])


@LAYOUTS
@pytest.mark.parametrize("per_channel", [False, True])
def test_five_calls_have_the_bits_of_one(layout, per_channel):
    case = Case(B=2, T=5, H=1, HV=2, layout=layout, per_channel=per_channel)
    one, state = run(case), case.inputs()["state"]
    # So the bits of a "step" kernel are those of one that loops.
    assert "_decode_" in one.plan["symbol"]
    for t in range(case.T):
        step = {n: x[:, [t]] for n, x in case.inputs().items() if n in "qkvab"}
        call = {**case.inputs(), **step, "state": state}
        result = launch.decode(call, **case.settings)
        assert ("_step_" in result.plan["symbol"]) != per_channel
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


@INSTANCE
def test_offsets_beyond_32_bits(one):
    """One slot of a pool of more than 2**32 elements, with nothing else behind it."""
    N, slot = 1 << 20, (1 << 20) - 2
    case = of_instance(one, B=1)
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


# Blocks that a multiprocessor starts before the one whose rows are asked for, and
# whether before the gates are made.
AHEAD = {
    "gdn_step_kv_f32_k128_vt16_c4_g8_gw": (8, False),
    "gdn_step_kv_f32_k128_vt32_c4_g16_gw": (6, True),
    "gdn_step_kv_f32_k128_vt64_c4_g16_gw": (1, True),
    "gdn_step_kv_bf16_k128_vt64_c4_g8_gw": (4, False),
    "gdn_step_kv_bf16_k128_vt128_c4_g8_gw": (1, False),
    "gdn_step_vk_f32_k128_vt16_r2_plain": (7, False),
    "gdn_step_vk_f32_k128_vt32_r2_plain": (4, False),
    "gdn_step_vk_bf16_k128_vt32_r8_plain": (5, True),
}


def test_these_ask_for_later_rows():
    found = {
        symbol
        for symbol, kernel in module.kernels().items()
        if PREFETCH in {i.opcode for i in kernel.code}
    }
    assert found == set(AHEAD)


@pytest.mark.parametrize("symbol", AHEAD)
def test_later_rows_are_asked_for(symbol):
    """The L2 cache, for the share of a block that comes so many later."""
    one = module.instance_of(symbol)
    blocks_ahead, before_gates = AHEAD[symbol]
    HV, ahead, shares = 2, 132 * blocks_ahead, one.K // one.VT
    a_row = HV * shares  # blocks
    B = ahead // a_row + 4
    slots = np.random.default_rng(0).permutation(B).astype(np.int32)
    # The first whose rows are asked for, whole; the next; the last, which is padding.
    first = (B - 3) * a_row - ahead
    padding = first // a_row + 1, B - 1
    slots[list(padding)] = -1
    case = of_instance(one, B=B, H=HV, HV=HV)
    inputs = case.inputs() | {"state_indices": slots}
    options = {**case.settings, "out_dtype": case.out_dtype, "kernel": symbol}
    share = one.K * one.VT * one.item_bytes
    asked, expected = [], []
    for block in range(first, first + 3 * a_row + 1):  # and beyond the grid
        result = launch.decode(inputs, **options, blocks=range(block, block + 1))
        asked += result.counters.prefetched
        n, i = divmod(block + ahead, a_row)
        # Of padding no gates are made, so nobody asks after them.
        asks = before_gates or block // a_row != padding[0]
        if asks and n < B - 1:
            base = FIRST_ADDRESS + list(result.arrays).index("state") * SPACING
            expected.append((base + (int(slots[n]) * a_row + i) * share, share))
    assert asked == expected
    assert len(asked) >= a_row


@pytest.mark.parametrize(
    ("symbol", "wave"),
    [
        ("gdn_decode_kv_f32_k64_vt64_c4_g8", 528),
        ("gdn_decode_vk_f32_k64_vt64_r16_plain", 528),
        ("gdn_step_kv_f32_k64_vt64_c4_g16_gw", 264),
    ],
)
def test_the_first_wave_of_a_large_grid_starts_apart(symbol, wave):
    one = module.instance_of(symbol)
    for B, slept in ((3 * wave // 8, False), (3 * wave // 8 + 1, True)):
        case = of_instance(one, B=B, H=8, HV=8, T=1 if one.step else 2)
        for block, in_first_wave in ((0, True), (wave - 1, True), (wave, False)):
            result = run(case, kernel=symbol, blocks=range(block, block + 1))
            code = result.program.kernel.code
            sleeps = [pc for pc, i in enumerate(code) if i.opcode == SLEEP]
            executed = [result.counters.executed[pc] for pc in sleeps]
            assert any(executed) == (slept and in_first_wave)
