"""Prefill: what decode computes, in chunks."""

import dataclasses
import functools as ft
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import F32, Case
from tests.oracle import assert_close, decode64

pytestmark = pytest.mark.usefixtures("host")

IMPLEMENTATIONS = ("native", "xla")
SIZES = {"B": 2, "H": 2, "HV": 4, "K": 32, "V": 16}
# One rounding is 6e-8. A chunk has sums of up to 64 or K terms, one behind the other,
# three in a row: (I + L)^-1, its product, and the keys' with that. Their roundings are
# random and add up to some 1e-6 of the largest entry; what a chunk leaves of them in a
# state decays as the state does. `out` sums K such entries once more.
STATE_TOLERANCE, OUT_TOLERANCE = 1e-5, 2e-5
FORMS = [
    Case(T=1, **SIZES),
    Case(T=2, state="bfloat16", layout="VK", **SIZES),
    Case(T=65, per_channel=True, **SIZES),
    Case(T=150, **SIZES | F32),
    Case(T=17, per_channel=True, q="float16", k="float32", output="float32", **SIZES),
    Case(T=70, lower_bound=-5.0, allow_neg_eigval=True, **SIZES),
    Case(T=70, qk_norm=1e-3, **SIZES | F32),
    Case(T=70, N=5, reads=(3, 0), writes=(-1, 4), **SIZES),
    Case(T=70, layers=3, layer=1, N=5, reads=(3, -1), writes=(2, 1), **SIZES),
    # A decay of everything, between tokens that have nearly none.
    Case(T=70, given=True, g_value=-np.inf, **SIZES | F32),
    Case(T=70, given=True, g_value=-np.inf, per_channel=True, **SIZES | F32),
]
# Their chunks go no way that others' do not.
MORE_FORMS = [
    Case(T=63, **SIZES),
    Case(T=64, layout="VK", **SIZES),
    Case(T=150, per_channel=True, layout="VK", state="float16", **SIZES | F32),
    Case(T=70, B=1, H=1, HV=3, K=7, V=5, state="bfloat16"),
    Case(T=70, lower_bound=-5.0, per_channel=True, **SIZES),
    Case(T=70, given=True, **SIZES),
    Case(T=70, use_qk_l2norm=False, qk_norm=0.5, scale=0.3, **SIZES | F32),
    Case(T=70, N=5, reads=(3, -1), **SIZES),
    Case(T=70, given=True, g_value=0.0, **SIZES | F32),
]
LONG = Case(B=1, T=4097, H=1, HV=1, K=16, V=8)


def correlated(case: Case) -> dict[str, np.ndarray]:
    """Inputs whose keys are those of a model, behind a SiLU: they have much in common.

    So that what was written before is in the way of every token. And decays as slow as
    a model's slow heads have them, which leave it there.
    """
    arrays = case.inputs()
    if case.qk_norm is None:
        for name in "qk":
            x = arrays[name].astype(np.float64) + 0.5
            arrays[name] = (x / (1 + np.exp(-x))).astype(arrays[name].dtype)
    if "A_log" in arrays:
        arrays["A_log"] -= 4
    elif case.g_value is None:
        arrays["g"] = (arrays["g"] / 64).astype(arrays["g"].dtype)
    elif case.g_value == -np.inf:
        arrays["g"] = np.where(np.arange(case.T) % 7 == 5, -np.inf, -1e-3).astype("f4")
        arrays["g"] = np.broadcast_to(
            np.expand_dims(arrays["g"], [0, *range(2, 3 + case.per_channel)]),
            (case.B, case.T, case.HV, *[case.K] * case.per_channel),
        )
    return arrays | case.slots


def prefill(case: Case, arrays, **settings):
    call = ft.partial(jax_gdn.prefill, **case.settings, **settings)
    return jax.jit(lambda x: call(**x))({n: jnp.asarray(x) for n, x in arrays.items()})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.id) for case in FORMS),
        *(pytest.param(x, id=x.id, marks=pytest.mark.slow) for x in MORE_FORMS),
    ],
)
def test_against_float64(case, implementation):
    arrays = correlated(case)
    want = decode64(**arrays, **case.settings)
    if case.output:
        arrays["output"] = np.zeros(want[0].shape, case.output)
    out, state = prefill(case, arrays, implementation=implementation)
    assert out.dtype == case.out_dtype
    assert_close(out, want[0], OUT_TOLERANCE, "out")
    assert_close(state, want[1], STATE_TOLERANCE, "state")


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_long_sequences(per_channel):
    """More than one segment would not be seen at these sizes: see the next test."""
    case = dataclasses.replace(LONG, per_channel=per_channel)
    arrays = correlated(case)
    want = decode64(**arrays)
    for implementation in IMPLEMENTATIONS:
        out, state = prefill(case, arrays, implementation=implementation)
        assert_close(out, want[0], OUT_TOLERANCE, "out")
        assert_close(state, want[1], STATE_TOLERANCE, "state")


