"""The calls that every implementation is tried on."""

import dataclasses
import itertools
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, dtypes and values of one call; `inputs()` is the same every time."""

    B: int = 2
    H: int = 2
    HV: int = 4
    K: int = 128
    V: int = 128
    q: str = "bfloat16"  # dtypes
    k: str = "bfloat16"
    v: str = "bfloat16"
    a: str = "bfloat16"
    dt_bias: str = "float32"
    b: str = "bfloat16"
    output: str | None = None
    x: float | None = None  # a + dt_bias, everywhere
    b_value: float | None = None
    A_log_value: float | None = None
    qk_norm: float | None = None  # of every q and k vector
    scale: float | None = None
    use_qk_l2norm: bool = True
    seed: int = 0

    @property
    def id(self) -> str:
        changed = (
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return ",".join(changed) or "default"

    @property
    def settings(self) -> dict:
        return {"scale": self.scale, "use_qk_l2norm": self.use_qk_l2norm}

    @property
    def out_dtype(self) -> np.dtype:
        return DTYPES[self.output or self.q]

    def inputs(self) -> dict[str, np.ndarray]:
        """Returns the arrays by argument name, in the order of the signature."""
        rng = np.random.default_rng(self.seed)

        def normal(dtype: str, *shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(DTYPES[dtype])

        def vectors(dtype: str, *shape: int) -> np.ndarray:
            x = rng.standard_normal(shape)
            if self.qk_norm is not None:
                x *= self.qk_norm / np.linalg.norm(x, axis=-1, keepdims=True)
            return x.astype(DTYPES[dtype])

        B, H, HV, K, V = self.B, self.H, self.HV, self.K, self.V
        arrays = {
            "q": vectors(self.q, B, 1, H, K),
            "k": vectors(self.k, B, 1, H, K),
            "v": normal(self.v, B, 1, HV, V),
            "state": normal("float32", B, HV, K, V),
            "A_log": np.log(rng.uniform(0.01, 16, HV)).astype(np.float32),
            "a": normal(self.a, B, 1, HV),
            "dt_bias": normal(self.dt_bias, HV),
            "b": normal(self.b, B, 1, HV),
        }
        if self.x is not None:
            arrays["a"] = np.full_like(arrays["a"], self.x)
            arrays["dt_bias"] = np.zeros_like(arrays["dt_bias"])
        if self.b_value is not None:
            arrays["b"] = np.full_like(arrays["b"], self.b_value)
        if self.A_log_value is not None:
            arrays["A_log"] = np.full_like(arrays["A_log"], self.A_log_value)
        return arrays


HEADS = ((16, 16), (16, 32), (16, 48), (2, 8), (1, 4), (1, 1))
SIZES = (64, 128, 192, 256)
GATE_INPUTS = (-1e4, -100.0, -20.0, 19.99, 20.01, 88.0, 100.0, 1e4)

SHAPE_CASES = [
    *(Case(B=B) for B in (1, 2, 3, 32, 33)),
    *(Case(B=1, H=H, HV=HV) for H, HV in HEADS),
    *(Case(K=K, V=V) for K, V in itertools.product(SIZES, SIZES)),
]
# Sizes that only the host kernel and the XLA form take.
ODD_CASES = [Case(K=96, V=40), Case(K=7, V=3), Case(K=1, V=1)]
DTYPE_CASES = [
    *(
        Case(q=io, k=io, v=io, a=gates, b=gates, dt_bias=bias)
        for io, gates, bias in itertools.product(DTYPES, DTYPES, DTYPES)
    ),
    Case(q="float32", k="bfloat16", v="float16", a="bfloat16", b="float32"),
    Case(q="float16", k="float32", v="bfloat16", a="float32", b="float16"),
    *(Case(q=io, output=out) for io, out in itertools.product(DTYPES, DTYPES)),
]
F32: dict[str, Any] = {
    "q": "float32",
    "k": "float32",
    "v": "float32",
    "a": "float32",
    "b": "float32",
}
GATE_CASES = [
    *(
        Case(x=x, A_log_value=A_log, **F32)
        for x, A_log in itertools.product(GATE_INPUTS, (-10.0, 0.0, 3.0))
    ),
    *(Case(b_value=b, **F32) for b in (-100.0, 0.0, 100.0)),
]
VALUE_CASES = [
    # Only short vectors tell one way of placing the epsilon from another.
    *(Case(qk_norm=norm, seed=1, **F32) for norm in (1e-3, 0.0, 1.0, 30.0)),
    Case(qk_norm=1.0, use_qk_l2norm=False, **F32),
    Case(use_qk_l2norm=False),
    Case(scale=0.37, **F32),
    Case(scale=0.37, use_qk_l2norm=False, qk_norm=2.0, **F32),
]
CASES = SHAPE_CASES + DTYPE_CASES + GATE_CASES + VALUE_CASES
