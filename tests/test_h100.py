"""XLA's own H100 pipeline, run without a GPU: what is left around the native call.

Needs JAX's CUDA plugin and ptxas (`pip install '.[h100]'`), no driver and no GPU. The
plugin compiles for a described device; nothing runs. That a program compiles at all
proves that the CUDA handlers are registered and speak the plugin's FFI version.
"""

import os
import re
from pathlib import Path

import jax
import pytest
from cases import Case
from hlo import calls, copies, opcodes, state_aliases
from jax.sharding import SingleDeviceSharding
from test_aliasing import CASE, PROGRAMS, SHAPE, STATE_BYTES, layers, one_step

import jax_gdn

OUT_BYTES = 4 * 4 * 128 * 2
DESCRIPTION = Path(__file__).parent / "h100.txtpb"

# What may stand beside the call: names for buffers, no work on the device.
FREE = {"parameter", "custom-call", "get-tuple-element", "tuple", "bitcast", "constant"}
# A loop counts in four bytes, and stacks what each step puts out.
LOOP = FREE | {"while", "add", "compare", "fusion", "copy", "dynamic-update-slice"}


@pytest.fixture(scope="module")
def h100():
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=DESCRIPTION.read_text(encoding="utf-8"),
            topology="1x1x1",
        )
    except Exception as error:
        message = f"JAX's CUDA plugin cannot compile for an H100 here: {error}"
        if os.environ.get("JAX_GDN_REQUIRE_H100") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return SingleDeviceSharding(topology.devices[0])


def arguments(program, sharding):
    arrays = CASE.inputs()
    specs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in arrays.items()
    }
    state = specs.pop("state")
    if program is layers:
        state = {f"layer{i:02}": state for i in range(12)}
    return state, list(specs.values())


def compile_for(h100, program, donate: bool):
    donated = (0,) if donate else ()
    call = jax.jit(program, donate_argnums=donated)
    return call.lower(*arguments(program, h100)).compile()


@pytest.mark.parametrize("program", PROGRAMS)
def test_donated_decode_is_the_call_and_nothing_else(h100, program):
    compiled = compile_for(h100, program, donate=True)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    number = 12 if program is layers else 1
    assert calls(text) == state_aliases(text) == number
    assert copies(text, SHAPE) == 0
    straight = program in (one_step, layers)
    assert opcodes(text) <= (FREE if straight else LOOP)
    # The pointer table of each call's two results is all there is; a loop also keeps
    # one step's `out` and a counter. Buffers are 256-byte aligned.
    loop_bytes = 0 if straight else OUT_BYTES + 2 * 256
    assert memory.temp_size_in_bytes <= 256 * number + loop_bytes
    assert memory.alias_size_in_bytes >= number * STATE_BYTES


@pytest.mark.parametrize("program", PROGRAMS)
def test_kept_state_costs_one_copy(h100, program):
    text = compile_for(h100, program, donate=False).as_text()
    number = 12 if program is layers else 1
    assert calls(text) == state_aliases(text) == number
    assert copies(text, SHAPE) == number


def test_xla_form_for_the_record(h100, record_property):
    """The same step without the kernel: a copy of the state and several passes."""

    def step(state, rest):
        q, k, v, *gates = rest
        out, state = jax_gdn.decode(q, k, v, state, *gates, implementation="xla")
        return state, out

    text = str(compile_for(h100, step, donate=True).as_text())
    entry = text[text.index("\nENTRY") :]
    shape = ",".join(map(str, SHAPE))
    kernels = re.findall(r"= \S+ (?:fusion|copy|custom-call)\(", entry)
    passes = len(re.findall(rf"= f32\[{shape}\]\S* (?:fusion|copy)\(", entry))
    for producer in re.findall(rf"%(\S+) = f32\[{shape}\]", entry):
        passes += len(re.findall(rf"(?:fusion|copy)\([^\n]*%{producer}[,)]", entry))
    record_property("kernels", len(kernels))
    record_property("state passes", passes)
    print(f"XLA form on an H100: {len(kernels)} kernels, {passes} passes over a state")
    assert len(kernels) > 1
    assert passes > 2


def test_odd_sizes_fall_back(h100):
    arrays = Case(K=96, V=40).inputs()
    specs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100) for x in arrays.values()
    ]
    call = jax.jit(lambda *x: jax_gdn.decode(*x))
    with pytest.warns(UserWarning, match="got K = 96"):
        assert calls(call.lower(*specs).compile().as_text()) == 0
