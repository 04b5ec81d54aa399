"""Deferred state writes under JAX's transformations: in place, and the same."""

import functools as ft
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gdn
from tests.cases import Case
from tests.hlo import DEFERRED_TARGET, calls, collectives, copies
from tests.meshes import KINDS, assert_same_bits, buffers, mesh_of

pytestmark = pytest.mark.usefixtures("host")

SIZES = {"B": 4, "H": 4, "HV": 8, "K": 32, "V": 16}
WINDOW = 4


def call_of(T=1, layers=None, pool=False, seed=0, **changes):
    """Returns a state, rings that hold tokens, cursors, and the rest by name."""
    case = Case(T=T, seed=seed, layers=layers, **SIZES | changes)
    rest = {name: jnp.asarray(x) for name, x in case.inputs().items()}
    state = rest.pop("state")
    pending = jax_gdn.new_pending(state, case.H, window=WINDOW, max_tokens=T)
    keys = jax.random.split(jax.random.key(seed), 3)
    pending = jax_gdn.Pending(
        k=jax.random.normal(keys[0], pending.k.shape, pending.k.dtype),
        u=jax.random.normal(keys[1], pending.u.shape),
        decay=jax.random.uniform(keys[2], pending.decay.shape, minval=0.5),
        window=WINDOW,
    )
    N = state.shape[0 if layers is None else 1]
    rows = jnp.arange(N, dtype=jnp.int32)
    cursors = jnp.stack([rows % (WINDOW + T), (3 * rows + 1) % (WINDOW + 1)], axis=1)
    return state, pending, cursors, rest


def step(state, pending, cursors, rest, **options):
    return jax_gdn.decode_deferred(
        state=state, pending=pending, cursors=cursors, **rest, **options
    )


def copies_of(text, arrays):
    """How often a compiled program copies one of the arrays, by their shapes."""
    names = {"float32": "f32", "bfloat16": "bf16"}
    return sum(
        copies(text, x.sharding.shard_shape(x.shape), names[x.dtype.name])
        for x in jax.tree.leaves(arrays)
    )


def run_in_place(call, state, pending, *rest, first=0):
    """Returns the results, of which from `first` on are what was donated."""
    donated = jax.tree.map(jnp.array, (state, pending))
    where = list(map(buffers, jax.tree.leaves(donated)))
    got = call(*donated, *rest)
    results = jax.tree.leaves(got[first : first + 2])
    assert list(map(buffers, results)) == where
    return got


@pytest.mark.parametrize("T", [1, 3])
def test_a_donated_loop_is_the_call_and_no_copy(T):
    state, pending, cursors, rest = call_of(T)

    def loop(state, pending, cursors):
        def body(_, carry):
            state, pending, cursors = carry
            _, state, pending = step(state, pending, cursors, rest)
            return state, pending, jax_gdn.advance_cursors(cursors, pending, T)

        return lax.fori_loop(0, 5, body, (state, pending, cursors))

    want = jax.jit(loop)(state, pending, cursors)
    compiled = jax.jit(loop, donate_argnums=(0, 1, 2)).lower(state, pending, cursors)
    compiled = compiled.compile()
    text = compiled.as_text()
    assert calls(text, DEFERRED_TARGET) == 1
    assert copies_of(text, (state, pending)) == 0
    assert_same_bits(run_in_place(compiled, state, pending, cursors), want)


def test_eager_calls_leave_the_caller_its_arrays():
    given = call_of()
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(given)]
    step(*given, fold=jnp.ones(4, bool))
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(given)] == before


@pytest.mark.parametrize("computed", [False, True])
def test_layers_of_a_stack_share_the_cursors(computed):
    L = 3
    state, pending, cursors, rest = call_of(2, layers=L)

    def layers(state, pending):
        def layer(i, carry):
            state, pending = carry
            _, state, pending = step(state, pending, cursors, rest, layer=i)
            return state, pending

        if computed:
            return lax.fori_loop(0, L, layer, (state, pending))
        return ft.reduce(lambda carry, i: layer(i, carry), range(L), (state, pending))

    compiled = jax.jit(layers, donate_argnums=(0, 1)).lower(state, pending).compile()
    text = compiled.as_text()
    assert calls(text, DEFERRED_TARGET) == (1 if computed else L)
    assert copies_of(text, (state, pending)) == 0
    got = run_in_place(compiled, state, pending)
    for i in range(L):
        one = jax.tree.map(lambda x, i=i: x[i], (state, pending))
        _, *want = step(*one, cursors, rest)
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), tuple(want))
    reference = step(*one, cursors, rest, implementation="xla")
    np.testing.assert_allclose(want[0], reference[1], atol=1e-5)


