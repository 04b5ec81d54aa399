"""A layer of a stack of states: in place, in loops, under transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_gdn
from tests.cases import Case
from tests.hlo import calls, collectives, copies, state_aliases
from tests.meshes import KINDS, compile_and_run, mesh_of, put, split

L, TOKENS = 3, 2
CASE = Case(B=2, K=64, V=64)
SHAPE = (L, 2, 4, 64, 64)
LAYER_BYTES = 4 * 2 * 4 * 64 * 64
POOL = {"N": 5, "reads": (4, -1)}


def arrays_of(case: Case) -> tuple[jax.Array, dict]:
    """Returns a stack of states, and a call's other operands with slots."""
    state, rest = split(case.inputs() | case.slots)
    stack = np.stack([np.roll(state, i, axis=-1) for i in range(L)])
    return jnp.array(stack), jax.tree.map(jnp.array, rest)


def decode(state, rest, v, **options):
    """One layer: what it puts out is the next one's v."""
    out, state = jax_gdn.decode(**rest | {"v": v}, state=state, **options)
    return state, out


def looped(stack, rest, v):
    """A scan over layers inside a loop over tokens."""

    def layer(carry, i):
        stack, v = carry
        return decode(stack, rest, v, layer=i), ()

    def token(_, carry):
        return lax.scan(layer, carry, jnp.arange(L, dtype=jnp.int32))[0]

    return lax.fori_loop(0, TOKENS, token, (stack, v))


def unrolled(stack, rest, v):
    for _ in range(TOKENS):
        for i in range(L):
            stack, v = decode(stack, rest, v, layer=i)
    return stack, v


def listed(stack, rest, v):
    """The same with a list of states."""
    states = list(stack)
    for _ in range(TOKENS):
        for i in range(L):
            states[i], v = decode(states[i], rest, v)
    return jnp.stack(states), v


PROGRAMS = [looped, unrolled]


