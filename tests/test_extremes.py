"""Gates of any size: no finite input gives NaN, in a result or a derivative."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import F32, LAYOUTS, Case
from tests.oracle import OUT_TOLERANCE, assert_close, decode64

SMALL = {"B": 3, "H": 2, "HV": 4, "K": 64, "V": 16, "T": 4, **F32}
ONE = {"B": 1, "T": 1, "H": 1, "HV": 450, "K": 64, "V": 16}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["native", "xla"])
# Beside the largest: where exp becomes subnormal, and where it becomes infinite.
EXTREMES = (
    -3e38,
    -200,
    -104,
    -88,
    -87.4,
    -60,
    -17,
    0,
    5,
    61,
    86,
    87.5,
    88.5,
    100,
    3e38,
)


def exact_decay(A_log, x):
    """Returns exp(-exp(A_log + log softplus(x))) in float64, where none overflows."""
    log_softplus = np.where(x < -30, x, np.log(np.logaddexp(0, np.maximum(x, -30))))
    with np.errstate(over="ignore"):
        return np.exp(-np.exp(A_log + log_softplus))


def extreme_gates(case: Case) -> tuple[dict, np.ndarray]:
    """Returns inputs of which every head has other gates, and the decays of one token.

    With k = 0 and a state of ones, they are the state that one token leaves.
    """
    arrays = case.inputs()
    x = np.array(EXTREMES).astype(arrays["a"].dtype)  # 16 bits round it
    A_log, x, twice = (
        np.ravel(y) for y in np.meshgrid(np.float32(EXTREMES), x, [False, True])
    )
    channels = (-1, 1) if case.per_channel else -1
    arrays["A_log"][:] = A_log
    arrays["a"][:] = x.reshape(channels)
    arrays["dt_bias"][:] = np.where(twice, np.float32(x), 0).reshape(channels)
    arrays["k"][:] = 0
    arrays["state"][:] = 1
    total = np.float64(x) * (1 + twice)  # in float32, it may overflow
    largest = float(np.finfo(np.float32).max)
    decay = exact_decay(np.float64(A_log), np.clip(total, -largest, largest))
    return arrays, np.broadcast_to(decay[:, None, None], arrays["state"].shape)


# A rate is exp of a sum, or a product, of terms of up to 200, rounded to 24 bits: off
# by 200 / 2^24 = 1.2e-5 of itself, which moves exp(-rate) by at most 1/e of that.
DECAY_TOLERANCE = 1e-5
# Float32 operands, and those of the kernels for one token.
CASES = [
    Case(**ONE, layout=layout, per_channel=per_channel, **F32)
    for layout in LAYOUTS
    for per_channel in (False, True)
] + [
    Case(**{**ONE, "K": 128, "V": 128}, layout=layout, per_channel=per_channel)
    for layout in LAYOUTS
    for per_channel in (False, True)
]


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.slow] * (x.K == 128)) for x in CASES],
    ids=lambda case: case.id,
)
def test_gates_of_any_size(case, implementation):
    """No finite A_log, a and dt_bias gives NaN; the decay is the limit of the formula.

    exp(A_log) may be infinite where softplus(x) is 0, and the other way around, and
    a + dt_bias may overflow.
    """
    arrays, decay = extreme_gates(case)
    arrays = jax.tree.map(jnp.asarray, arrays)
    decode = ft.partial(
        jax_gdn.decode, state_layout=case.layout, implementation=implementation
    )
    out, state = jax.jit(decode)(**arrays)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_allclose(np.asarray(state), decay, rtol=0, atol=DECAY_TOLERANCE)

    def results(x):
        return [y.astype(jnp.float32) for y in decode(**x)]

    ones = jax.tree.map(jnp.ones_like, arrays)
    gradient = jax.jit(jax.grad(lambda x: sum(y.sum() for y in results(x))))(arrays)
    tangents = jax.jit(lambda x: jax.jvp(results, (x,), (ones,))[1])(arrays)
    for name, x in [*gradient.items(), *zip(("out", "state"), tangents, strict=True)]:
        assert np.isfinite(np.asarray(x, np.float32)).all(), name


def test_weights_of_any_size_under_vmap():
    """Mapped weights, which move into `a`, too."""
    case = Case(**SMALL)
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    arrays["a"] = jnp.full_like(arrays["a"], -200.0)
    weights = jnp.float32([[100.0] * 4, [-200.0] * 4, [2.0] * 4])

    def call(A_log):
        return jax_gdn.decode(**arrays | {"A_log": A_log})

    mapped = jax.jit(jax.vmap(call))(weights)
    for i, A_log in enumerate(weights):
        given = {n: np.asarray(x) for n, x in arrays.items()} | {"A_log": A_log}
        given["A_log"] = np.minimum(np.asarray(A_log), 100)
        out, _ = decode64(**given)
        assert_close(mapped[0][i], out, OUT_TOLERANCE, "out")
        assert np.isfinite(np.asarray(mapped[1][i])).all()
