"""JAX's modes for debugging, and what arguments may be."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import Case

ROOT = Path(__file__).parents[1]
EXAMPLES = ("decode_loop", "continuous_batching", "speculative_decoding")
CASE = Case(B=2, H=2, HV=4, K=64, V=32, N=5, reads=(3, -1), writes=(1, 2))

RUN = """
import re, runpy, sys
from pathlib import Path
root, *names = sys.argv[1:]
scope = {}
if "README" in names:
    text = (Path(root) / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
for name in names:
    if name != "README":
        runpy.run_path(f"{root}/examples/{name}.py", run_name="__main__")
print("all ran")
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["X64", "CHECK_LEAKS", "DISABLE_JIT"])
def test_readme_and_examples_run(mode, tmp_path):
    variable = {
        "X64": "JAX_ENABLE_X64",
        "CHECK_LEAKS": "JAX_CHECK_TRACER_LEAKS",
        "DISABLE_JIT": "JAX_DISABLE_JIT",
    }[mode]
    # Without jit nothing is donated, which README's code asserts.
    names = EXAMPLES if mode == "DISABLE_JIT" else ("README", *EXAMPLES)
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(ROOT), *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, variable: "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all ran\n")
    assert "bitwise as alone: True" in result.stdout
    assert "the tokens of one by one: True; bitwise: True" in result.stdout
    assert result.stdout.count("the tokens of one by one: True") == 2


@pytest.fixture
def leaks():
    with jax.checking_leaks():
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("leaks", "host")
def test_no_tracer_leaks():
    """Of the native call, whose derivatives are the reference's."""
    arrays = {n: jnp.asarray(x) for n, x in (CASE.inputs() | CASE.slots).items()}

    def loss(arrays):
        out, state = jax_gdn.decode(**arrays, implementation="native")
        return out.astype(jnp.float32).sum() + state.sum()

    state = arrays["state"]
    jax.jit(loss)(arrays)
    jax.grad(lambda x: loss(arrays | {"state": x}))(state)
    jax.vmap(lambda x: loss(arrays | {"state": x}))(jnp.stack([state, state]))


def as_given(arrays):
    return {n: x if n in CASE.slots else jnp.asarray(x) for n, x in arrays.items()}


class Variable:
    """What holds an array in flax or Keras."""

    def __init__(self, value):
        self._value = value

    def __jax_array__(self):
        return jnp.asarray(self._value)


class OfNumpy(Variable):
    def __jax_array__(self):
        return self._value


@pytest.mark.parametrize("wrap", [np.asarray, Variable, OfNumpy])
@pytest.mark.parametrize("without_jit", [False, True])
def test_arrays_that_are_not_jax_arrays(wrap, without_jit):
    arrays = CASE.inputs() | CASE.slots
    expected = jax_gdn.decode(**{n: jnp.asarray(x) for n, x in arrays.items()})
    given = {n: wrap(x) for n, x in arrays.items()}
    with jax.disable_jit(without_jit):
        results = jax_gdn.decode(**given)
    inside = jax.jit(lambda: jax_gdn.decode(**given))()
    for got in (results, inside):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int16, np.uint8, np.uint32])
def test_whole_numbers_of_numpy_are_slots(dtype, x64):
    arrays = as_given(CASE.inputs() | CASE.slots)
    arrays |= {
        "state_indices": np.array([3, 4]),
        "output_state_indices": np.array([1, 2]),
    }
    expected = jax_gdn.decode(**arrays)
    with jax.enable_x64(x64):
        given = {
            n: x.astype(dtype) if n in CASE.slots else x for n, x in arrays.items()
        }
        wrapped = {n: OfNumpy(x) if n in CASE.slots else x for n, x in given.items()}
        for results in (jax_gdn.decode(**given), jax_gdn.decode(**wrapped)):
            for x, y in zip(results, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_wide_slots_of_jax_say_how_to_cast():
    arrays = as_given(CASE.inputs() | CASE.slots)
    with jax.enable_x64(True):
        arrays["state_indices"] = jnp.array([3, -1], jnp.int64)
        message = (
            r"`state_indices` must be int32; got int64. "
            r"Cast it: state_indices.astype\(jnp.int32\)."
        )
        with pytest.raises(TypeError, match=message):
            jax_gdn.decode(**arrays)
        arrays["state_indices"] = np.array([3, -1])
        arrays["state"] = jnp.zeros(arrays["state"].shape)
        message = (
            r"`state` must be .* got float64. Cast it: state.astype\(jnp.float32\)."
        )
        with pytest.raises(TypeError, match=message):
            jax_gdn.decode(**arrays)


def test_a_list_of_slots_says_how_to_pass_it():
    arrays = as_given(CASE.inputs() | CASE.slots)
    arrays["state_indices"] = [3, -1]
    message = (
        r"`state_indices` must be an array \[B\]; got list. "
        r"Pass np.array\(state_indices\)."
    )
    with pytest.raises(TypeError, match=message):
        jax_gdn.decode(**arrays)
