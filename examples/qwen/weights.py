"""Weights: random ones of a size, or those of a local Hugging Face directory.

Names are those of the files. Two things lie otherwise. What a linear layer projects
comes by key head, [q K, k K, v R V, z R V, b R, a R] of each with R = HV / H, much as
Qwen3-Next has it: one product makes all six, and devices split it by heads. And the
experts of a layer are one array, [E, in, out].
"""

import functools as ft
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import Config
from .layers import Weights

# The axis that a mesh splits: heads, the inner size of an MLP, or words.
AXES = {"in_proj": 0, "conv1d": 1, "A_log": 0, "dt_bias": 0}
AXES |= {"out_proj": 1, "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
AXES |= {"gate_proj": 0, "up_proj": 0, "down_proj": 1, "embed_tokens": 0, "lm_head": 0}
OF_EXPERTS = {"gate_proj": 2, "up_proj": 2, "down_proj": 1}


def shapes(c: Config) -> dict[str, Any]:
    h, H, HV = c.hidden_size, c.linear_num_key_heads, c.linear_num_value_heads
    K, V, R = c.linear_key_head_dim, c.linear_value_head_dim, HV // H
    N, kv, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def dense(inner: int) -> dict[str, Any]:
        return {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}

    linear = {"in_proj": (H, 2 * (K + R * V + R), h), "A_log": (HV,)}
    linear |= {"conv1d": (c.linear_conv_kernel_dim, H, 2 * K + R * V)}
    linear |= {"dt_bias": (HV,), "norm": (V,), "out_proj": (h, HV, V)}
    full = {"q_proj": (N, 2 * size, h), "k_proj": (kv, size, h), "q_norm": (size,)}
    full |= {"v_proj": (kv, size, h), "o_proj": (h, N, size), "k_norm": (size,)}
    mlp = dense(c.intermediate_size)
    if E := c.num_experts:
        inner = c.moe_intermediate_size
        each = {"gate_proj": (E, h, inner), "up_proj": (E, h, inner)}
        mlp = {"experts": each | {"down_proj": (E, inner, h)}, "gate": (E, h)}
        mlp["shared_expert"] = dense(c.shared_expert_intermediate_size)
        mlp["shared_expert_gate"] = (1, h)
    norms = {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    kinds = {"linear_attention": {"linear_attn": linear}}
    kinds["full_attention"] = {"self_attn": full}
    layers = [{**kinds[kind], "mlp": mlp, **norms} for kind in c.kinds]
    model = {"embed_tokens": (c.vocab_size, h), "norm": (h,), "layers": layers}
    result: dict[str, Any] = {"model": model}
    if not c.tie_word_embeddings:
        result["lm_head"] = (c.vocab_size, h)
    if c.mtp_num_hidden_layers:
        layer = {"self_attn": full, "mlp": mlp, **norms}
        mtp = {"fc": (h, 2 * h), "layers": [layer], "norm": (h,)}
        mtp |= {"pre_fc_norm_embedding": (h,), "pre_fc_norm_hidden": (h,)}
        result["mtp"] = mtp
    return result


def split(mesh: Mesh | None, shape: tuple[int, ...], axis: int | None) -> Any:
    """An array's place, split along an axis where that comes out even."""
    if mesh is None:
        return None
    spec: list[str | None] = [None] * len(shape)
    if axis is not None and shape[axis] % mesh.size == 0:
        spec[axis] = mesh.axis_names[0]
    return NamedSharding(mesh, PartitionSpec(*spec))


def filled(config: Config, mesh: Mesh | None, make: Callable[..., Any]) -> Weights:
    """Every weight, made by its name and shape, and where it goes."""

    def fill(keys: Any, shape: tuple[int, ...]) -> Any:
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        axes = OF_EXPERTS if ".experts." in name else AXES
        return make(name, shape, split(mesh, shape, axes.get(name.split(".")[-1])))

    return jax.tree_util.tree_map_with_path(
        fill, shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )


def random(config: Config, mesh: Mesh | None = None, seed: int = 0, dtype: Any = None):
    """Random weights, made where they go."""

    def make(name: str, shape: tuple[int, ...], place: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        kind = "normal"
        if name.endswith("A_log"):
            kind = "decay"
        elif len(shape) == 1:  # of norms, which add 1 to theirs but for one
            kind = "one" if name.endswith(("dt_bias", "linear_attn.norm")) else "zero"
        return _array_of(kind, shape, jnp.dtype(dtype or jnp.bfloat16), place)(key)

    return filled(config, mesh, make)


@ft.cache
def _array_of(kind: str, shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    def array(key: jax.Array) -> jax.Array:
        if kind == "decay":
            return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16))
        if kind == "normal":
            return 0.02 * jax.random.normal(key, shape, dtype)
        return jnp.full(shape, kind == "one", dtype)

    return jax.jit(array, out_shardings=place)


def load(config: Config, directory: Path, mesh: Mesh | None = None, dtype: Any = None):
    """The weights of a local Hugging Face directory."""
    from tqdm import tqdm

    files = Files(directory)
    number = len(jax.tree.leaves(shapes(config), is_leaf=lambda x: type(x) is tuple))
    with tqdm(total=number, unit=" weights", disable=None) as bar:

        def make(name: str, shape: tuple[int, ...], place: Any) -> Any:
            array = read(config, files, name).reshape(shape)
            if dtype is not None and not name.endswith("A_log"):
                array = array.astype(dtype)
            bar.update()
            return jax.device_put(array, place)

        return filled(config, mesh, make)


class Files(dict[str, Any]):
    """How to get each array of a directory's safetensors."""

    def __init__(self, directory: Path):
        from safetensors import safe_open

        index, names = directory / "model.safetensors.index.json", {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for path in sorted(directory / name for name in names):
            if not path.is_file():
                raise SystemExit(f"no {path}: is the download complete?")
            file = safe_open(path, framework="flax")
            for stored in file.keys():  # noqa: SIM118
                # Models that also see have a longer name in front.
                name = re.sub(r"^model\.language_model\.", "model.", stored)
                self[name] = ft.partial(file.get_tensor, stored)

    def get_array(self, name: str) -> np.ndarray:
        if name not in self:
            raise SystemExit(f"the weights lack {name}")
        return np.asarray(self[name]())


def read(config: Config, files: Files, name: str) -> np.ndarray:
    """One weight, as it lies here."""
    prefix, _, last = name.rpartition(".")
    get, H = files.get_array, config.linear_num_key_heads
    K = H * config.linear_key_head_dim

    def by_head(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([x.reshape(H, -1, *x.shape[1:]) for x in parts], 1)

    if last == "conv1d":
        taps = by_head(*np.split(get(f"{name}.weight")[:, 0], [K, 2 * K]))
        return np.moveaxis(taps, -1, 0)
    if last == "in_proj":
        if f"{name}_qkvz.weight" in files:
            return by_head(*(get(f"{name}_{x}.weight") for x in ("qkvz", "ba")))
        q, k, v = np.split(get(f"{name}_qkv.weight"), [K, 2 * K])
        return by_head(q, k, v, *(get(f"{name}_{x}.weight") for x in "zba"))
    if prefix.endswith("experts"):
        each = [f"{prefix}.{i}.{last}.weight" for i in range(config.num_experts)]
        if each[0] in files:
            return np.stack([get(x).T for x in each])
        if last == "down_proj":
            return np.swapaxes(get(f"{prefix}.down_proj"), 1, 2)
        both = np.split(get(f"{prefix}.gate_up_proj"), 2, axis=1)
        return np.swapaxes(both[last == "up_proj"], 1, 2)
    return get(name if last in ("A_log", "dt_bias") else f"{name}.weight")
