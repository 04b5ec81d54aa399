"""Weights: random ones of a size, or those of a local Hugging Face directory.

What a linear layer projects lies by key head, [q K, k K, v R V, z R V] of each with
R = HV / H, as Qwen3-Next stores it: one product makes all four, and devices split it by
heads. Experts lie as [E, in, out].
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
AXES = {"qkvz": 0, "ba": 0, "conv": 1, "A_log": 0, "dt_bias": 0, "out": 1}
AXES |= {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 0, "up": 0, "down": 1}
AXES |= {"embed": 0, "head": 0}
OF_EXPERTS = {"gate": 2, "up": 2, "down": 1}


def shapes(c: Config) -> dict[str, Any]:
    h, H, HV = c.hidden_size, c.linear_num_key_heads, c.linear_num_value_heads
    K, V = c.linear_key_head_dim, c.linear_value_head_dim
    N, size, kv, R = c.num_attention_heads, c.head_dim, c.num_key_value_heads, HV // H

    def dense(inner: int) -> dict[str, Any]:
        return {"gate": (inner, h), "up": (inner, h), "down": (h, inner)}

    linear = {"qkvz": (H, 2 * (K + R * V), h), "ba": (H, 2 * R, h), "A_log": (HV,)}
    linear |= {"conv": (c.linear_conv_kernel_dim, H, 2 * K + R * V), "dt_bias": (HV,)}
    linear |= {"norm": (V,), "out": (h, HV, V)}
    full = {"q": (N, 2 * size, h), "k": (kv, size, h), "v": (kv, size, h)}
    full |= {"o": (h, N, size), "q_norm": (size,), "k_norm": (size,)}
    mlp = dense(c.intermediate_size)
    if E := c.num_experts:
        inner = c.moe_intermediate_size
        mlp = {"gate": (E, h, inner), "up": (E, h, inner), "down": (E, inner, h)}
        mlp |= {"router": (E, h), "shared_gate": (1, h)}
        mlp |= {"shared": dense(c.shared_expert_intermediate_size)}
    norms = {"input_norm": (h,), "post_norm": (h,)}
    kinds = {"linear_attention": linear, "full_attention": full}
    layers = [{"mixer": kinds[kind], "mlp": mlp, **norms} for kind in c.kinds]
    result = {"embed": (c.vocab_size, h), "norm": (h,), "layers": layers}
    if not c.tie_word_embeddings:
        result["head"] = (c.vocab_size, h)
    if c.mtp_num_hidden_layers:
        draft = {"join": (h, 2 * h), "layer": {"mixer": full, "mlp": mlp, **norms}}
        draft |= {n: (h,) for n in ("embedding_norm", "hidden_norm", "norm")}
        result["draft"] = draft
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
    """Every weight, made by its path and shape, and where it goes."""

    def fill(keys: Any, shape: tuple[int, ...]) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        name = path.split("/")[-1]
        of_experts = len(shape) == 3 and name in OF_EXPERTS
        axis = (OF_EXPERTS if of_experts else AXES).get(name)
        return make(path, shape, split(mesh, shape, axis))

    return jax.tree_util.tree_map_with_path(
        fill, shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )


def random(config: Config, mesh: Mesh | None = None, seed: int = 0, dtype: Any = None):
    """Random weights, made where they go."""

    def make(path: str, shape: tuple[int, ...], place: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        kind = "normal"
        if path.endswith("A_log"):
            kind = "decay"
        elif len(shape) == 1:  # of norms, which add 1 to theirs but for one
            kind = "one" if path.endswith(("dt_bias", "mixer/norm")) else "zero"
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


class Files:
    """The safetensors of a directory, an array at a time."""

    def __init__(self, directory: Path):
        from safetensors import safe_open

        index, names = directory / "model.safetensors.index.json", {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for name in sorted(names):
            if not (directory / name).is_file():
                raise SystemExit(f"no {directory / name}: is the download complete?")
        files = [safe_open(directory / name, framework="flax") for name in names]
        self._of = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._of

    def _stored(self, name: str) -> str:
        """Models that also see have another name in front."""
        other = re.sub("^model", "model.language_model", name)
        return other if other in self._of else name

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise SystemExit(f"the weights lack {name}")
        stored = self._stored(name)
        return np.asarray(self._of[stored].get_tensor(stored))


def load(config: Config, directory: Path, mesh: Mesh | None = None, dtype: Any = None):
    """The weights of a local Hugging Face directory."""
    from tqdm import tqdm

    files = Files(directory)
    number = len(jax.tree.leaves(shapes(config), is_leaf=lambda x: type(x) is tuple))
    with tqdm(total=number, unit=" weights", disable=None) as bar:

        def make(path: str, shape: tuple[int, ...], place: Any) -> Any:
            array = read(config, files, path).reshape(shape)
            if dtype is not None and not path.endswith("A_log"):
                array = array.astype(dtype)
            bar.update()
            return jax.device_put(array, place)

        return filled(config, mesh, make)


# What a path here is called there; a pattern's first group is the layer's number.
NAMES = {
    r"embed": "model.embed_tokens.weight",
    r"norm": "model.norm.weight",
    r"head": "lm_head.weight",
    r"draft/join": "mtp.fc.weight",
    r"draft/norm": "mtp.norm.weight",
    r"draft/(embedding|hidden)_norm": r"mtp.pre_fc_norm_\1.weight",
    r"(.*)/input_norm": r"\1.input_layernorm.weight",
    r"(.*)/post_norm": r"\1.post_attention_layernorm.weight",
    r"(.*)/mixer/([qkvo])": r"\1.self_attn.\2_proj.weight",
    r"(.*)/mixer/([qk]_norm)": r"\1.self_attn.\2.weight",
    r"(.*)/mixer/norm": r"\1.linear_attn.norm.weight",
    r"(.*)/mixer/out": r"\1.linear_attn.out_proj.weight",
    r"(.*)/mixer/(A_log|dt_bias)": r"\1.linear_attn.\2",
    r"(.*)/mixer/(qkvz|ba)": r"\1.linear_attn.in_proj_\2.weight",
    r"(.*)/mixer/conv": r"\1.linear_attn.conv1d.weight",
    r"(.*)/mlp/router": r"\1.mlp.gate.weight",
    r"(.*)/mlp/shared_gate": r"\1.mlp.shared_expert_gate.weight",
    r"(.*)/mlp/shared/(\w+)": r"\1.mlp.shared_expert.\2_proj.weight",
    r"(.*)/mlp/(gate|up|down)": r"\1.mlp.\2_proj.weight",
}


def read(config: Config, files: Files, path: str) -> np.ndarray:
    """One weight, by its path here."""
    pattern, there = next(x for x in NAMES.items() if re.fullmatch(x[0], path))
    name = re.sub(f"^{pattern}$", there, path)
    name = re.sub(
        "^layers/", "model.layers.", name.replace("draft/layer", "mtp.layers.0")
    )
    prefix, _, last = name.removesuffix(".weight").rpartition(".")
    if config.num_experts and re.fullmatch(r".*/mlp/(gate|up|down)", path):
        return _of_experts(config, files, f"{prefix}.experts", last)
    if path.endswith("conv"):
        parts = _by_head(config, _parts(config, files[name][:, 0]))
        return np.moveaxis(parts, -1, 0)
    if path.endswith(("qkvz", "ba")) and name not in files:
        # Qwen3.5 has them one behind the other.
        first = f"{prefix}.in_proj_"
        if path.endswith("ba"):
            return _by_head(config, [files[f"{first}{x}.weight"] for x in "ba"])
        qkv = _parts(config, files[f"{first}qkv.weight"])
        return _by_head(config, [*qkv, files[f"{first}z.weight"]])
    return files[name]


def _parts(config: Config, x: np.ndarray) -> list[np.ndarray]:
    K = config.linear_num_key_heads * config.linear_key_head_dim
    return np.split(x, [K, 2 * K])


def _by_head(config: Config, parts: list[np.ndarray]) -> np.ndarray:
    H = config.linear_num_key_heads
    return np.concatenate([x.reshape(H, -1, *x.shape[1:]) for x in parts], 1)


def _of_experts(config: Config, files: Files, prefix: str, name: str) -> np.ndarray:
    """Of files with one array for all experts, [E, out, in], or one for each."""
    half = {"gate_proj": 0, "up_proj": 1}.get(name)
    if f"{prefix}.down_proj" not in files:
        each = range(config.num_experts)
        return np.stack([files[f"{prefix}.{i}.{name}.weight"].T for i in each])
    if half is None:
        return np.swapaxes(files[f"{prefix}.down_proj"], 1, 2)
    both = np.split(files[f"{prefix}.gate_up_proj"], 2, axis=1)
    return np.swapaxes(both[half], 1, 2)