XLA = pytest.param("xla", marks=pytest.mark.slow)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("pool", [{}, POOL], ids=["dense", "pool"])
@pytest.mark.parametrize("implementation", ["native", XLA])
def test_bits_of_a_list_of_states(program, pool, implementation):
    fixed = {"implementation": implementation}

    def run(program):
        stack, rest = arrays_of(Case(**CASE.__dict__ | pool))
        return jax.jit(lambda s, r: program(s, r | fixed, r["v"]))(stack, rest)

    # What XLA compiles on a GPU has bits that differ from program to program.
    device = jax.devices("cpu" if implementation == "xla" else None)[0]
    with jax.default_device(device):
        for got, want in zip(run(program), run(listed), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("pool", [{}, POOL], ids=["dense", "pool"])
def test_in_place(program, pool):
    case = Case(**CASE.__dict__ | pool)
    stack, rest = arrays_of(case)
    call = jax.jit(program, donate_argnums=0)
    compiled = call.lower(stack, rest, rest["v"]).compile()
    text = compiled.as_text()
    number = 1 if program is looped else L * TOKENS
    assert calls(text) == state_aliases(text) == number
    assert copies(text, stack.shape) == copies(text, stack.shape[1:]) == 0
    assert compiled.memory_analysis().temp_size_in_bytes < LAYER_BYTES
    where = stack.unsafe_buffer_pointer()
    stack, _ = compiled(stack, rest, rest["v"])
    assert stack.unsafe_buffer_pointer() == where


@pytest.mark.parametrize("layer", [-1, L, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("implementation", ["native", "xla"])
def test_computed_layer_outside_touches_nothing(layer, implementation):
    stack, rest = arrays_of(CASE)
    out, new = jax.jit(
        lambda i: jax_gdn.decode(
            **rest, state=stack, layer=i, implementation=implementation
        )
    )(jnp.int32(layer))
    assert not np.asarray(out, np.float32).any()
    np.testing.assert_array_equal(np.asarray(new), np.asarray(stack))


@pytest.mark.parametrize(
    "layer", [-1, L, 2**32 + 1, np.array(-1), np.array(L), np.array(2**32 + 1)]
)
def test_known_layer_outside_is_refused(layer):
    stack, rest = arrays_of(CASE)
    with pytest.raises(ValueError, match=r"`layer` must be in \[0, L\).* of `state`"):
        jax_gdn.decode(**rest, state=stack, layer=layer)


def test_negative_layer_of_any_number_of_layers_is_refused():
    _, rest = arrays_of(CASE)
    (layers,) = jax.export.symbolic_shape("L")
    spec = jax.ShapeDtypeStruct((layers, *SHAPE[1:]), jnp.float32)
    with pytest.raises(ValueError, match=r"`layer` must be in .*; got -1"):
        jax.export.export(
            jax.jit(lambda s: jax_gdn.decode(**rest, state=s, layer=-1)),
            disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
        )(spec)


@pytest.mark.parametrize("layer", [True, "1", np.float32(1), jnp.float32(1)])
def test_layer_of_a_wrong_type(layer):
    stack, rest = arrays_of(CASE)
    with pytest.raises(TypeError, match="`layer` must be an int or an integer scalar"):
        jax_gdn.decode(**rest, state=stack, layer=layer)


def test_several_layers_are_refused():
    stack, rest = arrays_of(CASE)
    with pytest.raises(ValueError, match=r"`layer` must have shape \[\]; got \[2\]"):
        jax_gdn.decode(**rest, state=stack, layer=jnp.zeros(2, jnp.int32))


def test_more_slots_than_int32_numbers_are_refused():
    _, rest = arrays_of(Case(**CASE.__dict__ | POOL))
    stack = jax.ShapeDtypeStruct((5, 2**30, 4, 64, 64), jnp.float32)
    for layer in (4, jnp.int32(4)):
        with pytest.raises(ValueError, match=r"`state` must have states .* int32"):
            jax.eval_shape(
                lambda s, i=layer: jax_gdn.decode(**rest, state=s, layer=i), stack
            )


@pytest.mark.parametrize("layers", [2, L])
def test_stack_without_layer_is_refused(layers):
    stack, rest = arrays_of(CASE)
    with pytest.raises(ValueError, match=r"A stack of layers, .* needs `layer`"):
        jax_gdn.decode(**rest, state=stack[:layers])


def test_layer_without_a_stack_is_refused():
    stack, rest = arrays_of(CASE)
    with pytest.raises(ValueError, match="With `layer` it is a stack of layers"):
        jax_gdn.decode(**rest, state=stack[0], layer=0)


@pytest.mark.parametrize("layer", [np.int64(1), np.array(1), np.array(1, np.uint8)])
def test_layers_of_numpy(layer):
    stack, rest = arrays_of(CASE)
    got = jax_gdn.decode(**rest, state=stack, layer=layer)
    want = jax_gdn.decode(**rest, state=stack, layer=1)
    np.testing.assert_array_equal(np.asarray(got[1]), np.asarray(want[1]))


def test_wide_layer_does_not_wrap():
    stack, rest = arrays_of(CASE)
    with jax.enable_x64(True):
        out, new = jax_gdn.decode(**rest, state=stack, layer=jnp.int64(2**32 + 1))
        _, right = jax_gdn.decode(**rest, state=stack, layer=jnp.int64(1))
    assert not np.asarray(out, np.float32).any()
    np.testing.assert_array_equal(np.asarray(new), np.asarray(stack))
    assert (np.asarray(right[1]) != np.asarray(stack[1])).any()


@pytest.mark.usefixtures("host")
def test_layers_behind_the_batch():
    """A cache [B, L, ...]: its rows are mapped, each a pool of its layers."""
    stack, rest = arrays_of(CASE)
    cache = jnp.array(np.moveaxis(np.asarray(stack), 0, 1))
    weights = ("A_log", "dt_bias")

    def row(state, x, layer):
        x = {n: y if n in weights else y[None] for n, y in x.items()}
        out, state = jax_gdn.decode(**x, state=state, state_indices=layer[None])
        return state, out[0]

    axes = {name: None if name in weights else 0 for name in rest}
    call = jax.jit(jax.vmap(row, (0, axes, None)), donate_argnums=0)
    compiled = call.lower(cache, rest, jnp.int32(1)).compile()
    assert calls(compiled.as_text()) == 1
    assert copies(compiled.as_text(), cache.shape) == 0
    cache, out = compiled(cache, rest, jnp.int32(1))
    want = jax_gdn.decode(**rest, state=stack, layer=1)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(want[0]))
    np.testing.assert_array_equal(np.moveaxis(np.asarray(cache), 0, 1), want[1])


@pytest.mark.parametrize("layers", [1, [2, 0], "computed"], ids=str)
@pytest.mark.parametrize("pool", [{}, POOL], ids=["dense", "pool"])
def test_vmap(layers, pool):
    """Over stacks; the layer the same, one for each, or computed."""
    stack, rest = arrays_of(Case(**CASE.__dict__ | pool))
    stacks = jnp.stack([stack, stack[::-1]])
    layer = jnp.int32(1) if layers == "computed" else layers

    def call(state, layer):
        return jax_gdn.decode(**rest, state=state, layer=layer)

    if isinstance(layers, list):
        got = jax.jit(jax.vmap(call))(stacks, jnp.array(layers, jnp.int32))
    else:
        got = jax.jit(jax.vmap(lambda s: call(s, layer)))(stacks)
        layers = [1, 1]
    for i, layer in enumerate(layers):
        want = call(stacks[i], layer)
        np.testing.assert_array_equal(np.asarray(got[0][i]), np.asarray(want[0]))
        np.testing.assert_array_equal(np.asarray(got[1][i]), np.asarray(want[1]))


def test_vmap_over_one_stack_is_refused():
    stack, rest = arrays_of(CASE)
    with pytest.raises(ValueError, match="got one stack for 2 mapped calls"):
        jax.vmap(lambda i: jax_gdn.decode(**rest, state=stack, layer=i))(
            jnp.arange(2, dtype=jnp.int32)
        )


MESHED = Case(B=4, H=4, HV=8, K=64, V=32, layers=3, layer=1)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", ["b", None])
@pytest.mark.parametrize("computed", [False, True])
def test_meshes(kind, rows, computed):
    """Rows and heads of every layer split: no collective, no copy, the same buffers."""
    mesh = mesh_of(kind)
    per_row = P(rows, None, "h")
    specs = {name: per_row for name in ("q", "k", "v", "a", "b")}
    specs |= {"state": P(None, rows, "h"), "A_log": P("h"), "dt_bias": P("h")}

    def step(state, rest):
        layer = state.shape[0] - 2 if not computed else jnp.argmin(jnp.abs(JUST_ONE))
        out, state = jax_gdn.decode(**rest, state=state, layer=layer)
        return state, out

    text, shard, kept, _ = compile_and_run(MESHED, mesh, specs, step)
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, shard) == 0
    assert kept


JUST_ONE = np.array([1, 0, 1], np.int32)  # whose smallest is layer 1


@pytest.mark.usefixtures("host")
def test_loop_over_layers_on_a_mesh():
    mesh = mesh_of(AxisType.Auto)
    state, rest = split(MESHED.inputs())
    specs = {name: P("b", None, "h") for name in rest}
    specs |= {"state": P(None, "b", "h"), "A_log": P("h"), "dt_bias": P("h")}
    arrays = put(rest | {"state": state}, mesh, specs)
    stack = arrays.pop("state")
    call = jax.jit(looped, donate_argnums=0)
    text = call.lower(stack, arrays, arrays["v"]).compile().as_text()
    assert collectives(text) == []
    assert copies(text, (3, 2, 2, 64, 32)) == 0


@pytest.mark.usefixtures("host")
def test_gradient():
    """That of a list of states, for the stack and for all else."""
    stack, rest = arrays_of(Case(**CASE.__dict__ | {"K": 16, "V": 16}))
    floats = {n: x.astype(jnp.float32) for n, x in rest.items()}

    def loss(program, stack, rest):
        stack, v = program(stack, rest, rest["v"])
        return jnp.sum(stack**2) + jnp.sum(v**2)

    got, want = (
        jax.jit(jax.grad(lambda s, r, p=program: loss(p, s, r), (0, 1)))(stack, floats)
        for program in (looped, listed)
    )
    # Sums of a few hundred products, in another order: some roundings of the largest.
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(1, np.abs(y).max()))


@pytest.mark.cuda_build
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("known", [False, True])
def test_export(known):
    """With any number of layers; a known one that is beyond is the handler's error."""
    stack, rest = arrays_of(CASE)
    B, N = jax.export.symbolic_shape("B, L")

    def spec(name, x):
        rows = x.shape if name in ("A_log", "dt_bias") else (B, *x.shape[1:])
        return jax.ShapeDtypeStruct(rows, x.dtype)

    specs = {name: spec(name, x) for name, x in rest.items()}
    program = jax.export.export(
        jax.jit(lambda s, r, i: decode(s, r, r["v"], layer=2 if known else i)),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
    )(
        jax.ShapeDtypeStruct((N, B, *SHAPE[2:]), jnp.float32),
        specs,
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    program = jax.export.deserialize(program.serialize())
    got = jax.jit(program.call)(stack, rest, jnp.int32(2))
    want = decode(stack, rest, rest["v"], layer=2)
    np.testing.assert_array_equal(np.asarray(got[0]), np.asarray(want[0]))
