"""What a call consists of: the argument table, and the settings fixed while tracing."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CHOICES = {"state_layout": ("KV", "VK"), "implementation": (None, "native", "xla")}
_FLOATS = ("float32", "bfloat16", "float16")

# Axes (or a choice of them) and dtypes of each argument, which the native modules have
# in ffi/operands.h. An axis gets its size where it first appears.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "q": (("B T H K",), _FLOATS),
    "k": (("B T H K",), _FLOATS),
    "v": (("B T HV V",), _FLOATS),
    "state": (("B HV K V", "B HV V K", "N HV K V", "N HV V K"), _FLOATS),
    "A_log": (("HV",), ("float32",)),
    "a": (("B T HV", "B T HV K"), _FLOATS),
    "dt_bias": (("HV", "HV K"), _FLOATS),
    "b": (("B T HV",), _FLOATS),
    "output": (("B T HV V",), _FLOATS),
    "state_indices": (("B",), ("int32",)),
    "output_state_indices": (("B", "B T"), ("int32",)),
}
SLOTS = ("state_indices", "output_state_indices")
OPTIONAL = ("output", *SLOTS)


class Operands(
    collections.namedtuple("Operands", ARGUMENTS, defaults=[None] * len(ARGUMENTS))
):
    """The arrays of a call, or one thing for each of them; None where there is none."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """Those that are there, by name."""
        return ((name, x) for name, x in self._asdict().items() if x is not None)


class Results(NamedTuple):
    """What a call returns, or one thing for each."""

    out: Any
    state: Any


class Settings(NamedTuple):
    """What is fixed when a call is traced; hashable."""

    scale: float | None
    use_qk_l2norm: bool
    state_layout: str
    implementation: str | None
    axes: Operands = Operands()  # of each operand, without batch dimensions
    num_batch_dims: int = 0  # put by vmap before B and before N

    @property
    def has_pool(self) -> bool:
        return self.axes.state_indices is not None

    @property
    def has_batch_dims(self) -> Operands:
        """Whether each operand has the batch dimensions; the weights have not."""
        return Operands(*(axes and axes[0] in ("B", "N") for axes in self.axes))


Call = Callable[[Settings, Operands], Results]