def test_vmap_is_one_call():
    """Over an ensemble, and over layers that share the cursors."""
    calls_of = [call_of(seed=i) for i in range(3)]
    weights = {name: calls_of[0][3][name] for name in ("A_log", "dt_bias")}
    for *_, rest in calls_of:
        rest |= weights
    state, pending, cursors, rest = jax.tree.map(lambda *x: jnp.stack(x), *calls_of)
    rest |= weights
    of_rest = {name: None if name in weights else 0 for name in rest}
    mapped = jax.vmap(step, in_axes=(0, 0, 0, of_rest))
    call = jax.jit(mapped, donate_argnums=(0, 1))
    compiled = call.lower(state, pending, cursors, rest).compile()
    text = compiled.as_text()
    assert calls(text, DEFERRED_TARGET) == 1
    assert copies_of(text, (state, pending)) == 0
    got = run_in_place(compiled, state, pending, cursors, rest, first=1)
    for i, one in enumerate(calls_of):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), step(*one))
    mapped = jax.vmap(step, in_axes=(0, 0, None, of_rest))
    shared = mapped(state, pending, calls_of[0][2], rest)
    want = step(*calls_of[1][:2], calls_of[0][2], calls_of[1][3])
    assert_same_bits(jax.tree.map(lambda x: x[1], shared), want)


def specs_of_call(b, h, key_heads, stack=False):
    lead = (None,) if stack else ()
    pending = jax_gdn.Pending(
        P(*lead, b, key_heads), P(*lead, b, h), P(*lead, b, h), WINDOW
    )
    heads = {"q": key_heads, "k": key_heads, "v": h, "a": h, "b": h}
    rest = {name: P(b, None, x) for name, x in heads.items()}
    return P(*lead, b, h), pending, P(b), rest | {"A_log": P(h), "dt_bias": P(h)}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("changes", "specs"),
    [
        ({"T": 3}, ("b", "h", "h")),
        # Key heads whole where they do not divide, or only in part.
        ({"H": 2}, ("b", "h", None)),
        ({"HV": 16}, (None, ("b", "h"), "b")),
        ({"layers": 2, "T": 2}, ("b", "h", "h")),
    ],
    ids=str,
)
def test_meshes_wait_for_nobody_and_copy_nothing(changes, specs, kind):
    given = call_of(**changes)
    options = {"layer": 1} if "layers" in changes else {}
    call = jax.jit(ft.partial(step, **options), donate_argnums=(0, 1))
    want = jax.tree.map(np.asarray, ft.partial(step, **options)(*given))
    mesh = mesh_of(kind)
    shardings = jax.tree.map(
        ft.partial(NamedSharding, mesh),
        specs_of_call(*specs, stack="layers" in changes),
        is_leaf=lambda x: isinstance(x, P),
    )
    given = jax.device_put(jax.tree.map(jnp.array, given), shardings)
    text = call.lower(*given).compile().as_text()
    assert collectives(text) == []
    assert calls(text, DEFERRED_TARGET) == 1
    state, pending = given[:2]
    assert copies_of(text, (state, pending.u, pending.decay)) == 0
    # Where value heads of a key head lie apart, the call reads a copy of its keys.
    assert (copies_of(text, pending.k) == 0) == (specs[1] == specs[2])
    assert_same_bits(run_in_place(call, *given, first=1), want)


