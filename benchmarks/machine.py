"""What a timing depends on and a reader has to know."""

import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

import jax_gdn


def machine() -> dict[str, Any]:
    """Returns JAX's first device, and what `host` says."""
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "devices": len(jax.devices()),
        "platform_version": device.client.platform_version.splitlines(),
        **host(),
    }


def host() -> dict[str, Any]:
    """Returns what can be said without starting JAX's backends."""
    return {
        "cpu": cpu_name(),
        "cpu_threads": cpu_threads(),
        "cpu_mhz": _cpu_mhz(),
        "gpu": nvidia_smi(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "numpy": np.__version__,
        "jax_gdn": jax_gdn.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40"),
    }


def cpu_threads() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return found[1] if found else platform.processor() or platform.machine()


def import_seconds(repeats: int = 5) -> float:
    """Returns what importing jax_gdn takes once jax is there, the median."""
    program = (
        "import time, jax; start = time.perf_counter(); import jax_gdn; "
        "print(time.perf_counter() - start)"
    )
    # -P: a source tree in the working directory is not what is installed.
    runs = [
        subprocess.run(
            [sys.executable, "-P", "-c", program],
            check=True,
            capture_output=True,
            text=True,
        )
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def free_bytes() -> int | None:
    """Returns the memory of the first device that is not in use, when it says."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        known = {"bytes_limit", "bytes_in_use"} <= stats.keys()
        return stats["bytes_limit"] - stats["bytes_in_use"] if known else None
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    return int(found[1]) * 1024 if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_mhz() -> list[float]:
    return [float(x) for x in re.findall(r"cpu MHz\s*: (\S+)", _read("/proc/cpuinfo"))]


def nvidia_smi() -> dict[str, str] | None:
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm"]
    fields += ["clocks.max.mem", "power.limit", "temperature.gpu"]
    line = _output(
        *("nvidia-smi", "--id=0", "--format=csv,noheader"),
        f"--query-gpu={','.join(fields)}",
    )
    return dict(zip(fields, line.split(", "), strict=True)) if line else None
