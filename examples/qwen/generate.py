"""Serves requests: they join as places get free, and leave when they are done."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from . import model, weights
from .config import Config
from .model import Options

STEPS = 16  # on the device, between two looks at who is done


@dataclasses.dataclass
class Request:
    """Tokens of a prompt, how many to make at most, and what is made so far."""

    prompt: Sequence[int]
    tokens: int
    made: list[int] = dataclasses.field(default_factory=list)


def serve(
    config: Config,
    options: Options,
    params: Any,
    requests: Sequence[Request],
    mesh: Mesh | None = None,
    seed: int = 0,
) -> Iterator[Request]:
    """Decodes requests, as many at a time as there are places; yields who is done."""
    for x in requests:
        need = len(x.prompt) + x.tokens + options.drafted
        if need > options.context or not x.prompt:
            raise SystemExit(f"{x} needs a context of {need}; got {options.context}")
    dtype = params["model"]["embed_tokens"].dtype
    cache = new_cache(config, options, dtype, mesh)
    waiting, running = list(requests), {}
    token = left = jnp.zeros(options.places, jnp.int32)
    drafted = jnp.zeros((options.places, 1, config.hidden_size), dtype)
    key = jax.random.key(seed)
    while waiting or running:
        key, of_prompt, of_steps = jax.random.split(key, 3)
        free = [n for n in range(options.places) if n not in running]
        joining = [waiting.pop(0) for _ in free[: len(waiting)]]
        if joining:
            rows = np.array(free[: len(joining)], np.int32)
            lengths = np.array([len(x.prompt) for x in joining], np.int32)
            # To a power of 2, so that few programs are compiled.
            T = min(1 << int(lengths.max() - 1).bit_length(), options.context)
            tokens = [[*x.prompt] + [0] * (T - len(x.prompt)) for x in joining]
            tokens = np.array(tokens, np.int32)
            first, last, cache = model.prompt(
                config, options, params, cache, tokens, rows, lengths, of_prompt
            )
            over = np.isin(first, config.eos_token_id)
            limits = np.array([x.tokens - 1 for x in joining], np.int32)
            left = left.at[rows].set(np.where(over, 0, limits))
            token, drafted = token.at[rows].set(first), drafted.at[rows].set(last)
            for n, request, made in zip(rows, joining, np.asarray(first), strict=True):
                running[int(n)] = request
                request.made.append(int(made))
        made, token, drafted, left, cache = model.decode(
            config, options, params, cache, token, drafted, left, of_steps, STEPS
        )
        rest = np.asarray(left)
        for n, row in enumerate(np.asarray(made).reshape(options.places, -1)):
            if n in running:
                running[n].made += [int(x) for x in row if x >= 0]
                if rest[n] == 0:
                    yield running.pop(n)


def new_cache(config: Config, options: Options, dtype: Any, mesh: Mesh | None) -> Any:
    """Empty caches; on a mesh they are split by heads, as the weights are."""
    cache = model.new_cache(config, options, dtype)
    if mesh is None:
        return cache
    axes = {"state": 1, "ring": 2, "k": 1, "v": 1}

    def place(keys: Any, x: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        axis = 1 if ".pending." in path else axes.get(path.split(".")[-1])
        return jax.device_put(x, weights.split(mesh, x.shape, axis))

    return jax.tree_util.tree_map_with_path(place, cache)
