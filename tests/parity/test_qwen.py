"""The example's models beside transformers': the same weights, the same tokens.

Needs torch and transformers: `pip install --group parity`, which brings 5 GB.
"""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from examples.qwen import config as configs  # noqa: E402
from examples.qwen import model, weights  # noqa: E402
from examples.qwen.generate import Request, serve  # noqa: E402
from examples.qwen.model import Options  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
KINDS = {
    "dense": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {"intermediate_size": 96}),
    "moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", EXPERTS),
    "next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", EXPERTS),
}
LENGTHS = (37, 1, 70)
STEPS = 32


@pytest.fixture(autouse=True)
def a_users_settings():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@ft.cache
def saved(kind, value_heads, directory):
    """A random model of transformers, and where it has written its files."""
    config_name, model_name, more = KINDS[kind]
    config = getattr(transformers, config_name)(
        **SIZES, **more, linear_num_value_heads=value_heads, initializer_range=0.1
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, model_name)(config).eval()
    for name, x in theirs.named_parameters():
        if "norm" in name:  # by default 0 or 1, which hides a missing or another one
            x.data += 0.1 * torch.randn_like(x)
        if "A_log" in name:  # slow decays, so that what was long ago counts
            x.data -= 3
    theirs.save_pretrained(directory)
    return theirs


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return ft.cache(lambda *key: tmp_path_factory.mktemp("-".join(map(str, key))))


FORMS = [("dense", 2), ("dense", 4), ("dense", 6), ("moe", 4), ("moe", 8)]
FORMS += [("next", 2), ("next", 6)]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [list(map(int, rng.integers(0, 97, n))) for n in LENGTHS]


def logits_of_theirs(theirs, prompt, tokens):
    """Logits of a prompt's tokens and of those after it, one by one, as if alone."""
    with torch.no_grad():
        out = theirs(torch.tensor([prompt]), use_cache=True)
        rows, cache = [out.logits[0]], out.cache
        for token in tokens:
            out = theirs(torch.tensor([[token]]), cache=cache, use_cache=True)
            rows.append(out.logits[0])
    return torch.cat(rows).float().numpy()


@ft.cache
def logits_of_saved(*key):
    each = zip(prompts(), tokens_after(), strict=True)
    return [logits_of_theirs(saved(*key), *x) for x in each]


def logits_of_ours(config, options, params, tokens):
    """The same of all rows at once, padded, the tokens of each given."""
    cache = model.new_cache(config, options, params["model"]["embed_tokens"].dtype)
    lengths = np.array(LENGTHS, np.int32)
    padded = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, prompt in zip(padded, prompts(), strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(LENGTHS), dtype=np.int32)
    forward = jax.jit(model.forward, static_argnums=(0, 1))
    x, cache = forward(
        config, options, params, cache, padded, rows, np.zeros_like(lengths), lengths
    )
    cache["lengths"] = jnp.asarray(lengths)
    parts = [[x[n, :length]] for n, length in enumerate(lengths)]
    for step in np.array(tokens, np.int32).T:
        x, cache = forward(
            config, options, params, cache, step[:, None], rows, cache["lengths"]
        )
        cache = model.advance(options, cache, rows, 1, np.ones_like(rows))
        for n in range(len(rows)):
            parts[n].append(x[n])
    return [np.asarray(model.logits_of(params, jnp.concatenate(x))) for x in parts]


def tokens_after() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 97, (len(LENGTHS), STEPS))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("kind", "value_heads"), FORMS)
def test_logits(kind, value_heads, deferred, directories):
    directory = directories(kind, value_heads)
    wanted = logits_of_saved(kind, value_heads, directory)
    config = configs.read(directory)
    params = weights.load(config, directory, dtype=jnp.float32)
    options = Options(places=len(LENGTHS), context=128, deferred=deferred)
    ours = logits_of_ours(config, options, params, tokens_after())
    for row, want in zip(ours, wanted, strict=True):
        # Sums of some hundred terms in another order, a rounding of 6e-8 each, through
        # four layers: 1e-6 of the largest logit, and a few times that at worst.
        assert np.abs(row - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("kind", "value_heads"), [("dense", 4), ("moe", 8), ("next", 6)]
)
def test_bfloat16_is_as_near_to_float32_as_theirs(kind, value_heads, directories):
    """Both round at other places, and a rounding may choose another expert."""
    directory = directories(kind, value_heads)
    saved(kind, value_heads, directory)
    config = configs.read(directory)
    params = weights.load(config, directory, dtype=jnp.bfloat16)
    name = getattr(transformers, KINDS[kind][1])
    theirs = name.from_pretrained(directory, dtype=torch.bfloat16).eval()
    options = Options(places=len(LENGTHS), context=128)
    ours = logits_of_ours(config, options, params, tokens_after())
    each = list(zip(prompts(), tokens_after(), strict=True))
    rows = [logits_of_theirs(theirs, *x) for x in each]
    rounded = theirs.float()  # the same weights, and no other rounding
    right = [logits_of_theirs(rounded, *x) for x in each]

    def error(logits) -> float:
        squares = [(x - y) ** 2 for x, y in zip(logits, right, strict=True)]
        return float(np.sqrt(np.mean(np.concatenate(squares))))

    # A mean over 20,000 logits; but those of one row have their errors in common.
    assert error(ours) < 1.3 * error(rows)


DRAFTS = {"deferred": True, "drafted": 2}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("dense", {}), ("moe", {"deferred": True}), ("next", {}), ("dense", DRAFTS)],
    ids=str,
)
def test_greedy_tokens(kind, options, directories):
    """More requests than places: they join and leave, and none sees another."""
    directory = directories(kind, 4)
    theirs = saved(kind, 4, directory)
    config = configs.read(directory)
    params = weights.load(config, directory, dtype=jnp.float32)
    if options.get("drafted"):  # files of transformers have none; a random one drafts
        config = dataclasses.replace(config, mtp_num_hidden_layers=1)
        params["mtp"] = weights.random(config, dtype=jnp.float32)["mtp"]
    requests = [Request(prompt, 20 + 7 * i) for i, prompt in enumerate(prompts())]
    options = Options(places=2, context=128, **options)
    done = list(serve(config, options, params, requests))
    assert {id(x) for x in done} == {id(x) for x in requests}
    for request in requests:
        want = theirs.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.tokens,
            do_sample=False,
            eos_token_id=None,
        )
        assert request.made == want[0, len(request.prompt) :].tolist()
