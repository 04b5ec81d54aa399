"""`benchmarks replay`, over a driver of host memory and the host's handler."""

import argparse
import ctypes
import dataclasses
import functools as ft
import itertools
import json
import types
from collections import Counter

import numpy as np
import pytest

from benchmarks import cuda_driver, deferred, replay, roofline, workload
from benchmarks.__main__ import main
from jax_gdn import _registration


class Driver:
    """The CUDA driver on host memory; what it does not know it takes for done."""

    stream = ctypes.c_void_p(1)

    def __init__(self):
        self.memory = []

    def __getattr__(self, name):
        return lambda *_: None

    def MemAlloc_v2(self, pointer, size):
        self.memory.append(np.empty(size.value + 64, np.uint8))
        address = self.memory[-1].ctypes.data
        pointer._obj.value = address + -address % 64

    def MemcpyHtoD_v2(self, to, data, size):
        ctypes.memmove(to.value, data, size.value)

    def MemcpyDtoH_v2(self, data, start, size):
        ctypes.memmove(data, start.value, size.value)


class Idle:
    """A handler that does nothing."""

    def call(self, operands, results, attributes):
        return None


class Handler(cuda_driver.StreamClient):
    """The host's, which also remembers whose states it was given."""

    def __init__(self):
        super().__init__(
            _registration.cpu.handlers()[_registration.DECODE_TARGET]["execute"],
            Driver.stream,
        )
        self.states = []

    def call(self, operands, results, attributes):
        self.states.append(operands[3].address)
        assert results[1].address == operands[3].address
        return super().call(operands, results, attributes)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("form", [{}, *replay.FORMS], ids=str)
def test_graphs_hold_calls_over_all_states_in_turn(form, monkeypatch):
    """Each is checked against float64 on the way."""
    config = workload.Config(
        16, T=2, state_dtype="bfloat16", layout="VK", K=64, V=64, **form
    )
    monkeypatch.setattr(replay, "BYTES_A_GRAPH", 3 * 2 * 2 * config.state_bytes)
    monkeypatch.setattr(workload, "COLD_BYTES", 2 * config.state_bytes)
    monkeypatch.setattr(replay, "symbol_of", lambda *_: "some kernel")
    handler, launched = Handler(), []
    passes = types.SimpleNamespace(
        PASSES=["a", "b"], launch=lambda *call: launched.append(call)
    )
    run = replay.Replay(Driver(), handler, passes, config)

    symbol, graph = run.decode(config)
    assert symbol == "some kernel"
    # One call on a state of its own, then three rounds over the two states.
    own = [buffer.address for buffer in run._states]
    assert handler.states[0] not in own
    assert handler.states[1:] == own * 3
    assert graph.calls == 6
    # Every row of a batch is one of eight, over and over.
    inputs = workload.model_inputs(dataclasses.replace(config, B=8))
    state, rest = workload.split_state(inputs)
    for _ in range(3):
        state, _ = workload.decode_step("native", "VK")(state, rest)
    for buffer in run._states:
        np.testing.assert_array_equal(buffer.last(16), np.tile(state, (2, 1, 1, 1)))

    assert [g.calls for g in run.passes().values()] == [6, 6]
    size = config.state_bytes
    expected = [(n, x, size, 2, 1) for n in (0, 1) for x in (own[0], *own * 3)]
    assert launched == expected


def test_wrong_result_is_refused_before_timing(monkeypatch):
    config = workload.Config(2, K=64, V=64)
    monkeypatch.setattr(workload, "COLD_BYTES", 1)
    monkeypatch.setattr(replay, "symbol_of", lambda *_: "some kernel")
    run = replay.Replay(Driver(), Idle(), None, config)
    with pytest.raises(ArithmeticError, match="some kernel: out"):
        run.decode(config)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("layout", "T"), [("KV", 1), ("VK", 4)])
