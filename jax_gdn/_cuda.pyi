FFI_API_VERSION: tuple[int, int]
CUDA_VERSION: tuple[int, int]
ARCHITECTURES: str

def handlers() -> dict[str, dict[str, object]]: ...
def why_unsupported(B: int, HV: int, K: int, V: int) -> str | None: ...
def kernel_symbols() -> list[str]: ...
def plan(
    operands: dict[str, tuple[int, str, list[int]]],
    scale: float,
    use_qk_l2norm: bool,
    state_layout: int = 0,
    VT: int | None = None,
) -> dict[str, object]: ...
