"""A decode loop: the state is donated, so every step updates it in place."""

import jax
import jax.numpy as jnp

import jax_gdn

B, H, HV, K, V, STEPS = 4, 16, 32, 128, 128, 16


@jax.jit
def token(key):
    """Stands for a layer's projections: q, k, v, a, b of one token."""
    shapes = [(B, 1, H, K), (B, 1, H, K), (B, 1, HV, V), (B, 1, HV), (B, 1, HV)]
    keys = jax.random.split(key, len(shapes))
    return [
        jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)
    ]


def step(state, key, A_log, dt_bias):
    q, k, v, a, b = token(key)
    out, state = jax_gdn.decode(q, k, v, state, A_log, a, dt_bias, b)
    return state, out


def main():
    A_log, dt_bias = jnp.zeros(HV, jnp.float32), jnp.zeros(HV, jnp.float32)
    keys = jax.random.split(jax.random.key(0), STEPS)

    # Stepping from Python.
    decode_step = jax.jit(step, donate_argnums=0)
    state = jnp.zeros((B, HV, K, V), jnp.float32)
    where = state.unsafe_buffer_pointer()
    for key in keys:
        state, _ = decode_step(state, key, A_log, dt_bias)
    print("same buffer:", state.unsafe_buffer_pointer() == where)

    # The whole loop on the device.
    def scan(state):
        return jax.lax.scan(lambda s, k: step(s, k, A_log, dt_bias), state, keys)

    scanned, _ = jax.jit(scan, donate_argnums=0)(jnp.zeros((B, HV, K, V), jnp.float32))
    print("scanned: same bits", bool(jnp.array_equal(scanned, state)))


if __name__ == "__main__":
    main()
