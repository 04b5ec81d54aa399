"""Derivatives against float64 differences and against those of the reference."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gdn
from tests.cases import F32, Case
from tests.hlo import calls, collectives
from tests.meshes import KINDS, host_arrays, mesh_of, put, specs_of
from tests.oracle import decode64

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"B": 2, "H": 2, "HV": 4, "K": 16, "V": 8, "T": 3}
FORMS = [
    Case(**SMALL, **F32),
    Case(**SMALL, **F32, layout="VK", per_channel=True),
    Case(**SMALL, **F32, use_qk_l2norm=False, qk_norm=1.0, scale=0.4),
    Case(**SMALL, **F32, N=5, reads=(3, -1)),
    Case(**SMALL, **F32, N=5, reads=(3, 1), writes=((0, 2, 9), (1, 4, -1))),
]
NAMES = tuple(Case().inputs())

# A derivative is a sum of products of some twenty float32 values; those cancel to a
# tenth of the largest in these cases. 20 roundings of 6e-8 over 0.1 are 1.2e-5. The
# difference quotient in float64 with a step of 1e-6 is exact to 1e-9.
TOLERANCE = 2e-5


def weights_of(case: Case) -> list[np.ndarray]:
    """Returns what out and state are multiplied by, so that every entry counts."""
    rng = np.random.default_rng(7)
    arrays = case.inputs()
    shapes = (arrays["v"].shape, arrays["state"].shape)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def loss(case: Case, arrays, decode=jax_gdn.decode):
    results = decode(**arrays, **case.slots, **case.settings)
    return sum(
        (w * x.astype(jnp.float32)).sum()
        for w, x in zip(weights_of(case), results, strict=True)
    )


def difference64(case: Case, name: str, direction) -> float:
    """Returns the derivative along a direction in one argument, by differences."""

    def at(step: float) -> float:
        arrays = {n: x.astype(np.float64) for n, x in case.inputs().items()}
        arrays[name] = arrays[name] + step * direction
        results = decode64(**arrays, **case.slots, **case.settings)
        pairs = zip(weights_of(case), results, strict=True)
        return float(sum((w * x).sum() for w, x in pairs))

    return (at(1e-6) - at(-1e-6)) / 2e-6


def assert_near(got, want) -> None:
    """Compares gradients, relative to the largest entry of each."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * np.abs(y).max())


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
def test_against_float64_differences(case):
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    gradient = jax.jit(jax.grad(ft.partial(loss, case)))(arrays)
    tangent = jax.jit(lambda x, t: jax.jvp(ft.partial(loss, case), (x,), (t,))[1])
    rng = np.random.default_rng(3)
    for name in NAMES:
        assert gradient[name].dtype == arrays[name].dtype
        direction = rng.standard_normal(arrays[name].shape).astype(np.float32)
        want = difference64(case, name, direction)
        terms = np.asarray(gradient[name], np.float64) * direction
        allowed = TOLERANCE * np.abs(terms).sum()
        assert abs(terms.sum() - want) <= allowed, name
        zeros = jax.tree.map(jnp.zeros_like, arrays)
        forward = tangent(arrays, zeros | {name: jnp.asarray(direction)})
        assert abs(float(forward) - want) <= allowed, name


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != FORMS[1])) for x in FORMS],
    ids=lambda case: case.id,
)
def test_plumbing_to_the_reference(case):
    """`decode` hands on every entry of what differentiating the reference gives."""
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    reference = ft.partial(loss, case, decode=jax_gdn.reference_decode)
    assert_near(
        jax.jit(jax.grad(ft.partial(loss, case)))(arrays),
        jax.jit(jax.grad(reference))(arrays),
    )


def test_storage_dtypes():
    """Gradients have the dtypes of the arguments, and are those of the reference."""
    case = Case(**SMALL, state="bfloat16", output="float32")
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    output = jnp.zeros(arrays["v"].shape, jnp.float32)
    call = ft.partial(jax_gdn.decode, output=output)
    got = jax.jit(jax.grad(ft.partial(loss, case, decode=call)))(arrays)
    call = ft.partial(jax_gdn.reference_decode, output=output)
    want = jax.jit(jax.grad(ft.partial(loss, case, decode=call)))(arrays)
    for name, x in arrays.items():
        assert got[name].dtype == x.dtype
        largest = np.abs(np.asarray(want[name], np.float32)).max()
        # Cotangents are rounded to 8 bits where values are, in both.
        np.testing.assert_allclose(
            np.asarray(got[name], np.float32),
            np.asarray(want[name], np.float32),
            rtol=0,
            atol=2**-7 * largest,
        )


STEPS = 4


def scanned(case: Case, arrays, decode=jax_gdn.decode):
    def step(state, _):
        out, state = decode(**arrays | {"state": state}, **case.settings)
        return state, out

    state, outs = lax.scan(step, arrays["state"], length=STEPS)
    out_weight, state_weight = weights_of(case)
    return (out_weight[None] * outs).sum() + (state_weight * state).sum()


