"""What was compiled: the PTX, SASS and resource usage inside the built `_cuda`."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess

from ptx.parser import Kernel, parse


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel, for sm_90."""

    registers: int  # of a thread
    stack_bytes: int
    local_bytes: int  # spills
    shared_bytes: int  # static, and 1 KiB that the system reserves


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
def ptx() -> str:
    """The PTX text that ships."""
    text = _dump("-ptx")
    if text.count(".version") != 1:
        raise ValueError("expected one PTX module in _cuda")
    return text[text.index(".version") :].partition("\nFatbin")[0]


@functools.cache
def kernels() -> dict[str, Kernel]:
    """The kernels of the PTX that ships, by symbol."""
    return parse(ptx())


def entry_text(symbol: str) -> str:
    """The PTX of one kernel alone, to be edited and parsed again."""
    match = re.search(
        rf"^\.visible \.entry {symbol}\(.*?^\}}$", ptx(), re.MULTILINE | re.DOTALL
    )
    if match is None:
        raise KeyError(symbol)
    return match[0]


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
