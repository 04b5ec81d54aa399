"""What a call consists of: the argument table, and the settings fixed while tracing."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

STATE_LAYOUTS = ("KV", "VK")
IMPLEMENTATIONS = (None, "native", "xla")
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


class Operands(NamedTuple):
    """The arrays of a call, or one thing for each of them; None where there is none."""

    q: Any
    k: Any
    v: Any
    state: Any
    A_log: Any
    a: Any
    dt_bias: Any
    b: Any
    output: Any = None
    state_indices: Any = None
    output_state_indices: Any = None

    def items(self) -> Iterator[tuple[str, Any]]:
        """Those that are there, by name."""
        return ((name, x) for name, x in self._asdict().items() if x is not None)


class Results(NamedTuple):
    """What a call returns, or one thing for each."""

    out: Any
    state: Any


def axes_of(name: str, operands: Operands, state_layout: str) -> list[str]:
    """Returns the axes that an argument must have, given the others."""
    choices = list(ARGUMENTS[name][0])
    if name == "state":
        first = "B" if operands.state_indices is None else "N"
        own = [first, "HV", *state_layout]
        choices = [axes for axes in choices if axes.split() == own]
    elif name == "dt_bias":
        choices = [choices[getattr(operands.a, "ndim", 0) == 4]]
    rank = getattr(getattr(operands, name), "ndim", 0)
    fitting = [axes for axes in choices if len(axes.split()) == rank]
    return (fitting or choices)[0].split()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when a call is traced; hashable."""

    axes: Operands  # of each operand, without batch dimensions
    scale: float
    use_qk_l2norm: bool
    state_layout: str
    implementation: str | None
    num_batch_dims: int = 0  # put by vmap before B and before N

    @property
    def has_pool(self) -> bool:
        return self.axes.state_indices is not None

    @property
    def has_batch_dims(self) -> Operands:
        """Whether each operand has the batch dimensions; the weights have not."""
        return Operands(*(axes and axes[0] in ("B", "N") for axes in self.axes))
