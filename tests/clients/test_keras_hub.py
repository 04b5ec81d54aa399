"""KerasHub's Qwen3.5 with `decode` for its recurrence, and its stacked cache in place.

Needs keras-hub; CI of the repository installs the version that this was written for.
Its own `generate()` is no measure: it pads prompts into the recurrence and feeds the
last prompt token twice. So tokens are compared with its full forward pass.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.hlo import calls, copies

os.environ.setdefault("KERAS_BACKEND", "jax")
keras_hub = pytest.importorskip("keras_hub", reason="needs keras-hub")

from keras_hub.src.models.qwen3_5 import qwen3_5_gated_delta_net as gdn  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("host"),
    pytest.mark.filterwarnings("default"),
]

B, PROMPT, LENGTH, LAYERS = 2, 5, 24, 4
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
SIZES |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
STACK = (B, LAYERS, 4, 32, 32)


@pytest.fixture(scope="module")
def model():
    import keras

    # Keras's own code promotes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.Qwen3_5Backbone(
            vocabulary_size=97,
            num_layers=LAYERS,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            hidden_dim=64,
            intermediate_dim=96,
            **SIZES,
        )
        model = keras_hub.models.Qwen3_5CausalLM(backbone)
        rng = np.random.default_rng(0)
        for weight in model.weights:  # so that layers matter, and tokens differ
            if weight.name in ("A_log", "dt_bias"):
                weight.assign(rng.normal(size=weight.shape))
            elif "embedding" in weight.path:
                weight.assign(0.5 * rng.normal(size=weight.shape))
        yield model


class Stack:
    """The recurrent cache, [B, L, ...], which layers update in turn."""

    def __init__(self, states):
        self.states, self.layer = states, 0

    def update(self, query, key, value, g, beta, **_):
        slot = np.array([self.layer], np.int32)

        def row(state, q, k, v, g, beta):
            q, k, v, g, beta = (x[None] for x in (q, k, v, g, beta))
            out, state = jax_gdn.decode(
                q, k, v, state, g=g, beta=beta, state_indices=slot
            )
            return out[0], state

        # A cache that autocast made narrower would be a mismatch in some loop's carry.
        assert self.states.dtype == jnp.float32
        out, self.states = jax.vmap(row)(self.states, query, key, value, g, beta)
        return out, slot  # in the place of a layer's state


def step(model, monkeypatch, tokens, caches, index):
    """`call_with_cache` of one token, with the cache as it is."""
    kv_cache, conv_cache, states = caches
    stack = Stack(states)
    monkeypatch.setattr(gdn, "_recurrent_gated_delta_rule", stack.update)
    x = model.backbone.token_embedding(tokens)
    kv, conv = [], []
    for i, layer in enumerate(model.backbone.transformer_layers):
        stack.layer = i
        x, new_kv, new_conv, _ = layer.call_and_update_cache(
            x,
            kv_cache=kv_cache[:, i],
            conv_cache=conv_cache[:, i],
            recurrent_cache=jnp.zeros(1),
            cache_update_index=index,
        )
        kv.append(new_kv)
        conv.append(new_conv)
    logits = model.backbone.token_embedding(model.backbone.layer_norm(x), reverse=True)
    caches = jnp.stack(kv, axis=1), jnp.stack(conv, axis=1), stack.states
    return jnp.argmax(logits[:, 0], axis=-1), caches


def empty_caches(model):
    conv_dim = 2 * 2 * 32 + 4 * 32
    return (
        jnp.zeros((B, LAYERS, 2, LENGTH, 1, 32)),
        jnp.zeros((B, LAYERS, conv_dim, 3)),
        jnp.zeros(STACK),
    )


def test_tokens_of_the_full_forward_pass(model, monkeypatch):
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 97, (B, LENGTH)).astype(np.int32)
    expected, made = tokens.copy(), tokens.copy()

    @jax.jit
    def full(tokens):
        ones = jnp.ones_like(tokens)
        logits = model({"token_ids": tokens, "padding_mask": ones})
        return jnp.argmax(logits, axis=-1)

    for t in range(PROMPT, LENGTH):  # what comes after t does not matter to it
        expected[:, t] = np.asarray(full(expected))[:, t - 1]

    def one(caches, tokens, index):
        return step(model, monkeypatch, tokens, caches, index)

    caches = empty_caches(model)
    call = jax.jit(one, donate_argnums=0)
    compiled = call.lower(caches, jnp.asarray(tokens[:, :1]), jnp.int32(0)).compile()
    assert calls(compiled.as_text()) == 3  # of four layers, the last is attention
    assert copies(compiled.as_text(), STACK) == 0
    assert copies(compiled.as_text(), (B, 1, *STACK[2:])) == 0
    a_layer = caches[2].nbytes // LAYERS
    kept = sum(x.nbytes for x in caches[:2])  # Keras puts these together anew
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 3 * kept + a_layer
    where = caches[2].unsafe_buffer_pointer()
    for t in range(LENGTH - 1):
        new, caches = compiled(caches, jnp.asarray(made[:, t : t + 1]), jnp.int32(t))
        if t + 1 >= PROMPT:
            made[:, t + 1] = np.asarray(new)
    assert caches[2].unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(made, expected)
    assert len(np.unique(expected[:, PROMPT:])) > 8
