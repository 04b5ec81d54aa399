"""Gated-delta-rule decode for JAX, with the state updated in place."""

from importlib.metadata import version

from jax_gdn._checks import check_slots as check_slots
from jax_gdn._decode import decode as decode
from jax_gdn._deferred import Pending as Pending
from jax_gdn._deferred import advance_cursors as advance_cursors
from jax_gdn._deferred import decode_deferred as decode_deferred
from jax_gdn._deferred import materialize as materialize
from jax_gdn._deferred import new_cursors as new_cursors
from jax_gdn._deferred import new_pending as new_pending
from jax_gdn._prefill import prefill as prefill
from jax_gdn._reference import reference_decode as reference_decode
from jax_gdn._registration import DISABLE_JAX_EXPORT_CHECKS as DISABLE_JAX_EXPORT_CHECKS

__version__ = version("jax-gdn")
__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "Pending",
    "__version__",
    "advance_cursors",
    "check_slots",
    "decode",
    "decode_deferred",
    "materialize",
    "new_cursors",
    "new_pending",
    "prefill",
    "reference_decode",
]
