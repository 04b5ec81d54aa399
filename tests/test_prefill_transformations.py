"""Prefill under JAX's transformations: in place, split, mapped, differentiated."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_gdn
from tests.cases import F32, Case
from tests.hlo import collectives
from tests.meshes import (
    KINDS,
    assert_same_bits,
    buffers,
    host_arrays,
    mesh_of,
    put,
    specs_of,
    split,
)
from tests.oracle import assert_close, decode64
from tests.test_prefill import (
    IMPLEMENTATIONS,
    OUT_TOLERANCE,
    STATE_TOLERANCE,
    correlated,
)

pytestmark = pytest.mark.usefixtures("host")

# Derivatives are those of the chunks, whichever way was taken.
SLOW_NATIVE = [pytest.param("native", marks=pytest.mark.slow), "xla"]
CASE = Case(B=4, T=70, H=4, HV=8, K=16, V=8)
SMALL = {"B": 2, "T": 19, "H": 1, "HV": 2, "K": 8, "V": 4}


def step(case: Case, **settings):
    """Returns (state, rest) -> (state, out), to be jitted."""

    def call(state, rest):
        out, state = jax_gdn.prefill(state=state, **rest, **case.settings, **settings)
        return state, out

    return call


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [{}, {"layers": 2, "layer": 1}, {"N": 6}], ids=str)
def test_a_donated_state_stays(form, implementation):
    pool = {"reads": (3, -1, 0, 1), "writes": (3, 2, 0, -1)} if "N" in form else {}
    case = Case(**CASE.__dict__ | form | pool)
    state, rest = split({n: jnp.array(x) for n, x in correlated(case).items()})
    rest["lengths"] = jnp.array([70, 3, 0, 64], jnp.int32)
    call = jax.jit(step(case, implementation=implementation), donate_argnums=0)
    compiled = call.lower(state, rest).compile()
    where = state.unsafe_buffer_pointer()
    assert compiled(state, rest)[0].unsafe_buffer_pointer() == where


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "kind",
    [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize(
    ("form", "specs"),
    [
        ({}, {}),
        ({}, {"h": ("b", "h"), "b": None, "key_heads": "b"}),
        ({"H": 2, "layout": "VK"}, {"key_heads": None}),
        ({"N": 6, "reads": (3, -1, 0, 1)}, {"b": None}),
    ],
    ids=str,
)
def test_meshes(form, specs, kind, implementation):
    """No device waits for another, and none copies its states."""
    case = Case(**CASE.__dict__ | form)
    function = step(case, implementation=implementation)
    run_on(mesh_of(kind), case, specs_of(case, **specs), function)


def test_shard_map():
    mesh, specs = mesh_of(KINDS[1]), specs_of(CASE)
    names = [name for name in host_arrays(CASE) if name != "state"]
    function = jax.shard_map(
        step(CASE, implementation="xla"),
        mesh=mesh,
        in_specs=(specs["state"], {name: specs[name] for name in names}),
        out_specs=(specs["state"], specs["v"]),
    )
    run_on(mesh, CASE, specs, function)


def run_on(mesh, case, specs, function):
    """Runs a donating step on a mesh: right, in place, and no device waits."""
    arrays = correlated(case)
    state, rest = split(put(arrays, mesh, specs))
    compiled = jax.jit(function, donate_argnums=0).lower(state, rest).compile()
    where = buffers(state)
    state, out = compiled(state, rest)
    assert buffers(state) == where
    assert collectives(compiled.as_text()) == []
    want = decode64(**arrays, **case.settings)
    assert_close(out, want[0], OUT_TOLERANCE, "out")
    assert_close(state, want[1], STATE_TOLERANCE, "state")


@pytest.mark.parametrize("implementation", SLOW_NATIVE)
def test_vmap(implementation):
    cases = [Case(**CASE.__dict__ | F32 | {"seed": seed}) for seed in range(3)]
    each = [{n: jnp.asarray(x) for n, x in correlated(c).items()} for c in cases]
    lengths = jnp.arange(12, dtype=jnp.int32).reshape(3, 4) * 7
    call = ft.partial(jax_gdn.prefill, implementation=implementation)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
    got = jax.vmap(lambda x, n: call(**x, lengths=n))(stacked, lengths)
    for i, (x, n) in enumerate(zip(each, lengths, strict=True)):
        for a, b in zip(got, call(**x, lengths=n), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"per_channel": True, "layout": "VK"},
        {"given": True},
        {"N": 4, "reads": (3, -1), "writes": (1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", SLOW_NATIVE)
def test_derivatives_against_float64(form, implementation):
    case = Case(**SMALL | F32 | form)
    arrays = correlated(case)
    rng = np.random.default_rng(0)
    moving = [n for n in arrays if arrays[n].dtype == np.float32]
    slots = {n: x for n, x in arrays.items() if n not in moving}
    way = {n: rng.standard_normal(arrays[n].shape) for n in moving}
    weights = [
        rng.standard_normal(x.shape) for x in decode64(**arrays, **case.settings)
    ]

    def moved(step):
        given = {n: arrays[n] + step * way[n] for n in moving} | slots
        results = decode64(**given, **case.settings)
        return sum(np.sum(w * x) for w, x in zip(weights, results, strict=True))

    # The third derivative times a square of 1e-4: 1e-8 of what is differentiated.
    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4

    def loss(given):
        call = step(case, implementation=implementation)
        state, out = call(*split(given | slots))
        pairs = zip(weights, (out, state), strict=True)
        return sum(jnp.sum(w.astype(np.float32) * x) for w, x in pairs)

    point = {n: jnp.asarray(arrays[n]) for n in moving}
    tangent = {n: jnp.asarray(x, jnp.float32) for n, x in way.items()}
    _, forward = jax.jit(lambda *x: jax.jvp(loss, *x))((point,), (tangent,))
    gradient = jax.jit(jax.grad(loss))(point)
    backward = sum(np.vdot(gradient[n], way[n]) for n in moving)
    scale = np.sqrt(sum(np.vdot(x, x) for x in gradient.values()) * len(moving))
    # Sums of some thousand float32 terms, each with its roundings.
    assert abs(forward - slope) < 1e-4 * max(scale, abs(slope))
    assert abs(backward - slope) < 1e-4 * max(scale, abs(slope))


@pytest.mark.parametrize("implementation", SLOW_NATIVE)
def test_no_gradient_depends_on_padding(implementation):
    arrays = correlated(Case(**SMALL | F32))
    tokens = ("q", "k", "v", "a", "b")
    lengths = np.array([19, 7], np.int32)
    for name in tokens:
        arrays[name][1, 7:] = np.nan
    given = {name: jnp.asarray(x) for name, x in arrays.items()}

    @jax.jit
    @jax.grad
    def gradient(given):
        out, state = jax_gdn.prefill(
            **given, lengths=lengths, implementation=implementation
        )
        return jnp.sum(out**2) + jnp.sum(state**2)

    for name, x in gradient(given).items():
        assert np.isfinite(np.asarray(x)).all(), name
        if name in tokens:
            assert not np.asarray(x[1, 7:]).any(), name


def test_export_with_any_number_of_rows():
    (B,) = export.symbolic_shape("B")
    case = Case(**SMALL | F32)
    arrays = host_arrays(case)
    specs = {
        n: jax.ShapeDtypeStruct((B, *x.shape[1:]) if x.ndim > 1 else x.shape, x.dtype)
        for n, x in arrays.items()
    }
    state, rest = split(specs)
    program = export.export(
        jax.jit(step(case)),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
    )(state, rest)
    state, rest = split(jax.tree.map(jnp.asarray, arrays))
    assert_same_bits(program.call(state, rest), jax.jit(step(case))(state, rest))


def test_a_symbolic_length_is_an_error():
    (T,) = export.symbolic_shape("T")
    arrays = host_arrays(Case(**SMALL))
    specs = {
        n: jax.ShapeDtypeStruct(
            (2, T, *x.shape[2:]) if n in ("q", "k", "v", "a", "b") else x.shape, x.dtype
        )
        for n, x in arrays.items()
    }
    with pytest.raises(ValueError, match="`q` must have a known T"):
        jax.jit(lambda x: jax_gdn.prefill(**x)).trace(specs)
