"""What padding holds reaches nothing: rows of no slot, tokens that change nothing."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import F32, LAYOUTS, Case
from jax import lax
from oracle import OUT_TOLERANCE, assert_close, decode64

import jax_gdn

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"B": 3, "H": 2, "HV": 4, "K": 16, "V": 8, "T": 4, "N": 5, **F32}
TOKENS = ("q", "k", "v", "a", "b")
# Slot 0, which a careless gather takes for a row of no slot, is nobody's.
FORMS = [
    Case(**SMALL, reads=(1, -1, 2)),
    Case(**SMALL, reads=(1, 5, 2), layout="VK", per_channel=True),
    Case(**SMALL, reads=(1, -1, 2), writes=(3, 3, -1)),
    Case(**SMALL, reads=(1, -7, 2), writes=((3, 3, -1, 1), (4, 4, 4, 4), (-1,) * 4)),
]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["native", "xla"])
CASES = pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)


def poisoned(case: Case, value: float) -> dict:
    """Returns inputs with a value in all that no row that counts brings or reads."""
    arrays = case.inputs()
    for name in TOKENS:
        arrays[name][1] = value
    unread = [slot for slot in range(case.N) if slot not in case.reads]
    arrays["state"][unread] = value
    return jax.tree.map(jnp.asarray, arrays)


def loss(case: Case, implementation, arrays):
    out, state = jax_gdn.decode(
        **arrays, **case.slots, **case.settings, implementation=implementation
    )
    weight = 1 + jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape) % 7
    return (weight * out).sum() + (state * state.shape[0]).sum()


def grad(case, implementation):
    return jax.grad(ft.partial(loss, case, implementation))


def tangent_of_grad(case, implementation):
    def call(arrays):
        tangents = jax.tree.map(jnp.ones_like, arrays)
        return jax.jvp(grad(case, implementation), (arrays,), (tangents,))[1]

    return call


def vmap_of_grad(case, implementation):
    def call(arrays):
        return jax.vmap(grad(case, implementation))(
            jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
        )

    return call


def grad_of_scan(case, implementation):
    def total(arrays):
        def step(state, _):
            out, state = jax_gdn.decode(
                **arrays | {"state": state},
                **case.slots,
                **case.settings,
                implementation=implementation,
            )
            return state, out

        state, outs = lax.scan(step, arrays["state"], length=2)
        return outs.sum() + (state * 3).sum()

    return jax.grad(total)


@IMPLEMENTATIONS
@CASES
@pytest.mark.parametrize(
    "function", [grad, tangent_of_grad, vmap_of_grad, grad_of_scan]
)
def test_no_gradient_depends_on_padding(function, case, implementation):
    call = jax.jit(function(case, implementation))
    clean = call(poisoned(case, 0.0))
    assert any(np.asarray(x).any() for x in clean.values())
    for poison in (np.nan, np.inf, -np.inf):
        for name, x in call(poisoned(case, poison)).items():
            x = np.asarray(x)
            np.testing.assert_array_equal(x, np.asarray(clean[name]), err_msg=name)
            assert np.isfinite(x).all(), name
            if name in TOKENS:
                rows = x[:, 1] if function is vmap_of_grad else x[1]
                assert not rows.any(), name


@IMPLEMENTATIONS
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_of_no_decay_and_no_strength_changes_nothing(
    layout, per_channel, T, implementation
):
    """Left padding: a = b = -inf with finite q, k, v keeps the state bit for bit.

    The tokens behind it give what they give alone, and it has no gradient.
    """
    case = Case(
        **{**SMALL, "T": T + 2, "N": None}, layout=layout, per_channel=per_channel
    )
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    padded = {
        n: x.at[:, :2].set(-jnp.inf) if n in "ab" else x for n, x in arrays.items()
    }
    decode = ft.partial(jax_gdn.decode, **case.settings, implementation=implementation)
    for name in ("a", "b"):
        assert np.isinf(np.asarray(padded[name][:, :2])).all()
    only = {n: x[:, :2] if n in TOKENS else x for n, x in padded.items()}
    _, state = decode(**only)
    assert np.asarray(state).tobytes() == np.asarray(arrays["state"]).tobytes()
    rest = {n: x[:, 2:] if n in TOKENS else x for n, x in arrays.items()}
    (out, state), (want_out, want_state) = decode(**padded), decode(**rest)
    # XLA's own loops of other lengths round otherwise: units of values of order 1.
    allowed = 0 if implementation == "native" else 1e-6
    for got, want in ((out[:, 2:], want_out), (state, want_state)):
        np.testing.assert_allclose(
            np.asarray(got), np.asarray(want), rtol=0, atol=allowed
        )

    def total(arrays):
        out, state = decode(**arrays)
        return (out[:, 2:] ** 2).sum() + (state**2).sum()

    gradient = jax.grad(total)(padded)
    for name, x in gradient.items():
        assert np.isfinite(np.asarray(x)).all(), name
        assert name not in TOKENS or not np.asarray(x[:, :2]).any(), name


@IMPLEMENTATIONS
def test_empty_pool(implementation):
    """N = 0: every slot is outside, every row padding."""
    case = Case(**{**SMALL, "N": 0}, reads=(-1, 0, 3), writes=((0,) * 4,) * 3)
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    for slots in (case.slots, {"state_indices": case.slots["state_indices"]}):
        out, state = jax.jit(
            lambda x, slots=slots: jax_gdn.decode(
                **x, **slots, implementation=implementation
            )
        )(arrays)
        assert state.shape == (0, 4, 16, 8)
        assert out.shape == (3, 4, 4, 8)
        assert not np.asarray(out).any()


EXTREMES = (-3e38, -200, -104, -86, -17, 0, 5, 87.5, 88.5, 100, 200, 3e38)


def exact_decay(A_log, x):
    """Returns exp(-exp(A_log + log softplus(x))) in float64, where none overflows."""
    log_softplus = np.where(x < -30, x, np.log(np.logaddexp(0, np.maximum(x, -30))))
    with np.errstate(over="ignore"):
        return np.exp(-np.exp(A_log + log_softplus))


@IMPLEMENTATIONS
@pytest.mark.parametrize("per_channel", [False, True])
def test_gates_of_any_size(per_channel, implementation):
    """No finite A_log, a and dt_bias gives NaN; the decay is the limit of the formula.

    exp(A_log) may be infinite where softplus(x) is 0, and the other way around, and
    a + dt_bias may overflow.
    """
    grid = np.array([(A, x) for A in EXTREMES for x in EXTREMES] * 2, np.float32)
    HV = len(grid)
    case = Case(
        **{**SMALL, "B": 1, "T": 1, "N": None, "H": 1, "HV": HV},
        per_channel=per_channel,
    )
    arrays = case.inputs()
    A_log, x = grid.T
    twice = np.arange(HV) >= HV // 2
    arrays["A_log"][:] = A_log
    arrays["a"][:] = x.reshape(-1, 1) if per_channel else x
    bias = np.where(twice, x, 0)
    arrays["dt_bias"][:] = bias.reshape(-1, 1) if per_channel else bias
    arrays["k"][:] = 0
    arrays["state"][:] = 1
    arrays = jax.tree.map(jnp.asarray, arrays)
    decode = ft.partial(jax_gdn.decode, implementation=implementation)
    out, state = jax.jit(decode)(**arrays)
    assert np.isfinite(np.asarray(out)).all()
    total = np.float64(x) + np.where(twice, np.float64(x), 0)
    want = exact_decay(np.float64(A_log), np.clip(total, -3.4e38, 3.4e38))
    # A rate is exp of a sum, or a product, of terms of up to 200, rounded to 24 bits:
    # off by 200 / 2^24 = 1.2e-5 of itself, which moves exp(-rate) by at most 1/e of it.
    np.testing.assert_allclose(
        np.asarray(state)[0],
        np.broadcast_to(want[:, None, None], (HV, case.K, case.V)),
        rtol=0,
        atol=1e-5,
    )

    def results(x):
        return decode(**x)

    ones = jax.tree.map(jnp.ones_like, arrays)
    gradient = jax.jit(jax.grad(lambda x: sum(y.sum() for y in results(x))))(arrays)
    tangents = jax.jit(lambda x: jax.jvp(results, (x,), (ones,))[1])(arrays)
    for name, x in [*gradient.items(), *zip(("out", "state"), tangents, strict=True)]:
        assert np.isfinite(np.asarray(x)).all(), name


def test_weights_of_any_size_under_vmap():
    """Mapped weights, which move into `a`, too."""
    case = Case(**{**SMALL, "N": None})
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
