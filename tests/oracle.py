"""The formula of the README as a plain float64 loop: what every result is judged by."""

import numpy as np

EPSILON = 1e-6


def decode64(
    q,
    k,
    v,
    state,
    A_log=None,
    a=None,
    dt_bias=None,
    b=None,
    scale=None,
    use_qk_l2norm=True,
    *,
    g=None,
    beta=None,
    lower_bound=None,
    allow_neg_eigval=False,
    state_layout="KV",
    layer=None,
    state_indices=None,
    output_state_indices=None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `(out, state)` in float64, one sequence, value head and token at a time.

    A slot that nothing is written to keeps what it had.
    """
    if layer is not None:
        given = locals() | {"state": state[layer], "layer": None}
        out, new_layer = decode64(**given)
        new_state = np.array(state, dtype=np.float64)
        new_state[layer] = new_layer
        return out, new_state
    q, k, v, state, A_log, a, dt_bias, b, g, beta = (
        None if x is None else np.array(x, dtype=np.float64)
        for x in (q, k, v, state, A_log, a, dt_bias, b, g, beta)
    )
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    N = state.shape[0]
    scale = K**-0.5 if scale is None else scale
    reads = np.arange(B) if state_indices is None else state_indices
    writes = reads if output_state_indices is None else output_state_indices
    every = np.ndim(writes) == 2
    writes = (
        np.asarray(writes) if every else np.repeat(np.asarray(writes)[:, None], T, 1)
    )
    out, new_state = np.zeros((B, T, HV, V)), state.copy()
    for n in range(B):
        if not 0 <= reads[n] < N:
            continue
        for j in range(HV):
            S = state[reads[n], j]
            S = S if state_layout == "KV" else S.T
            for t in range(T):
                q_j, k_j = q[n, t, j // (HV // H)], k[n, t, j // (HV // H)]
                if use_qk_l2norm:
                    q_j = q_j / np.sqrt(q_j @ q_j + EPSILON)
                    k_j = k_j / np.sqrt(k_j @ k_j + EPSILON)
                if g is not None:
                    g_j, beta_j = g[n, t, j], beta[n, t, j]
                else:
                    x = a[n, t, j] + dt_bias[j]
                    g_j = -np.exp(A_log[j]) * np.logaddexp(0.0, x)
                    if lower_bound is not None:
                        g_j = lower_bound * sigmoid(np.exp(A_log[j]) * x)
                    beta_j = sigmoid(b[n, t, j]) * (2 if allow_neg_eigval else 1)
                S = np.exp(g_j).reshape(-1, 1) * S
                u = beta_j * (v[n, t, j] - k_j @ S)
                S = S + np.outer(k_j, u)
                out[n, t, j] = scale * (q_j @ S)
                if (every or t == T - 1) and 0 <= writes[n, t] < N:
                    new_state[writes[n, t], j] = S if state_layout == "KV" else S.T
    return out, new_state


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    """Compares with float64, the tolerance relative to the largest value expected.

    A result stored in 16 bits may be one unit in its last place further off: half of
    one for its rounding, the rest for a float32 error that moves it across a tie.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    allowed = np.full(
        expected.shape, tolerance * max(1.0, np.abs(expected).max(initial=0))
    )
    if actual.dtype.itemsize == 2:
        allowed += np.spacing(np.abs(expected).astype(actual.dtype)).astype(np.float64)
    error = np.abs(actual.astype(np.float64) - expected)
    if not (error <= allowed).all():
        at = np.unravel_index(np.argmax(error - allowed), error.shape)
        raise AssertionError(
            f"{what}{list(map(int, at))} is {actual[at]}, should be {expected[at]}: "
            f"off by {error[at]:.3g}, allowed {allowed[at]:.3g}"
        )


# One rounding is 6e-8 of a value. A state entry is two products and a sum of K of
# them, K <= 256, added in a tree 8 to 32 deep: 30 roundings in a bad case, 2e-6.
STATE_TOLERANCE = 1e-5
# `out` sums K entries of that state once more.
OUT_TOLERANCE = 2e-5
