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
    T: int = 1
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
    state: str = "float32"
    layout: str = "KV"
    per_channel: bool = False  # one decay a key channel
    N: int | None = None  # slots of a pool
    reads: tuple[int, ...] | None = None  # state_indices
    writes: tuple | None = None  # output_state_indices
    x: float | None = None  # a + dt_bias, everywhere
    b_value: float | None = None
    A_log_value: float | None = None
    qk_norm: float | None = None  # of every q and k vector
    scale: float | None = None
    use_qk_l2norm: bool = True
    given: bool = False  # g and beta, in the dtypes of a and b
    g_value: float | None = None
    beta_value: float | None = None
    lower_bound: float | None = None
    allow_neg_eigval: bool = False
    layers: int | None = None  # of a stack of states
    layer: int = 0
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
        settings: dict[str, Any] = {
            "scale": self.scale,
            "use_qk_l2norm": self.use_qk_l2norm,
            "state_layout": self.layout,
        }
        if self.lower_bound is not None:
            settings["lower_bound"] = self.lower_bound
        if self.allow_neg_eigval:
            settings["allow_neg_eigval"] = True
        if self.layers is not None:
            settings["layer"] = self.layer
        return settings

    @property
    def slots(self) -> dict[str, np.ndarray]:
        """The slot arguments that the call has, by name."""
        given = {"state_indices": self.reads, "output_state_indices": self.writes}
        return {n: np.array(x, np.int32) for n, x in given.items() if x is not None}

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

        B, T, H, HV, K, V = self.B, self.T, self.H, self.HV, self.K, self.V
        channels = (K,) if self.per_channel else ()
        tile = (K, V) if self.layout == "KV" else (V, K)
        states = (B if self.N is None else self.N, HV)
        states = states if self.layers is None else (self.layers, *states)
        arrays = {
            "q": vectors(self.q, B, T, H, K),
            "k": vectors(self.k, B, T, H, K),
            "v": normal(self.v, B, T, HV, V),
            "state": normal(self.state, *states, *tile),
            "A_log": np.log(rng.uniform(0.01, 16, HV)).astype(np.float32),
            "a": normal(self.a, B, T, HV, *channels),
            "dt_bias": normal(self.dt_bias, HV, *channels),
            "b": normal(self.b, B, T, HV),
        }
        if self.x is not None:
            arrays["a"] = np.full_like(arrays["a"], self.x)
            arrays["dt_bias"] = np.zeros_like(arrays["dt_bias"])
        if self.b_value is not None:
            arrays["b"] = np.full_like(arrays["b"], self.b_value)
        if self.A_log_value is not None:
            arrays["A_log"] = np.full_like(arrays["A_log"], self.A_log_value)
        if self.given:
            a, b = arrays.pop("a"), arrays.pop("b")
            del arrays["A_log"], arrays["dt_bias"]
            g = -np.exp(a.astype(np.float64)) if self.g_value is None else self.g_value
            beta = 1 / (1 + np.exp(-b.astype(np.float64)))
            beta = beta if self.beta_value is None else self.beta_value
            arrays["g"] = np.broadcast_to(g, a.shape).astype(a.dtype)
            arrays["beta"] = np.broadcast_to(beta, b.shape).astype(b.dtype)
        return arrays


HEADS = ((16, 16), (16, 32), (16, 48), (2, 8), (1, 4), (1, 1))
SIZES = (64, 128, 192, 256)
GATE_INPUTS = (-1e4, -100.0, -20.0, 19.99, 20.01, 88.0, 100.0, 1e4)

