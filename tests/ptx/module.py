"""What was compiled: the PTX, SASS and resource usage inside the built `_cuda`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess

from cases import Case

from ptx.parser import Kernel, parse


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel, for sm_90."""

    registers: int  # of a thread
    stack_bytes: int
    local_bytes: int  # spills
    shared_bytes: int  # static, and 1 KiB that the system reserves


@dataclasses.dataclass(frozen=True)
class Instance:
    """A kernel that ships, by what its symbol says of it."""

    symbol: str
    layout: str  # as Python names it
    state: str  # dtype, likewise
    K: int
    VT: int
    variant: (
        # Columns of a thread and groups of rows ("KV"), or rows of a warp and kind of
        # access ("VK").
        str
    )
    step: bool  # takes only what a decode loop fixes

    @property
    def item_bytes(self) -> int:
        """Of one value of the state."""
        return 4 if self.state == "float32" else 2

    @property
    def columns(self) -> int:
        """Of a thread, neighbours in one access."""
        found = re.match(r"c(\d+)_", self.variant)
        return int(found[1]) if found else 16 // self.item_bytes

    @property
    def row_groups(self) -> int:
        """Groups of threads, each with its rows of the state ("KV")."""
        found = re.search(r"_g(\d+)", self.variant)
        return int(found[1]) if found else 1

    @property
    def row_threads(self) -> int:
        """Of a block, those that own a part of the state."""
        found = re.match(r"r(\d+)_", self.variant)
        if found:
            return 32 * self.VT // int(found[1])
        return self.VT // self.columns * self.row_groups

    @property
    def gate_warp(self) -> bool:
        """Whether the block has a warp that makes the gates and owns no rows."""
        return "_gw" in self.variant or (self.layout == "VK" and self.step)

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.row_threads + (32 if self.gate_warp else 0)

    @property
    def access_bytes(self) -> int:
        """Of one access to the state."""
        return self.columns * self.item_bytes

    @property
    def accesses(self) -> int:
        """With which a thread reads its part of the state."""
        tile = self.K * self.VT * self.item_bytes
        return tile // (self.access_bytes * self.row_threads)

    def fits(self, case: Case) -> bool:
        """Whether the kernel computes such a call."""
        narrow = {case.q, case.k, case.v, case.a, case.b, case.output or case.q}
        common = case.T == 1 and case.V == case.K and not case.per_channel
        return (
            (case.layout, case.state, case.K) == (self.layout, self.state, self.K)
            and case.V % self.VT == 0
            and (not self.step or (common and narrow == {"bfloat16"}))
        )


def instance_of(symbol: str) -> Instance:
    """Reads a symbol."""
    match = re.fullmatch(
        r"gdn_(decode|step)_(kv|vk)_(b?f\d+)_k(\d+)_vt(\d+)_"
        r"(c\d+_g\d+(?:_gw)?|r\d+_(?:streaming|plain))",
        symbol,
    )
    if match is None:
        raise ValueError(f"a symbol that says nothing: {symbol}")
    kind, layout, state, K, VT, variant = match.groups()
    states = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    sizes = int(K), int(VT)
    return Instance(
        symbol, layout.upper(), states[state], *sizes, variant, kind == "step"
    )


def instances() -> list[Instance]:
    """All that the library may launch; none where it was built without CUDA."""
    if why_missing():
        return []
    from jax_gdn import _cuda

    return [instance_of(symbol) for symbol in _cuda.kernel_symbols()]


def find_cuobjdump() -> pathlib.Path | None:
    """The tool of the PyPI wheel `nvidia-cuda-cuobjdump`, else the one on PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        tool = pathlib.Path(folder) / "cu13" / "bin" / "cuobjdump"
        if tool.exists():
            return tool
    tool = shutil.which("cuobjdump")
    return pathlib.Path(tool) if tool else None


def why_missing() -> str | None:
    """Why there is nothing to run here, or None."""
    if importlib.util.find_spec("jax_gdn._cuda") is None:
        return "jax_gdn was built without CUDA"
    if find_cuobjdump() is None:
        return "no cuobjdump: pip install nvidia-cuda-cuobjdump"
    return None


@functools.cache
def _dump(option: str) -> str:
    from jax_gdn import _cuda

    return subprocess.run(
        [str(find_cuobjdump()), option, _cuda.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@functools.cache
def modules() -> tuple[str, ...]:
    """The PTX that ships: one text a source file."""
    found = (
        text[text.index(".version") :]
        for text in _dump("-ptx").split("\nFatbin")
        if ".version" in text
    )
    return tuple(found)


@functools.cache
def kernels() -> dict[str, Kernel]:
    """The kernels of the PTX that ships, by symbol."""
    found: dict[str, Kernel] = {}
    for text in modules():
        more = parse(text)
        if twice := found.keys() & more.keys():
            raise ValueError(f"in two modules of _cuda: {twice}")
        found |= more
    return found


def entry_text(symbol: str) -> str:
    """The PTX of one kernel alone, to be edited and parsed again."""
    for text in modules():
        start = text.find(f".visible .entry {symbol}(")
        if start >= 0:
            return text[start : text.index("\n}\n", start) + 3]
    raise KeyError(symbol)


@functools.cache
def sass() -> dict[str, list[str]]:
    """The machine code that ships, by symbol: one text an instruction."""
    found: dict[str, list[str]] = {}
    symbol = None
    for line in _dump("-sass").splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
            found[symbol] = []
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found[symbol].append(match[1])
    return found


@functools.cache
def resources() -> dict[str, Resources]:
    """Registers, spills and shared memory, by symbol."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        symbol: Resources(int(registers), int(stack), int(local), int(shared))
        for symbol, registers, stack, shared, local in re.findall(
            pattern, _dump("-res-usage")
        )
    }
