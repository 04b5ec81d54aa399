"""Every implementation against the float64 loop, on every case."""

import jax
import numpy as np
import pytest

import jax_gdn
from jax_gdn import _registration
from tests.cases import (
    CASES,
    FORM_CASES,
    ODD_CASES,
    SLOW_CASES,
    VALUE_CASES,
    Case,
)
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512bf16")


def reference(*arrays, **rest):
    return jax_gdn.reference_decode(*arrays, **rest)


def native(*arrays, **rest):
    return jax_gdn.decode(*arrays, implementation="native", **rest)


def xla(*arrays, **rest):
    return jax_gdn.decode(*arrays, implementation="xla", **rest)


def check(implementation, case: Case) -> None:
    arrays = case.inputs()
    optional = case.slots
    if case.output is not None:
        optional["output"] = np.full(arrays["v"].shape, np.nan, case.out_dtype)
    call = jax.jit(lambda x: implementation(**x, **case.settings))
    out, state = call(arrays | optional)
    expected_out, expected_state = decode64(**arrays, **case.slots, **case.settings)
    assert out.dtype == case.out_dtype
    assert state.dtype == arrays["state"].dtype
    assert_close(np.asarray(state), expected_state, STATE_TOLERANCE, "state")
    assert_close(np.asarray(out), expected_out, OUT_TOLERANCE, "out")


def each_on_each() -> list:
    """Of the reference, one text for all sizes, some and every third of the others."""
    few = FORM_CASES + VALUE_CASES
    others = [case for case in CASES if case not in few][::3]
    return [
        pytest.param(
            implementation,
            case,
            marks=[pytest.mark.slow] * (case in slow),
            id=f"{case.id}-{implementation.__name__}",
        )
        for implementation, slow in (
            (native, SLOW_CASES),
            (reference, others),
        )
        for case in (CASES if implementation is native else few + others)
    ]


@pytest.mark.parametrize(("implementation", "case"), each_on_each())
def test_against_float64(implementation, case):
    check(implementation, case)


@pytest.mark.parametrize("case", ODD_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    "implementation", [pytest.param(reference, marks=pytest.mark.slow), native]
)
def test_odd_sizes_on_the_host(implementation, case):
    with jax.default_device(jax.devices("cpu")[0]):
        check(implementation, case)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Makes the host kernel use one, where the processor has it."""
    kernels = _registration.cpu
    usable = kernels.instruction_sets()
    if request.param not in usable:
        pytest.skip(f"this processor has {', '.join(usable)}")
    before = kernels.instruction_set()
    kernels.use_instruction_set(request.param)
    yield request.param
    kernels.use_instruction_set(before)


@pytest.mark.usefixtures("instruction_set", "host")
@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_every_instruction_set(layout, state):
    """V: parts of four vectors, of one and of one column; K: a rest too."""
    check(native, Case(T=3, K=67, V=71, layout=layout, state=state, per_channel=True))


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="`name` must be one of"):
        _registration.cpu.use_instruction_set("avx1024")


def test_implementation_xla_calls_the_reference():
    arrays = Case().inputs().values()
    expected = jax.jit(jax_gdn.reference_decode)(*arrays)
    for got, want in zip(xla(*arrays), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_empty_batch():
    out, state = native(*Case(B=0).inputs().values())
    assert out.shape == (0, 1, 4, 128)
    assert state.shape == (0, 4, 128, 128)
