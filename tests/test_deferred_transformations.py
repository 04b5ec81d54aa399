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
    for x in (state, pending.k, pending.u, pending.decay):
        dtype = {"float32": "f32", "bfloat16": "bf16"}[x.dtype.name]
        assert copies(text, x.shape, dtype) == 0
    donated = [jnp.array(x) for x in jax.tree.leaves((state, pending))]
    where = [x.unsafe_buffer_pointer() for x in donated]
    state, pending = jax.tree.unflatten(jax.tree.structure((state, pending)), donated)
    got = compiled(state, pending, jnp.array(cursors))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got[:2])] == where
    assert_same_bits(got, want)


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

    got = jax.jit(layers)(state, pending)
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
    text = jax.jit(mapped).lower(state, pending, cursors, rest).as_text()
    assert text.count(DEFERRED_TARGET) == 1
    got = mapped(state, pending, cursors, rest)
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
    for x in (state, pending.u):
        assert copies(text, x.sharding.shard_shape(x.shape)) == 0
    where = list(map(buffers, (state, pending.u, pending.decay)))
    got = call(*given)
    assert list(map(buffers, (got[1], got[2].u, got[2].decay))) == where
    assert_same_bits(got, want)


def test_shard_map():
    given = call_of(2)
    specs = specs_of_call("b", "h", "h")
    mesh = mesh_of(AxisType.Auto)
    call = jax.shard_map(
        step, mesh=mesh, in_specs=specs, out_specs=(P("b", None, "h"), *specs[:2])
    )
    text = jax.jit(call).lower(*given).compile().as_text()
    assert collectives(text) == []
    assert_same_bits(jax.jit(call)(*given), step(*given))


@pytest.mark.parametrize("fold", [False, True])
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


ERRORS = [
    ({"pending": None}, TypeError, "`pending` must be a jax_gdn.Pending; got NoneType"),
    ({"cursors": np.zeros((4, 3), np.int32)}, ValueError,
     r"`cursors` must have shape \[B, 2\] = \[4, 2\]; got \[4, 3\]"),
    ({"cursors": np.zeros((4, 2), np.float32)}, TypeError,
     "`cursors` must be int32; got float32"),
    ({"fold": np.zeros(4, np.int32)}, TypeError, "`fold` must be bool; got int32"),
    ({"fold": np.zeros(3, bool)}, ValueError, r"`fold` must have shape \[B\] = \[4\]"),
    ({"T": 2}, ValueError, r"`pending` must have room for T = 2 tokens; got one made "
     r"with max_tokens=1 \(R = 5 entries, window 4\)"),
    ({"k_dtype": "float32"}, TypeError, "`pending.k` must be bfloat16, k's dtype; got "
     r"float32. Make it by new_pending\(..., k_dtype=jnp.bfloat16\)"),
    ({"state_indices": np.zeros(4, np.int32),
      "output_state_indices": np.zeros((4, 1), np.int32)}, ValueError,
     r"`output_state_indices` must have shape \[B\] = \[4\]; got \[4, 1\]"),
    ({"u": (4, 8, 5, 15)}, ValueError,
     r"`pending.u` must have shape \[B, HV, R, V\] = \[4, 8, 5, 16\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=str)
def test_errors(changes, error, message):
    state, pending, cursors, rest = call_of()
    changes = dict(changes)
    given = {"pending": pending, "cursors": cursors}
    if "T" in changes:
        rest = call_of(changes.pop("T"))[3]
    if "u" in changes:
        u = jnp.zeros(changes.pop("u"))
        given["pending"] = jax_gdn.Pending(pending.k, u, pending.decay, WINDOW)
    if "k_dtype" in changes:
        given["pending"] = jax_gdn.new_pending(
            state, 4, window=WINDOW, k_dtype=changes.pop("k_dtype")
        )
    given |= changes
    with pytest.raises(error, match=message):
        jax_gdn.decode_deferred(state=state, **given, **rest)


HELPERS = [
    (lambda x: jax_gdn.new_pending(x[0], 4, window=4, max_tokens=5),
     ValueError, "`max_tokens` must be from 1 to window = 4"),
    (lambda x: jax_gdn.new_pending(x[0], 4, state_layout="KK"),
     ValueError, "`state_layout` must be 'KV' or 'VK'"),
    (lambda x: jax_gdn.new_pending(x[0], 3), ValueError, "must divide HV = 8"),
    (lambda x: jax_gdn.new_pending(x[0][0], 4), ValueError, "`state` must have shape"),
    (lambda x: jax_gdn.new_pending(x[0], 4, k_dtype=jnp.int32), TypeError, "`k_dtype`"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 2), ValueError, "room for T = 2"),
    (lambda x: jax_gdn.advance_cursors(x[2][0], x[1], 1), ValueError, "`cursors` must"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1].k, 1), TypeError, "`pending` must"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 1, fold=jnp.zeros(4, jnp.int32)),
     TypeError, "`fold` must be bool; got int32"),
    (lambda x: jax_gdn.advance_cursors(x[2], x[1], 1, accepted=jnp.zeros(4)),
     TypeError, "`accepted` must be integers; got float32"),
    (lambda x: jax_gdn.materialize(x[0], x[1], x[2][:3]), ValueError,
     r"`cursors` must have shape \[4, 2\] and be int32; got \[3, 2\]"),
    (lambda x: jax_gdn.materialize(*x[:3], state_layout="V"), ValueError, "`state_l"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), HELPERS)
def test_errors_of_the_helpers(call, error, message):
    with pytest.raises(error, match=message):
        call(call_of())


def test_what_is_accepted_stays_in_the_call():
    _, pending, _, _ = call_of(3)
    cursors, kept = jax_gdn.new_cursors(4), jnp.array([-1, 2, 3, 7], jnp.int32)
    after = jax_gdn.advance_cursors(cursors, pending, 3, accepted=kept)
    assert np.asarray(after)[:, 1].tolist() == [0, 2, 3, 3]


def test_cursors_outside_materialize_as_they_decode():
    state, pending, cursors, _ = call_of()
    pending = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pending)
    cursors = jnp.array([[0, 99], [-7, 2], [0, 0], [9, 1]], jnp.int32)
    got = jax_gdn.materialize(state, pending, cursors)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(state))


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


@pytest.mark.cuda_build
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"T": 9}, "T up to 8; got T = 9"),
        ({"K": 64}, "K = V = 128; got K = 64, V = 128"),
        ({"window": 17}, "a window of up to 16; got 17"),
        ({"per_channel": True}, "one decay a head"),
        ({"bfloat16": False}, "bfloat16 q, k and v"),
    ],
)
def test_why_there_is_no_cuda_kernel(changes, why):
    from jax_gdn import _registration

    given = {"T": 1, "K": 128, "V": 128, "window": 16}
    given |= {"per_channel": False, "bfloat16": True}
    got = _registration.cuda.why_unsupported_deferred(**given | changes)
    takes = "the CUDA kernel of decode_deferred takes "
    assert got is None if why is None else got.startswith(takes + why)
