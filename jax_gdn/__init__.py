"""Gated-delta-rule decode for JAX, with the state updated in place."""

from importlib.metadata import version

from jax_gdn._decode import decode as decode
from jax_gdn._reference import reference_decode as reference_decode

__version__ = version("jax-gdn")
__all__ = ["__version__", "decode", "reference_decode"]
