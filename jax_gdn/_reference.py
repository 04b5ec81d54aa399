"""The definition of gated-delta-rule decode, in jnp: the text to read first.

    g    = -exp(A_log) * softplus(a + dt_bias)                     log decay, <= 0
    beta = sigmoid(b)                                              write strength
    q, k = q / sqrt(sum q^2 + 1e-6), k / sqrt(sum k^2 + 1e-6)      if use_qk_l2norm
    S    = exp(g) S                                                S is [K, V]
    u    = beta (v - k^T S)
    S    = S + k u^T
    out  = scale q^T S                                             default K ** -0.5

Source: Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv:2412.06464.
"""

import jax
import jax.numpy as jnp
from jax import Array


def reference_decode(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    A_log: Array,
    a: Array,
    dt_bias: Array,
    b: Array,
    scale: float | None = None,
    output: Array | None = None,
    use_qk_l2norm: bool = True,
) -> tuple[Array, Array]:
    """Computes what `jax_gdn.decode` computes; see there for the arguments."""
    f32 = jnp.float32
    group = v.shape[2] // q.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def heads(x):  # [B, 1, H, K] -> [B, HV, K]
        x = x[:, 0].astype(f32)
        if use_qk_l2norm:
            x = x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6)
        return jnp.repeat(x, group, axis=1)

    qs, ks, vs = heads(q), heads(k), v[:, 0].astype(f32)
    x = a[:, 0].astype(f32) + dt_bias.astype(f32)[None]
    g = -jnp.exp(A_log)[None] * jax.nn.softplus(x)
    beta = jax.nn.sigmoid(b[:, 0].astype(f32))

    S = jnp.exp(g)[..., None, None] * state
    u = beta[..., None] * (vs - jnp.sum(ks[..., None] * S, axis=2))
    S = S + ks[..., None] * u[:, :, None]
    out = factor * jnp.sum(qs[..., None] * S, axis=2)
    return out[:, None].astype(q.dtype if output is None else output.dtype), S
