"""What `decode` promises beyond one right answer."""

import functools as ft
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import F32, Case
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

GOLDEN = Path(__file__).parent / "golden" / "qwen3_next_float32.npz"


def step(state, q, k, v, A_log, a, dt_bias, b):
    out, state = jax_gdn.decode(q, k, v, state, A_log, a, dt_bias, b)
    return state, out


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("B", [1, 3, 33])
def test_repeats_bitwise(B):
    arrays = Case(B=B, H=4, HV=8).inputs().values()
    first = jax_gdn.decode(*arrays)
    for _ in range(10):
        assert list(map(bits, jax_gdn.decode(*arrays))) == list(map(bits, first))


# The last four fill a GPU many times over: the kernels for the most states.
@pytest.mark.parametrize(
    "case",
    [Case(B=33), Case(B=5, H=1, HV=3, K=64, V=48)]
    + [
        Case(B=520, H=8, HV=8, layout=layout, state=state)
        for layout in ("KV", "VK")
        for state in ("float32", "bfloat16")
    ],
)
def test_row_alone_equals_row_in_batch(case):
    arrays = case.inputs()
    decode = ft.partial(jax_gdn.decode, state_layout=case.layout)
    # Rows are cut out on the host: what XLA's kernels write, sanitizers do not watch.
    out, state = map(np.asarray, decode(*arrays.values()))
    per_head = ("A_log", "dt_bias")
    for n in (0, case.B // 2, case.B - 1):
        row = [x if name in per_head else x[n : n + 1] for name, x in arrays.items()]
        row_out, row_state = decode(*row)
        assert bits(row_out) == bits(out[n : n + 1])
        assert bits(row_state) == bits(state[n : n + 1])


@pytest.mark.parametrize("name", ["q", "k", "v", "state", "a", "b"])
def test_nan_stays_in_its_row(name):
    arrays = Case(B=5, **F32).inputs()
    clean = jax_gdn.decode(*arrays.values())
    arrays[name][2] = np.nan
    poisoned = jax_gdn.decode(*arrays.values())
    others = np.array([0, 1, 3, 4])
    for got, want in zip(poisoned, clean, strict=True):
        assert bits(np.asarray(got)[others]) == bits(np.asarray(want)[others])
    # q is not written into the state.
    assert [np.isnan(np.asarray(x)[2]).all() for x in poisoned] == [True, name != "q"]


def test_golden_trace_in_place():
    """Replays 16 decode steps of a Hugging Face Qwen3-Next layer."""
    trace = np.load(GOLDEN)
    call = jax.jit(step, donate_argnums=0)
    A_log, dt_bias = trace["A_log"], trace["dt_bias"]
    state = jnp.array(trace["initial_state"])
    where = state.unsafe_buffer_pointer()
    inputs = [trace[name][:, :, None] for name in ("q", "k", "v", "a", "b")]
    for t, (q, k, v, a, b) in enumerate(zip(*inputs, strict=True)):
        state, out = call(state, q, k, v, A_log, a, dt_bias, b)
        assert_close(np.asarray(out[:, 0]), trace["output"][t], OUT_TOLERANCE, "out")
    assert_close(np.asarray(state), trace["final_state"], STATE_TOLERANCE, "state")
    assert state.unsafe_buffer_pointer() == where


def test_drift_over_1000_steps():
    """Errors of a float32 state do not grow: each step forgets some of the old."""
    case = Case(B=1, H=1, HV=2, K=64, V=64, **F32)
    steps = [Case(**{**case.__dict__, "seed": t}).inputs() for t in range(1000)]
    first = steps[0]
    call = jax.jit(step, donate_argnums=0)
    state, exact = jnp.array(first["state"]), first["state"]
    for inputs in steps:
        q, k, v, _, _, a, _, b = inputs.values()
        A_log, dt_bias = np.full(2, -6.0, np.float32), first["dt_bias"]
        state, out = call(state, q, k, v, A_log, a, dt_bias, b)
        exact_out, exact = decode64(q, k, v, exact, A_log, a, dt_bias, b)
    assert_close(np.asarray(out), exact_out, OUT_TOLERANCE, "out")
    assert_close(np.asarray(state), exact, STATE_TOLERANCE, "state")


FORMS = [
    (layout, per_channel) for layout in ("KV", "VK") for per_channel in (False, True)
]


@pytest.mark.parametrize(("layout", "per_channel"), FORMS)
@pytest.mark.parametrize(("K", "V"), [(64, 48), (128, 48), (192, 48), (128, 144)])
def test_several_tokens_equal_single_calls(layout, per_channel, K, V):
    case = Case(T=5, K=K, V=V, layout=layout, per_channel=per_channel)
    arrays = case.inputs()
    out, state = jax_gdn.decode(**arrays, state_layout=layout)
    outs = []
    single = dict(arrays)
    for t in range(5):
        for name in ("q", "k", "v", "a", "b"):
            single[name] = arrays[name][:, t : t + 1]
        out_t, single["state"] = jax_gdn.decode(**single, state_layout=layout)
        outs.append(np.asarray(out_t))
    assert bits(out) == bits(np.concatenate(outs, axis=1))
    assert bits(state) == bits(single["state"])


@pytest.mark.parametrize("state", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("layout", "per_channel"), FORMS)
def test_row_alone_in_every_form(layout, per_channel, state):
    case = Case(
        B=9, T=2, K=64, V=48, layout=layout, per_channel=per_channel, state=state
    )
    arrays = case.inputs()
    out, new = map(np.asarray, jax_gdn.decode(**arrays, state_layout=layout))
    per_head = ("A_log", "dt_bias")
    row = {n: x if n in per_head else x[4:5] for n, x in arrays.items()}
    row_out, row_new = jax_gdn.decode(**row, state_layout=layout)
    assert bits(row_out) == bits(out[4:5])
    assert bits(row_new) == bits(new[4:5])