def test_through_a_scan_of_steps():
    case = FORMS[0]
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    want = jax.grad(ft.partial(scanned, case, decode=jax_gdn.reference_decode))(arrays)
    assert_near(jax.jit(jax.grad(ft.partial(scanned, case)))(arrays), want)
    saving = jax.checkpoint(ft.partial(scanned, case))
    assert_near(jax.jit(jax.grad(saving))(arrays), want)


def test_what_is_kept_for_the_way_back():
    """The operands; in a scan, one state a step and nothing else of its size."""
    case = Case(**SMALL | {"K": 64, "V": 64, "T": 8}, **F32)
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    _, pull = jax.vjp(lambda x: jax_gdn.decode(**x), arrays)
    kept = sorted(x.shape for x in jax.tree.leaves(pull))
    assert kept == sorted(x.shape for x in arrays.values())
    call = jax.jit(jax.grad(ft.partial(scanned, case)))
    text = call.lower(arrays).compile().as_text()
    B, HV, K, V = arrays["state"].shape
    assert f"f32[{STEPS},{B},{HV},{K},{V}]" in text
    assert f"f32[{STEPS},{case.T},{B},{HV},{K},{V}]" not in text


def test_value_comes_from_the_kernel():
    case = FORMS[0]
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    call = jax.jit(jax.value_and_grad(ft.partial(loss, case)))
    assert calls(call.lower(arrays).compile().as_text()) == 1
    value, _ = call(arrays)
    assert value == jax.jit(ft.partial(loss, case))(arrays)


@pytest.mark.slow
def test_derivative_in_one_argument_only():
    """The others stand still: indices too, which have no derivative."""
    case = FORMS[3]
    arrays = jax.tree.map(jnp.asarray, case.inputs())
    every = jax.grad(ft.partial(loss, case))(arrays)
    for name in NAMES:
        one = jax.grad(lambda x, name=name: loss(case, arrays | {name: x}))
        assert_near(one(arrays[name]), every[name])


@pytest.mark.slow
def test_second_derivatives():
    case = FORMS[0]
    arrays = jax.tree.map(jnp.asarray, case.inputs())

    def product(decode):
        f = jax.grad(lambda x: loss(case, x, decode) ** 2)
        return jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])(arrays)

    assert_near(product(jax_gdn.decode), product(jax_gdn.reference_decode))


@pytest.mark.parametrize(
    "implementation", ["native", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_vmap_of_grad_and_grad_of_vmap(implementation):
    case = FORMS[0]
    arrays = case.inputs()
    pairs = {name: np.stack([x, 0.5 * x]) for name, x in arrays.items()}
    decode = ft.partial(jax_gdn.decode, implementation=implementation)
    one = jax.grad(ft.partial(loss, case, decode=decode))
    want = [one(jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), pairs)) for i in (0, 1)]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    pairs = jax.tree.map(jnp.asarray, pairs)
    assert_near(jax.jit(jax.vmap(one))(pairs), want)

    def total(x):
        return jax.vmap(ft.partial(loss, case, decode=decode))(x).sum()

    assert_near(jax.jit(jax.grad(total))(pairs), want)


SHARDED = Case(**SMALL | {"B": 4, "H": 4, "HV": 8}, **F32)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "program", [loss, pytest.param(scanned, marks=pytest.mark.slow)]
)
def test_sharded(program, kind):
    """Only the gradients of the weights are summed over devices that hold rows."""
    arrays = host_arrays(SHARDED)
    function = ft.partial(program, SHARDED)
    want = jax.jit(jax.grad(function))(jax.tree.map(jnp.asarray, arrays))
    sharded = put(arrays, mesh_of(kind), specs_of(SHARDED))
    compiled = jax.jit(jax.grad(function)).lower(sharded).compile()
    assert set(collectives(compiled.as_text())) == {"all-reduce"}
    assert_near(compiled(sharded), want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_of_shard_map(check_vma):
    mesh = mesh_of(AxisType.Auto)
    arrays = host_arrays(SHARDED)
    specs = {name: specs_of(SHARDED)[name] for name in arrays}
    weights = weights_of(SHARDED)

    def local(arrays, out_weight, state_weight):
        out, state = jax_gdn.decode(**arrays)
        total = (out_weight * out).sum() + (state_weight * state).sum()
        return lax.psum(total, ("b", "h"))

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, P("b", None, "h"), P("b", "h")),
        out_specs=P(),
        check_vma=check_vma,
    )
    got = jax.jit(jax.grad(mapped))(put(arrays, mesh, specs), *weights)
    function = ft.partial(loss, SHARDED)
    assert_near(got, jax.grad(function)(jax.tree.map(jnp.asarray, arrays)))
