"""The example's decode loop for an H100: what is left around the native calls."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from examples.qwen import config, model, weights
from examples.qwen.model import Options
from tests.hlo import DEFERRED_TARGET, TARGET, calls, copies
from tests.test_h100 import h100 as h100  # the fixture

pytestmark = pytest.mark.cuda_build


@pytest.mark.parametrize("deferred", [False, True])
def test_no_cache_of_a_model_is_copied(h100, deferred):
    four = dataclasses.replace(
        config.SIZES["4B"], num_hidden_layers=4, mtp_num_hidden_layers=0
    )
    options = Options(places=64, deferred=deferred)

    def spec(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100)

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=h100),
        weights.shapes(four),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    cache = jax.eval_shape(lambda: model.new_cache(four, options, jnp.bfloat16))
    cache, key = jax.tree.map(spec, (cache, jax.eval_shape(lambda: jax.random.key(0))))
    row = jax.ShapeDtypeStruct((64,), jnp.int32, sharding=h100)
    drafted = jax.ShapeDtypeStruct((64, 1, 2560), jnp.bfloat16, sharding=h100)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        given = four, options, params, cache, row, drafted, row, key, 16
        lowered = model.decode.lower(*given)
    compiled = lowered.compile()
    text = compiled.as_text()
    assert calls(text, DEFERRED_TARGET if deferred else TARGET) == 3
    sizes = []
    for x in jax.tree.leaves(cache["layers"]):
        dtype = {"bfloat16": "bf16", "float32": "f32"}[x.dtype.name]
        assert copies(text, x.shape, dtype) == 0
        sizes.append(math.prod(x.shape) * x.dtype.itemsize)
    memory = compiled.memory_analysis()
    # An attention cache laid anew would be there twice.
    assert memory.alias_size_in_bytes >= sum(sizes)
    keys = math.prod(cache["layers"][3]["k"].shape) * 2
    assert memory.temp_size_in_bytes < keys / 2
