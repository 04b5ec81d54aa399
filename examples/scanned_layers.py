"""A model whose layers are scanned: one stack of weights, one donated stack of states.

A small one with random weights, in plain pytrees: projections, the recurrence and a
residual, a layer like the next. Tokens are chosen greedily, once by a scan over layers
that carries the stack of states, and once with a list of states in unrolled layers;
both choose the same.
"""

import jax
import jax.numpy as jnp
from jax import lax

import jax_gdn

B, L, D, VOCABULARY, TOKENS = 2, 4, 64, 101, 16
H, HV, K, V = 2, 4, 32, 32  # key and value heads, and their sizes


def random_weights(key):
    sizes = {"q": (D, H * K), "k": (D, H * K), "v": (D, HV * V), "a": (D, HV)}
    sizes |= {"b": (D, HV), "out": (HV * V, D)}
    keys = iter(jax.random.split(key, len(sizes) + 1))
    layers = {
        n: jax.random.normal(next(keys), (L, *x)) * x[0] ** -0.5
        for n, x in sizes.items()
    }
    layers |= {"A_log": jnp.zeros((L, HV)), "dt_bias": jnp.ones((L, HV))}
    embedding, head = jax.random.normal(next(keys), (2, VOCABULARY, D))
    return {"layers": layers, "embedding": embedding, "head": head}


def layer(x, weights, state, **which):
    """One layer: x [B, D], a state or a stack of them."""
    w = weights
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    heads = {"q": (H, K), "k": (H, K), "v": (HV, V), "a": (HV,), "b": (HV,)}
    y = {n: (y @ w[n]).reshape(B, 1, *shape) for n, shape in heads.items()}
    q, k, v = (jax.nn.silu(y[n]) for n in "qkv")  # no convolution, for brevity
    out, state = jax_gdn.decode(
        q, k, v, state, w["A_log"], y["a"], w["dt_bias"], y["b"], **which
    )
    return x + out.reshape(B, HV * V) @ w["out"], state


def scanned(weights, stack, x):
    def body(carry, of_layer):
        x, stack = carry
        i, w = of_layer
        return layer(x, w, stack, layer=i), None

    layers = (jnp.arange(L, dtype=jnp.int32), weights["layers"])
    (x, stack), _ = lax.scan(body, (x, stack), layers)
    return x, stack


def unrolled(weights, states, x):
    states = list(states)
    for i in range(L):
        w = {n: y[i] for n, y in weights["layers"].items()}
        x, states[i] = layer(x, w, states[i])
    return x, states


def generate(layers, weights, states):
    """Returns tokens [TOKENS, B] and the states, in one loop on the device."""

    def step(carry, _):
        token, states = carry
        x, states = layers(weights, states, weights["embedding"][token])
        token = jnp.argmax(x @ weights["head"].T, axis=-1).astype(jnp.int32)
        return (token, states), token

    first = jnp.arange(B, dtype=jnp.int32)
    (_, states), tokens = lax.scan(step, (first, states), length=TOKENS)
    return tokens, states


def main():
    weights = random_weights(jax.random.key(0))
    stack = jnp.zeros((L, B, HV, K, V))
    where = stack.unsafe_buffer_pointer()
    program = jax.jit(generate, static_argnums=0, donate_argnums=2)
    tokens, stack = program(scanned, weights, stack)
    print("same buffer:", stack.unsafe_buffer_pointer() == where)

    states = [jnp.zeros((B, HV, K, V)) for _ in range(L)]
    others, _ = program(unrolled, weights, states)
    print("same tokens:", bool((tokens == others).all()))
    print("tokens of the first sequence:", *tokens[:, 0].tolist())


if __name__ == "__main__":
    main()
