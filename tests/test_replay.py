"""`benchmarks/replay.py` over a driver that keeps memory and launches nothing."""

import ctypes
import importlib
import json
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ptx import module

from jax_gdn import _bench

pytestmark = pytest.mark.skipif(bool(module.why_missing()), reason="no CUDA module")


class Driver:
    """The CUDA driver on host memory; what it does not know it takes for done."""

    stream = ctypes.c_void_p(1)

    def __init__(self):
        self.memory, self.launched = [], []

    def __getattr__(self, name):
        return lambda *_: None

    def MemAlloc_v2(self, pointer, size):
        self.memory.append(ctypes.create_string_buffer(size.value))
        pointer._obj.value = ctypes.addressof(self.memory[-1])

    def MemcpyHtoD_v2(self, to, data, size):
        ctypes.memmove(to.value, data, size.value)

    def MemcpyDtoH_v2(self, data, start, size):
        ctypes.memmove(data, start.value, size.value)

    def LaunchKernel(self, function, x, y, z, threads, *rest):
        state = ctypes.cast(rest[4][0], ctypes.POINTER(ctypes.c_uint64))[0]
        self.launched.append((function.value, (x, y, z), threads, state))


@pytest.fixture
def replay(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return importlib.import_module("replay")


@pytest.mark.cuda_build
def test_graphs_hold_calls_over_all_states_in_turn(replay, monkeypatch):
    from jax_gdn import _cuda

    symbols = [
        *_cuda.kernel_symbols(),
        "FlipSignsILi128ELi2ELNS_7CachingE2ELb1EEEvP5uint4j",
    ]
    numbered = {s: ctypes.c_void_p(i + 1) for i, s in enumerate(symbols)}
    functions = types.SimpleNamespace(by_symbol=numbered)
    monkeypatch.setattr(replay, "BYTES_A_GRAPH", 3 * 2 * 2 * 16 * 2**20)
    monkeypatch.setattr(replay._bench_run, "COLD_BYTES", 2**25)
    checked = []
    monkeypatch.setattr(_bench, "verify", lambda *given: checked.append(given))
    driver = Driver()
    run = replay.Replay(driver, functions, 16, "bfloat16")

    symbol, graph = run.decode("VK", 2)
    (name, inputs, out, state, layout), *more = checked
    assert (name, layout, more) == (symbol, "VK", [])
    # What was never launched has the state as it was, and no output.
    np.testing.assert_array_equal(state, inputs["state"])
    assert state.dtype == ml_dtypes.bfloat16
    assert out.shape == (8, 2, 32, 128)
    assert not out.any()
    # One call on a state of its own, then three rounds over the two states.
    states = [launch[3] for launch in driver.launched]
    own = [buffer.address for buffer in run._states]
    assert states[0] not in own
    assert states[1:] == own * 3
    assert graph.calls == 6
    plans = {launch[:3] for launch in driver.launched}
    assert plans == {(numbered[symbol].value, (128 // 64, 32, 16), 128)}

    driver.launched.clear()
    (name,) = run.passes()
    assert name == "pass 128 x 2, loads around, stores streaming"
    assert [launch[3] for launch in driver.launched] == own * 3
    accesses = 16 * 32 * 128 * 128 * 2 // 16
    assert driver.launched[0][1] == (accesses // 256, 1, 1)


def test_what_is_measured_stays_when_the_run_is_cut_off(replay, monkeypatch, tmp_path):
    measured = []

    def measure(cuda, functions, B, dtype, options):
        measured.append(B)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return {"B": B, "rows": {}}

    for name in ("Cuda", "Functions"):
        monkeypatch.setattr(replay, name, lambda *_: None)
    monkeypatch.setattr(replay, "measure", measure)
    data = tmp_path / "replay.json"
    monkeypatch.setattr(
        sys, "argv", ["replay.py", "--batch", "8", "1", "--json", str(data)]
    )
    with pytest.raises(KeyboardInterrupt):
        replay.main()
    assert [result["B"] for result in json.loads(data.read_text())["results"]] == [8]
