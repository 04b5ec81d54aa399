"""Gates as models have them: given, with a lower bound, with a strength of up to 2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import DTYPES, F32, Case

SMALL = {"B": 2, "T": 3, "H": 2, "HV": 4, "K": 16, "V": 16, **F32}
FORMS = {
    "softplus": {},
    "lower bound": {"lower_bound": -3.0},
    "negative eigenvalues": {"allow_neg_eigval": True},
    "both": {"lower_bound": -0.5, "allow_neg_eigval": True},
}
LOGITS = ("A_log", "a", "dt_bias", "b")


def arrays_of(case: Case) -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, case.inputs())


def gates_of(A_log, a, dt_bias, b, lower_bound=None, allow_neg_eigval=False):
    """G and beta by the formula, in the dtype of `a`."""
    x = a + dt_bias[None, None]
    rate = jnp.exp(A_log)[None, None]
    rate = rate if a.ndim == 3 else rate[..., None]
    g = -rate * jax.nn.softplus(x)
    if lower_bound is not None:
        g = lower_bound * jax.nn.sigmoid(rate * x)
    return {"g": g, "beta": (1 + allow_neg_eigval) * jax.nn.sigmoid(b)}


# Gates a few roundings apart, which states of a few tokens carry on.
TOLERANCE = 1e-5


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "implementation", ["native", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_given_gates_are_those_of_the_logits(form, per_channel, implementation):
    """The results, and by the chain rule the gradients."""
    arrays = arrays_of(Case(**SMALL, per_channel=per_channel))
    logits = {name: arrays.pop(name) for name in LOGITS}
    fixed = FORMS[form]

    def loss(gates, arrays, **settings):
        settings["implementation"] = implementation
        out, state = jax_gdn.decode(**arrays, **gates, **settings)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state)), (out, state)

    def by_logits(logits, arrays):
        return loss(logits, arrays, **fixed)

    def by_gates(logits, arrays):
        return loss(gates_of(**logits, **fixed), arrays)

    got, want = (
        jax.jit(jax.grad(f, (0, 1), has_aux=True))(logits, arrays)
        for f in (by_gates, by_logits)
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        allowed = TOLERANCE * max(1, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=allowed)


def heads_of(*values) -> list[np.ndarray]:
    """All combinations, one a head."""
    return [np.ravel(x) for x in np.meshgrid(*map(np.float32, values))]


def derivatives(results, arrays):
    """Yields what reverse and forward mode give, by name."""
    ones = jax.tree.map(jnp.ones_like, arrays)
    yield from jax.grad(lambda x: sum(jnp.sum(y) for y in results(x)))(arrays).items()
    yield from zip(
        ("out", "state"), jax.jvp(results, (arrays,), (ones,))[1], strict=True
    )


@pytest.mark.usefixtures("host")
def test_derivatives_at_the_extremes_are_finite():
    g, beta = heads_of([0, -1e30, -np.inf], [0, 1, 2])
    arrays = arrays_of(Case(**SMALL | {"H": 1, "HV": 9}, given=True))
    arrays |= {"g": jnp.broadcast_to(g, (2, 3, 9))}
    arrays |= {"beta": jnp.broadcast_to(beta, (2, 3, 9))}
    for name, x in derivatives(lambda x: jax_gdn.decode(**x), arrays):
        assert np.isfinite(np.asarray(x)).all(), name


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_a_bounded_decay_of_any_size(implementation):
    """No finite A_log and a give NaN; exp(A_log) may be infinite where a is 0."""
    A_log, x = heads_of(
        [-3e38, -104, 0, 88.5, 177, 3e38], [-3e38, -1, -2e-38, 0, 2e-38, 1, 3e38]
    )
    HV = len(x)
    case = Case(**SMALL | {"B": 1, "T": 1, "H": 1, "HV": HV}, lower_bound=-5.0, x=0.0)
    arrays = arrays_of(case) | {
        "A_log": jnp.array(A_log),
        "a": jnp.array(x)[None, None],
    }
    arrays["k"] = jnp.zeros_like(arrays["k"])
    arrays["state"] = jnp.ones_like(arrays["state"])

    def results(arrays):
        return jax_gdn.decode(**arrays, **case.settings, implementation=implementation)

    # With k = 0 and a state of ones, the decay is what is left. The product is known
    # to 2^-22 of itself, of which sigmoid keeps at most 0.28, and exp(g) 5 times that.
    with np.errstate(divide="ignore"):
        log = np.float64(A_log) + np.log(np.abs(np.float64(x)))
    product = np.sign(x) * np.exp(np.minimum(log, 700))
    decay = np.exp(-5.0 * np.exp(-np.logaddexp(0.0, -product)))[None, :, None, None]
    state = np.asarray(jax.jit(results)(arrays)[1])
    decay = np.broadcast_to(decay, state.shape)
    np.testing.assert_allclose(state, decay, rtol=0, atol=2e-6)
    for name, y in derivatives(results, arrays):
        assert np.isfinite(np.asarray(y)).all(), name


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mapped", ["A_log", "dt_bias", "a"])
def test_vmap_over_weights(form, mapped):
    arrays = arrays_of(Case(**SMALL))
    both = jnp.stack([arrays[mapped], 0.5 * arrays[mapped]])

    def call(x):
        return jax_gdn.decode(**arrays | {mapped: x}, **FORMS[form])

    got = jax.vmap(call)(both)
    for i in range(2):
        for x, y in zip(got, call(both[i]), strict=True):
            x, y = np.asarray(x[i]), np.asarray(y)
            np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_A_log_of_any_float(dtype):
    arrays = arrays_of(Case())
    narrow = arrays["A_log"].astype(dtype)
    got = jax_gdn.decode(**arrays | {"A_log": narrow})
    want = jax_gdn.decode(**arrays | {"A_log": narrow.astype(jnp.float32)})
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("T", [1, 3])
def test_repeated_key_heads_change_nothing(T):
    """Q and k may come repeated to HV heads; they need not."""
    arrays = arrays_of(Case(T=T))
    wide = {name: jnp.repeat(arrays[name], 2, axis=2) for name in ("q", "k")}
    got, want = jax_gdn.decode(**arrays | wide), jax_gdn.decode(**arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


GIVEN = Case(**SMALL, given=True)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"a": "g"},
            ValueError,
            "`g` and `beta` come in place of .*; got `g` beside `a`",
        ),
        ({"b": "beta"}, ValueError, "got `g` beside `b`"),
        ({"lower_bound": -1.0}, ValueError, "got `g` beside `lower_bound`"),
        ({"allow_neg_eigval": True}, ValueError, "got `g` beside `allow_neg_eigval`"),
        ({"beta": None}, TypeError, "`beta` must be an array; got None. .* together"),
        ({"g": None}, TypeError, "`g` must be an array; got None. .* come together"),
        ({"allow_neg_eigval": np.True_}, ValueError, "beside `allow_neg_eigval`"),
        (
            {"g": "q"},
            ValueError,
            r"`g` must have shape \[B, T, HV, K\] = \[2, 3, 4, 16",
        ),
        ({"beta": "g[:1]"}, ValueError, r"`beta` must have shape .*; got \[1, 3, 4\]"),
        ({"beta": "int"}, TypeError, "`beta` must be float32 or .*; got int32"),
        ({"g": None, "beta": None}, TypeError, "or `g` and `beta`; got none"),
    ],
    ids=str,
)
def test_mixed_or_wrong_gates_are_refused(changes, error, match):
    arrays = arrays_of(GIVEN)
    others = {
        **arrays,
        "g[:1]": arrays["g"][:1],
        "int": jnp.zeros((2, 3, 4), jnp.int32),
    }
    given = {
        n: others.get(x, x) if isinstance(x, str) else x for n, x in changes.items()
    }
    with pytest.raises(error, match="jax_gdn: .*" + match):
        jax_gdn.decode(**arrays | given)


@pytest.mark.parametrize(
    ("bound", "error", "match"),
    [
        (
            0.0,
            ValueError,
            "`lower_bound` must be below 0 and fit into float32; got 0.0",
        ),
        (5.0, ValueError, "must be below 0"),
        (-np.inf, ValueError, "fit into float32; got -inf"),
        (np.nan, ValueError, "got nan"),
        (jnp.float32(-5), TypeError, "must be a Python number or None; got Array"),
    ],
)
def test_bounds_that_are_none(bound, error, match):
    with pytest.raises(error, match=match):
        jax_gdn.decode(**arrays_of(Case()), lower_bound=bound)


def test_a_state_that_was_cast_is_named():
    arrays = arrays_of(Case())
    jax_gdn.decode(**arrays, state_dtype="float32")
    narrow = arrays | {"state": arrays["state"].astype(jnp.bfloat16)}
    match = "`state` must be float32, which `state_dtype` says; got bfloat16.*jax_gdn.d"
    with pytest.raises(TypeError, match=match):
        jax_gdn.decode(**narrow, state_dtype=jnp.float32)
    with pytest.raises(TypeError, match="`state_dtype` must be a dtype or None"):
        jax_gdn.decode(**arrays, state_dtype="nonsense")
