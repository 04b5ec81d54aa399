"""How exact the decay is, on the machine, and the polynomial in it."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.cases import Case
from tests.kernels import launch, module
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64
from tests.ptxcheck import floats
from tests.test_extremes import CASES, DECAY_TOLERANCE, extreme_gates

ULP = 2.0**-23  # of a float32, at most, relative to it


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("layout", ["KV", "VK"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"HV": 512}, marks=pytest.mark.slow),
        {"HV": 4, "per_channel": True},
        {"HV": 512, "T": 2, "K": 64, "V": 16},
    ],
    ids=str,
)
def test_decay_is_exact_to_rounding(layout, sizes):
    """Of 512 numbers, by kernels of one token and of any."""
    case = Case(B=1, H=1, layout=layout, **sizes)
    given, T, HV = case.inputs(), case.T, case.HV
    x = np.linspace(-30, 20, 512).astype(np.float32).reshape(given["dt_bias"].shape)
    given |= {"A_log": np.zeros(HV, np.float32), "dt_bias": x}
    given |= {name: np.zeros_like(given[name]) for name in ("a", "k")}
    given["state"] = np.ones_like(given["state"])
    result = launch.decode(given, **case.settings, out_dtype=case.out_dtype)
    assert module.of_symbol(result.plan["symbol"]).single_token == (T == 1)
    # With k = 0 and S = 1, what is left is exp(g), of every token.
    softplus = np.logaddexp(0, x.astype(np.float64)).reshape(1, HV, -1, 1)
    softplus = softplus if layout == "KV" else softplus.swapaxes(2, 3)
    decay = np.exp(-T * softplus)
    # exp and log(1 + .) within 2 ulp and 1, a sum and a product rounded, then exp
    # again; and the product with the last token's.
    allowed = T * (3.5 * softplus + 2.5) * ULP * decay
    error = np.abs(result.arrays["state"] - decay)
    assert (error <= allowed).all(), (error / decay).max() / ULP


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.slow] * (x.K == 128)) for x in CASES],
    ids=lambda case: case.id,
)
def test_gates_of_any_size(case):
    """Of finite ones none gives NaN, and the decay is the limit of the formula."""
    given, decay = extreme_gates(case)
    result = launch.decode(given, **case.settings, out_dtype=case.out_dtype)
    assert np.isfinite(result.arrays["out"].astype(np.float32)).all()
    error = np.abs(result.arrays["state"] - decay)
    assert error.max() <= DECAY_TOLERANCE


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    "form",
    [
        {"given": True},
        {"given": True, "g_value": -np.inf, "beta_value": 2.0},
        {"lower_bound": -5.0, "allow_neg_eigval": True},
        {"lower_bound": -5.0, "x": 1e30, "A_log_value": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["KV", "VK"])
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gate_forms_against_float64(form, layout, T, per_channel):
    case = Case(B=1, H=1, T=T, layout=layout, per_channel=per_channel, **form)
    result = launch.run(case)
    with np.errstate(over="ignore"):
        out, state = decode64(**case.inputs(), **case.settings)
    assert_close(result.arrays["out"], out, OUT_TOLERANCE, "out")
    assert_close(result.arrays["state"], state, STATE_TOLERANCE, "state")


def test_the_polynomial_is_within_an_ulp():
    source = Path(__file__).parents[2] / "cuda" / "gates.cuh"
    body = source.read_text().split("float Log1pOfFraction")[1].split("\n}\n")[0]
    first, *rest = re.findall(r"r = (?:fmaf\(r, m, )?(-?0\.\d+)f", body)
    assert len(rest) == 8
    x = np.linspace(0, 1, 2**20 + 1).astype(np.float32)
    x = np.append(x, np.float32(2.0) ** np.arange(-149, 0))
    half, one = np.float32([0.5]), np.float32([1])
    upper = x >= half
    m = np.where(upper, floats.fma(half, x, -half), x)
    r = np.full_like(m, first)
    for coefficient in rest:
        r = floats.fma(r, m, np.float32([coefficient]))
    r = floats.fma(floats.mul(r, m), m, m)
    (ln2,) = re.findall(r"upper \? r \+ (0\.\d+)f", body)
    r = np.where(upper, floats.fma(r, one, np.float32([ln2])), r)
    exact = np.log1p(x.astype(np.float64))
    error = np.abs(r - exact) / np.spacing(exact.astype(np.float32))
    assert error[x > 0].max() < 1
    assert r[0] == 0
