"""The built `_cuda`: its table of kernels, and what was compiled for each."""

from __future__ import annotations

import dataclasses
import functools

from jax_gdn import _registration
from tests.cases import Case
from tests.ptxcheck import sass
from tests.ptxcheck.binary import Binary, find_cuobjdump


@dataclasses.dataclass(frozen=True)
class Instance:
    """A row of the table of kernels; cuda/plan.h says what the fields are."""

    symbol: str
    threads: int
    layout: str  # as Python names it
    state: str  # dtype, likewise
    K: int
    VT: int
    columns: int  # "KV"
    row_groups: int  # "KV"
    warp_rows: int  # "VK"
    single_token: bool
    per_channel: bool
    deferred: bool
    streaming: bool
    min_blocks: int
    prefetch_distance: int
    prefetch_first: bool
    max_states: int

    @property
    def item_bytes(self) -> int:
        """Of one value of the state."""
        return 4 if self.state == "float32" else 2

    @property
    def row_threads(self) -> int:
        """Of a block, those that own a part of the state: not a warp beside these."""
        return self.threads - (32 if self.single_token or self.deferred else 0)

    @property
    def access_bytes(self) -> int:
        """Of one access to the state."""
        if self.deferred:
            return 4 * self.item_bytes
        return self.columns * self.item_bytes if self.layout == "KV" else 16

    @property
    def accesses(self) -> int:
        """With which a thread reads its part of the state."""
        tile = self.K * self.VT * self.item_bytes
        return tile // (self.access_bytes * self.row_threads)

    def case(self, **changes) -> Case:
        """A small call that it takes."""
        names = ("K", "layout", "state", "per_channel")
        sizes = {name: getattr(self, name) for name in names}
        sizes["V"] = self.K if self.single_token or self.deferred else 64
        return Case(**{"B": 2, "H": 1, "HV": 2, **sizes, **changes})


def why_missing() -> str | None:
    """Why there is nothing to run here, or None."""
    if _registration.cuda is None:
        return "jax_gdn was built without CUDA"
    if find_cuobjdump() is None:
        return "no cuobjdump: pip install nvidia-cuda-cuobjdump"
    return None


@functools.cache
def instances() -> tuple[Instance, ...]:
    """All that the library may launch; none where it was built without CUDA."""
    if why_missing():
        return ()
    return tuple(Instance(**row) for row in _registration.cuda.kernels())


def plain() -> tuple[Instance, ...]:
    """Those of `decode`."""
    return tuple(one for one in instances() if not one.deferred)


def deferred() -> tuple[Instance, ...]:
    """Those of `decode_deferred`."""
    return tuple(one for one in instances() if one.deferred)


def of_symbol(symbol: str) -> Instance:
    """The row of a kernel."""
    return next(one for one in instances() if one.symbol == symbol)


@functools.cache
def binary() -> Binary:
    """The file that ships."""
    return Binary(_registration.cuda.__file__)


def late_loads(one: Instance) -> int:
    """State loads that the machine code issues after a wait, and the PTX before it."""
    code, size = binary().sass[one.symbol], one.access_bytes
    late = sass.late_ptx_loads(binary().kernel(one.symbol), size)
    return sass.late_loads(code, size) - len(late)
