"""The bandwidth roofline: an in-place pass over the state bytes.

On a GPU it is a CUDA kernel, because XLA's own is several percent slower.
"""

import functools as ft
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .loops import COMMAND_BUFFERS, DeviceLoop, HostLoop
from .timing import measure
from .workload import Inputs, Step, on_gpu

TARGET = "jax_gdn_bench.in_place_pass"


def native_module() -> ModuleType:
    """Returns the module of the CUDA passes; raises where it was not built."""
    try:
        return importlib.import_module("jax_gdn._bench_cuda")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the roofline on a GPU is a CUDA kernel that this build of jax_gdn does "
            "not have: pip install -e . -Ccmake.define.JAX_GDN_BENCH=ON"
        ) from error


def jnp_pass(state: Array, _: Inputs) -> tuple[Array, tuple[()]]:
    """Changes the sign of every entry.

    Repeated, that neither decays into denormals nor overflows. Of bits, because XLA's
    host code takes detours through float32 where a dtype is bfloat16.
    """
    width = 8 * state.dtype.itemsize
    bits = lax.bitcast_convert_type(state, f"uint{width}")
    signs = jnp.array(1 << (width - 1), bits.dtype)
    return lax.bitcast_convert_type(bits ^ signs, state.dtype), ()


@ft.cache
def _register() -> None:
    handler = native_module().handler()
    jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA")


def native_pass(number: int) -> Step:
    """Returns one of the CUDA passes, which does the same."""
    _register()

    def step(state: Array, after: Inputs) -> tuple[Array, tuple[()]]:
        call = jax.ffi.ffi_call(
            TARGET,
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            input_output_aliases={0: 0},
        )
        return call(state, *after.values(), number=np.int32(number)), ()

    return step


def loop_of(states: list[Array]) -> Any:
    """Returns a loop of in-place passes, on a GPU of the fastest over these states."""
    if not on_gpu():
        return HostLoop(jnp_pass, states[:1], [{}])
    loops = {
        name: DeviceLoop(
            native_pass(number),
            states,
            [{}] * len(states),
            compiler_options=COMMAND_BUFFERS,
        )
        for number, name in enumerate(native_module().PASSES)
    }
    timings = measure(loops, seconds=0.5, rounds=5)
    return loops[min(loops, key=lambda name: timings[name].median)]
