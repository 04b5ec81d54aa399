"""The state in place: same buffer, no copy, nothing of its size beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_gdn
from tests.cases import Case
from tests.hlo import TARGET, calls, copies, state_aliases

CASE = Case(B=4)
SHAPE = (4, 4, 128, 128)
STATE_BYTES = 4 * int(np.prod(SHAPE))
STEPS = 5


def step(state, rest):
    q, k, v, A_log, a, dt_bias, b = rest
    out, state = jax_gdn.decode(q, k, v, state, A_log, a, dt_bias, b)
    return state, out


def one_step(state, rest):
    return step(state, rest)


def scan(state, rest):
    return lax.scan(lambda s, _: step(s, rest), state, length=STEPS)


def fori_loop(state, rest):
    return lax.fori_loop(0, STEPS, lambda _, s: step(s, rest)[0], state), rest[0]


def while_loop(state, rest):
    def body(carry):
        i, s = carry
        return i + 1, step(s, rest)[0]

    steps, state = lax.while_loop(lambda c: c[0] < STEPS, body, (0, state))
    return state, steps


def layers(states, rest):
    updated = {name: step(state, rest) for name, state in states.items()}
    return {n: s for n, (s, _) in updated.items()}, [o for _, o in updated.values()]


def arguments(program):
    arrays = CASE.inputs()
    state = jnp.array(arrays.pop("state"))
    rest = [jnp.array(x) for x in arrays.values()]
    if program is layers:
        return {f"layer{i:02}": jnp.array(state) for i in range(12)}, rest
    return state, rest


PROGRAMS = [one_step, scan, fori_loop, while_loop, layers]


@pytest.mark.parametrize("program", PROGRAMS)
def test_donated_state_is_updated_in_place(program):
    state, rest = arguments(program)
    where = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    expected = jax.jit(program)(state, rest)
    compiled = jax.jit(program, donate_argnums=0).lower(state, rest).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) == len(where)
    assert copies(text, SHAPE) == 0
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < STATE_BYTES
    assert memory.alias_size_in_bytes >= STATE_BYTES * len(where)
    updated, outs = compiled(state, rest)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(updated)] == where
    for got, want in zip(
        jax.tree.leaves((updated, outs)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("program", PROGRAMS)
def test_kept_state_costs_one_copy(program):
    state, rest = arguments(program)
    before = [np.array(x) for x in jax.tree.leaves(state)]
    text = jax.jit(program).lower(state, rest).compile().as_text()
    assert calls(text) == state_aliases(text) == len(before)
    assert copies(text, SHAPE) == len(before)
    jax.jit(program)(state, rest)
    for kept, was in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(np.asarray(kept), was)


def test_eager_call_keeps_the_state():
    state, rest = arguments(one_step)
    before = np.array(state)
    step(state, rest)
    np.testing.assert_array_equal(np.asarray(state), before)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_is_written_in_place(dtype):
    (q, k, v, *gates), state = arguments(one_step)[1], arguments(one_step)[0]
    expected, _ = jax_gdn.decode(q, k, v, state, *gates, output=v.astype(dtype))
    output = jnp.full(v.shape, jnp.nan, dtype)
    where = output.unsafe_buffer_pointer()

    def call(state, output):
        return jax_gdn.decode(q, k, v, state, *gates, output=output)

    compiled = jax.jit(call, donate_argnums=(0, 1)).lower(state, output).compile()
    name = {jnp.float32: "f32", jnp.bfloat16: "bf16"}[dtype]
    assert copies(compiled.as_text(), v.shape, name) == 0
    out, _ = compiled(state, output)
    assert out.dtype == dtype
    assert out.unsafe_buffer_pointer() == where
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


def test_reference_finds_a_use_for_output():
    state, (q, k, v, *gates) = arguments(one_step)
    call = jax.jit(
        lambda state, output: jax_gdn.decode(
            q, k, v, state, *gates, output=output, implementation="xla"
        ),
        donate_argnums=(0, 1),
    )
    out, _ = call(state, jnp.zeros(v.shape, jnp.float32))  # warns if it has none
    assert out.dtype == jnp.float32


@pytest.mark.cuda_build
@pytest.mark.parametrize("program", PROGRAMS)
def test_lowered_for_cuda(program):
    """Target and alias are there in what a GPU would compile."""
    state, rest = arguments(program)
    text = (
        jax.jit(program, donate_argnums=0)
        .trace(state, rest)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert text.count(f"@{TARGET}") == 1  # one function, called by every layer
    assert "output_tuple_indices = [1], operand_index = 3" in text
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_captured_into_cuda_graphs(gpu):
    """Twelve layers as XLA's command buffers: same bits, same buffers."""
    states, rest = jax.device_put(arguments(layers), gpu)
    expected, _ = jax.jit(layers)(*jax.jit(layers)(states, rest)[:1], rest)
    captured = jax.jit(
        layers,
        donate_argnums=0,
        compiler_options={
            "xla_gpu_enable_command_buffer": "CUSTOM_CALL",
            "xla_gpu_graph_min_graph_size": 1,
        },
    )
    where = {name: x.unsafe_buffer_pointer() for name, x in states.items()}
    for _ in range(2):
        states, _ = captured(states, rest)
    for name, state in states.items():
        assert state.unsafe_buffer_pointer() == where[name]
        np.testing.assert_array_equal(np.asarray(state), np.asarray(expected[name]))
