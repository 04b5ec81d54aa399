"""What padding holds reaches nothing: rows of no slot, tokens that change nothing."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_gdn
from tests.cases import F32, Case

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


@pytest.mark.parametrize(
    "implementation", ["native", pytest.param("xla", marks=pytest.mark.slow)]
)
@CASES
@pytest.mark.parametrize(
    "function",
    [
        tangent_of_grad,
        *(
            pytest.param(function, marks=pytest.mark.slow)
            for function in (vmap_of_grad, grad_of_scan)
        ),
    ],
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


@pytest.mark.parametrize(
    ("layout", "per_channel", "implementation"),
    [
        *(("KV", x, "native") for x in (False, True)),
        *(("VK", x, "native") for x in (False, True)),
        ("KV", False, "xla"),
        ("VK", True, "xla"),
    ],
)
def test_token_of_no_decay_and_no_strength_changes_nothing(
    layout, per_channel, implementation
):
    """Left padding: a = b = -inf with finite q, k, v keeps the state bit for bit.

    The tokens behind it give what they give alone, and it has no gradient.
    """
    case = Case(**{**SMALL, "T": 4, "N": None}, layout=layout, per_channel=per_channel)
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
