"""Settings of every test: strict promotion, and a GPU that may be required."""

import os
import sys
from pathlib import Path

import jax
import pytest

# Of `tests` and `benchmarks`. Last: the clone's own jax_gdn has no native modules.
sys.path.append(str(Path(__file__).parents[1]))
# Processes of `pytest -n auto` share a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Virtual ones, for meshes; whatever is not sharded runs on the first.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items):
    from jax_gdn import _registration

    if _registration.cuda is None:
        for item in items:
            if item.get_closest_marker("cuda_build"):
                item.add_marker(pytest.mark.skip(reason="this build has no CUDA"))


@pytest.fixture
def host():
    """Makes the host's first device the default, for tests of small or odd sizes."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def gpu() -> jax.Device:
    """The first CUDA device; without one the test is skipped, or fails if required."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        if os.environ.get("JAX_GDN_REQUIRE_GPU") == "1":
            pytest.fail("JAX_GDN_REQUIRE_GPU=1, but JAX sees no CUDA device")
        pytest.skip("needs a CUDA device")
