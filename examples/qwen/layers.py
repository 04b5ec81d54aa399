"""The layers. x is [B, T, hidden]; every row has T tokens, at its own positions.

A layer's cache is updated in place. Rows join and leave, so it has a row for each place
of the batch, and `rows` says which place each row has; one that it does not have is
written nowhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_gdn

from .config import Config

Weights = dict[str, Any]
Cache = dict[str, Any]
GATE_UP = ("gate_proj", "up_proj")


class Where(NamedTuple):
    """Where the tokens of a call stand, and how they are decoded."""

    rows: Array  # [B], the place of each row
    positions: Array  # [B, T]
    lengths: Array | None = None  # [B], of whole prompts; else tokens that follow
    cursors: Array | None = None  # of deferred writes
    implementation: str | None = None


def scaled(x: Array, eps: float) -> Array:
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def norm(x: Array, weight: Array, eps: float) -> Array:
    return (scaled(x, eps) * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def gated_norm(x: Array, gate: Array, weight: Array, eps: float) -> Array:
    y = (weight * scaled(x, eps).astype(x.dtype)).astype(jnp.float32)
    return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


def rope(x: Array, positions: Array, config: Config) -> Array:
    """Rotates the first part of every head, [B, T, heads, head_dim]."""
    size = int(config.head_dim * config.partial_rotary_factor)
    rates = config.rope_theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None, None].astype(jnp.float32) * rates
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b, rest = jnp.split(x, [size // 2, size], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(config: Config, w: Weights, x: Array, cache: Cache, at: Where):
    """Full attention to all tokens up to each, those of the cache included."""
    q, gate = jnp.split(jnp.einsum("bth,nkh->btnk", x, w["q_proj"]), 2, axis=-1)
    k, v = (jnp.einsum("bth,nkh->btnk", x, w[n]) for n in ("k_proj", "v_proj"))
    q = rope(norm(q, w["q_norm"], config.rms_norm_eps), at.positions, config)
    k = rope(norm(k, w["k_norm"], config.rms_norm_eps), at.positions, config)
    # Caches are [places, heads, tokens, size], as the products want them, or XLA would
    # lay them anew.
    tokens = at.rows[:, None], slice(None), at.positions
    new = zip(("k", "v"), (k, v), strict=True)
    cache = {name: cache[name].at[tokens].set(y, mode="drop") for name, y in new}
    if at.lengths is None:  # row n is place n
        k, v = (jnp.swapaxes(y, 1, 2) for y in cache.values())

    def attend(token):
        q, position = (y[:, None] for y in token)
        mask = (jnp.arange(k.shape[1]) <= position[..., None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)[:, 0]

    # Of a long prompt 512 tokens at a time: all of T x T would not fit.
    by_token = (jnp.swapaxes(y, 0, 1) for y in (q, at.positions))
    out = jnp.swapaxes(lax.map(attend, tuple(by_token), batch_size=512), 0, 1)
    return jnp.einsum("btnk,hnk->bth", out * jax.nn.sigmoid(gate), w["o_proj"]), cache


def convolution(w: Array, x: Array, ring: Array, at: Where) -> tuple[Array, Array]:
    """The short convolution and its SiLU of x [B, T, H, channels].

    The ring of a row keeps its last tokens, token t at t mod R: no token moves, and
    taking tokens back is to forget them.
    """
    taps, T, R = w.shape[0], x.shape[1], ring.shape[1]
    past = at.positions[:, :1] + jnp.arange(1 - taps, 0, dtype=jnp.int32)
    before = ring.at[at.rows[:, None], past % R].get(mode="clip")
    # What a place held before a prompt is not of it.
    window = jnp.where((past >= 0)[..., None, None], before, 0)
    window = jnp.concatenate([window, x], 1)
    y = sum(w[i] * window[:, i : i + T] for i in range(taps))
    kept, positions = x, at.positions
    if at.lengths is not None:  # the last ones of each
        positions = at.lengths[:, None] - 1 - jnp.arange(R, dtype=jnp.int32)
        kept = jnp.clip(positions, 0, T - 1)[..., None, None]
        kept = jnp.take_along_axis(x, kept, axis=1)
    ring = ring.at[at.rows[:, None], positions % R].set(kept, mode="drop")
    return jax.nn.silu(y), ring


def linear_attention(config: Config, w: Weights, x: Array, cache: Cache, at: Where):
    """The gated delta rule, behind its projections and the short convolution."""
    (B, T, _), HV = x.shape, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    R = HV // config.linear_num_key_heads
    parts = [2 * K + R * V, 2 * (K + R * V), 2 * (K + R * V) + R]
    inputs = jnp.einsum("bth,gch->btgc", x, w["in_proj"])
    qkv, z, b, a = jnp.split(inputs, parts, axis=-1)
    qkv, ring = convolution(w["conv1d"], qkv, cache["ring"], at)
    q, k, v = jnp.split(qkv, [K, 2 * K], axis=-1)
    v, z = (y.reshape(B, T, HV, V) for y in (v, z))
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "state": cache["state"]}
    given |= {"a": a.reshape(B, T, HV), "b": b.reshape(B, T, HV)}
    given |= {"A_log": w["A_log"], "dt_bias": w["dt_bias"]}
    given |= {"implementation": at.implementation, "state_indices": at.rows}
    cache = cache | {"ring": ring}
    if at.lengths is not None:  # the last slot holds zeros, where a request begins
        given["state_indices"] = jnp.full(B, cache["state"].shape[0] - 1, jnp.int32)
        given |= {"output_state_indices": at.rows, "lengths": at.lengths}
        out, cache["state"] = jax_gdn.prefill(**given)
    elif at.cursors is not None:
        given |= {"pending": cache["pending"], "cursors": at.cursors}
        out, cache["state"], cache["pending"] = jax_gdn.decode_deferred(**given)
    else:
        out, cache["state"] = jax_gdn.decode(**given)
    out = gated_norm(out, z, w["norm"], config.rms_norm_eps)
    return jnp.einsum("btnv,hnv->bth", out, w["out_proj"]), cache


def mlp(config: Config, w: Weights, x: Array) -> Array:
    return experts(config, w, x) if "experts" in w else dense(w, x)


def dense(w: Weights, x: Array) -> Array:
    gate, up = (jnp.einsum("...h,ih->...i", x, w[name]) for name in GATE_UP)
    return jnp.einsum("...i,hi->...h", jax.nn.silu(gate) * up, w["down_proj"])


def experts(config: Config, w: Weights, x: Array) -> Array:
    """The chosen experts of each token, and the one that all share."""
    tokens, each = x.reshape(-1, x.shape[-1]), w["experts"]
    logits = jnp.einsum("nh,eh->ne", tokens, w["gate"])
    number = config.num_experts_per_tok
    scores, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), number)
    if config.norm_topk_prob:
        scores = scores / jnp.sum(scores, -1, keepdims=True)
    scores = scores.astype(x.dtype)
    if chosen.size <= config.num_experts:  # few tokens: read what they chose
        gate, up, down = (each[name][chosen] for name in (*GATE_UP, "down_proj"))
        inner = jax.nn.silu(jnp.einsum("nh,nkhi->nki", tokens, gate))
        inner = inner * jnp.einsum("nh,nkhi->nki", tokens, up)
        out = jnp.einsum("nki,nkih->nkh", inner, down)
    else:  # many: every expert takes its tokens in a row
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=config.num_experts)
        sizes, sorted_ = sizes.astype(jnp.int32), tokens[order // number]
        inner = jax.nn.silu(lax.ragged_dot(sorted_, each["gate_proj"], sizes))
        inner = inner * lax.ragged_dot(sorted_, each["up_proj"], sizes)
        out = lax.ragged_dot(inner, each["down_proj"], sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        out = out.reshape(*chosen.shape, -1)
    out = jnp.sum(scores[..., None] * out, 1)
    shared = jax.nn.sigmoid(jnp.einsum("nh,oh->no", tokens, w["shared_expert_gate"]))
    return (out + shared * dense(w["shared_expert"], tokens)).reshape(x.shape)
