"""What a compiled file holds: its PTX, SASS and resource usage, by cuobjdump."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess

from .parser import Kernel, parse


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas says of one kernel."""

    registers: int  # of a thread
    stack_bytes: int
    local_bytes: int  # spills
    shared_bytes: int  # static, and what the system reserves


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


class Binary:
    """A file with kernels in it: a library, an executable or a cubin."""

    def __init__(self, path: str | pathlib.Path):
        self.path = path

    def _dump(self, option: str) -> str:
        tool = find_cuobjdump()
        if tool is None:
            raise FileNotFoundError("cuobjdump")
        command = [str(tool), option, str(self.path)]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout

    @functools.cached_property
    def entries(self) -> dict[str, str]:
        """The PTX of each kernel alone, by symbol: to be edited and parsed."""
        pattern = r"^\.visible \.entry (\w+).*?^}$"
        found = re.finditer(pattern, self._dump("-ptx"), re.MULTILINE | re.DOTALL)
        return {match[1]: match[0] for match in found}

    def kernel(self, symbol: str) -> Kernel:
        """A kernel of the PTX."""
        return parse(self.entries[symbol])[symbol]

    @functools.cached_property
    def sass(self) -> dict[str, list[str]]:
        """The machine code, by symbol: one text an instruction."""
        found: dict[str, list[str]] = {}
        symbol = ""
        for line in self._dump("-sass").splitlines():
            if match := re.match(r"\s*Function : (\S+)", line):
                symbol = match[1]
                found[symbol] = []
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                found[symbol].append(match[1])
        return found

    @functools.cached_property
    def resources(self) -> dict[str, Resources]:
        """Registers, spills and shared memory, by symbol."""
        pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        return {
            symbol: Resources(int(registers), int(stack), int(local), int(shared))
            for symbol, registers, stack, shared, local in re.findall(
                pattern, self._dump("-res-usage")
            )
        }
