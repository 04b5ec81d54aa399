"""Skips what needs the built CUDA module; JAX_GDN_REQUIRE_PTX=1 makes that fail."""

import os

import pytest

from tests.kernels import module


@pytest.fixture
def built() -> None:
    """The CUDA module and cuobjdump are here."""
    if reason := module.why_missing():
        if os.environ.get("JAX_GDN_REQUIRE_PTX") == "1":
            pytest.fail(f"JAX_GDN_REQUIRE_PTX=1, but {reason}")
        pytest.skip(reason)
