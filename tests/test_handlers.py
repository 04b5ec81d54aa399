"""The registered handlers, called by clients that are wrong or that no alias binds."""

import os
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from jax_gdn import _operands, _registration
from tests.cases import DTYPES, LAYOUTS, Case
from tests.ffi_client import Array, Client, plain_attributes
from tests.hlo import TARGET
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

OF_OTHERS = (*_operands.DEFERRED, "lengths")
OPTIONAL = tuple(n for n in _operands.OPTIONAL if n not in OF_OTHERS)
REQUIRED = tuple(
    name
    for name in _operands.Operands._fields
    if name not in (*OPTIONAL, *OF_OTHERS, "layer")
)
MODULES = ["_cpu", pytest.param("_cuda", marks=pytest.mark.cuda_build)]
SMALL = {"B": 3, "T": 2, "H": 2, "HV": 4, "K": 64, "V": 32}
POOL = {"N": 7, "reads": (5, -1, 2)}
FORMS = [
    Case(**SMALL, **pool, layout=layout, state=state)
    for layout in LAYOUTS
    for state in DTYPES
    for pool in ({}, POOL, {**POOL, "writes": ((0, 5), (1, 1), (-1, 3))})
]


def client_of(module: str, **options) -> Client:
    native = {"_cpu": _registration.cpu, "_cuda": _registration.cuda}[module]
    return Client(native.handlers()[TARGET]["execute"], **options)


def attributes_of(case: Case, names) -> dict:
    bits = sum(1 << i for i, name in enumerate(OPTIONAL) if name in names)
    return plain_attributes(case.K, case.layout, bits)


def call_of(case: Case) -> tuple[list, list, dict]:
    """Returns operands, results and attributes, each result in memory of its own."""
    arrays = case.inputs() | case.slots
    operands = [arrays[name] for name in (*REQUIRED, *OPTIONAL) if name in arrays]
    out = np.full(arrays["v"].shape, 7, case.out_dtype)
    if case.output:
        arrays["output"] = np.zeros_like(out)
        operands.insert(len(REQUIRED), arrays["output"])
    results = [out, np.full_like(arrays["state"], 7)]
    return operands, results, attributes_of(case, arrays)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_state_and_new_state_in_two_buffers(case):
    """As XLA hands them over where it drops the alias: the bits of the call in place.

    The state keeps its bytes; so do the new state's slots that no row writes.
    """
    arrays = {n: jnp.asarray(x) for n, x in (case.inputs() | case.slots).items()}
    expected = jax_gdn.decode(**arrays, state_layout=case.layout)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in expected]
    call = jax.jit(
        lambda *x: jax.ffi.ffi_call(TARGET, types)(*x, **attributes_of(case, arrays))
    )
    out, new_state = call(*arrays.values())
    assert np.asarray(out).tobytes() == np.asarray(expected[0]).tobytes()
    assert np.asarray(new_state).tobytes() == np.asarray(expected[1]).tobytes()
    before = case.inputs()["state"]
    assert np.asarray(arrays["state"]).tobytes() == before.tobytes()


@pytest.mark.parametrize("pool", [{}, POOL], ids=["dense", "pool"])
def test_stack_and_new_stack_in_two_buffers(pool):
    """All layers are copied; the one that is named is updated."""
    case = Case(**SMALL, **pool, layers=3, layer=1)
    arrays = {n: jnp.asarray(x) for n, x in (case.inputs() | case.slots).items()}
    expected = jax_gdn.decode(**arrays, layer=1)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in expected]
    attributes = attributes_of(case, arrays) | {"layer": np.int32(1)}
    call = jax.jit(lambda *x: jax.ffi.ffi_call(TARGET, types)(*x, **attributes))
    out, stack = call(*arrays.values())
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected[0]))
    np.testing.assert_array_equal(np.asarray(stack), np.asarray(expected[1]))
    before = case.inputs()["state"]
    np.testing.assert_array_equal(np.asarray(stack)[::2], before[::2])
    np.testing.assert_array_equal(np.asarray(arrays["state"]), before)


