"""XLA's own H100 pipeline, run without a GPU: what is left around the native call.

Needs JAX's CUDA plugin and ptxas (`pip install '.[h100]'`), no driver and no GPU. The
plugin compiles for a described device; nothing runs. That a program compiles at all
proves that the CUDA handlers are registered and speak the plugin's FFI version.
"""

import ctypes
import math
import os
import re
from pathlib import Path

import jax
import pytest
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jax_gdn
from jax_gdn import _registration
from tests import test_deferred_transformations as deferred
from tests import test_prefill_transformations as prefill
from tests import test_stacks as stacks
from tests.cases import Case
from tests.hlo import (
    DEFERRED_TARGET,
    TARGET,
    calls,
    collectives,
    copies,
    opcodes,
    state_aliases,
)
from tests.meshes import KINDS, host_arrays, label, mesh_of, specs_of, split, step
from tests.test_aliasing import CASE, PROGRAMS, SHAPE, STATE_BYTES, layers, one_step
from tests.test_pools import BRANCHES, branching
from tests.test_slices import KEEP, inputs_of, name_of
from tests.test_slices import PROGRAMS as OF_SLICES

pytestmark = pytest.mark.cuda_build

OUT_BYTES = 4 * 4 * 128 * 2
DESCRIPTION = Path(__file__).parent / "h100.txtpb"

# What may stand beside the call: names for buffers, no work on the device.
FREE = {"parameter", "custom-call", "get-tuple-element", "tuple", "bitcast", "constant"}
# A loop counts in four bytes, and stacks what each step puts out.
LOOP = FREE | {"while", "add", "compare", "fusion", "copy", "dynamic-update-slice"}


def devices_of(shape: str) -> list:
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=DESCRIPTION.read_text(encoding="utf-8"),
            topology=shape,
        )
    except Exception as error:
        message = f"JAX's CUDA plugin cannot compile for an H100 here: {error}"
        if os.environ.get("JAX_GDN_REQUIRE_H100") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return topology.devices


@pytest.fixture(scope="module")
def h100():
    return SingleDeviceSharding(devices_of("1x1x1")[0])


@pytest.fixture(scope="module")
def eight_h100s():
    return devices_of("1x1x8")


COMMAND_BUFFER_COMPATIBLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE


def ffi_traits(handler) -> int:
    """Asks an FFI handler for its metadata, and returns its traits.

    The 64-bit words are the structs of xla/ffi/api/c_api.h that the build uses.
    """
    metadata = (ctypes.c_size_t * 6)(48, 24)  # size; version: size, ...; traits; ...
    extension = (ctypes.c_size_t * 4)(32, 1, 0, ctypes.addressof(metadata))
    frame = (ctypes.c_size_t * 22)(168, ctypes.addressof(extension))
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype = ctypes.c_void_p
    pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(pointer(handler, None))
    assert call(ctypes.addressof(frame)) is None
    return metadata[4] & 0xFFFFFFFF


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


@pytest.mark.parametrize("program", stacks.PROGRAMS)
@pytest.mark.parametrize("pool", [{}, stacks.POOL], ids=["dense", "pool"])
def test_layer_of_a_stack_in_place(h100, program, pool):
    stack, rest = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100),
        stacks.arrays_of(Case(**stacks.CASE.__dict__ | pool)),
    )
    call = jax.jit(program, donate_argnums=0)
    compiled = call.lower(stack, rest, rest["v"]).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) > 0
    assert copies(text, stack.shape) == copies(text, stack.shape[1:]) == 0
    assert compiled.memory_analysis().temp_size_in_bytes < stacks.LAYER_BYTES


def test_reference_for_the_record(h100, record_property):
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
    print(f"reference on an H100: {len(kernels)} kernels, {passes} passes over a state")
    assert len(kernels) > 1
    assert passes > 2


@pytest.mark.parametrize("program", OF_SLICES, ids=name_of)
def test_slices_compile_into_the_call(h100, program):
    """From jax 0.11 on XLA fuses them with it, and no longer keeps its alias.

    What runs then gives the same bits: `test_slices`, which on a GPU must see such
    fusions.
    """
    case = Case()
    arrays, stack = inputs_of(case)
    arrays, stack = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100),
        (arrays, stack),
    )
    call = jax.jit(
        lambda stack, arrays: program(case, arrays, stack),
        donate_argnums=() if program in KEEP else (0,),
    )
    text = call.lower(stack, arrays).compile().as_text()
    assert calls(text) == state_aliases(text) >= 1  # XLA peels some loops
    fused = re.search(r"^%dynamic-slice-fusion.*?^}", text, re.M | re.S)
    newer = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
    assert (fused is not None) == newer
    assert fused is None or calls(fused[0]) == 1


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_passes_a_pool_through_is_free(h100, name):
    pool, rest = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100),
        branching(name)[1:],
    )
    program = jax.jit(branching(name)[0], donate_argnums=0)
    compiled = program.lower(pool, rest).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, pool.shape) == 0
    size = math.prod(pool.shape) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < size


def test_odd_sizes_fall_back(h100):
    arrays = Case(K=96, V=40).inputs()
    specs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100) for x in arrays.values()
    ]
    call = jax.jit(lambda *x: jax_gdn.decode(*x))
    with pytest.warns(UserWarning, match="got K = 96"):
        assert calls(call.lower(*specs).compile().as_text()) == 0


