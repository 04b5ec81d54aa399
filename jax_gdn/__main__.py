"""The `jax-gdn` command, and `python -m jax_gdn`."""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

import jax_gdn
from jax_gdn import _registration


def _operands(B: int) -> dict[str, Any]:
    """Returns random operands for one token in one layer of Qwen3-Next."""
    H, HV, K = 16, 32, 128
    token = {"q": (H, K), "k": (H, K), "v": (HV, K), "a": (HV,), "b": (HV,)}
    shapes = {name: (B, 1, *shape) for name, shape in token.items()}
    shapes |= {"state": (B, HV, K, K), "A_log": (HV,), "dt_bias": (HV,)}
    dtypes = {name: "bfloat16" if name in token else "float32" for name in shapes}
    keys = zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True)
    return {n: jax.random.normal(key, shapes[n], dtypes[n]) for n, key in keys}


def _implementation(device: Any) -> str:
    """Tries one native call on a device, and says what `decode` runs there."""
    try:
        with jax.default_device(device):
            call = jax_gdn.decode(**_operands(1), implementation="native")
            jax.block_until_ready(call)
    except ImportError:
        return "none: the native modules do not fit this jaxlib"
    except NotImplementedError as error:
        return f"reference: {str(error).splitlines()[0]}"
    except jax.errors.JaxRuntimeError as error:  # also without implementation="native"
        return f"an error: {str(error).splitlines()[0]}"
    return f"native, {'host' if device.platform == 'cpu' else 'CUDA'} kernel"


def _demo(B: int) -> tuple[dict[str, str], int]:
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
    rows = {
        "device": f"{device.device_kind} ({device.platform})",
        "implementation": _implementation(device),
        "one layer": f"{call * 1e6:,.0f} us a call, one token of {B} sequences",
        "state traffic": f"{2 * state.nbytes / call / 1e9:,.1f} GB/s",
        "largest error": f"{errors[0]:.1e} in out, {errors[1]:.1e} in the state",
        "state's buffer": "stayed where it was" if stayed else "MOVED",
    }
    return rows, 0 if stayed else 1


def _info() -> tuple[dict[str, str], int]:
    cpu, cuda = _registration.cpu, _registration.cuda
    host = f"{cpu.instruction_set()}, at most {cpu.usable_cpus()} threads"
    kernels = cuda and (
        "CUDA {}.{} runtime, architectures ".format(*cuda.CUDA_VERSION)
        + f"{cuda.ARCHITECTURES}, {len(cuda.kernels())} kernels"
    )
    rows = {
        "jax_gdn": jax_gdn.__version__,
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.version.__version__}",
        "XLA FFI": "jaxlib speaks {}.{}".format(*_registration.runtime_ffi_version()),
        "targets": f"{_registration.DECODE_TARGET}, {_registration.DEFERRED_TARGET}",
        "host module": _module_text(cpu, host),
        "CUDA module": (cuda and _module_text(cuda, kernels)) or "not in this build",
    }
    for device in jax.devices():
        name = f"{device.device_kind} ({device.platform})"
        rows[f"device {device.id}"] = f"{name}: {_implementation(device)}"
    return rows, 1 if _registration.unregistered else 0


def _module_text(module: Any, details: str) -> str:
    if held_back := _registration.unregistered.get(module.__name__):
        return f"NOT registered: {held_back}"
    return "registered, FFI {}.{}, {}".format(*module.FFI_API_VERSION, details)


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
    rows, status = _info() if given.command == "info" else _demo(given.batch)
    for name, text in rows.items():
        print(f"{name:>14}  {text}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
