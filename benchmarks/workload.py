"""The calls that are timed: shapes, inputs, and whether a result is right."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_gdn
from tests.cases import Case
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

Inputs = dict[str, Any]
# (state, the other operands) -> (state, out)
Step = Callable[[Array, Inputs], tuple[Array, Any]]

# The L2 caches of the GPUs that there are kernels for have 50 to 60 MB. Of 128 MB in
# turn they still keep a part, and some loads are 2 to 4 % faster; of 512 MB nothing.
COLD_BYTES = 512 * 2**20
# Random rows that a large batch on a GPU may consist of, over and over: making all of
# it on the host takes longer than everything else.
ROWS = 8
# Operands without rows, of weights.
WEIGHTS = ("A_log", "dt_bias")


@dataclasses.dataclass(frozen=True)
class Config:
    """One call that is timed, in the axis letters of `decode`."""

    B: int
    H: int = 16
    HV: int = 32
    T: int = 1
    state_dtype: str = "float32"
    layout: str = "KV"
    K: int = 128
    V: int = 128
    per_channel: bool = False  # one decay a key channel
    gate_dtype: str = "bfloat16"  # of a, b and the output

    @property
    def state_bytes(self) -> int:
        entries = self.B * self.HV * self.K * self.V
        return entries * jnp.dtype(self.state_dtype).itemsize

    @property
    def form(self) -> str:
        """The state, and what differs from Qwen3-Next's operands."""
        text = f"{self.state_dtype} {self.layout}"
        if self.per_channel:
            text += ", decay per channel"
        if self.gate_dtype != "bfloat16":
            text += f", {self.gate_dtype} a, b, output"
        return text

    @property
    def family(self) -> str:
        """What stays when only B changes."""
        return f"{self.H}/{self.HV} heads, T {self.T}, {self.form}"

    @property
    def cold_sets(self) -> int:
        """How many states together leave the L2 cache of a GPU."""
        return max(2, math.ceil(COLD_BYTES / self.state_bytes))

    def arrays(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Returns random operands of `decode`, in the order of its signature."""
        sizes = {n: getattr(self, n) for n in ("B", "H", "HV", "T", "K", "V")}
        arrays = Case(
            **sizes,
            state=self.state_dtype,
            layout=self.layout,
            per_channel=self.per_channel,
            a=self.gate_dtype,
            b=self.gate_dtype,
            seed=seed,
        ).inputs()
        if self.gate_dtype != "bfloat16":
            arrays["output"] = np.zeros(arrays["v"].shape, self.gate_dtype)
        return arrays


def model_inputs(config: Config, seed: int = 0) -> Inputs:
    return {name: jnp.asarray(x) for name, x in config.arrays(seed).items()}


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def rows_of(B: int) -> tuple[int, int]:
    """Returns of how many rows B sequences on a GPU consist, and how often of each."""
    rows = ROWS if B % ROWS == 0 else B
    return rows, B // rows


def split_state(inputs: Inputs) -> tuple[Array, Inputs]:
    """Returns the state, and the operands without it."""
    return inputs["state"], {n: x for n, x in inputs.items() if n != "state"}


def decode_step(implementation: str | None, layout: str = "KV") -> Step:
    def step(state: Array, rest: Inputs) -> tuple[Array, Array]:
        out, state = jax_gdn.decode(
            state=state, **rest, state_layout=layout, implementation=implementation
        )
        return state, out

    return step


def verify(name: str, inputs: Inputs, out: Any, state: Any, layout: str) -> None:
    """Raises `ArithmeticError` unless results are those of the tests' float64 loop.

    Looks at up to eight rows, the first and the last among them: all of a large batch
    would take long.
    """
    B = inputs["q"].shape[0]
    rows = np.unique(np.linspace(0, B - 1, min(B, 8)).round().astype(int))
    given = {n: x if n in WEIGHTS else x[rows] for n, x in inputs.items()}
    given.pop("output", None)
    expected = decode64(**given, state_layout=layout)
    names, tolerances = ("out", "state"), (OUT_TOLERANCE, STATE_TOLERANCE)
    for what, x, right, tolerance in zip(
        names, (out, state), expected, tolerances, strict=True
    ):
        try:
            assert_close(x[rows], right, tolerance, what)
        except AssertionError as error:
            raise ArithmeticError(f"{name}: {error}; not timed") from error
