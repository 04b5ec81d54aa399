"""The benchmarks of whole programs: they compute what they say they time."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import costs, layers, loops, model, scaling, workload
from benchmarks.__main__ import main
from examples.qwen import config, weights
from tests.hlo import TARGET


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("gate_dtype", ["bfloat16", "float32"])
def test_device_loop_links_its_calls(donate, gate_dtype, monkeypatch):
    """What a GPU times, one program over several states, is a loop over them."""
    monkeypatch.setattr(loops, "CALLS_IN_A_ROW", 4)
    config = workload.Config(B=1, H=1, HV=2, K=64, V=16, gate_dtype=gate_dtype)
    monkeypatch.setattr(loops, "BYTES_A_PROGRAM", 4 * 2 * config.state_bytes)
    pairs = [
        workload.split_state(workload.model_inputs(config, seed)) for seed in (0, 1)
    ]
    states, rests = [s for s, _ in pairs], [rest for _, rest in pairs]
    step = workload.decode_step("native")
    loop = loops.DeviceLoop(step, states, rests, donate)
    assert loop.calls == (4 if donate else 2)
    loop.run(3)
    link = "v" if gate_dtype == "bfloat16" else "output"
    out = rests[0][link]
    for i in range(3 * loop.calls):
        rest = rests[i % 2] | {link: out}
        states[i % 2], out = jax.jit(step)(states[i % 2], rest)
    for ours, theirs in zip(loop._states, states, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(loop._out, out)


def test_layers_keep_their_states(monkeypatch):
    monkeypatch.setattr(loops, "BYTES_A_PROGRAM", 1)
    rows = layers.measure(layers=2, B=1, seconds=0.02)["rows"]
    del rows["kernel alone"]
    assert len(rows) == 17
    assert all(row["buffers_stayed"] for row in rows.values())


def test_scaling_counts_what_a_mesh_costs():
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    rows = scaling.measure(layers=2, B=1, numbers=[2], seconds=0.02)["rows"]
    assert list(rows)[::2] == ["one device", "2 devices, rows", "2 devices, heads"]
    for row in rows.values():
        assert row["collectives"] == row["copies"] == 0
        assert row["buffers_stayed"]


def test_replaying_the_accepted_tokens_is_the_snapshot_after_them():
    """The ways that `costs speculation` times leave the same state."""
    B, T = 2, 4
    state, rest = workload.split_state(
        workload.model_inputs(workload.Config(B=B, T=T, H=1, HV=2, K=64, V=64))
    )
    rows = np.arange(B, dtype=np.int32)
    pool = jnp.concatenate([state, jnp.zeros((B * T, *state.shape[1:]))])
    _, taken = jax.jit(costs.snapshots)(pool, rest, rows)
    _, replayed = jax.jit(costs.verify_and_replay)(state, rest, rows)
    accepted = T // 2
    after = taken[B:].reshape(B, T, *state.shape[1:])
    np.testing.assert_array_equal(replayed, after[:, accepted - 1])
    _, whole = jax.jit(costs.one_state)(state, rest, rows)
    np.testing.assert_array_equal(whole, after[:, -1])


@pytest.mark.slow
def test_checkpoint_around_four_steps_saves_memory():
    rows = costs.gradients(argparse.Namespace())
    states = [row["states"] for row in rows]
    one_call, scan, each, four = states
    assert four < 0.8 * scan < 0.5 * one_call
    assert each > 0.9 * scan


@pytest.mark.slow
def test_model_counts_kept_tokens_and_leaves_out_its_parts(tmp_path):
    """Speculation keeps what the stated acceptance says, and no part is there twice."""
    file = tmp_path / "model.json"
    given = ["--batch", "2", "--context", "64", "--ways", "native", "deferred"]
    given += ["--drafted", "2", "--acceptance", "0", "1"]
    given += ["--prompts", "1x64", "--seconds", "0.01", "--rounds", "2"]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        main(["model", *given, "--json", str(file)])
        tiny = config.SIZES["tiny"]
        timed = model.Model(tiny, weights.random(tiny), 64)
        without = {
            name: timed.loop(parts, places=1).lowered.as_text().count(TARGET)
            for name, parts in {"nothing": [], **model.PARTS}.items()
        }
    steps, prompts = json.loads(file.read_text("utf-8"))["results"]
    tokens = {name: row["tokens_a_step"] for name, row in steps["rows"].items()}
    assert tokens.pop("2 drafts, 100% accepted") == 6
    assert set(tokens.values()) == {2}
    assert set(prompts["rows"]) == {"prompts", "without the gated delta rule"}
    assert all(row["ms"] > 0 for row in (steps["rows"] | prompts["rows"]).values())
    without_calls = {n for n, calls in without.items() if calls == 0}
    assert without_calls == {"the gated delta rule", "GDN layers"}
