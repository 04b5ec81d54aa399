"""What a model's config.json says, and the sizes that are known by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

# Text models, and what also sees and has one inside.
KINDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen3_5", "qwen3_5_moe")


@dataclasses.dataclass(frozen=True)
class Config:
    """Names as in config.json; hashable, for it is fixed when a program is traced."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 248320
    intermediate_size: int = 0  # of a dense model
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    norm_topk_prob: bool = True
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4
    layer_types: tuple[str, ...] = ()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    tie_word_embeddings: bool = False
    mtp_num_hidden_layers: int = 0
    eos_token_id: tuple[int, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each layer: "linear_attention" or "full_attention"."""
        every = self.full_attention_interval
        full = [(i + 1) % every == 0 for i in range(self.num_hidden_layers)]
        return self.layer_types or tuple(
            "full_attention" if x else "linear_attention" for x in full
        )


def read(directory: Path) -> Config:
    """Reads a config.json; ends the program where it is not one of ours."""
    path = directory / "config.json"
    if not path.is_file():
        raise SystemExit(f"no {path}: is this the directory of a model?")
    outer: dict[str, Any] = json.loads(path.read_text("utf-8"))
    kind = outer.get("model_type")
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise SystemExit(f"{path}: no model of type {kind!r}; known are {known}")
    given = outer | outer.get("text_config", {})
    rope = given.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise SystemExit(f"{path}: rope of type {rope['rope_type']!r} is not known")
    if given.get("mlp_only_layers") or given.get("decoder_sparse_step", 1) != 1:
        raise SystemExit(f"{path}: dense layers among those of experts are not known")
    given |= {x: rope[x] for x in ("rope_theta", "partial_rotary_factor") if x in rope}
    given["tie_word_embeddings"] = outer.get("tie_word_embeddings", False)
    end = given.get("eos_token_id")
    given["eos_token_id"] = end if isinstance(end, list) else [end] * (end is not None)
    for name in ("eos_token_id", "layer_types"):
        given[name] = tuple(given.get(name) or ())
    names = {field.name for field in dataclasses.fields(Config)}
    return Config(**{n: x for n, x in given.items() if n in names and x is not None})


def _small(hidden: int, inner: int) -> Config:
    tied: Any = {"tie_word_embeddings": True, "linear_num_value_heads": 16}
    return Config(hidden, 24, 8, 2, intermediate_size=inner, **tied)


_TINY: dict[str, Any] = {
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_TINY |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
SIZES = {
    "tiny": Config(64, 4, 4, 2, 256, 96, **_TINY),
    "0.8B": _small(1024, 3584),
    "2B": _small(2048, 6144),
    "4B": Config(2560, 32, 16, 4, intermediate_size=9216, tie_word_embeddings=True),
    "9B": Config(4096, 32, 16, 4, intermediate_size=12288),
    "35B-A3B": Config(2048, 40, 16, 2, num_experts=256, num_experts_per_tok=8),
    "80B-A3B": Config(
        2048, 48, 16, 2, 151936, num_experts=512, num_experts_per_tok=10
    ),  # Qwen3-Next
}
SIZES = {n: dataclasses.replace(x, mtp_num_hidden_layers=1) for n, x in SIZES.items()}
