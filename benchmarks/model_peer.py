"""Times decode steps of `transformers`' Qwen3.5 of a size, beside `model`.

Random weights, bfloat16; with --directory they are written there, for `model` to read.
A step is what `generate` takes longer for more tokens. Needs torch and transformers.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from examples.qwen.config import SIZES, Config

from .machine import host
from .options import output_file, positive, write_json

FEW, MANY = 8, 40  # tokens


def theirs(c: Config) -> Any:
    """A dense model of theirs, with random weights, on the GPU where there is one."""
    import torch
    import transformers

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "vocab_size")
    names += ("linear_num_key_heads", "linear_num_value_heads", "tie_word_embeddings")
    names += ("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim")
    given = {name: getattr(c, name) for name in names}
    config = transformers.Qwen3_5TextConfig(**given, eos_token_id=None)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = transformers.Qwen3_5ForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    dense = [name for name, config in SIZES.items() if not config.num_experts]
    add("--size", choices=dense, default="tiny")
    add("--batch", type=positive, nargs="+", default=[1, 8], help="rows (1 8)")
    add("--context", type=positive, default=1024, help="tokens of a prompt (1024)")
    add("--rounds", type=positive, default=5)
    add("--directory", type=Path, help="where to write the weights")
    add("--json", type=output_file)


def run(given: argparse.Namespace) -> None:
    import torch
    import transformers

    model = theirs(SIZES[given.size])
    if given.directory:
        model.save_pretrained(given.directory)
    report: dict[str, Any] = {"machine": host(), "size": given.size, "results": []}
    report |= {"torch": torch.__version__, "transformers": transformers.__version__}

    def took(B: int, tokens: int) -> float:
        prompt = torch.ones((B, given.context), dtype=torch.long, device=model.device)
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        int(out[0, -1])  # waits
        return time.perf_counter() - start

    for B in given.batch:
        took(B, FEW)
        steps = [
            1e3 * (took(B, MANY) - took(B, FEW)) / (MANY - FEW)
            for _ in range(given.rounds)
        ]
        low, median, high = statistics.quantiles(steps, n=4, method="inclusive")
        row = {"B": B, "ms": median, "quartiles_ms": [low, high], "rounds": len(steps)}
        report["results"].append(row)
        print(f"B = {B}: {median:.2f} ms a step ({low:.2f} to {high:.2f})", flush=True)
        write_json(report, given.json)
