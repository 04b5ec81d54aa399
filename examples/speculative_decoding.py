"""Speculative decoding: verify T drafted tokens in one call, roll back by a slot.

Every token leaves a snapshot of the state in a slot of its own. When only some of a
draft are accepted, the next call reads the slot after the last of them: no copy, no
recomputation. Outputs are bitwise those of decoding token by token.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_gdn

B, T, H, HV, K, V, LENGTH = 3, 4, 2, 4, 64, 64, 24
A_log, dt_bias = jnp.zeros(HV, jnp.float32), jnp.zeros(HV, jnp.float32)


def sequence(key, length: int) -> dict[str, Any]:
    keys = jax.random.split(key, 5)
    shapes = {"q": (H, K), "k": (H, K), "v": (HV, V), "a": (HV,), "b": (HV,)}
    return {
        name: jax.random.normal(key, (B, length, *shape), jnp.bfloat16)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def step(pool, read, write, inputs):
    out, pool = jax_gdn.decode(
        **inputs,
        state=pool,
        A_log=A_log,
        dt_bias=dt_bias,
        state_indices=read,
        output_state_indices=write,
    )
    return pool, out


verify = jax.jit(step, donate_argnums=0)


def main():
    true = sequence(jax.random.key(0), LENGTH)
    wrong = sequence(jax.random.key(1), LENGTH)
    # Row n owns slots n (T + 1) to n (T + 1) + T: one to read, T to write.
    slots = np.arange(B * (T + 1), dtype=np.int32).reshape(B, T + 1)
    pool = jnp.zeros((slots.size, HV, K, V), jnp.float32)
    read, position = slots[:, 0].copy(), np.zeros(B, int)
    outputs = [[] for _ in range(B)]
    rng = np.random.default_rng(0)
    calls = 0
    while (position < LENGTH).any():
        # A draft is right up to a point that only verifying tells.
        good = np.minimum(rng.integers(1, T + 1, B), LENGTH - position)
        at = np.minimum(position[:, None] + np.arange(T), LENGTH - 1)
        right = np.arange(T) < good[:, None]
        inputs = {}
        for name, x in true.items():
            mask = right.reshape(B, T, *[1] * (x.ndim - 2))
            drafted = jnp.where(mask, x[np.arange(B)[:, None], at], wrong[name][:, :T])
            inputs[name] = drafted
        write = np.stack([row[row != r] for row, r in zip(slots, read, strict=True)])
        finished = position >= LENGTH
        pool, out = verify(pool, np.where(finished, -1, read), write, inputs)
        calls += 1
        for n in range(B):
            outputs[n] += list(np.asarray(out[n, : good[n]]))
            if good[n]:
                read[n] = write[n, good[n] - 1]  # roll back to the last right token
        position += good

    state = jnp.zeros((B, HV, K, V), jnp.float32)
    same = True
    for t in range(LENGTH):
        token = {name: x[:, t : t + 1] for name, x in true.items()}
        out, state = jax_gdn.decode(**token, state=state, A_log=A_log, dt_bias=dt_bias)
        same &= all(np.array_equal(outputs[n][t], out[n, 0]) for n in range(B))
    print(f"{B * LENGTH} tokens in {calls} calls of {T}; bitwise one by one: {same}")


if __name__ == "__main__":
    main()
