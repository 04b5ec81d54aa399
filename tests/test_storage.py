"""Every value that a 16-bit type can hold, through the state and back."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import DTYPES, LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_finite_state_value(dtype, layout):
    """No decay and nothing to write: out is a row of the state, which stays.

    XLA's threads treat float32 subnormals as zero; those of float16 must not be.
    """
    K, V = 128, 512
    values = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype])
    wide = values.astype(np.float32)
    tiny = np.abs(wide) < np.finfo(np.float32).tiny  # of bfloat16 alone
    values = np.where(np.isfinite(wide) & ~tiny, values, np.zeros_like(values))
    rows = values.reshape(K, V)
    tile = rows if layout == "KV" else rows.T
    state = np.broadcast_to(tile, (K, 1, *tile.shape))
    out, new = jax_gdn.decode(
        q=jnp.eye(K)[:, None, None],  # row n reads key channel n
        k=jnp.zeros((K, 1, 1, K)),
        v=jnp.zeros((K, 1, 1, V)),
        state=jnp.asarray(state),
        A_log=jnp.full(1, -200.0),
        a=jnp.zeros((K, 1, 1)),
        dt_bias=jnp.zeros(1),
        b=jnp.full((K, 1, 1), -200.0),
        scale=1.0,
        use_qk_l2norm=False,
        state_layout=layout,
        implementation="native",
    )
    np.testing.assert_array_equal(np.asarray(out)[:, 0, 0], rows.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(new), state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_rounding_of_the_output(dtype):
    """Values between, on and beside every tie are rounded to nearest even, once."""
    K, V = 64, 4112
    bits = np.arange(0, 2**16, dtype=np.uint16)
    wide = bits.view(DTYPES[dtype]).astype(np.float32)
    wide = np.sort(wide[np.isfinite(wide) & (np.abs(wide) >= 2.0**-24)])
    ties = (wide[:-1].astype(np.float64) + wide[1:]) / 2
    ties = ties.astype(np.float32)  # exact: one more bit
    below, above = (
        np.nextafter(ties, np.float32(end), dtype=np.float32)
        for end in (-np.inf, np.inf)
    )
    values = np.concatenate([wide, ties, below, above])
    values = values[np.abs(values) >= 2.0**-25]  # sums lose the sign of zero
    state = np.zeros((K, V), np.float32)
    state.flat[: values.size] = values
    out, _ = jax_gdn.decode(
        q=jnp.eye(K)[:, None, None],
        k=jnp.zeros((K, 1, 1, K)),
        v=jnp.zeros((K, 1, 1, V)),
        state=jnp.broadcast_to(state, (K, 1, K, V)),
        A_log=jnp.full(1, -200.0),
        a=jnp.zeros((K, 1, 1)),
        dt_bias=jnp.zeros(1),
        b=jnp.full((K, 1, 1), -200.0),
        scale=1.0,
        output=jnp.zeros((K, 1, 1, V), DTYPES[dtype]),
        use_qk_l2norm=False,
        implementation="native",
    )
    with np.errstate(over="ignore"):
        expected = state.astype(DTYPES[dtype])
    np.testing.assert_array_equal(
        np.asarray(out)[:, 0, 0].view(np.uint16), expected.view(np.uint16)
    )