def test_shard_map():
    given = call_of(2)
    specs = specs_of_call("b", "h", "h")
    mesh = mesh_of(AxisType.Auto)
    call = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(P("b", None, "h"), *specs[:2])
    )
    shardings = jax.tree.map(
        ft.partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, P)
    )
    want = step(*given)
    given = jax.device_put(given, shardings)
    compiled = jax.jit(call, donate_argnums=(0, 1)).lower(*given).compile()
    assert collectives(compiled.as_text()) == []
    assert copies_of(compiled.as_text(), given[:2]) == 0
    assert_same_bits(run_in_place(compiled, *given, first=1), want)


@pytest.mark.parametrize("fold", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_are_those_of_the_reference(fold):
    state, pending, cursors, rest = call_of(2, B=2, H=1, HV=2, K=4, V=3, q="float32",
                                            k="float32", v="float32", a="float32",
                                            b="float32")  # fmt: skip
    pending = jax.tree.map(lambda x: x.astype(jnp.float32), pending)

    def out(state, u, decay, rest, implementation):
        rings = jax_gdn.Pending(pending.k, u, decay, WINDOW)
        out, state, rings = step(
            *(state, rings, cursors, rest),
            fold=jnp.full(2, fold),
            implementation=implementation,
        )
        return out, jax_gdn.materialize(state, rings, jnp.zeros_like(cursors)), rings.u

    moving = state, pending.u, pending.decay, rest

    def derivatives(implementation):
        function = ft.partial(out, implementation=implementation)
        results, forward = jax.jvp(function, moving, moving)
        _, pull = jax.vjp(function, *moving)
        return forward, pull(results)

    got, want = map(jax.jit(derivatives, static_argnums=0), (None, "xla"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)

    @jax.jit
    def loss(scale):
        moved = jax.tree.map(lambda x: scale * x, moving)
        return sum(jnp.sum(x**2) for x in out(*moved, "xla"))

    # A step of 1e-2 in float32: a slope is 1e-3 off by its curvature, 1e-4 by rounding.
    slope = (loss(1.01) - loss(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(1.0), slope, rtol=5e-3)


def test_gradients_do_not_see_what_is_not_pending():
    state, pending, cursors, rest = call_of()
    pending = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pending)

    def loss(state, pending):
        out, *_ = step(state, pending, jnp.zeros_like(cursors), rest)
        return jnp.sum(out.astype(jnp.float32))

    of_state, of_pending = jax.grad(loss, (0, 1))(state, pending)
    assert np.isfinite(np.asarray(of_state)).all()
    for x in jax.tree.leaves(of_pending):
        assert (np.asarray(x.astype(jnp.float32)) == 0).all()


def test_export_with_a_symbolic_batch():
    state, pending, cursors, rest = call_of(2)
    (b,) = export.symbolic_shape("b")

    def sized(x, is_row=True):
        shape = (b, *x.shape[1:]) if is_row else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    weights = ("A_log", "dt_bias")
    given = jax.tree.map(sized, (state, pending, cursors))
    of_rest = {name: sized(x, name not in weights) for name, x in rest.items()}
    exported = export.export(
        jax.jit(step),
        platforms=["cpu"],
        disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
    )(*given, of_rest)
    again = export.deserialize(exported.serialize())
    assert_same_bits(again.call(state, pending, cursors, rest),
                     step(state, pending, cursors, rest))  # fmt: skip


def test_threads():
    # A default device is the thread's own.
    given = [
        jax.device_put(call_of(2, seed=i), jax.devices("cpu")[0]) for i in range(4)
    ]
    want = [jax.tree.map(np.asarray, step(*one)) for one in given]
    call, got = jax.jit(step), [None] * 4

    def work(i):
        for _ in range(5):
            got[i] = call(*given[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same_bits(got, want)


def test_helpers_on_a_mesh_wait_for_nobody():
    state, pending, cursors, _ = call_of()
    specs = specs_of_call("b", "h", "h")[:3]
    shardings = jax.tree.map(
        ft.partial(NamedSharding, mesh_of(AxisType.Auto)),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    given = jax.device_put((state, pending, cursors), shardings)
    advance = ft.partial(jax_gdn.advance_cursors, num_tokens=1)
    for call, arguments in ((jax_gdn.materialize, given), (advance, given[2:0:-1])):
        text = jax.jit(call).lower(*arguments).compile().as_text()
        assert collectives(text) == []