def test_deferred_calls_are_checked_before_timing(layout, T, monkeypatch):
    monkeypatch.setattr(workload, "COLD_BYTES", 1)
    config = workload.Config(8, T=T, K=64, V=64, layout=layout)
    handler = _registration.cpu.handlers()[_registration.DEFERRED_TARGET]["execute"]
    client = cuda_driver.StreamClient(handler, Driver.stream)
    deferred.Calls(Driver(), {"deferred": client}, config).verify()
    with pytest.raises(ArithmeticError, match="out"):
        deferred.Calls(Driver(), {"deferred": Idle()}, config).verify()


@pytest.mark.parametrize("T", [1, 4, 8])
def test_rows_stand_where_a_server_leaves_them(T):
    """In the calls of a whole cycle: as often as they do over many windows."""
    served, count, window = Counter(), T, deferred.WINDOW
    for _ in range(30 * window):
        served[count] += 1
        count = T if count + T > window else count + T
    rows = Counter(deferred.counts_of("whole cycle", window, T).tolist())
    assert rows.keys() == served.keys()
    assert len(set(rows.values())) == 1
    assert max(served.values()) - min(served.values()) <= 1
    for phase, folds in (("no row folds", False), ("all rows fold", True)):
        counts = deferred.counts_of(phase, window, T)
        assert {n + T > window for n in counts.tolist()} == {folds}


@ft.cache
def shapes_of_one(config):
    arrays = config.arrays()
    arrays["out"] = np.zeros_like(arrays.get("output", arrays["v"]))
    return {n: (x.dtype.name, x.shape) for n, x in arrays.items() if n != "output"}


@pytest.mark.cuda_build
def test_every_kernel_is_timed(monkeypatch):
    """By a run without options."""
    groups = []
    monkeypatch.setattr(
        replay, "run", lambda given: groups.extend(replay.groups(given))
    )
    main(["replay"])
    found = set()
    for config in (config for rows in groups for config in rows.values()):
        operands = {}
        shapes = shapes_of_one(dataclasses.replace(config, B=1))
        for number, (name, (dtype, shape)) in enumerate(shapes.items()):
            if name not in workload.WEIGHTS:
                shape = (config.B, *shape[1:])
            operands[name] = types.SimpleNamespace(
                address=(number + 1) << 40, dtype=dtype, shape=shape
            )
        found.add(replay.symbol_of(config, operands))
    assert _registration.cuda is not None
    plain = [row for row in _registration.cuda.kernels() if not row["deferred"]]
    assert found == {row["symbol"] for row in plain}


@pytest.mark.cuda_build
def test_every_deferred_kernel_is_timed():
    """By a run of `deferred` without options."""
    parser = argparse.ArgumentParser()
    deferred.add_options(parser)
    given = parser.parse_args([])
    forms = itertools.product(given.layout, given.state_dtype, given.tokens)
    found = {(layout, state, T == 1) for layout, state, T in forms}
    assert _registration.cuda is not None
    rows = [row for row in _registration.cuda.kernels() if row["deferred"]]
    shipped = {(row["layout"], row["state"], row["single_token"]) for row in rows}
    assert shipped == found


def test_what_is_measured_stays_when_the_run_is_cut_off(monkeypatch, tmp_path):
    measured = []

    def measure(run, rows, seconds):
        measured.append(next(iter(rows.values())))
        if len(measured) == 2:
            raise KeyboardInterrupt
        base = measured[-1]
        return {"B": base.B, "K": base.K, "state_dtype": base.state_dtype, "rows": {}}

    stub = types.SimpleNamespace(
        handlers=lambda: {
            _registration.DECODE_TARGET: {"execute": _registration.cpu.handlers()}
        }
    )
    monkeypatch.setattr(_registration, "cuda", stub)
    monkeypatch.setattr(replay, "StreamClient", lambda *_: None)
    monkeypatch.setattr(replay, "Driver", Driver)
    monkeypatch.setattr(replay, "Replay", lambda *_: types.SimpleNamespace(free=list))
    monkeypatch.setattr(roofline, "native_module", lambda: None)
    monkeypatch.setattr(replay, "measure", measure)
    data = tmp_path / "replay.json"
    with pytest.raises(KeyboardInterrupt):
        main(["replay", "--batch", "8", "1", "--json", str(data)])
    assert [result["B"] for result in json.loads(data.read_text())["results"]] == [8]
