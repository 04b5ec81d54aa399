"""vmap: one call however many there are, with the bits of as many calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import F32, GATE_INPUTS, Case
from tests.hlo import calls, copies, state_aliases
from tests.meshes import assert_same_bits, on_one_device
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"B": 3, "H": 2, "HV": 4, "K": 16, "V": 8}
E = 3
NAMES = tuple(Case().inputs())
WEIGHTS = ("A_log", "dt_bias")


def members(case: Case) -> list[dict[str, np.ndarray]]:
    """Returns the arguments of E calls that differ in every value."""
    calls = [Case(**{**case.__dict__, "seed": seed}) for seed in range(E)]
    return [call.inputs() | call.slots for call in calls]


def stacked(case: Case, mapped) -> tuple[dict, dict, list[dict]]:
    """Returns arguments, their in_axes, and the E calls that they stand for."""
    each = members(case)
    for arrays in each:
        arrays.update({n: x for n, x in each[0].items() if n not in mapped})
    axes = {name: 0 if name in mapped else None for name in each[0]}
    arrays = {
        name: np.stack([x[name] for x in each]) if name in mapped else each[0][name]
        for name in each[0]
    }
    return arrays, axes, each


def decode(case: Case):
    return lambda arrays: jax_gdn.decode(**arrays, **case.settings)


def check(case: Case, mapped) -> None:
    arrays, axes, each = stacked(case, mapped)
    got = on_one_device(jax.vmap(decode(case), (axes,)), arrays)
    for e, call in enumerate(each):
        member = [x[e] for x in got]
        if "A_log" not in mapped:
            assert_same_bits(member, on_one_device(decode(case), call))
        out, state = decode64(**call, **case.settings)
        # The decay of an ensemble passes through softplus and back in float32. That
        # moves g by two roundings of itself, like the product that it replaces.
        assert_close(member[0], out, OUT_TOLERANCE, "out")
        assert_close(member[1], state, STATE_TOLERANCE, "state")


SUBSETS = [
    *((name,) for name in NAMES),
    *(WEIGHTS, ("dt_bias", "a"), ("A_log", "state"), ("q", "v")),
    tuple(name for name in NAMES if name not in WEIGHTS),
    tuple(name for name in NAMES if name != "state"),
    NAMES,
]


@pytest.mark.parametrize("mapped", SUBSETS, ids="+".join)
def test_any_arguments(mapped):
    check(Case(**SMALL), mapped)


@pytest.mark.parametrize("mapped", [NAMES, ("dt_bias",), ("A_log", "v")], ids="+".join)
@pytest.mark.parametrize(
    "form",
    [
        {"per_channel": True},
        {"per_channel": True, "layout": "VK", "T": 2},
        {"state": "bfloat16", "T": 3, **F32},
        {"scale": 0.3, "use_qk_l2norm": False, "qk_norm": 1.0},
    ],
    ids=str,
)
def test_every_form(form, mapped):
    check(Case(**SMALL, **form), mapped)


@pytest.mark.parametrize("x", GATE_INPUTS)
def test_ensemble_at_extreme_gates(x):
    case = Case(**SMALL, x=x, **F32)
    check(case, NAMES)


@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_any_in_axes_and_out_axes(implementation):
    """Every argument mapped along another axis, the last for most."""
    case = Case(**SMALL, T=2)
    arrays, _, _ = stacked(case, NAMES)
    axes = {name: x.ndim - 1 for name, x in arrays.items()} | {"k": 2, "state": 1}
    moved = {name: np.moveaxis(x, 0, axes[name]) for name, x in arrays.items()}

    def call(arrays):
        return jax_gdn.decode(**arrays, implementation=implementation)

    got = on_one_device(jax.vmap(call, (axes,), (2, -1)), moved)
    want = on_one_device(jax.vmap(call), arrays)
    # XLA forms the gates of an ensemble, and rounds as its layout of them suggests.
    out, state = (np.float64(np.asarray(x, np.float32)) for x in want)
    assert_close(np.moveaxis(got[0], 2, 0), out, OUT_TOLERANCE, "out")
    assert_close(np.moveaxis(got[1], -1, 0), state, STATE_TOLERANCE, "state")


def test_output_is_mapped():
    case = Case(**SMALL, output="float32")
    arrays, axes, _ = stacked(case, NAMES)
    shape = arrays["v"].shape
    given, axes = arrays | {"output": np.zeros(shape, np.float32)}, axes | {"output": 0}
    want = on_one_device(jax.vmap(decode(case)), given)
    assert want[0].dtype == np.float32
    shared, axes = given | {"output": given["output"][0]}, axes | {"output": None}
    assert_same_bits(on_one_device(jax.vmap(decode(case), (axes,)), shared), want)


def test_nested():
    """Two axes for some arguments, one or none for others, in either order."""
    case = Case(**SMALL, T=2)
    arrays, _, _ = stacked(case, NAMES)
    outer = {name: 0 for name in ("q", "state", "A_log", "b")}
    inner = {name: 0 for name in ("q", "v", "state", "dt_bias")}
    both = {n: np.stack([x, x[::-1]]) for n, x in arrays.items() if n in {*outer}}
    alone = {n: x if n in inner else x[0] for n, x in arrays.items() if n not in outer}
    given = alone | {n: x if n in inner else x[:, 0] for n, x in both.items()}
    axes = [{n: side.get(n) for n in given} for side in (outer, inner)]
    call = decode(case)
    got = on_one_device(jax.vmap(jax.vmap(call, (axes[1],)), (axes[0],)), given)
    for i in range(2):
        for j in range(E):
            one = {n: x[i] if n in outer else x for n, x in given.items()}
            one = {n: x[j] if n in inner else x for n, x in one.items()}
            out, state = decode64(**one)
            assert_close(got[0][i, j], out, OUT_TOLERANCE, "out")
            assert_close(got[1][i, j], state, STATE_TOLERANCE, "state")


POOL = Case(
    **SMALL,
    T=2,
    N=5,
    reads=(4, 0, -1),
    writes=((1, -1), (5, 2), (3, 3)),
    state="float16",
)


@pytest.mark.parametrize("pool", [False, True])
def test_one_aliased_call(pool):
    """One call, the state's buffer kept, and nothing else as large as the state."""
    case = POOL if pool else Case(**SMALL)
    slots = tuple(case.slots)
    arrays, _, _ = stacked(case, (*NAMES, *slots))
    state = jnp.array(arrays.pop("state"))
    where = state.unsafe_buffer_pointer()

    def call(state, rest):
        out, state = jax.vmap(lambda s, r: jax_gdn.decode(state=s, **r))(state, rest)
        return state, out

    compiled = jax.jit(call, donate_argnums=0).lower(state, arrays).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) == 1
    assert compiled.memory_analysis().temp_size_in_bytes < state.nbytes / 2
    assert compiled(state, arrays)[0].unsafe_buffer_pointer() == where


@pytest.mark.parametrize(
    "mapped",
    [
        ("state",),
        ("state", "q", "v"),
        (*NAMES, "state_indices"),
        (*NAMES, "state_indices", "output_state_indices"),
    ],
    ids="+".join,
)
def test_pool_for_each(mapped):
    """Row 1 writes slot N: that must not be the first slot of the next pool."""
    check(POOL, mapped)


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize(
    "mapped", [("q",), ("state_indices",), ("A_log",)], ids="+".join
)
def test_shared_pool_is_refused(mapped, implementation):
    arrays, axes, _ = stacked(POOL, mapped)
    call = jax.vmap(
        lambda x: jax_gdn.decode(**x, implementation=implementation), (axes,)
    )
    message = "jax_gdn.decode: under jax.vmap `state` must be mapped .* got one pool"
    with pytest.raises(ValueError, match=message):
        call(arrays)


def test_unmapped_state_is_copied_once():
    """There are E new states, so one copy is the least."""
    arrays, axes, _ = stacked(Case(**SMALL), ("q", "v"))
    text = jax.jit(jax.vmap(decode(Case()), (axes,))).lower(arrays).compile().as_text()
    assert calls(text) == 1
    assert copies(text, (E * 3, 4, 16, 8)) <= 1
