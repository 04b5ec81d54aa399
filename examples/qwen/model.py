"""The model: caches, prompts, steps, and the draft head's speculation."""

import dataclasses
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import jax_gdn

from . import layers
from .config import Config
from .layers import Cache, Weights, Where, norm


@dataclasses.dataclass(frozen=True)
class Options:
    """How to decode."""

    places: int = 4  # rows of the batch, for requests to take
    context: int = 1024  # tokens a row has room for
    deferred: bool = False  # write a state once in many tokens
    drafted: int = 0  # tokens that the draft head adds to a step
    state: str = "float32"
    implementation: str | None = None
    temperature: float = 0.0  # 0: greedy

    @property
    def nowhere(self) -> int:
        """A row that is no place."""
        return self.places + 1


GREEDY = Options()


def new_cache(config: Config, options: Options, dtype: Any) -> Cache:
    """Empty caches, one a layer, and how many tokens each row has."""
    rows, tokens = options.places, 1 + options.drafted
    H, HV = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim
    slots = rows + 1  # the last one stays 0

    def of_attention() -> Cache:
        shape = rows, config.num_key_value_heads, options.context, config.head_dim
        return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}

    def of_linear() -> Cache:
        state = jnp.zeros((slots, HV, K, V), options.state)
        ring = slots, config.linear_conv_kernel_dim - 1 + tokens, H, 2 * K + HV // H * V
        cache: Cache = {"state": state, "ring": jnp.zeros(ring, dtype)}
        if options.deferred:
            cache["pending"] = jax_gdn.new_pending(
                state, H, max_tokens=tokens, k_dtype=dtype
            )
        return cache

    kinds = {"linear_attention": of_linear, "full_attention": of_attention}
    cache: Cache = {"layers": [kinds[kind]() for kind in config.kinds]}
    cache["lengths"] = jnp.zeros(rows, jnp.int32)
    if options.deferred:
        cache["cursors"] = jax_gdn.new_cursors(slots)
    if options.drafted:
        cache["draft"] = of_attention()
    return cache


def block(config: Config, w: Weights, x: Array, cache: Cache, at: Where):
    """A layer: attention of its kind, then an MLP or experts, each beside a sum."""
    y = norm(x, w["input_layernorm"], config.rms_norm_eps)
    if "self_attn" in w:
        y, cache = layers.attention(config, w["self_attn"], y, cache, at)
    else:
        y, cache = layers.linear_attention(config, w["linear_attn"], y, cache, at)
    x = x + y
    y = norm(x, w["post_attention_layernorm"], config.rms_norm_eps)
    return x + layers.mlp(config, w["mlp"], y), cache


def forward(config, options, weights, cache, tokens, rows, start, lengths=None):
    """The hidden states, [B, T, hidden], of tokens that begin at `start` in their rows.

    With `lengths` they are prompts, and begin at 0. Returns the caches too.
    """
    w, new = weights["model"], []
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    cursors = cache.get("cursors")
    at = Where(rows, positions, lengths, cursors, options.implementation)
    x = w["embed_tokens"][tokens]
    for layer, old in zip(w["layers"], cache["layers"], strict=True):
        x, part = block(config, layer, x, old, at)
        new.append(part)
    return norm(x, w["norm"], config.rms_norm_eps), cache | {"layers": new}


def logits_of(weights: Weights, x: Array) -> Array:
    head = weights.get("lm_head", weights["model"]["embed_tokens"])
    return jnp.einsum("...h,vh->...v", x, head).astype(jnp.float32)


def draft(config, weights, cache, x, tokens, rows, start, lengths=None):
    """The draft head: hidden states of the model, and the tokens after them.

    Returns its own, which say the token after that, and the caches.
    """
    w, eps = weights["mtp"], config.rms_norm_eps
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    embedded = weights["model"]["embed_tokens"][tokens]
    parts = norm(embedded, w["pre_fc_norm_embedding"], eps)
    parts = jnp.concatenate([parts, norm(x, w["pre_fc_norm_hidden"], eps)], -1)
    x = jnp.einsum("btc,hc->bth", parts, w["fc"])
    at = Where(rows, positions, lengths)
    x, new = block(config, w["layers"][0], x, cache["draft"], at)
    return norm(x, w["norm"], eps), cache | {"draft": new}