def test_pool_of_its_own_buffer_is_copied_where_no_row_is():
    case = Case(B=0, N=3, K=64, V=32, reads=())
    arrays = {n: jnp.asarray(x) for n, x in (case.inputs() | case.slots).items()}
    types = [jax.ShapeDtypeStruct(arrays[n].shape, jnp.float32) for n in ("v", "state")]
    call = jax.ffi.ffi_call(TARGET, types)
    _, new_state = jax.jit(lambda *x: call(*x, **attributes_of(case, arrays)))(
        *arrays.values()
    )
    np.testing.assert_array_equal(np.asarray(new_state), case.inputs()["state"])


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("case", [FORMS[2], FORMS[11]], ids=lambda case: case.id)
def test_alignment(module, case):
    """Small operands may lie at any multiple of their elements, vectors of 16 bytes."""
    names = [n for n in (*REQUIRED, *OPTIONAL) if n in case.inputs() | case.slots]
    for name in names:
        operands, results, attributes = call_of(case)
        at = names.index(name)
        x = operands[at]
        room = np.zeros(x.nbytes + 64, np.uint8)
        first = -room.ctypes.data % 64 + x.dtype.itemsize
        room[first : first + x.nbytes] = x.reshape(-1).view(np.uint8)
        given = list(map(Array, operands))
        given[at] = Array(room.ctypes.data + first, x.dtype, x.shape)
        vector = name in ("q", "k", "v", "state")
        if module == "_cuda" and not vector:
            continue  # would be launched; what tells them apart is the same
        message = client_of(module).call(given, list(map(Array, results)), attributes)
        if vector:
            assert (
                message == f"jax_gdn.decode: {name} must lie at a multiple of 16 bytes"
            )
            continue
        assert message is None
        out, state = decode64(**case.inputs(), **case.slots, state_layout=case.layout)
        assert_close(results[0], out, OUT_TOLERANCE, "out")
        assert_close(results[1], state, STATE_TOLERANCE, "state")


# Where a result begins, in bytes behind the beginning of what it must not overlap.
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("operand", [*REQUIRED, *OPTIONAL])
@pytest.mark.parametrize("shift", [-16, 0, 16])
def test_overlapping_buffers_are_refused(module, result, operand, shift):
    case = Case(**SMALL, **POOL, writes=(0, 1, 2))
    operands, results, attributes = call_of(case)
    names = (*REQUIRED, *OPTIONAL)
    operands.insert(len(REQUIRED), np.zeros_like(results[0]))
    attributes["optional_operands"] = np.int32(7)
    index = names.index(operand)
    given = list(map(Array, operands))
    room = np.zeros(64 + max(operands[index].nbytes, results[result].nbytes), np.uint8)
    first = -(-(room.ctypes.data + 16) // 16) * 16
    x = operands[index]
    shift = shift if x.nbytes > 16 or shift < 0 else 0
    given[index] = Array(first, x.dtype, x.shape)
    to = list(map(Array, results))
    y = results[result]
    to[result] = Array(first + shift, y.dtype, y.shape)
    may_share = (operand, result) in (("state", 1), ("output", 0))
    if may_share and shift == 0:
        if module == "_cpu":
            assert client_of(module).call(given, to, attributes) is None
        return
    message = client_of(module).call(given, to, attributes)
    written = ("out", "the new state")[result]
    assert message == f"jax_gdn.decode: {written} must not overlap {operand}"
    assert (results[0] == 7).all() or result == 0


@pytest.mark.parametrize("module", MODULES)
def test_results_that_overlap_are_refused(module):
    operands, results, attributes = call_of(Case(**SMALL))
    to = list(map(Array, results))
    to[0] = Array(to[1].address, results[0].dtype, results[0].shape)
    message = client_of(module).call(list(map(Array, operands)), to, attributes)
    assert message == "jax_gdn.decode: the new state must not overlap out"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("state_layout", 7, "state_layout must be 0 (KV) or 1 (VK), got 7"),
        ("state_layout", -1, "state_layout must be 0 (KV) or 1 (VK), got -1"),
        ("optional_operands", 8, "optional_operands, 8, must say which of output"),
        ("optional_operands", 2, "optional_operands, 2, must say which of output"),
        ("optional_operands", -1, "optional_operands, -1, must say which of output"),
        ("gates", 2, "optional_operands, 0, must say which of output"),
        ("gates", 3, "gates must be 0 (softplus), 1 (sigmoid) or 2 (given), got 3"),
        ("layer", 0, "layer must be one of a stack [L, N, ...], or -1; got 0 of [3, "),
        ("layer", -2, "layer must be one of a stack [L, N, ...], or -1; got -2 of [3"),
    ],
)
def test_attributes_of_another_program_are_refused(module, attribute, value, said):
    operands, results, attributes = call_of(Case(**SMALL))
    attributes[attribute] = np.int32(value)
    message = client_of(module).call(
        list(map(Array, operands)), list(map(Array, results)), attributes
    )
    assert message.startswith(f"jax_gdn.decode: {said}")