def compile_on_mesh(devices, kind, case, function, **specs):
    """Compiles a donating step for a mesh; returns HLO and a device's state shape."""
    mesh = mesh_of(kind, devices=devices)
    named = specs_of(case, **specs)
    arrays = {
        name: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, named[name])
        )
        for name, x in host_arrays(case).items()
    }
    state, rest = split(arrays)
    compiled = jax.jit(function, donate_argnums=0).lower(state, rest).compile()
    return compiled, state.sharding.shard_shape(state.shape)


SHARDED = [
    (Case(B=4, H=4, HV=8), {}),
    (Case(B=4, H=4, HV=8, T=3, layout="VK", per_channel=True), {}),
    (Case(B=4, H=2, HV=8), {"key_heads": None}),
    (Case(B=4, H=4, HV=8, N=6, reads=(5, 0, 3, -1)), {"b": None}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("case", "specs"), SHARDED, ids=label)
def test_eight_devices_do_not_talk(eight_h100s, case, specs, kind):
    compiled, shard = compile_on_mesh(eight_h100s, kind, case, step(case), **specs)
    text = compiled.as_text()
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, shard) == 0
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * math.prod(shard)


@pytest.mark.parametrize("T", [128, 1000])
def test_prefill_takes_the_faster_way(h100, T):
    """Few tokens go one by one in the native call, many in chunks; both in place."""
    case = Case(B=1, T=T, H=4, HV=8)
    state, rest = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100),
        split(host_arrays(case)),
    )
    call = jax.jit(prefill.step(case), donate_argnums=0)
    compiled = call.lower(state, rest).compile()
    assert calls(compiled.as_text()) == (T == 128)
    size = 4 * math.prod(state.shape)
    assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_prefill_on_eight_devices(eight_h100s, kind):
    """Of 512 states a device has 64, few enough for chunks."""
    case = Case(B=16, T=300, H=16, HV=32)
    function = prefill.step(case)
    compiled, shard = compile_on_mesh(eight_h100s, kind, case, function)
    assert collectives(compiled.as_text()) == []
    assert calls(compiled.as_text()) == 0
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * math.prod(shard)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_eight_devices_in_a_scan(eight_h100s, kind):
    case = Case(B=4, H=4, HV=8)

    def scan(state, rest):
        return lax.scan(lambda s, _: step(case)(s, rest), state, length=3)

    compiled, shard = compile_on_mesh(eight_h100s, kind, case, scan)
    text = compiled.as_text()
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, shard) == 0


def test_split_over_K_gathers(eight_h100s):
    """That the counting above would see it."""
    case = Case(B=4, H=4, HV=8)
    specs = {"h": None, "key_heads": None, "state": P("b", None, "h")}
    compiled, _ = compile_on_mesh(eight_h100s, KINDS[0], case, step(case), **specs)
    assert "all-gather" in collectives(compiled.as_text())


@pytest.mark.parametrize("mapped", ["all", "weights too", "nested"])
def test_vmap_is_one_call_in_place(h100, mapped):
    """A leading mapped axis joins B without a copy."""
    arrays = Case(B=3).inputs()
    weights = () if mapped == "weights too" else ("A_log", "dt_bias")
    lead = (2, 2) if mapped == "nested" else (2,)
    specs = {
        name: jax.ShapeDtypeStruct(
            x.shape if name in weights else (*lead, *x.shape), x.dtype, sharding=h100
        )
        for name, x in arrays.items()
    }
    state, rest = split(specs)
    axes = {name: None if name in weights else 0 for name in rest}
    call = step(Case())
    for _ in lead:
        call = jax.vmap(call, (0, axes))
    compiled = jax.jit(call, donate_argnums=0).lower(state, rest).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) == 1
    merged = (math.prod(state.shape[:-3]), *state.shape[-3:])
    assert copies(text, state.shape) == copies(text, merged) == 0
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * math.prod(state.shape)


def test_handler_is_command_buffer_compatible():
    """Asks the registered handler as XLA does, when it decides what to capture."""
    stages = _registration.cuda.handlers()[TARGET]
    assert ffi_traits(stages["execute"]) == COMMAND_BUFFER_COMPATIBLE


def test_command_buffer_options_are_known(h100):
    """The options of the README compile; what they capture is seen on a GPU."""
    state, rest = arguments(layers, h100)
    options = {
        "xla_gpu_enable_command_buffer": "CUSTOM_CALL",
        "xla_gpu_graph_min_graph_size": 1,
    }
    call = jax.jit(layers, donate_argnums=0, compiler_options=options)
    assert calls(call.lower(state, rest).compile().as_text()) == 12


@pytest.mark.parametrize(("T", "stack"), [(1, None), (3, None), (2, 2)])
def test_deferred_writes_in_a_loop_copy_nothing(h100, T, stack):
    """States and rings are carried in place, and so are the cursors."""
    given = deferred.call_of(T, layers=stack, K=128, V=128)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100), given
    )

    def loop(state, pending, cursors, rest):
        def body(i, carry):
            state, pending, cursors = carry
            layer = None if stack is None else i % stack
            _, state, pending = deferred.step(
                state, pending, cursors, rest, layer=layer
            )
            return state, pending, jax_gdn.advance_cursors(cursors, pending, T)

        return lax.fori_loop(0, 5, body, (state, pending, cursors))

    compiled = jax.jit(loop, donate_argnums=(0, 1, 2)).lower(*shapes).compile()
    text = compiled.as_text()
    assert calls(text, DEFERRED_TARGET) > 0
    names = {"float32": "f32", "bfloat16": "bf16"}
    for x in jax.tree.leaves(given[:2]):
        assert copies(text, x.shape, names[x.dtype.name]) == 0
    assert compiled.memory_analysis().temp_size_in_bytes < given[0].nbytes
