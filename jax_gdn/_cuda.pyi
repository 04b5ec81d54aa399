from collections.abc import Mapping, Sequence

FFI_API_VERSION: tuple = (0, 3)

CUDA_VERSION: tuple = (13, 0)

ARCHITECTURES: str = "90-real,90-virtual"

def handlers() -> dict: ...
def why_unsupported(B: int, HV: int, K: int, V: int) -> str | None: ...
def plan(
    operands: Mapping[str, tuple[int, str, Sequence[int]]],
    scale: float,
    use_qk_l2norm: bool,
    state_layout: int = 0,
    kernel: str | None = None,
) -> dict: ...
def kernels() -> list[dict]: ...
