"""The `jax-gdn` command."""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_gdn
from jax_gdn import _registration


def _operands(B: int) -> dict[str, Any]:
    """Returns random operands for one token in one layer of Qwen3-Next."""
    rng, (H, HV, K) = np.random.default_rng(0), (16, 32, 128)
    token = {"q": (H, K), "k": (H, K), "v": (HV, K), "a": (HV,), "b": (HV,)}
    layer = {"state": (B, HV, K, K), "A_log": (HV,), "dt_bias": (HV,)}
    # Copies: memory that JAX shares with NumPy cannot be donated.
    return {
        name: jnp.array(
            rng.standard_normal(shape, np.float32),
            "bfloat16" if name in token else "float32",
        )
        for name, shape in ({n: (B, 1, *x) for n, x in token.items()} | layer).items()
    }


def _implementation(device: Any) -> str:
    """Tries one native call on a device, and says what `decode` runs there."""
    try:
        with jax.default_device(device):
            call = jax_gdn.decode(**_operands(1), implementation="native")
            jax.block_until_ready(call)
    except ImportError:
        return "none: the native modules do not fit this jaxlib"
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return f"reference: {str(error).splitlines()[0]}"
    return f"native, {'host' if device.platform == 'cpu' else 'CUDA'} kernel"


def _demo(B: int) -> int:
    device, rest = jax.devices()[0], _operands(B)
    expected = jax.jit(jax_gdn.reference_decode)(**rest)
    decode = jax.jit(jax_gdn.decode, donate_argnames="state")
    where = rest["state"].unsafe_buffer_pointer()
    out, state = decode(state=rest.pop("state"), **rest)
    pairs = zip((out, state), expected, strict=True)
    errors = [float(abs(x - y).astype("float32").max()) for x, y in pairs]

    def seconds(calls: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(calls):
            _, state = decode(state=state, **rest)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / calls

    calls = max(1, int(0.2 / seconds(8)))
    call = statistics.median(seconds(calls) for _ in range(5))
    stayed = state.unsafe_buffer_pointer() == where
    _print_rows(
        {
            "device": f"{device.device_kind} ({device.platform})",
            "implementation": _implementation(device),
            "one layer": f"{call * 1e6:,.0f} us a call, one token of {B} sequences",
            "state traffic": f"{2 * state.nbytes / call / 1e9:,.1f} GB/s",
            "largest error": f"{errors[0]:.1e} in out, {errors[1]:.1e} in the state",
            "state's buffer": "stayed where it was" if stayed else "MOVED",
        }
    )
    return 0 if stayed else 1


def _info() -> int:
    cpu, cuda = _registration.cpu, _registration.cuda
    rows = {
        "jax_gdn": jax_gdn.__version__,
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.version.__version__}",
        "XLA FFI": "jaxlib speaks {}.{}".format(*_registration.runtime_ffi_version()),
        "target": _registration.DECODE_TARGET,
    }
    host = f"{cpu.instruction_set()}, at most {cpu.usable_cpus()} threads"
    rows["host module"] = _module_text(cpu, host)
    rows["CUDA module"] = "not in this build"
    if cuda is not None:
        text = "CUDA {}.{} runtime, architectures ".format(*cuda.CUDA_VERSION)
        text += f"{cuda.ARCHITECTURES}, {len(cuda.kernels())} kernels"
        rows["CUDA module"] = _module_text(cuda, text)
    for device in jax.devices():
        name = f"{device.device_kind} ({device.platform})"
        rows[f"device {device.id}"] = f"{name}: {_implementation(device)}"
    _print_rows(rows)
    return 1 if _registration.unregistered else 0


def _module_text(module: Any, details: str) -> str:
    if held_back := _registration.unregistered.get(module.__name__):
        return f"NOT registered: {held_back}"
    return "registered, FFI {}.{}, {}".format(*module.FFI_API_VERSION, details)


def _print_rows(rows: dict[str, str]) -> None:
    for name, text in rows.items():
        print(f"{name:>14}  {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="jax-gdn")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser("demo", help="check and time a decode loop here")
    demo.add_argument("--batch", type=int, default=32, help="sequences (32)")
    commands.add_parser("info", help="versions, devices, and what runs on them")
    given = parser.parse_args(argv)
    if given.command == "demo" and given.batch < 1:
        parser.error("--batch must be at least 1")
    return _info() if given.command == "info" else _demo(given.batch)
