"""The benchmarks: what they write, their statistics, and what they refuse to time."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
    bench,
    bench_report,
    compare,
    machine,
    picture,
    roofline,
    timing,
    workload,
)
from benchmarks.__main__ import main
from tests.cases import Case

TINY = ["bench", "--batch", "1", "2", "--shape", "2/8", "--tokens", "2"]
TINY += ["--layout", "VK", "--seconds", "0.02"]
ROOT = Path(__file__).parents[1]


def test_writes_table_json_and_picture(tmp_path, capsys):
    data, plot = tmp_path / "b.json", tmp_path / "b.png"
    main([*TINY, "--json", str(data), "--plot", str(plot)])

    printed = capsys.readouterr().out
    stepped = 2 if workload.on_gpu() else 0  # a line a result, under command buffers
    assert printed.count("float32 VK") == 2 + stepped
    assert printed.count("| 2/8 |") == 2
    assert "(at most 1.3)" in printed
    assert "(at most 100)" in printed

    report = json.loads(data.read_text())
    assert {"device", "cpu", "jax", "commit"} <= report["machine"].keys()
    assert [r["B"] for r in report["results"]] == [1, 2]
    for result in report["results"]:
        assert result["state_bytes"] == result["B"] * 8 * 128 * 128 * 4
        names = {"native", "reference, donated", "reference, not donated", "roofline"}
        assert names <= result["timings"].keys()
        times = {n: t["median_us"] for n, t in result["timings"].items()}
        better = min(times["reference, donated"], times["reference, not donated"])
        assert times[result["best_reference"]] == better
        assert result["times_faster"] == pytest.approx(better / times["native"])
        assert result["of_roofline"] == pytest.approx(
            times["roofline"] / times["native"]
        )
        rate = 2 * result["state_bytes"] / times["native"] / 1e3
        assert result["GB/s"] == pytest.approx(rate)
        for times in result["timings"].values():
            low, high = times["quartiles_us"]
            assert low <= times["median_us"] <= high
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_stays_when_the_run_is_cut_off(monkeypatch, tmp_path):
    def measure_config(config, *_):
        if config.B == 2:
            raise KeyboardInterrupt
        return {"B": config.B}

    monkeypatch.setattr(bench, "measure_config", measure_config)
    monkeypatch.setattr(bench, "_overhead", lambda *_: {})
    monkeypatch.setattr(bench_report, "line", str)
    data = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--json", str(data)])
    assert [result["B"] for result in json.loads(data.read_text())["results"]] == [1]


class FakeLoop:
    """Steps that take the times given, in turn, on a clock of its own."""

    def __init__(self, times, calls=1):
        self.times, self.calls, self.now, self.taken = times, calls, 0.0, 0

    def run(self, steps):
        for _ in range(steps):
            self.now += self.times[self.taken % len(self.times)]
            self.taken += 1

    def wait(self):
        pass


def test_statistics():
    # Two uncounted steps, then in a round one more and one that counts: 3, 1, 2, 5, 4
    # seconds for two calls.
    slow = FakeLoop([9, 9, 9, 3, 9, 1, 9, 2, 9, 5, 9, 4], calls=2)
    # Ten steps fill a round of one second.
    fast = FakeLoop([0.1])
    timings = timing.measure(
        {"slow": slow, "fast": fast},
        seconds=10,
        rounds=5,
        clock=lambda: slow.now + fast.now,
        queued=False,
    )
    assert timings["slow"] == timing.Timing(1.5, 1.0, 2.0, rounds=5, calls=2)
    assert timings["fast"].median == pytest.approx(0.1)
    assert timings["fast"].calls == 10


class Queued(FakeLoop):
    """Steps whose end is noticed late, and later every time."""

    late = 1.0

    def wait(self):
        self.now += self.late
        self.late *= 1.001


@pytest.mark.parametrize("default", [False, True])
def test_what_does_not_grow_with_the_steps_is_no_part_of_a_queued_step(
    default, monkeypatch
):
    loop = Queued([0.5], calls=4)
    if default:
        monkeypatch.setattr(timing, "on_gpu", lambda: True)
    # Rounds of 12 seconds, an even number, so that half have many steps first.
    timings = timing.measure(
        {"loop": loop},
        seconds=48,
        rounds=4,
        clock=lambda: loop.now,
        queued=None if default else True,
    )
    assert timings["loop"].median == pytest.approx(0.125, rel=1e-5)
    assert timings["loop"].calls == 24 * 4


@pytest.mark.parametrize(("queued", "steps"), [(True, 30), (False, 1)])
def test_queued_rounds_are_long_enough(queued, steps):
    loop = FakeLoop([0.001])
    timings = timing.measure(
        {"loop": loop}, seconds=1e-3, clock=lambda: loop.now, queued=queued
    )
    assert timings["loop"].calls == pytest.approx(steps, rel=0.1)


@pytest.mark.parametrize(
    ("form", "operands"),
    [
        ({}, {}),
        ({"per_channel": True}, {"a": (2, 3, 4, 64), "dt_bias": (4, 64)}),
        ({"gate_dtype": "float32"}, {"output": (2, 3, 4, 32)}),
    ],
)
def test_inputs_are_what_decode_takes(form, operands):
    config = workload.Config(B=2, T=3, H=2, HV=4, K=64, V=32, layout="VK", **form)
    inputs = workload.model_inputs(config)
    for name, shape in operands.items():
        assert inputs[name].shape == shape
    for name in ("a", "b"):
        assert inputs[name].dtype == config.gate_dtype
    step = workload.decode_step("native", "VK")
    state, out = step(*workload.split_state(inputs))
    assert out.dtype == config.gate_dtype
    workload.verify("native", inputs, out, state, "VK")


@pytest.mark.parametrize("wrong", ["out", "state", "nan"])
def test_wrong_output_is_refused_before_timing(wrong, monkeypatch):
    right = workload.decode_step

    def broken(implementation, layout):
        step = right(implementation, layout)

        def call(state, rest):
            state, out = step(state, rest)
            if wrong == "out":
                return state, out.at[-1, 0, -1, 0].add(0.1)
            value = np.nan if wrong == "nan" else 1e-3
            return state.at[-1, -1, -1, -1].add(value), out

        return call if implementation == "xla" else step

    def untimed(*_, **__):
        raise AssertionError("timed a wrong result")

    monkeypatch.setattr(workload, "decode_step", broken)
    monkeypatch.setattr(timing, "measure", untimed)
    what = "out" if wrong == "out" else "state"
    with pytest.raises(ArithmeticError, match=rf"reference: {what}\[1, .*not timed"):
        bench.measure_config(workload.Config(B=2, H=2, HV=8), seconds=0.01)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (["--json", "nowhere/b.json"], "cannot write"),
        (["--json", "."], "cannot write"),
        (["--plot", "nowhere/b.png"], "cannot write"),
        (["--plot", "picture.jpg"], "must end in .png"),
        (["--plot", "b.png"], "needs matplotlib"),
        (["--seconds", "0"], "must be positive"),
        (["--tokens", "0"], "must be a whole number"),
    ],
)
def test_what_would_fail_later_is_refused_before_timing(
    option, why, monkeypatch, capsys
):
    if why == "needs matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([*TINY, *option])
    assert f"argument {option[0]}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "compare", "replay"])
def test_missing_roofline_is_named_before_timing(command, monkeypatch):
    monkeypatch.setattr(workload, "on_gpu", lambda: True)
    monkeypatch.setattr(compare, "on_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "jax_gdn._bench_cuda", None)
    with pytest.raises(ImportError, match="JAX_GDN_BENCH=ON"):
        main([command])


def test_nothing_that_fits_is_no_report(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 1)
    with pytest.raises(SystemExit, match=r"nothing to time; 2/8 heads.*skipped: needs"):
        main(TINY)


@pytest.mark.parametrize(
    ("B", "dtype", "sets"),
    [(1, "bfloat16", 128), (8, "float32", 32), (512, "float32", 2)],
)
def test_how_many_states_take_turns(B, dtype, sets, monkeypatch):
    """512 MiB, up to 128 states a loop; two where those are more."""
    monkeypatch.setattr(workload, "on_gpu", lambda: True)
    config = workload.Config(B, state_dtype=dtype)
    assert bench.sets(config, warm=False) == sets
    assert bench.sets(config, warm=True) == 1
    assert config.cold_sets == (512 if B == 1 else sets)


def test_memory_decides_what_is_timed():
    small, large = workload.Config(B=1), workload.Config(B=512)
    fitting, skipped = bench._fitting([small, large], True, small.state_bytes * 99)
    assert fitting == [small]
    assert "B 512 skipped: needs 14.0 GiB, 0.2 GiB are free" in skipped[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pass_changes_every_sign(dtype):
    state = Case(state=dtype, K=64, V=16).inputs()["state"]
    changed, _ = jax.jit(roofline.jnp_pass)(state, {})
    np.testing.assert_array_equal(changed, -state)


def test_compare_times_what_is_right_and_names_the_rest(monkeypatch):
    class Wrong(compare.Own):
        def __init__(self, inputs, repeats=1):
            super().__init__(inputs, repeats)
            right = self.once
            self.once = lambda: (right()[0], right()[1] * (1 + 1e-3))

    def missing(inputs, repeats=1):
        raise ImportError("nowhere")

    for module in (compare, roofline, timing, workload):
        monkeypatch.setattr(module, "on_gpu", lambda: False)
    peers = {"wrong": Wrong, "missing": missing}
    monkeypatch.setattr(compare.peers_cpu, "PEERS", peers)
    table = compare.compare(1, 0.02, warm=False, skip=["reference"], errors={})
    rows = {row["peer"]: row for row in table}
    timed = {name for name, row in rows.items() if "median" in row}
    native = {"jax_gdn native", "jax_gdn native, V-major"}
    assert timed == native | {"in-place pass, float32"}
    assert rows["missing"]["note"] == "not installed (nowhere)"
    assert rows["wrong"]["note"].startswith("failed: wrong: {'out'")


def test_compare_says_what_it_was_asked_but_not_where_the_file_lies(
    monkeypatch, tmp_path
):
    path = tmp_path / "compare.json"
    monkeypatch.setattr(compare, "compare", lambda *_, **__: [])
    monkeypatch.setattr(compare, "on_gpu", lambda: False)
    main(["compare", "--batch", "2", "--skip", "reference", "--json", str(path)])
    text = path.read_text()
    assert json.loads(text)["arguments"]["batch"] == [2]
    assert json.loads(text)["arguments"]["skip"] == ["reference"]
    assert str(tmp_path) not in text


def test_picture_shows_each_implementation_beside_its_own_pass(tmp_path):
    def row(peer, B, **what):
        return {"peer": peer, "B": B, **what}

    rows = [
        row("in-place pass, float32", 8, median=9.0),
        row("in-place pass, bfloat16", 8, median=4.0),
        row("jax_gdn native", 8, median=10.0),
        row("jax_gdn native, V-major, bfloat16", 8, median=5.0),
        row("FlashInfer, bfloat16 state", 8, median=8.0),
        row("jax_gdn reference, donated", 8, median=90.0),
        row("lalamo (Pallas)", 8, note="not installed"),
        row("jax_gdn native", 16, median=20.0),  # the run ended before its pass
    ]
    float32 = {"decode, KV": {8: 90}, "reference, donated": {8: 10}}
    assert picture.lines(rows, "float32") == float32
    bfloat16 = {"decode, VK": {8: 80}, "FlashInfer": {8: 50}}
    assert picture.lines(rows, "bfloat16") == bfloat16

    path = tmp_path / "p.png"
    picture.draw({"rows": rows, "machine": {"device": "x", "jax": "y"}}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_one_batch_size_is_seen_in_the_picture():
    """A line through one point is none: every curve has a marker."""
    from matplotlib.figure import Figure

    report = json.loads((ROOT / "benchmarks/results/host/bench.json").read_text())
    times, shares = Figure().subplots(1, 2)
    bench_report._draw(times, shares, report["results"][:1])
    assert len(times.lines) == 5  # three curves, and two entries of the legend
    assert all(line.get_marker() not in (None, "None", "") for line in times.lines)
