"""Gated-delta-rule decode for JAX, with the state updated in place."""

from importlib.metadata import version

from jax_gdn._checks import check_slots as check_slots
from jax_gdn._decode import decode as decode
from jax_gdn._reference import reference_decode as reference_decode
from jax_gdn._registration import DISABLE_JAX_EXPORT_CHECKS as DISABLE_JAX_EXPORT_CHECKS

__version__ = version("jax-gdn")
__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "__version__",
    "check_slots",
    "decode",
    "reference_decode",
]
