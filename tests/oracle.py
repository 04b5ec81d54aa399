"""The formula of the README as a plain float64 loop: what every result is judged by."""

import dataclasses

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
    gates = _gates_of(A_log, a, dt_bias, b, g, beta, lower_bound, allow_neg_eigval)
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
                h = j // (HV // H)
                token = q[n, t, h], k[n, t, h], v[n, t, j], *gates(n, t, j)
                out_j, S, _ = _decode_token(S, *token, use_qk_l2norm)
                out[n, t, j] = scale * out_j
                if (every or t == T - 1) and 0 <= writes[n, t] < N:
                    new_state[writes[n, t], j] = S if state_layout == "KV" else S.T
    return out, new_state


def _gates_of(A_log, a, dt_bias, b, g, beta, lower_bound, allow_neg_eigval):
    """A function of a token's place: its log decay and write strength."""

    def gates(n, t, j):
        if g is not None:
            return g[n, t, j], beta[n, t, j]
        x = a[n, t, j] + dt_bias[j]
        g_j = -np.exp(A_log[j]) * np.logaddexp(0.0, x)
        if lower_bound is not None:
            g_j = lower_bound * sigmoid(np.exp(A_log[j]) * x)
        return g_j, sigmoid(b[n, t, j]) * (2 if allow_neg_eigval else 1)

    return gates


def _decode_token(S, q, k, v, g, beta, use_qk_l2norm):
    """Of one value head: `out` without its scale, S, and what then may be pending."""
    k_norm = 1.0
    if use_qk_l2norm:
        k_norm = np.sqrt(k @ k + EPSILON)
        q, k = q / np.sqrt(q @ q + EPSILON), k / k_norm
    S = np.exp(g).reshape(-1, 1) * S
    u = beta * (v - k @ S)
    S = S + np.outer(k, u)
    return q @ S, S, (u / k_norm, np.exp(g))


@dataclasses.dataclass(frozen=True)
class DeferredRow:
    """What a row of a deferred call does, if it is not padding."""

    n: int
    read: int
    write: int | None
    pending: tuple[int, ...]  # entries of the ring, the oldest first
    appended: tuple[int, ...]  # those that the call's tokens take
    folds: bool


def deferred_rows(
    cursors, R, window, T, *, state_indices=None, output_state_indices=None, fold=None
) -> list[DeferredRow]:
    """The rows of a deferred call that are not padding."""
    N, rows = len(cursors), []
    reads = range(N) if state_indices is None else map(int, state_indices)
    for n, read in enumerate(reads):
        write = read if output_state_indices is None else int(output_state_indices[n])
        first, count = map(int, cursors[read]) if 0 <= read < N else (-1, -1)
        if not (0 <= first < R and 0 <= count <= window):
            continue
        told = fold is not None and bool(fold[n])
        folds = write != read or (count > 0 and (told or count + T > window))
        entries = tuple((first + i) % R for i in range(count + T))
        inside = 0 <= write < N
        entries = entries[:count], entries[count:]
        write = write if inside else None
        rows.append(DeferredRow(n, read, write, *entries, folds and inside))
    return rows


def deferred64(
    q,
    k,
    v,
    state,
    pending,
    cursors,
    A_log=None,
    a=None,
    dt_bias=None,
    b=None,
    scale=None,
    use_qk_l2norm=True,
    *,
    window,
    g=None,
    beta=None,
    lower_bound=None,
    allow_neg_eigval=False,
    state_layout="KV",
    **slots,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Returns `(out, state, pending)` of `decode_deferred`: replays what is pending.

    `slots` are the arguments of `deferred_rows`.
    """
    q, k, v, state, A_log, a, dt_bias, b, g, beta = (
        None if x is None else np.array(x, dtype=np.float64)
        for x in (q, k, v, state, A_log, a, dt_bias, b, g, beta)
    )
    keys, us, decays = (np.array(x, dtype=np.float64) for x in pending)
    new_rings = [keys.copy(), us.copy(), decays.copy()]
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    gates = _gates_of(A_log, a, dt_bias, b, g, beta, lower_bound, allow_neg_eigval)
    out, new_state = np.zeros((B, T, HV, V)), state.copy()
    for row in deferred_rows(cursors, keys.shape[2], window, T, **slots):
        n = row.n
        for j in range(HV):
            S, h = state[row.read, j], j // (HV // H)
            S = S if state_layout == "KV" else S.T
            for i in row.pending:
                S = decays[row.read, j, i] * S
                S = S + np.outer(keys[row.read, h, i], us[row.read, j, i])
            if row.folds:
                new_state[row.write, j] = S if state_layout == "KV" else S.T
            for t, i in enumerate(row.appended):
                token = q[n, t, h], k[n, t, h], v[n, t, j], *gates(n, t, j)
                out_j, S, entry = _decode_token(S, *token, use_qk_l2norm)
                out[n, t, j] = scale * out_j
                if row.write is not None:
                    at = row.write, j, i
                    new_rings[0][row.write, h, i] = k[n, t, h]
                    new_rings[1][at], new_rings[2][at] = entry
    return out, new_state, new_rings


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