@pytest.mark.cuda_build
@pytest.mark.parametrize("layout", [2, 7, -1, 2**31 - 1])
def test_planning_refuses_an_unknown_layout(layout):
    arrays = Case(**SMALL).inputs()
    arrays["out"] = np.zeros(arrays["v"].shape, np.float32)
    operands = {n: (x.ctypes.data, str(x.dtype), x.shape) for n, x in arrays.items()}
    with pytest.raises(ValueError, match=rf"0 \(KV\) or 1 \(VK\), got {layout}"):
        _registration.cuda.plan(operands, 1.0, True, state_layout=layout)


def mutate(rng, operands: list, results: list, attributes: dict) -> None:
    """Makes one thing of a call another than it was."""
    arrays = operands + results
    x = arrays[rng.integers(len(arrays))]
    kind = rng.integers(7)
    if kind == 0:
        x.dtype = rng.choice(["int32", "float64", "bool", "int64", "uint8", "float16"])
    elif kind == 1 and x.shape:
        at = rng.integers(len(x.shape))
        size = int(rng.choice([0, 1, 5, 31, 2**31, 2**33, 2**62]))
        x.shape = (*x.shape[:at], size, *x.shape[at + 1 :])
    elif kind == 2:
        x.shape = x.shape[1:] if rng.integers(2) else (*x.shape, 1)
    elif kind == 3:
        x.address += int(rng.integers(1, 16))
    elif kind == 4:
        name = rng.choice(sorted(attributes))
        values = [-1, 2, 3, 7, 8, 2**31 - 1, -(2**31)]
        attributes[name] = np.int32(rng.choice(values))
    elif kind == 5:
        attributes.pop(rng.choice(sorted(attributes)))
    elif rng.integers(2):
        operands.pop()
    else:
        operands.append(operands[0])


# What an error may name: an argument, an attribute, or, of XLA's own, what it counts.
NAMED = (*REQUIRED, *OPTIONAL, "out", "new state", "attribute", "arguments", "operands")
NAMED += ("gates", "layer")


def test_no_wrong_program_goes_unnoticed_or_crashes():
    """10,000 calls with one to three things changed, on every module's handler."""
    rng = np.random.default_rng(0)
    host = client_of("_cpu")
    cuda = client_of("_cuda") if _registration.cuda is not None else None
    cases = [
        *FORMS[:3],
        Case(**SMALL, per_channel=True),
        Case(**SMALL, **POOL, output="float32"),
    ]
    calls = [call_of(case) for case in cases]
    outcomes = Counter()
    for number in range(10_000):
        arrays, results, attributes = calls[number % len(calls)]
        operands, to = list(map(Array, arrays)), list(map(Array, results))
        attributes = dict(attributes)
        for _ in range(rng.integers(1, 4)):
            mutate(rng, operands, to, attributes)
        message = host.call(operands, to, attributes)
        if message is None:
            outcomes["still right"] += 1  # and the CUDA handler would launch
            continue
        outcomes["refused"] += 1
        assert any(name in message for name in NAMED), message
        assert cuda is None or cuda.call(operands, to, attributes) == message
    assert outcomes["refused"] > 8_000, outcomes


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),  # a fifth of one
        ({"cpu.max": "9900000 100000"}, None),  # more than there are
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": ""}, None),
    ],
)
def test_a_quota_is_fewer_cpus(files, cpus, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    everything = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        everything = len(os.sched_getaffinity(0))
    assert _registration.cpu.usable_cpus(str(tmp_path)) == (cpus or everything)


def test_no_more_threads_than_cpus():
    """However wide the pool is, and however soon its threads start."""
    operands, results, attributes = call_of(Case(B=4, H=8, HV=16))
    client = client_of("_cpu", threads=256)
    client.at_once = True
    given, to = list(map(Array, operands)), list(map(Array, results))
    assert client.call(given, to, attributes) is None
    assert client.scheduled <= _registration.cpu.usable_cpus() - 1


@pytest.mark.parametrize("threads", [1, 2, 64, 256])
@pytest.mark.parametrize("late", [False, True])
def test_threads_that_come_late_or_never_change_nothing(threads, late):
    """Helpers of a pool that only start when the call has ended find nothing to do."""
    case = Case(B=4, H=8, HV=16)
    operands, results, attributes = call_of(case)
    client = client_of("_cpu", threads=threads)
    assert (
        client.call(list(map(Array, operands)), list(map(Array, results)), attributes)
        is None
    )
    woken = len(client.tasks)
    assert woken <= min(threads - 1, 2)  # by the caller; a helper that runs wakes more
    if late:
        client.run_tasks()
    out, state = decode64(**case.inputs())
    assert_close(results[0], out, OUT_TOLERANCE, "out")
    assert_close(results[1], state, STATE_TOLERANCE, "state")