def test_segments(monkeypatch):
    """Chunks that do not fit into memory at once come in turns."""
    case = Case(T=300, **SIZES)
    arrays = correlated(case)
    want = decode64(**arrays)
    monkeypatch.setattr(jax_gdn._chunked, "_SEGMENT", 2 * 4 * 64 * 2)
    out, state = prefill(case, arrays, implementation="xla")
    assert_close(out, want[0], OUT_TOLERANCE, "out")
    assert_close(state, want[1], STATE_TOLERANCE, "state")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"given": True, "layout": "VK"},
        {"lower_bound": -5.0, "allow_neg_eigval": True},
        {"per_channel": True, "N": 6, "reads": (3, 0, 1, 5), "writes": (2, 4, -1, 5)},
    ],
    ids=str,
)
def test_a_row_is_as_long_as_it_says(form, implementation):
    """Each is as alone with its own tokens; what is behind them is never read."""
    case = Case(T=70, **SIZES | {"B": 4} | form)
    arrays = correlated(case)
    lengths = np.array([70, 0, 33, 64], np.int32)
    tokens = [n for n in arrays if n in ("q", "k", "v", "a", "b", "g", "beta")]
    padding = np.arange(70) >= lengths[:, None]
    for name in tokens:
        arrays[name] = np.array(arrays[name])
        arrays[name][padding] = np.nan
    given = arrays | {"lengths": lengths}
    out, state = prefill(case, given, implementation=implementation)
    assert not np.asarray(out)[padding].any()
    expected = np.array(arrays["state"], np.float64)
    reads = arrays.get("state_indices", np.arange(4))
    writes = arrays.get("output_state_indices", reads)
    for n, length in enumerate(lengths):
        row = {name: arrays[name][n : n + 1, :length] for name in tokens}
        row |= {x: arrays[x] for x in ("A_log", "dt_bias") if x in arrays}
        row["state"] = arrays["state"][reads[n]][None]
        want = row["state"]
        if length:
            want_out, want = decode64(**row, **case.settings)
            assert_close(out[n, :length], want_out[0], OUT_TOLERANCE, f"out {n}")
        if writes[n] >= 0:
            expected[writes[n]] = want[0]
    assert_close(state, expected, STATE_TOLERANCE, "state")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_row_and_leaves_padding_0(implementation):
    case = Case(T=70, **SIZES)
    arrays = correlated(case) | {"lengths": np.array([70, 40], np.int32)}
    want = prefill(case, arrays, implementation=implementation)
    arrays["state"][1] = np.nan
    arrays["v"][1, 3] = np.inf
    out, state = prefill(case, arrays, implementation=implementation)
    np.testing.assert_array_equal(out[0], want[0][0])
    np.testing.assert_array_equal(state[0], want[1][0])
    assert np.isnan(np.asarray(out[1, :40], np.float32)).all()
    assert not np.asarray(out[1, 40:]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lengths_outside(implementation):
    case = Case(T=5, **SIZES)
    arrays = {name: jnp.asarray(x) for name, x in correlated(case).items()}
    call = ft.partial(jax_gdn.prefill, implementation=implementation)
    got = call(**arrays, lengths=np.array([-3, 9], np.int32))
    want = call(**arrays, lengths=np.array([0, 5], np.int32))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


# What is rounded to 8 bits is off by 2^-9 of itself, at random; of an output or a state
# a few such roundings remain beside one another.
@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("bf16x6", 0, 1e-5), ("bf16x3", 0, 1e-4), ("bf16", 5e-4, 2e-2)],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_precision(precision, least, most, per_channel):
    case = Case(T=150, per_channel=per_channel, **SIZES | F32)
    arrays = correlated(case)
    want = decode64(**arrays)
    got = prefill(case, arrays, precision=precision, implementation="xla")
    for x, right in zip(got, want, strict=True):
        error = np.abs(np.asarray(x, np.float64) - right).max() / np.abs(right).max()
        assert least <= error <= most


@pytest.mark.parametrize("K", [32, 96])
def test_no_warning_where_there_is_no_kernel(K):
    """The chunked form is what prefill is, and no way out."""
    case = Case(T=3, **SIZES | {"K": K})
    specs = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, case.inputs()))
    traced = jax.jit(lambda x: jax_gdn.prefill(**x)).trace(specs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for platform in ("cpu", "cuda", "tpu"):
            traced.lower(lowering_platforms=(platform,))
    native = jax.jit(lambda x: jax_gdn.prefill(**x, implementation="native"))
    with pytest.raises(NotImplementedError, match=r"jax_gdn\.prefill: .* cannot run"):
        native.trace(specs).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "float64"}, ValueError, "`precision` must be 'bf16x6' or "),
        ({"precision": None}, ValueError, "`precision` must be 'bf16x6' or "),
        ({"lengths": [1, 2]}, TypeError, r"`lengths` must be an array \[B\]; got list"),
        ({"lengths": np.ones(2, "f4")}, TypeError, "`lengths` must be int32"),
        (
            {"lengths": np.ones(3, "i4")},
            ValueError,
            r"`lengths` must have shape \[B\] = \[2\]; got \[3\] \(B = 2 from `q`\)",
        ),
        (
            {
                "state_indices": np.zeros(2, "i4"),
                "output_state_indices": np.zeros((2, 3), "i4"),
            },
            ValueError,
            r"`output_state_indices` must have shape \[B\] = \[2\]; got \[2, 3\]",
        ),
    ],
    ids=str,
)
def test_errors(changes, error, message):
    arrays = {name: jnp.asarray(x) for name, x in Case(T=3, **SIZES).inputs().items()}
    with pytest.raises(error, match=message):
        jax_gdn.prefill(**arrays | changes)
