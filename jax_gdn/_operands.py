"""What a call consists of: the argument table, and the settings fixed while tracing."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

CHOICES = {
    "state_layout": ("KV", "VK"),
    "implementation": (None, "native", "xla"),
    "precision": ("bf16x6", "bf16x3", "bf16"),
}
# How log decay and write strength come: from logits, by softplus or by a sigmoid with a
# lower bound, or as they are, in the places of `a` and `b`.
GATE_FORMS = ("softplus", "sigmoid", "given")
_FLOATS = ("float32", "bfloat16", "float16")

# Axes (or a choice of them) and dtypes of each argument, which the native modules have
# in ffi/operands.h. An axis gets its size where it first appears. States and what is
# pending have N for B where there is a pool, and with `layer` L in front.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "q": (("B T H K",), _FLOATS),
    "k": (("B T H K",), _FLOATS),
    "v": (("B T HV V",), _FLOATS),
    "state": (("B HV K V", "B HV V K"), _FLOATS),
    "A_log": (("HV",), _FLOATS),
    "a": (("B T HV", "B T HV K"), _FLOATS),
    "dt_bias": (("HV", "HV K"), _FLOATS),
    "b": (("B T HV",), _FLOATS),
    "pending_k": (("B H R K",), _FLOATS),
    "pending_u": (("B HV R V",), ("float32",)),
    "pending_decay": (("B HV R", "B HV R K"), ("float32",)),
    "cursors": (("B 2",), ("int32",)),
    "output": (("B T HV V",), _FLOATS),
    "state_indices": (("B",), ("int32",)),
    "output_state_indices": (("B", "B T"), ("int32",)),
    "fold": (("B",), ("bool",)),
    "layer": (("",), ("int32",)),
    "lengths": (("B",), ("int32",)),  # of `prefill` alone, which no native call takes
}
GIVEN_GATES = {"a": "g", "b": "beta"}  # whose places they take
WEIGHTS = ("A_log", "dt_bias")
SLOTS = ("state_indices", "output_state_indices")
OPTIONAL = ("output", *SLOTS, "fold", "lengths")
PENDING = ("pending_k", "pending_u", "pending_decay")  # the fields of a `Pending`
DEFERRED = (*PENDING, "cursors", "fold")  # of `decode_deferred` alone
# What a call updates in place beside `out`.
UPDATED = ("state", *PENDING)


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
    pending_k: Any = None  # these of `decode_deferred` alone
    pending_u: Any = None
    pending_decay: Any = None


class Settings(NamedTuple):
    """What is fixed when a call is traced; hashable."""

    scale: float | None = None
    use_qk_l2norm: bool = True
    state_layout: str = "KV"
    implementation: str | None = None
    gate_form: str = "softplus"
    lower_bound: float | None = None
    allow_neg_eigval: bool = False
    layer: int | None = None  # where it is no operand
    window: int | None = None  # of `decode_deferred` alone
    precision: str | None = None  # of `prefill` alone
    axes: Operands = Operands()  # of each operand, without batch dimensions
    num_batch_dims: int = 0  # put by vmap before B, and before L or N

    @property
    def has_pool(self) -> bool:
        return self.axes.state_indices is not None

    @property
    def has_stack(self) -> bool:
        return self.layer is not None or self.axes.layer is not None

    @property
    def name(self) -> str:
        if self.precision is not None:
            return "prefill"
        return "decode" if self.window is None else "decode_deferred"

    def results(self, of: Callable[[str], Any]) -> Results:
        """Returns one thing for each result that the call has, by its name."""
        there = Results._fields[: 2 if self.window is None else None]
        return Results(*map(of, there))

    @property
    def has_batch_dims(self) -> Operands:
        """Whether each operand has the batch dimensions; the weights have not."""
        axes = self.axes._asdict().items()
        return Operands(*(x is not None and name not in WEIGHTS for name, x in axes))


Call = Callable[[Settings, Operands], Results]