SHAPE_CASES = [
    *(Case(B=B) for B in (1, 2, 3, 32, 33)),
    *(Case(B=1, H=H, HV=HV) for H, HV in HEADS),
    *(Case(K=K, V=V) for K, V in itertools.product(SIZES, SIZES)),
]
# Sizes that only the host kernel and the reference take.
ODD_CASES = [
    Case(K=K, V=V, layout=layout, state=state, T=T, per_channel=T == 2)
    for K, V in ((96, 40), (7, 3), (1, 1), (33, 17))
    for layout in ("KV", "VK")
    for state in DTYPES
    for T in (1, 2)
]
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
LAYOUTS = ("KV", "VK")
# Layout, state dtype and decay, each with each, in several lengths.
FORM_CASES = [
    Case(layout=layout, state=state, per_channel=per_channel, T=T)
    for layout, state, per_channel, T in itertools.product(
        LAYOUTS, DTYPES, (False, True), (1, 2, 5)
    )
]
LAYOUT_CASES = [
    *(Case(layout="VK", K=K, V=V) for K, V in itertools.product(SIZES, (16, 64, 80))),
    *(Case(layout="VK", B=1, H=H, HV=HV) for H, HV in HEADS),
    *(
        Case(layout=layout, state=state, K=K, V=48, T=T)
        for layout, state, K, T in itertools.product(
            LAYOUTS, ("bfloat16", "float16"), SIZES, (1, 3)
        )
    ),
    *(
        Case(layout=layout, per_channel=True, x=x, A_log_value=A_log, **F32)
        for layout, x, A_log in itertools.product(LAYOUTS, (-1e4, 88.0), (-10.0, 3.0))
    ),
    *(Case(layout=layout, T=33, B=1, K=64, V=32) for layout in LAYOUTS),
]
POOL = {"B": 4, "K": 64, "V": 32}
POOL_CASES = [
    Case(layout=layout, state=state, T=T, N=9, reads=reads, writes=writes, **POOL)
    for layout, state in itertools.product(LAYOUTS, DTYPES)
    for T, reads, writes in (
        (1, (7, 0, 3, 5), None),
        (1, (7, -1, 3, 9), None),
        (1, (-1, -1, -1, -1), None),
        (1, (7, -1, 3, 5), (1, 2, -1, 4)),
        (1, (7, -1, 3, 5), ((1,), (2,), (99,), (4,))),
        (2, (1, 3, -7, 5), (1, -1, 6, 0)),
        (3, (1, -1, 3, 5), ((0, 2, 4), (6, 6, 6), (-1, 3, -1), (5, -1, 99))),
    )
]
# States enough for the tiles of full grids, and more tokens than are staged at once.
TILE_CASES = [
    Case(B=17, T=5, H=8, HV=8, K=K, V=64, layout=layout, state=state)
    for layout, (K, state) in itertools.product(
        LAYOUTS,
        [*itertools.product((64, 128), DTYPES), (192, "float32"), (256, "float32")],
    )
]
TILE_CASES += [
    *(
        Case(B=B, state="bfloat16", layout=layout)
        for layout in LAYOUTS
        for B in (9, 33)
    ),
    *(
        Case(B=B, H=8, HV=8, K=K, V=K, layout=layout, state=state)
        for layout, state, (K, B) in itertools.product(
            LAYOUTS,
            ("float32", "bfloat16"),
            # More states of a larger K would take minutes.
            (
                *itertools.product((64, 128), (64, 129)),
                *itertools.product((64, 192, 256), (2, 20)),
            ),
        )
    ),
]
# Gates as they are, and those of models with a bounded decay or a strength of up to 2.
GATE_FORM_CASES = [
    *(
        Case(layout=layout, per_channel=per_channel, T=T, **form)
        for layout, per_channel, T in itertools.product(LAYOUTS, (False, True), (1, 3))
        for form in (
            {"given": True},
            {"lower_bound": -5.0, "allow_neg_eigval": True},
        )
    ),
    *(Case(given=True, a=dtype, b=dtype, K=64, V=32) for dtype in DTYPES),
    *(
        Case(given=True, g_value=g, beta_value=beta, per_channel=per_channel, **F32)
        for g, beta in itertools.product((0.0, -1e30, -np.inf), (0.0, 1.0, 2.0))
        for per_channel in (False, True)
    ),
    *(
        Case(lower_bound=bound, x=x, A_log_value=A_log, **F32)
        for bound in (-5.0, -1e-3)
        for x, A_log in ((-1e4, 3.0), (0.0, 100.0), (1e4, -10.0), (1e30, 100.0))
    ),
    Case(allow_neg_eigval=True, b_value=100.0, **F32),
]
STACK_CASES = [
    Case(B=3, T=T, K=64, V=32, layers=4, layer=layer, state=state, **pool)
    for T, layer, state in ((1, 0, "float32"), (2, 3, "bfloat16"), (2, 1, "float32"))
    for pool in (
        {},
        {"N": 5, "reads": (4, -1, 2)},
        {"N": 5, "reads": (4, -1, 2), "writes": (1, 0, -1)},
    )
]
CASES = (
    SHAPE_CASES
    + DTYPE_CASES
    + GATE_CASES
    + VALUE_CASES
    + FORM_CASES
    + LAYOUT_CASES
    + POOL_CASES
    + TILE_CASES
    + GATE_FORM_CASES
    + STACK_CASES
)
# Those that take long: many states, and most mixtures of dtypes. Marked `slow` where
# they are compared with float64.
SLOW_CASES = [
    case
    for case in CASES
    if case.B * case.HV * case.K * case.V > 2**21
    or (case in DTYPE_CASES[:27] and len({case.q, case.a, case.dt_bias}) == 2)
]