@ft.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def prompt(config, options, weights, cache, tokens, rows, lengths, key):
    """Takes prompts, [b, T] padded on the right, into places.

    Returns the first token of each, what the draft head makes of it, and the cache.
    """
    start = jnp.zeros_like(lengths)
    x, cache = forward(config, options, weights, cache, tokens, rows, start, lengths)
    at = jnp.maximum(lengths - 1, 0)[:, None]
    last = jnp.take_along_axis(x, at[..., None], 1)
    token = pick(options, logits_of(weights, last[:, 0]), key)
    cache["lengths"] = cache["lengths"].at[rows].set(lengths, mode="drop")
    if options.deferred:
        cache["cursors"] = cache["cursors"].at[rows].set(0, mode="drop")
    if options.drafted:
        after = jnp.roll(tokens, -1, axis=1)
        after = after.at[jnp.arange(len(at)), at[:, 0]].set(token)
        x, cache = draft(config, weights, cache, x, after, rows, start, lengths)
        last = jnp.take_along_axis(x, at[..., None], 1)
    return token, last, cache


def pick(options: Options, logits: Array, key: Array) -> Array:
    if options.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    scaled = logits / options.temperature
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


@ft.partial(jax.jit, static_argnums=(0, 1, 8), donate_argnums=3)
def decode(config, options, weights, cache, token, drafted, left, key, steps):
    """Decodes: a token of each row a step, until a row has none `left` to make.

    With drafts a step verifies T tokens and keeps those that the model would have made
    itself; wrong ones are taken back by the lengths and the cursors alone. `drafted`,
    [B, 1, hidden], is what the draft head made of the last token. Returns tokens
    [B, steps, T], -1 where there is none, and what goes on.
    """
    places = jnp.arange(options.places, dtype=jnp.int32)

    def step(carry, key):
        cache, token, drafted, left = carry
        rows = jnp.where(left > 0, places, options.nowhere)
        start, tokens, y = cache["lengths"], [token[:, None]], drafted
        for i in range(options.drafted):
            if i:
                given = y, tokens[-1], rows, start + i - 1
                y, cache = draft(config, weights, cache, *given)
            tokens.append(pick(GREEDY, logits_of(weights, y), key))
        tokens = jnp.concatenate(tokens, 1)
        x, cache = forward(config, options, weights, cache, tokens, rows, start)
        new = pick(options, logits_of(weights, x), key)
        right = jnp.cumprod((tokens[:, 1:] == new[:, :-1]).astype(jnp.int32), 1)
        good = jnp.minimum(1 + jnp.sum(right, 1), left)
        end = jnp.isin(new, jnp.array(config.eos_token_id or (-1,), jnp.int32))
        before_end = jnp.cumsum(end, 1) - end == 0
        keep = (jnp.arange(new.shape[1]) < good[:, None]) & before_end
        kept = jnp.sum(keep, 1, dtype=jnp.int32)
        cache = advance(options, cache, rows, new.shape[1], kept)
        last, some = jnp.maximum(kept - 1, 0)[:, None], kept > 0
        token = jnp.where(some, jnp.take_along_axis(new, last, 1)[:, 0], token)
        if options.drafted:  # the draft head takes true hidden states
            x, cache = draft(config, weights, cache, x, new, rows, start)
            moved = jnp.take_along_axis(x, last[..., None], 1)
            drafted = jnp.where(some[:, None, None], moved, drafted)
        left = jnp.where(jnp.any(keep & end, 1), 0, left - kept)
        return (cache, token, drafted, left), jnp.where(keep, new, -1)

    keys = jax.random.split(key, steps)
    (cache, *carry), made = lax.scan(step, (cache, token, drafted, left), keys)
    return jnp.moveaxis(made, 0, 1), *carry, cache


def advance(options: Options, cache: Cache, rows: Array, tokens: int, kept) -> Cache:
    """The caches after a step of so many tokens, of which each row keeps some."""
    cache = cache | {"lengths": cache["lengths"] + kept}
    if options.deferred:
        linear = next(x for x in cache["layers"] if "pending" in x)
        cache["cursors"] = jax_gdn.advance_cursors(
            cache["cursors"], linear["pending"], tokens, state_indices=rows,
            accepted=kept,
        )  # fmt: skip
    return cache
