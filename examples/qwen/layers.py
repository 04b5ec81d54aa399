"""The layers. x is [B, T, hidden]; every row has T tokens, at its own positions.

A layer's cache is donated and updated in place. Rows of a batch join and leave, so the
caches have a row for each of B places, and `rows` says which of them is at work: a
place, or B, whose writes are dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_gdn

from .config import Config

Weights = dict[str, Any]
Cache = dict[str, Any]


def norm(x: Array, weight: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def gated_norm(x: Array, gate: Array, weight: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    y = (weight * y.astype(x.dtype)).astype(jnp.float32)
    return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


def rope(x: Array, positions: Array, config: Config) -> Array:
    """Rotates the first part of every head, [B, T, heads, head_dim]."""
    size = int(config.head_dim * config.partial_rotary_factor)
    rates = config.rope_theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = positions[..., None, None].astype(jnp.float32) * rates
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b, rest = jnp.split(x, [size // 2, size], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def attention(
    config: Config, w: Weights, x: Array, cache: Cache, rows: Array, positions: Array
) -> tuple[Array, Cache]:
    """Full attention to what is in the cache up to each token, its own included."""
    q, gate = jnp.split(jnp.einsum("bth,nkh->btnk", x, w["q"]), 2, axis=-1)
    k, v = (jnp.einsum("bth,nkh->btnk", x, w[name]) for name in "kv")
    q = rope(norm(q, w["q_norm"], config.rms_norm_eps), positions, config)
    k = rope(norm(k, w["k_norm"], config.rms_norm_eps), positions, config)
    at = rows[:, None], positions
    new = {"k": k, "v": v}
    cache = {n: cache[n].at[at].set(y, mode="drop") for n, y in new.items()}
    places = jnp.arange(cache["k"].shape[1], dtype=jnp.int32)
    mask = (places <= positions[..., None])[:, None]
    every = (y if y.shape[0] == x.shape[0] else y[rows] for y in cache.values())
    out = jax.nn.dot_product_attention(q, *every, mask=mask)
    return jnp.einsum("btnk,hnk->bth", out * jax.nn.sigmoid(gate), w["o"]), cache


def convolution(
    w: Array, x: Array, ring: Array, rows: Array, positions: Array, lengths: Array
) -> tuple[Array, Array]:
    """The short convolution and its SiLU of x [B, T, H, channels].

    The ring of a row keeps its last tokens, token t at t mod R: no token moves, and
    taking tokens back is to forget them. Of prompts, [B, lengths], it keeps the last.
    """
    taps, T, R = w.shape[0], x.shape[1], ring.shape[1]
    before = jnp.arange(1 - taps, 0, dtype=jnp.int32)
    if T > R:  # a prompt from its start; what it had before is not there
        window = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0), (0, 0)))
        last = lengths[:, None] - 1 - jnp.arange(R, dtype=jnp.int32)
        kept = jnp.take_along_axis(x, jnp.maximum(last, 0)[..., None, None], axis=1)
        ring = ring.at[rows[:, None], last % R].set(kept, mode="drop")
    else:
        past = positions[:, :1] + before
        window = ring.at[rows[:, None], past % R].get(mode="clip")
        window = jnp.where((past >= 0)[..., None, None], window, 0)
        window = jnp.concatenate([window, x], 1)
        inside = jnp.arange(T, dtype=jnp.int32) < lengths[:, None]
        at = jnp.where(inside, rows[:, None], ring.shape[0])
        ring = ring.at[at, positions % R].set(x, mode="drop")
    y = sum(w[i] * window[:, i : i + T] for i in range(taps))
    return jax.nn.silu(y), ring


def linear_attention(
    config: Config,
    w: Weights,
    x: Array,
    cache: Cache,
    rows: Array,
    positions: Array,
    lengths: Array | None,
    cursors: Array | None,
    implementation: str | None,
) -> tuple[Array, Cache]:
    """The gated delta rule; of a prompt with `lengths`, else of tokens that follow."""
    (B, T, _), HV = x.shape, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    qkvz = jnp.einsum("bth,gch->btgc", x, w["qkvz"])
    inputs, z = jnp.split(qkvz, [2 * K + HV // w["qkvz"].shape[0] * V], axis=-1)
    there = jnp.full(B, T, jnp.int32) if lengths is None else lengths
    inputs, ring = convolution(w["conv"], inputs, cache["ring"], rows, positions, there)
    q, k, v = jnp.split(inputs, [K, 2 * K], axis=-1)
    v, z = (y.reshape(B, T, HV, V) for y in (v, z))
    b, a = jnp.split(jnp.einsum("bth,gch->btgc", x, w["ba"]), 2, axis=-1)
    b, a = (y.reshape(B, T, HV) for y in (b, a))
    gates = {"A_log": w["A_log"], "a": a, "dt_bias": w["dt_bias"], "b": b}
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "state": cache["state"], **gates}
    given["implementation"] = implementation
    cache = cache | {"ring": ring}
    if lengths is not None:  # the last slot holds zeros, where a request begins
        zeros = jnp.full(B, cache["state"].shape[0] - 1, jnp.int32)
        given |= {"state_indices": zeros, "output_state_indices": rows}
        out, cache["state"] = jax_gdn.prefill(**given, lengths=lengths)
    elif cursors is not None:
        out, cache["state"], cache["pending"] = jax_gdn.decode_deferred(
            **given, pending=cache["pending"], cursors=cursors, state_indices=rows
        )
    else:
        out, cache["state"] = jax_gdn.decode(**given, state_indices=rows)
    out = gated_norm(out, z, w["norm"], config.rms_norm_eps)
    return jnp.einsum("btnv,hnv->bth", out, w["out"]), cache


def mlp(w: Weights, x: Array) -> Array:
    gate, up = (jnp.einsum("...h,ih->...i", x, w[name]) for name in ("gate", "up"))
    return jnp.einsum("...i,hi->...h", jax.nn.silu(gate) * up, w["down"])


def experts(config: Config, w: Weights, x: Array) -> Array:
    """The chosen experts of each token, and the one that all share."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = jnp.einsum("nh,eh->ne", tokens, w["router"])
    number = config.num_experts_per_tok
    scores, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), number)
    if config.norm_topk_prob:
        scores = scores / jnp.sum(scores, -1, keepdims=True)
    scores = scores.astype(x.dtype)
    if chosen.size <= config.num_experts:  # few tokens: read what they chose
        gate, up, down = (w[name][chosen] for name in ("gate", "up", "down"))
        inner = jax.nn.silu(jnp.einsum("nh,nkhi->nki", tokens, gate))
        inner = inner * jnp.einsum("nh,nkhi->nki", tokens, up)
        out = jnp.einsum("nki,nkih->nkh", inner, down)
    else:  # many: every expert takes its tokens in a row
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=config.num_experts)
        sizes, sorted_ = sizes.astype(jnp.int32), tokens[order // number]
        inner = jax.nn.silu(lax.ragged_dot(sorted_, w["gate"], sizes))
        inner = inner * lax.ragged_dot(sorted_, w["up"], sizes)
        out = lax.ragged_dot(inner, w["down"], sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        out = out.reshape(*chosen.shape, -1)
    out = jnp.sum(scores[..., None] * out, 1)
    shared = jax.nn.sigmoid(jnp.einsum("nh,oh->no", tokens, w["shared_gate"]))
    return (out + shared * mlp(w["shared"], tokens)).reshape(x.shape)
