"""The kernels that ship, on the machine, judged as every implementation is."""

import dataclasses

import numpy as np
import pytest
from cases import CASES, DTYPES, F32, Case
from oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

from ptx import launch, module
from ptx.memory import Buffer

pytestmark = pytest.mark.usefixtures("built")
TILES = (16, 32, 64)
SIZES = (64, 128, 192, 256)
INSTANCES = [(K, VT) for K in SIZES for VT in TILES]
GATES = [case for case in CASES if case.x is not None or case.b_value is not None]
# V for which every tile is possible, and one state a block's K x V in a batch.
SMALL = Case(B=2, H=1, HV=2, V=64)


def run(case: Case, **options) -> launch.Result:
    options = {**case.settings, "out_dtype": case.out_dtype, **options}
    return launch.decode(case.inputs(), **options)


def judge(case: Case, result: launch.Result) -> None:
    out, state = decode64(**case.inputs(), **case.settings)
    assert_close(result.arrays["state"], state, STATE_TOLERANCE, "state")
    assert_close(result.arrays["out"], out, OUT_TOLERANCE, "out")


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.tobytes() == b.tobytes()


def test_these_are_all_instances():
    from jax_gdn import _cuda

    planned = set()
    for K, VT in INSTANCES:
        planned.add(run(dataclasses.replace(SMALL, K=K, B=1), VT=VT).plan["symbol"])
    assert planned == set(_cuda.kernel_symbols()) == set(module.kernels())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_float64(case):
    judge(case, run(case))


@pytest.mark.parametrize("approximate_by", [-1, 1])
@pytest.mark.parametrize("case", GATES, ids=lambda case: case.id)
def test_float64_whatever_approx_instructions_answer(case, approximate_by):
    judge(case, run(case, approximate_by=approximate_by))


@pytest.mark.parametrize(("K", "VT"), INSTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instance(K, VT, dtype):
    names = ("q", "k", "v", "a", "b", "dt_bias")
    case = dataclasses.replace(SMALL, K=K, **dict.fromkeys(names, dtype))
    judge(case, run(case, VT=VT))


@pytest.mark.parametrize("K", SIZES)
def test_every_tile_and_every_run_has_the_same_bits(K):
    case = dataclasses.replace(SMALL, K=K, **F32)
    first = run(case, VT=16)
    for VT in (16, 32, 64):
        again = run(case, VT=VT)
        for name in ("out", "state"):
            assert_same_bits(again.arrays[name], first.arrays[name])


@pytest.mark.parametrize("VT", TILES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(VT):
    case = Case(B=5, H=1, HV=3, V=64, **F32)
    inputs, per_head = case.inputs(), ("A_log", "dt_bias")
    batch = run(case, VT=VT)
    for row in range(case.B):
        alone = launch.decode(
            {n: x if n in per_head else x[row : row + 1] for n, x in inputs.items()},
            out_dtype=case.out_dtype,
            VT=VT,
        )
        for name in ("out", "state"):
            assert_same_bits(alone.arrays[name][0], batch.arrays[name][row])


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


@pytest.mark.parametrize("VT", TILES)
def test_offsets_beyond_32_bits(VT):
    """The last row of a batch whose state has 2**32 elements and more."""
    B = 65535
    case = Case(B=1, H=2, HV=10, V=64)
    inputs, per_head = case.inputs(), ("A_log", "dt_bias")
    arrays = {**inputs, "out": np.zeros(inputs["v"].shape, case.out_dtype)}
    operands, buffers = {}, []
    for number, (name, array) in enumerate(arrays.items()):
        # 1 TiB apart, each a window on the last row.
        address = (1 << 44) + (number << 40)
        shape = list(array.shape) if name in per_head else [B, *array.shape[1:]]
        operands[name] = (address, str(array.dtype), shape)
        window = address + (0 if name in per_head else (B - 1) * array.nbytes)
        buffers.append(Buffer(name, window, array, name != "out"))
    assert B * inputs["state"].size > 2**32
    plan = launch.plan_decode(operands, scale=case.K**-0.5, VT=VT)
    x, y, z = plan["grid"]
    result = launch.run_plan(
        plan,
        buffers,
        written=("out", "state"),
        blocks=range(x * y * (z - 1), x * y * z),
    )
    judge(case, result)
