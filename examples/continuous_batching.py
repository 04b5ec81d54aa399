"""Continuous batching over a pool: requests join, finish, and their slots are reused.

The decode step has a fixed batch; rows without a request are padding. Each request's
output is bitwise what it is when decoded alone.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gdn

BATCH, SLOTS, H, HV, K, V = 4, 6, 2, 4, 64, 64
A_log, dt_bias = jnp.zeros(HV, jnp.float32), jnp.zeros(HV, jnp.float32)


def tokens(request: int, length: int) -> dict[str, Any]:
    """Stands for a request's q, k, v, a, b, one row a token."""
    keys = jax.random.split(jax.random.key(request), 5)
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "a": (HV,), "b": (HV,)}
    return {
        name: jax.random.normal(key, (length, 1, *shape), jnp.bfloat16)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def step(pool, state_indices, inputs):
    out, pool = jax_gdn.decode(
        **inputs, state=pool, A_log=A_log, dt_bias=dt_bias, state_indices=state_indices
    )
    return pool, out


decode_step = jax.jit(step, donate_argnums=0)
# A new request starts from zeros, in place as well.
reset_slot = jax.jit(lambda pool, slot: pool.at[slot].set(0), donate_argnums=0)


def serve(requests: dict[int, dict[str, Any]]) -> dict[int, list[np.ndarray]]:
    pool = jnp.zeros((SLOTS, HV, K, V), jnp.float32)
    waiting = collections.deque(requests)
    free = list(range(SLOTS))
    rows: list[tuple[int, int, int] | None] = [None] * BATCH  # request, slot, token
    outputs = collections.defaultdict(list)
    while waiting or any(rows):
        for i, row in enumerate(rows):
            if row is None and waiting:
                rows[i] = (waiting.popleft(), slot := free.pop(), 0)
                pool = reset_slot(pool, slot)
        indices = np.array([row[1] if row else -1 for row in rows], np.int32)
        blank = next(iter(requests.values()))
        inputs = {
            name: jnp.stack(
                [requests[r[0]][name][r[2]] if r else blank[name][0] for r in rows]
            )
            for name in blank
        }
        pool, out = decode_step(pool, indices, inputs)
        for i, row in enumerate(rows):
            if row is None:
                continue
            request, slot, t = row
            outputs[request].append(np.asarray(out[i]))
            done = t + 1 == len(requests[request]["q"])
            rows[i] = None if done else (request, slot, t + 1)
            if done:
                free.append(slot)
    return outputs


def alone(inputs: dict[str, Any]) -> list[np.ndarray]:
    state, outputs = jnp.zeros((1, HV, K, V), jnp.float32), []
    for t in range(len(inputs["q"])):
        token = {name: x[t : t + 1] for name, x in inputs.items()}
        out, state = jax_gdn.decode(**token, state=state, A_log=A_log, dt_bias=dt_bias)
        outputs.append(np.asarray(out[0]))
    return outputs


def main():
    lengths = [3, 7, 2, 5, 4, 1, 6, 3]
    requests = {i: tokens(i, length) for i, length in enumerate(lengths)}
    served = serve(requests)
    same = all(
        np.array_equal(got, want)
        for i, inputs in requests.items()
        for got, want in zip(served[i], alone(inputs), strict=True)
    )
    print(f"{len(requests)} requests, {sum(lengths)} tokens; bitwise as alone: {same}")


if __name__ == "__main__":
    main()
