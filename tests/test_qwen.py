"""The example's model: every way to decode gives the same tokens."""

import dataclasses
import functools as ft
import itertools
import json
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from examples.qwen import config as configs
from examples.qwen import weights
from examples.qwen.generate import Request, serve
from examples.qwen.model import Options

TINY = configs.SIZES["tiny"]
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}
MODELS = {"dense": TINY, "moe": dataclasses.replace(TINY, **EXPERTS)}
WAYS = [
    {"deferred": True, "drafted": 3},
    pytest.param({"implementation": "xla", "places": 1}, marks=pytest.mark.slow),
    pytest.param(
        {"temperature": 1e-4, "deferred": True, "drafted": 3}, marks=pytest.mark.slow
    ),
    pytest.param(
        {"devices": 2, "deferred": True, "drafted": 1}, marks=pytest.mark.slow
    ),
]


@pytest.fixture(autouse=True)
def a_users_settings():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def params_of(kind, mesh=None):
    """Weights large enough for no two tokens to be alike."""
    params = weights.random(MODELS[kind], mesh, dtype=jnp.float32)
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, params)


def prompts() -> list[list[int]]:
    """Padded to the same length, so that few programs are compiled."""
    rng = np.random.default_rng(0)
    return [list(map(int, rng.integers(0, 256, n))) for n in (30, 17, 25)]


def made(kind="dense", devices=1, seed=0, **options) -> list[list[int]]:
    """Tokens of three requests, for which there are two places."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("heads",)) if devices > 1 else None
    requests = [Request(x, 12 + 5 * i) for i, x in enumerate(prompts())]
    given = Options(**{"places": 2, "context": 64} | options)
    done = list(serve(MODELS[kind], given, params_of(kind, mesh), requests, mesh, seed))
    assert sorted(map(id, done)) == sorted(map(id, requests))
    for request in requests:
        assert len(request.made) == request.tokens
    return [request.made for request in requests]


@ft.cache
def plain(kind: str) -> list[list[int]]:
    return made(kind)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_makes_the_same_tokens(way):
    assert len(set(itertools.chain(*plain("dense")))) > 20
    assert made(**way) == plain("dense")


@pytest.mark.slow
def test_with_experts_on_a_mesh():
    assert made("moe", devices=2) == plain("moe")


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"deferred": True, "drafted": 3}], ids=str)
def test_a_request_ends_with_its_token(way):
    """A row that ends leaves its place, and makes nothing more."""
    full = plain("dense")[1]
    config = dataclasses.replace(TINY, eos_token_id=(full[4],))
    request = Request(prompts()[1], len(full))
    options = Options(**{"places": 2, "context": 64} | way)
    assert list(serve(config, options, params_of("dense"), [request])) == [request]
    assert request.made == full[: full.index(full[4]) + 1]


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"deferred": True, "drafted": 1}], ids=str)
def test_samples_repeat_with_their_seed(way):
    first, again, other = (made(temperature=1.0, seed=x, **way) for x in (1, 1, 2))
    assert first == again != other


def test_command_line(monkeypatch, capsys):
    arguments = ["--size", "tiny", "--prompt", "ab", "--prompt", "c", "--tokens", "5"]
    monkeypatch.setattr(sys, "argv", ["qwen", *arguments, "--drafted", "1"])
    runpy.run_module("examples.qwen", run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^'ab': \[(\d+, ){4}\d+\]$", printed, re.MULTILINE)
    assert "10 tokens in " in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "no model of type 'llama'; known are qwen3_5_text,"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope of type 'yarn'"),
        ({"mlp_only_layers": [1]}, "dense layers among those of experts"),
    ],
    ids=str,
)
def test_configurations_that_are_not_known(changes, message, tmp_path):
    given = {"model_type": "qwen3_next", "num_hidden_layers": 4, **changes}
    (tmp_path / "config.json").write_text(json.dumps(given), "utf-8")
    with pytest.raises(SystemExit, match=message):
        configs.read(tmp_path)


def test_a_directory_that_is_no_model(tmp_path):
    with pytest.raises(SystemExit, match=r"no .*config\.json: is this the directory"):
        configs.read(tmp_path)


def test_a_prompt_that_does_not_fit():
    options = Options(context=16)
    with pytest.raises(SystemExit, match="needs a context of 20; got 16"):
        list(serve(TINY, options, {}, [Request([1, 2], 18)]))
