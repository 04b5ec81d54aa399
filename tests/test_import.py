"""Importing jax_gdn: what it must not do, and what it must refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_newer_handlers_are_held_back(module, tmp_path):
    """A clear ImportError, and a JAX that still works."""
    code = f"""
import importlib.util, sys, types
import jax.numpy as jnp
spec = importlib.util.find_spec("jax_gdn")
package = types.ModuleType("jax_gdn")
package.__path__ = list(spec.submodule_search_locations)
sys.modules["jax_gdn"] = package
native = importlib.import_module("jax_gdn.{module}")
native.FFI_API_VERSION = (0, 99)
del sys.modules["jax_gdn"]
try:
    import jax_gdn
except ImportError as error:
    print(error)
print(jnp.ones(3).sum())
"""
    result = run(code, tmp_path)
    said = f"{result.stdout}{result.stderr}exit {result.returncode}"
    assert f"jax_gdn.{module} was built with XLA FFI 0.99, but jaxlib" in said, said
    assert "Upgrade jaxlib, or rebuild jax_gdn" in said
    assert result.stdout.endswith("3.0\n"), said


def test_source_tree_says_what_it_is():
    if list((ROOT / "jax_gdn").glob("_cpu.*so")):
        pytest.skip("an editable install keeps the modules in the source tree")
    result = run("import jax_gdn", ROOT)
    assert "the native module _cpu is missing" in result.stderr
    assert "pip install ." in result.stderr
