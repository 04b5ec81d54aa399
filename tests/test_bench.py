"""`jax-gdn bench`: what it writes, its statistics, and what it refuses to time."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from cases import Case

from jax_gdn import _bench, _bench_machine, _bench_report, _bench_run
from jax_gdn.cli import main

TINY = ["bench", "--batch", "1", "2", "--shape", "2/8", "--tokens", "2"]
TINY += ["--layout", "VK", "--seconds", "0.02"]


def test_writes_json_picture_and_table(tmp_path, capsys):
    data, picture, readme = (tmp_path / n for n in ("b.json", "b.png", "README.md"))
    readme.write_text("before\n<!-- bench -->\nstale text\n<!-- /bench -->\nafter\n")
    files = ["--json", str(data), "--plot", str(picture), "--readme", str(readme)]
    assert main([*TINY, *files]) == 0

    printed = capsys.readouterr().out
    stepped = 2 if _bench.on_gpu() else 0  # a line a result, under command buffers
    assert printed.count("float32 VK") == 2 + stepped
    assert "(at most 1.3)" in printed
    assert "(at most 100)" in printed

    report = json.loads(data.read_text())
    assert {"device", "cpu", "jax", "commit"} <= report["machine"].keys()
    assert [r["B"] for r in report["results"]] == [1, 2]
    for result in report["results"]:
        assert result["state_bytes"] == result["B"] * 8 * 128 * 128 * 4
        names = {"native", "XLA donated", "XLA not donated", "limit"}
        assert names <= result["timings"].keys()
        times = {n: t["median_us"] for n, t in result["timings"].items()}
        better = min(times["XLA donated"], times["XLA not donated"])
        assert times[result["xla"]] == better
        assert result["times_faster"] == pytest.approx(better / times["native"])
        assert result["of_limit"] == pytest.approx(times["limit"] / times["native"])
        rate = 2 * result["state_bytes"] / times["native"] / 1e3
        assert result["GB/s"] == pytest.approx(rate)
        for timing in result["timings"].values():
            low, high = timing["quartiles_us"]
            assert low <= timing["median_us"] <= high

    assert picture.read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench -->\n")
    assert text.endswith("\n<!-- /bench -->\nafter\n")
    assert "stale text" not in text
    assert text.count("| 2/8 |") == 2


def test_what_is_measured_stays_when_the_run_is_cut_off(monkeypatch, tmp_path):
    def measure_config(config, *_):
        if config.B == 2:
            raise KeyboardInterrupt
        return {"B": config.B}

    monkeypatch.setattr(_bench_run, "measure_config", measure_config)
    monkeypatch.setattr(_bench_run, "_overhead", lambda *_: {})
    data = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        main([*TINY, "--json", str(data)])
    assert [result["B"] for result in json.loads(data.read_text())["results"]] == [1]


class FakeChain:
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
    slow = FakeChain([9, 9, 9, 3, 9, 1, 9, 2, 9, 5, 9, 4], calls=2)
    # Ten steps fill a round of one second.
    fast = FakeChain([0.1])
    timings = _bench.measure(
        {"slow": slow, "fast": fast},
        seconds=10,
        rounds=5,
        clock=lambda: slow.now + fast.now,
        queued=False,
    )
    assert timings["slow"] == _bench.Timing(1.5, 1.0, 2.0, rounds=5, calls=2)
    assert timings["fast"].median == pytest.approx(0.1)
    assert timings["fast"].calls == 10


class Queued(FakeChain):
    """Steps whose end is noticed late, and later every time."""

    late = 1.0

    def wait(self):
        self.now += self.late
        self.late *= 1.001


@pytest.mark.parametrize("default", [False, True])
def test_what_does_not_grow_with_the_steps_is_no_part_of_a_queued_step(
    default, monkeypatch
):
    chain = Queued([0.5], calls=4)
    if default:
        monkeypatch.setattr(_bench, "on_gpu", lambda: True)
    # Rounds of 12 seconds, an even number, so that half have many steps first.
    timings = _bench.measure(
        {"chain": chain},
        seconds=48,
        rounds=4,
        clock=lambda: chain.now,
        queued=None if default else True,
    )
    assert timings["chain"].median == pytest.approx(0.125, rel=1e-5)
    assert timings["chain"].calls == 24 * 4


@pytest.mark.parametrize(("queued", "steps"), [(True, 30), (False, 1)])
def test_queued_rounds_are_long_enough(queued, steps):
    chain = FakeChain([0.001])
    timings = _bench.measure(
        {"chain": chain}, seconds=1e-3, clock=lambda: chain.now, queued=queued
    )
    assert timings["chain"].calls == pytest.approx(steps, rel=0.1)


@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_float64_is_that_of_the_tests(layout):
    inputs = Case(B=3, T=3, H=2, HV=6, K=64, V=32, layout=layout).inputs()
    out, state = _bench.decode64(inputs, [0, 2], layout)
    expected_out, expected = oracle.decode64(**inputs, state_layout=layout)
    np.testing.assert_allclose(out, expected_out[[0, 2]], rtol=0, atol=1e-12)
    np.testing.assert_allclose(state, expected[[0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong", ["out", "state", "nan"])
def test_wrong_output_is_refused_before_timing(wrong, monkeypatch):
    right = _bench.decode_step

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

    monkeypatch.setattr(_bench, "decode_step", broken)
    monkeypatch.setattr(_bench, "measure", untimed)
    what = "out" if wrong == "out" else "state"
    with pytest.raises(ArithmeticError, match=f"XLA form: `{what}` is"):
        _bench_run.measure_config(_bench.Config(B=2, H=2, HV=8), seconds=0.01)


@pytest.mark.parametrize("module", ["rich", "matplotlib"])
def test_missing_extra_is_named(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--plot", str(tmp_path / "b.png")])
    assert f"needs {module}" in str(stop.value)
    assert "jax-gdn[bench]" in str(stop.value)


def test_readme_without_markers_is_refused_before_timing(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- /bench --> <!-- bench -->")
    with pytest.raises(SystemExit, match="must have one <!-- bench -->"):
        main([*TINY, "--readme", str(readme)])


@pytest.mark.parametrize(
    "option",
    [
        ["--json", "nowhere/b.json"],
        ["--json", "."],
        ["--readme", "nowhere.md"],
        ["--plot", "picture.jpg"],
    ],
    ids=" ".join,
)
def test_files_that_cannot_be_written_are_refused_before_timing(option, monkeypatch):
    monkeypatch.setattr(_bench, "measure", None)
    with pytest.raises(SystemExit, match=rf"jax-gdn bench: {option[0]}: "):
        main([*TINY, *option])


def test_nothing_that_fits_is_no_report(monkeypatch):
    monkeypatch.setattr(_bench_machine, "free_bytes", lambda: 1)
    with pytest.raises(SystemExit, match=r"nothing to time; 2/8 heads.*skipped: needs"):
        main(TINY)


@pytest.mark.parametrize(
    ("B", "dtype", "sets"),
    [(1, "bfloat16", 128), (8, "float32", 32), (512, "float32", 2)],
)
def test_how_many_states_take_turns(B, dtype, sets, monkeypatch):
    """512 MiB, up to 128 states a loop; two where those are more."""
    monkeypatch.setattr(_bench, "on_gpu", lambda: True)
    config = _bench.Config(B, state_dtype=dtype)
    assert _bench_run.sets(config, warm=False) == sets
    assert _bench_run.sets(config, warm=True) == 1
    assert _bench_run.cold_sets(config) == (512 if B == 1 else sets)


def test_memory_decides_what_is_timed():
    small, large = _bench.Config(B=1), _bench.Config(B=512)
    fitting, skipped = _bench_run._fitting([small, large], True, small.state_bytes * 99)
    assert fitting == [small]
    assert "B 512 skipped: needs 14.0 GiB, 0.2 GiB are free" in skipped[0]


@pytest.mark.parametrize("donate", [True, False])
def test_device_chain_links_its_calls(donate, monkeypatch):
    """What a GPU times, one program over several states, is a loop over them."""
    monkeypatch.setattr(_bench, "CALLS_IN_A_ROW", 4)
    config = _bench.Config(B=1, H=1, HV=2, K=64, V=16)
    monkeypatch.setattr(_bench, "BYTES_A_PROGRAM", 4 * 2 * config.state_bytes)
    pairs = [_bench.split_state(_bench.model_inputs(config, seed)) for seed in (0, 1)]
    states, rests = [s for s, _ in pairs], [rest for _, rest in pairs]
    step = _bench.decode_step("native")
    chain = _bench.DeviceChain(step, states, rests, donate)
    assert chain.calls == (4 if donate else 2)
    chain.run(3)
    out = rests[0]["v"]
    for i in range(3 * chain.calls):
        rest = rests[i % 2] | {"v": out}
        states[i % 2], out = jax.jit(step)(states[i % 2], rest)
    for ours, theirs in zip(chain._states, states, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(chain._out, out)


@pytest.fixture
def script(request):
    """A program of `benchmarks/`, as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(request.param, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.mark.parametrize("script", ["compare"], indirect=True)
def test_compare_times_what_is_right_and_names_the_rest(script, monkeypatch):
    class Wrong(script.Own):
        def __init__(self, inputs, repeats=1):
            super().__init__(inputs, repeats)
            right = self.once
            self.once = lambda: (right()[0], right()[1] * (1 + 1e-3))

    def missing(inputs, repeats=1):
        raise ImportError("nowhere")

    monkeypatch.setattr(script, "ON_GPU", False)
    monkeypatch.setattr(script.peers_cpu, "PEERS", {"wrong": Wrong, "missing": missing})
    table = script.compare(1, 0.02, warm=False, skip=["XLA"], errors={})
    rows = {row["peer"]: row for row in table}
    timed = {name for name, row in rows.items() if "median" in row}
    native = {"jax_gdn native", "jax_gdn native, V-major"}
    assert timed == native | {"in-place pass, float32"}
    assert rows["missing"]["note"] == "not installed (nowhere)"
    assert rows["wrong"]["note"].startswith("failed: wrong: {'out'")


@pytest.mark.parametrize("script", ["compare"], indirect=True)
def test_compare_says_what_it_was_asked_but_not_where_the_file_lies(
    script, monkeypatch, tmp_path
):
    path = tmp_path / "compare.json"
    asked = ["compare.py", "--batch", "2", "--skip", "XLA", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.setattr(script, "compare", lambda *_, **__: [])
    script.main()
    text = path.read_text()
    assert json.loads(text)["arguments"]["batch"] == [2]
    assert json.loads(text)["arguments"]["skip"] == ["XLA"]
    assert str(tmp_path) not in text


@pytest.mark.parametrize("script", ["picture"], indirect=True)
def test_picture_shows_each_implementation_beside_its_own_pass(script, tmp_path):
    def row(peer, B, **what):
        return {"peer": peer, "B": B, **what}

    rows = [
        row("in-place pass, float32", 8, median=9.0),
        row("in-place pass, bfloat16", 8, median=4.0),
        row("jax_gdn native", 8, median=10.0),
        row("jax_gdn native, V-major, bfloat16", 8, median=5.0),
        row("FlashInfer, bfloat16 state", 8, median=8.0),
        row("jax_gdn XLA form, donated", 8, median=90.0),
        row("lalamo (Pallas)", 8, note="not installed"),
        row("jax_gdn native", 16, median=20.0),  # the run ended before its pass
    ]
    float32 = {"decode, KV": {8: 90}, "XLA form, donated": {8: 10}}
    assert script.lines(rows, "float32") == float32
    bfloat16 = {"decode, VK": {8: 80}, "FlashInfer": {8: 50}}
    assert script.lines(rows, "bfloat16") == bfloat16

    picture = tmp_path / "p.png"
    script.draw({"rows": rows, "machine": {"device": "x", "jax": "y"}}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", ["layers"], indirect=True)
def test_layers_keep_their_states(script, monkeypatch):
    monkeypatch.setattr(_bench, "BYTES_A_PROGRAM", 1)
    rows = script.measure(layers=2, B=1, seconds=0.02)["rows"]
    assert rows.pop("kernel alone")["host_share"] == 0
    assert len(rows) == 9
    assert all(row["buffers_stayed"] for row in rows.values())


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "bench-cpu.json"


def test_a_row_of_the_table_is_a_line():
    """At 120 columns, which a terminal may have."""
    from rich.console import Console

    report = json.loads(RESULTS.read_text())
    console = Console(width=120, file=io.StringIO())
    _bench_report.print_table(report, console)
    lines = console.file.getvalue().splitlines()
    for result in report["results"]:
        cells = " ".join(_bench_report.cells(result))
        assert sum(" ".join(line.split()) == cells for line in lines) == 1, cells


def test_one_batch_size_is_seen_in_the_picture():
    """A line through one point is none: every curve has a marker."""
    from matplotlib.figure import Figure

    report = json.loads(RESULTS.read_text())
    times, shares = Figure().subplots(1, 2)
    _bench_report._draw(times, shares, report["results"][:1])
    assert len(times.lines) == 5  # three curves, and two entries of the legend
    assert all(line.get_marker() not in (None, "None", "") for line in times.lines)
