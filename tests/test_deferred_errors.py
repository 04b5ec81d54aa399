"""What `decode_deferred` and its helpers refuse, and what they take for padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.test_deferred_transformations import WINDOW, call_of

pytestmark = pytest.mark.usefixtures("host")


ERRORS = [
    ({"pending": None}, TypeError, "`pending` must be a jax_gdn.Pending; got NoneType"),
    ({"cursors": np.zeros((4, 3), np.int32)}, ValueError,
     r"`cursors` must have shape \[B, 2\] = \[4, 2\]; got \[4, 3\]"),
    ({"cursors": np.zeros((4, 2), np.float32)}, TypeError,
     "`cursors` must be int32; got float32"),
    ({"fold": np.zeros(4, np.int32)}, TypeError, "`fold` must be bool; got int32"),
    ({"fold": np.zeros(3, bool)}, ValueError, r"`fold` must have shape \[B\] = \[4\]"),
    ({"T": 2}, ValueError, r"`pending` must have room for T = 2 tokens; got one made "
     r"with max_tokens=1 \(R = 5 entries, window 4\)"),
    ({"k_dtype": "float32"}, TypeError, "`pending.k` must be bfloat16, k's dtype; got "
     r"float32. Make it by new_pending\(..., k_dtype=jnp.bfloat16\)"),
    ({"state_indices": np.zeros(4, np.int32),
      "output_state_indices": np.zeros((4, 1), np.int32)}, ValueError,
     r"`output_state_indices` must have shape \[B\] = \[4\]; got \[4, 1\]"),
    ({"u": (4, 8, 5, 15)}, ValueError,
     r"`pending.u` must have shape \[B, HV, R, V\] = \[4, 8, 5, 16\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=str)
def test_errors(changes, error, message):
    state, pending, cursors, rest = call_of()
    changes = dict(changes)
    given = {"pending": pending, "cursors": cursors}
    if "T" in changes:
        rest = call_of(changes.pop("T"))[3]
    if "u" in changes:
        u = jnp.zeros(changes.pop("u"))
        given["pending"] = jax_gdn.Pending(pending.k, u, pending.decay, WINDOW)
    if "k_dtype" in changes:
        given["pending"] = jax_gdn.new_pending(
            state, 4, window=WINDOW, k_dtype=changes.pop("k_dtype")
        )
    given |= changes
    with pytest.raises(error, match=message):
        jax_gdn.decode_deferred(state=state, **given, **rest)


HELPERS = [
    (lambda x: jax_gdn.new_pending(x[0], 4, window=4, max_tokens=5),
     ValueError, "`max_tokens` must be from 1 to window = 4"),
    (lambda x: jax_gdn.new_pending(x[0], 4, state_layout="KK"),
     ValueError, "`state_layout` must be 'KV' or 'VK'"),
    (lambda x: jax_gdn.new_pending(x[0], 3), ValueError, "must divide HV = 8"),
    (lambda x: jax_gdn.new_pending(x[0][0], 4), ValueError, "`state` must have shape"),
    (lambda x: jax_gdn.new_pending(x[0], 4, k_dtype=jnp.int32), TypeError, "`k_dtype`"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 2), ValueError, "room for T = 2"),
    (lambda x: jax_gdn.advance_cursors(x[2][0], x[1], 1), ValueError, "`cursors` must"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1].k, 1), TypeError, "`pending` must"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 1, fold=jnp.zeros(4, jnp.int32)),
     TypeError, "`fold` must be bool; got int32"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 1, accepted=jnp.zeros(4)),
     TypeError, "`accepted` must be integers; got float32"),
    (lambda x: jax_gdn.materialize(x[0], x[1], x[2][:3]), ValueError,
     r"`cursors` must have shape \[4, 2\] and be int32; got \[3, 2\]"),
    (lambda x: jax_gdn.materialize(*x[:3], state_layout="V"), ValueError, "`state_l"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), HELPERS)
def test_errors_of_the_helpers(call, error, message):
    with pytest.raises(error, match=message):
        call(call_of())


def test_what_is_accepted_stays_in_the_call():
    _, pending, _, _ = call_of(3)
    cursors, kept = jax_gdn.new_cursors(4), jnp.array([-1, 2, 3, 7], jnp.int32)
    after = jax_gdn.advance_cursors(cursors, pending, 3, accepted=kept)
    assert np.asarray(after)[:, 1].tolist() == [0, 2, 3, 3]


def test_cursors_outside_materialize_as_they_decode():
    state, pending, cursors, _ = call_of()
    pending = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pending)
    cursors = jnp.array([[0, 99], [-7, 2], [0, 0], [9, 1]], jnp.int32)
    got = jax_gdn.materialize(state, pending, cursors)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(state))


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"T": 9}, "T up to 8; got T = 9"),
        ({"K": 64}, "K = V = 128; got K = 64, V = 128"),
        ({"window": 17}, "a window of up to 16; got 17"),
        ({"per_channel": True}, "one decay a head"),
        ({"bfloat16": False}, "bfloat16 q, k and v"),
    ],
)
def test_why_there_is_no_cuda_kernel(changes, why):
    from jax_gdn import _registration

    given = {"T": 1, "K": 128, "V": 128, "window": 16}
    given |= {"per_channel": False, "bfloat16": True}
    got = _registration.cuda.why_unsupported_deferred(**given | changes)
    takes = "the CUDA kernel of decode_deferred takes "
    assert got is None if why is None else got.startswith(takes + why)
