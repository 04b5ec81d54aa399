"""The formula of the README as a plain float64 loop: what every result is judged by."""

import numpy as np

EPSILON = 1e-6


def decode64(
    q, k, v, state, A_log, a, dt_bias, b, scale=None, use_qk_l2norm=True
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(out, state)` in float64, one sequence and value head at a time."""
    q, k, v, state, A_log, a, dt_bias, b = (
        np.asarray(x).astype(np.float64) for x in (q, k, v, state, A_log, a, dt_bias, b)
    )
    B, _, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    out, new_state = np.empty((B, 1, HV, V)), np.empty((B, HV, K, V))
    for n in range(B):
        for j in range(HV):
            q_j, k_j = q[n, 0, j // (HV // H)], k[n, 0, j // (HV // H)]
            if use_qk_l2norm:
                q_j = q_j / np.sqrt(q_j @ q_j + EPSILON)
                k_j = k_j / np.sqrt(k_j @ k_j + EPSILON)
            g = -np.exp(A_log[j]) * np.logaddexp(0.0, a[n, 0, j] + dt_bias[j])
            beta = 1 / (1 + np.exp(-b[n, 0, j]))
            S = np.exp(g) * state[n, j]
            u = beta * (v[n, 0, j] - k_j @ S)
            S = S + np.outer(k_j, u)
            out[n, 0, j], new_state[n, j] = scale * (q_j @ S), S
    return out, new_state


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    """Compares with float64, the tolerance relative to the largest value expected.

    A result stored in 16 bits may be one unit in its last place further off: half of
    one for its rounding, the rest for a float32 error that moves it across a tie.
    """
    expected = np.asarray(expected)
    allowed = np.full(
        expected.shape, tolerance * max(1.0, np.abs(expected).max(initial=0))
    )
    if actual.dtype.itemsize == 2:
        allowed += np.spacing(np.abs(expected).astype(actual.dtype)).astype(np.float64)
    error = np.abs(np.asarray(actual).astype(np.float64) - expected)
    if not (error <= allowed).all():
        at = np.unravel_index(np.argmax(error - allowed), error.shape)
        raise AssertionError(
            f"{what}{list(at)} is {actual[at]}, should be {expected[at]}: "
            f"off by {error[at]:.3g}, allowed {allowed[at]:.3g}"
        )


# One rounding is 6e-8 of a value. A state entry is two products and a sum of K of
# them, K <= 256, added in a tree 8 to 32 deep: 30 roundings in a bad case, 2e-6.
STATE_TOLERANCE = 1e-5
# `out` sums K entries of that state once more.
OUT_TOLERANCE = 2e-5
