"""Importing jax_gdn: what it must not do, and what it must refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jax_gdn

ROOT = Path(__file__).parents[1]


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_initialises_no_backend(tmp_path):
    # A platform that does not exist fails as soon as anyone asks for a device.
    broken = {"JAX_PLATFORMS": "nonesuch"}
    assert run("import jax_gdn", tmp_path, **broken).returncode == 0
    assert "nonesuch" in run("import jax; jax.devices()", tmp_path, **broken).stderr


# Handlers of an FFI version that no jaxlib speaks, before the package sees them.
NEWER = """
import importlib, importlib.util, sys, types
spec = importlib.util.find_spec("jax_gdn")
package = types.ModuleType("jax_gdn")
package.__path__ = list(spec.submodule_search_locations)
sys.modules["jax_gdn"] = package
native = importlib.import_module("jax_gdn.{module}")
native.FFI_API_VERSION = (0, 99)
del sys.modules["jax_gdn"]
"""
MODULES = pytest.mark.parametrize(
    "module", ["_cpu", pytest.param("_cuda", marks=pytest.mark.cuda_build)]
)


@MODULES
def test_newer_handlers_are_held_back(module, tmp_path):
    """A clear ImportError where they are wanted, and a JAX that still works."""
    code = (
        NEWER.format(module=module)
        + """
import jax, jax.numpy as jnp, jax_gdn
B, H, K = 1, 1, 16
x, gate = jnp.zeros((B, 1, H, K)), jnp.zeros((B, 1, H))
given = (x, x, x, jnp.zeros((B, H, K, K)), jnp.zeros(H), gate, jnp.zeros(H), gate)
jax_gdn.decode(*given, implementation="xla")
try:
    jax_gdn.decode(*given)
except ImportError as error:
    print(error)
print(jnp.ones(3).sum())
"""
    )
    result = run(code, tmp_path)
    said = f"{result.stdout}{result.stderr}exit {result.returncode}"
    assert f"jax_gdn.{module} was built with XLA FFI 0.99, but jaxlib" in said, said
    assert "Upgrade jaxlib, or rebuild jax_gdn" in said
    assert result.stdout.endswith("3.0\n"), said


@MODULES
def test_info_says_what_was_held_back(module, tmp_path):
    """When one asks `jax-gdn info` why nothing runs, it answers."""
    code = (
        NEWER.format(module=module)
        + """
from jax_gdn.__main__ import main
sys.exit(main(["info"]))
"""
    )
    result = run(code, tmp_path)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    held_back = f"NOT registered: jax_gdn.{module} was built with XLA FFI 0.99"
    assert held_back in result.stdout
    assert "the native modules do not fit this jaxlib" in result.stdout


def test_source_tree_says_what_it_is():
    if Path(jax_gdn.__file__).parent == ROOT / "jax_gdn":
        pytest.skip("an editable install imports the source tree")
    result = run("import jax_gdn", ROOT)
    assert "the native module _cpu is missing" in result.stderr
    assert "pip install -e ." in result.stderr
