"""Generates text with Qwen3.5 or Qwen3-Next, from local weights or random ones."""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from . import config, weights
from .generate import Request, serve
from .model import Options


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.qwen", description=__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    files = "a Hugging Face directory: config.json, tokenizer.json and safetensors"
    source.add_argument("--model", type=Path, help=files)
    source.add_argument("--size", choices=config.SIZES, help="random weights of a size")
    add("--prompt", action="append", help="may be given several times")
    add("--tokens", type=int, default=64, help="to make, at most (64)")
    add("--places", type=int, default=4, help="requests at a time (4)")
    add("--context", type=int, default=1024, help="tokens that a place holds (1024)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--seed", type=int, default=0, help="of samples and of random weights (0)")
    add("--deferred", action="store_true", help="write states once in 16 tokens")
    drafts = "tokens that the draft head (MTP) adds to a step; brings --deferred"
    add("--drafted", type=int, default=0, metavar="N", help=drafts)
    add("--mesh", type=int, default=1, metavar="N", help="devices to split over (1)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--state", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--implementation", choices=("native", "xla"), help="of the gated delta rule")
    given = parser.parse_args()
    if not 0 <= given.drafted <= 7:
        parser.error(f"--drafted must be from 0 to 7; got {given.drafted}")
    if not 1 <= given.mesh <= jax.device_count():
        parser.error(f"--mesh {given.mesh}: there are {jax.device_count()} devices")
    return given


def main() -> None:
    given = parsed()
    devices = np.array(jax.devices()[: given.mesh])
    mesh = Mesh(devices, ("heads",)) if given.mesh > 1 else None
    model = config.SIZES[given.size] if given.size else config.read(given.model)
    if given.drafted and not model.mtp_num_hidden_layers:
        raise SystemExit("--drafted: this model has no draft head")
    model = dataclasses.replace(model, mtp_num_hidden_layers=int(given.drafted > 0))
    texts, dtype = given.prompt or ["Once upon a time"], jnp.dtype(given.dtype)
    if given.size:
        params = weights.random(model, mesh, given.seed, dtype)
        prompts = [list(text.encode()) for text in texts]
        text_of = str  # of random weights there is no text
    else:
        tokenizer = tokenizer_of(given.model)
        prompts, text_of = [tokenizer.encode(x).ids for x in texts], tokenizer.decode
        params = weights.load(model, given.model, mesh, dtype)
    names = [field.name for field in dataclasses.fields(Options)]
    chosen = {name: getattr(given, name) for name in names}
    options = Options(**chosen | {"deferred": given.deferred or given.drafted > 0})
    requests = [Request(prompt, given.tokens) for prompt in prompts]
    start = time.perf_counter()
    for request in serve(model, options, params, requests, mesh, given.seed):
        n = next(i for i, x in enumerate(requests) if x is request)
        print(f"{texts[n]!r}: {text_of(request.made)}", flush=True)
    made = sum(len(request.made) for request in requests)
    print(f"{made} tokens in {time.perf_counter() - start:.1f} s, compilation included")


def tokenizer_of(directory: Path):
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise SystemExit(f"no {path}, which text needs")
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    main()
