"""Shapes and dtypes that nobody thought of."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_gdn
from tests.cases import DTYPES, LAYOUTS, Case
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

dtypes = st.sampled_from(sorted(DTYPES))


@st.composite
def cases(draw) -> Case:
    H = draw(st.integers(1, 4))
    return Case(
        B=draw(st.integers(0, 5)),
        T=draw(st.integers(1, 3)),
        state=draw(dtypes),
        layout=draw(st.sampled_from(LAYOUTS)),
        per_channel=draw(st.booleans()),
        H=H,
        HV=H * draw(st.integers(1, 4)),
        K=draw(st.integers(1, 80)),
        V=draw(st.integers(1, 80)),
        **{name: draw(dtypes) for name in ("q", "k", "v", "a", "dt_bias", "b")},
        output=draw(st.none() | dtypes),
        scale=draw(st.none() | st.floats(-4, 4)),
        use_qk_l2norm=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_host_kernel_against_float64(case):
    arrays = case.inputs()
    output = (
        None if case.output is None else np.zeros(arrays["v"].shape, case.out_dtype)
    )
    with jax.default_device(jax.devices("cpu")[0]):
        out, state = jax_gdn.decode(
            *arrays.values(), output=output, implementation="native", **case.settings
        )
    expected_out, expected_state = decode64(*arrays.values(), **case.settings)
    assert out.dtype == case.out_dtype
    assert_close(np.asarray(state), expected_state, STATE_TOLERANCE, "state")
    assert_close(np.asarray(out), expected_out, OUT_TOLERANCE, "out")
