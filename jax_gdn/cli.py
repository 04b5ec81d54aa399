"""The `jax-gdn` command."""

import argparse
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import jax_gdn
from jax_gdn import _bench, _bench_run, _registration


def _native_kernel(device: Any) -> tuple[str | None, str]:
    """Returns the native kernel's name for a device, or None, and an explanation."""
    if _registration.unregistered:
        return None, "the native modules do not fit this jaxlib"
    if device.platform == "cpu":
        return "host kernel", "any K and V"
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return None, f"there is no native kernel for {device.platform}"
    if _registration.cuda is None:
        return None, "this build of jax_gdn has no CUDA kernels"
    capability = str(getattr(device, "compute_capability", "0"))
    if int(capability.split(".")[0]) < 9:
        return None, (
            f"compute capability {capability}; the CUDA kernel needs 9.0 or newer"
        )
    return "CUDA kernel", "K of 64, 128, 192 or 256; V a multiple of 16"


def _demo(arguments: argparse.Namespace) -> int:
    device = jax.devices()[0]
    kernel, why = _native_kernel(device)
    implementation = "native" if kernel else "xla"
    config = _bench.Config(B=arguments.batch)
    inputs = _bench.model_inputs(config)
    state, rest = _bench.split_state(inputs)
    step = _bench.decode_step(implementation)
    chains = {
        "decode": _bench.SteppedChain(step, [state], [rest]),
        "in-place pass": _bench.SteppedChain(_bench.in_place_pass, [state], [{}]),
    }

    out, state = jax_gdn.decode(**inputs, implementation=implementation)
    expected_out, expected_state = jax.jit(jax_gdn.reference_decode)(**inputs)
    error_out, error_state = (
        float(jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))))
        for x, y in ((out, expected_out), (state, expected_state))
    )
    loop = jax.jit(step, donate_argnums=0)
    state = jnp.array(inputs["state"])
    where = state.unsafe_buffer_pointer()
    for _ in range(8):
        state, _ = loop(state, rest)
    stayed = jax.block_until_ready(state).unsafe_buffer_pointer() == where
    timings = _bench.measure(chains, seconds=8)

    seconds = timings["decode"].median
    traffic = 2 * config.state_bytes / 1e9
    rate = {name: traffic / timing.median for name, timing in timings.items()}
    share = rate["decode"] / rate["in-place pass"]
    rows = {
        "device": f"{device.device_kind} ({device.platform})",
        "implementation": f"native, {kernel}" if kernel else f"XLA form: {why}",
        "shapes": f"B {config.B}, H {config.H}, HV {config.HV}, K {config.K}, "
        f"V {config.V}, bfloat16; state float32",
        "one layer": f"{seconds * 1e6:,.0f} us a call, one token of each sequence",
        "state traffic": f"{rate['decode']:,.1f} GB/s; an in-place pass over the same "
        f"bytes: {rate['in-place pass']:,.1f} GB/s ({share:.0%})",
        "largest error": f"{error_state:.1e} in the state, {error_out:.1e} in out "
        "(bfloat16), against reference_decode",
        "state's buffer": "stayed where it was" if stayed else "MOVED",
    }
    _print_rows(rows)
    return 0 if stayed else 1


def _info(_: argparse.Namespace) -> int:
    rows = {
        "jax_gdn": jax_gdn.__version__,
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.version.__version__}",
        "python, numpy": f"{platform.python_version()}, {np.__version__}",
        "XLA FFI": "jaxlib speaks {}.{}".format(*_registration.runtime_ffi_version()),
        "target": _registration.DECODE_TARGET,
        "host module": _module_text(
            _registration.cpu,
            f"instruction set {_registration.cpu.instruction_set()}, "
            f"at most {_registration.cpu.usable_cpus()} threads",
        ),
        "CUDA module": "not in this build",
    }
    if _registration.cuda is not None:
        rows["CUDA module"] = _module_text(
            _registration.cuda,
            "CUDA {}.{} runtime, ".format(*_registration.cuda.CUDA_VERSION)
            + f"architectures {_registration.cuda.ARCHITECTURES}, "
            f"{len(_registration.cuda.kernel_symbols())} kernels",
        )
    for device in jax.devices():
        kernel, why = _native_kernel(device)
        rows[f"device {device.id}"] = f"{device.device_kind} ({device.platform}): " + (
            f"native, {kernel} ({why})" if kernel else f"XLA form only: {why}"
        )
    _print_rows(rows)
    return 1 if _registration.unregistered else 0


def _module_text(module: Any, details: str) -> str:
    held_back = _registration.unregistered.get(module.__name__)
    if held_back is not None:
        return f"NOT registered: {held_back}"
    version = "{}.{}".format(*module.FFI_API_VERSION)
    return f"registered, FFI {version}, {details}"


def _benchmark(arguments: argparse.Namespace) -> int:
    kernel, why = _native_kernel(jax.devices()[0])
    try:
        if kernel is None:
            raise NotImplementedError(f"jax-gdn bench: no native kernel to time: {why}")
        return _bench_run.run(arguments)
    except (ArithmeticError, ImportError, NotImplementedError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:>{width}}  {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="jax-gdn", description="Gated-delta-rule decode for JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="run and time a decode loop on this device")
    demo.add_argument("--batch", type=positive, default=32, help="sequences (32)")
    demo.set_defaults(run=_demo)
    info = commands.add_parser("info", help="versions, devices, and what runs on them")
    info.set_defaults(run=_info)
    bench = commands.add_parser("bench", help="time decode against XLA and the limit")
    _bench_run.add_options(bench, positive)
    bench.set_defaults(run=_benchmark)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def positive(text: str) -> int:
    """Reads a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1, got {text}"
        )
    return value
