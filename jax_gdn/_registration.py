"""Loads the native modules and hands their handlers to XLA, once.

The only importer of `_cpu` and `_cuda`. Neither import touches a device.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax import export

# Targets are global to the process and stay in exported programs, so the name
# carries the version of the call's signature. Programs of 0.2 and before call v1.
DECODE_TARGET = "jax_gdn.decode.v2"
DEFERRED_TARGET = "jax_gdn.decode_deferred.v1"
_TARGETS = ("jax_gdn.decode.v1", DECODE_TARGET, DEFERRED_TARGET)

# For `jax.export.export(..., disabled_checks=...)`: a target keeps its meaning, so a
# program that calls it may be kept.
DISABLE_JAX_EXPORT_CHECKS = tuple(map(export.DisabledSafetyCheck.custom_call, _TARGETS))


def runtime_ffi_version() -> tuple[int, int]:
    """Returns the FFI version that the running jaxlib speaks, from its headers."""
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text(encoding="utf-8")
    parts = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)
    version = {part: int(number) for part, number in parts}
    return version["MAJOR"], version["MINOR"]


def _load(name: str, platform: str) -> Any:
    """Imports a native module and hands its handlers to XLA, if this build has it."""
    try:
        module = importlib.import_module(f"jax_gdn.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"jax_gdn.{name}":
            raise
        return None
    # A jaxlib that is handed handlers of a newer FFI version refuses them by
    # breaking the whole backend, so they are held back here.
    built, runs = module.FFI_API_VERSION, runtime_ffi_version()
    if built[0] != runs[0] or built[1] > runs[1]:
        unregistered[module.__name__] = (
            f"{module.__name__} was built with XLA FFI {built[0]}.{built[1]}, "
            f"but jaxlib {jaxlib.version.__version__} speaks {runs[0]}.{runs[1]}. "
            "Upgrade jaxlib, or rebuild jax_gdn against this one."
        )
    else:
        for target, stages in module.handlers().items():
            jax.ffi.register_ffi_target(target, stages, platform=platform)
    return module


def require_handlers() -> None:
    """Raises where a module's handlers were held back."""
    for held_back in unregistered.values():
        raise ImportError(f"jax_gdn: {held_back}")


# By module, why its handlers were held back. Said where they are wanted: until then,
# `jax-gdn info` and `reference_decode` work.
unregistered: dict[str, str] = {}
cpu: Any = _load("_cpu", "cpu")
cuda: Any = _load("_cuda", "CUDA")
if cpu is None:
    raise ImportError(
        "jax_gdn: the native module _cpu is missing. This is most likely the source "
        "tree: install it with `pip install -e .`, or with `pip install .` and run "
        "Python elsewhere."
    )
