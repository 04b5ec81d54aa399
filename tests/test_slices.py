"""States, pools and operands that are slices of larger arrays.

XLA may fuse such slices with the native call (on GPUs from jax 0.11 on, by default) and
then hands over two buffers where an alias was asked for. Every form of program gives
the bits of its calls one by one.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_gdn
from tests.cases import Case

LAYERS, STEPS = 5, 3
CASES = [
    Case(),
    Case(layout="VK", state="bfloat16", T=3, K=64, V=48, H=1, HV=3, B=3),
    Case(state="float16", per_channel=True, B=1),
    Case(N=5, reads=(4, -1), K=64, V=16),
    Case(N=5, T=2, reads=(4, 0), writes=((1, -1), (2, 3)), state="bfloat16"),
]


def decode(case: Case, arrays, **changes):
    return jax_gdn.decode(**{**arrays, **changes}, state_layout=case.layout)


def scan_over_layers(case, arrays, stack):
    def layer(carry, state):
        out, state = decode(case, arrays, state=state)
        return carry, (state, out)

    return lax.scan(layer, 0, stack)[1]


def layer_by_layer(case, arrays, stack):
    pairs = [decode(case, arrays, state=x)[::-1] for x in stack]
    return [jnp.stack(x) for x in zip(*pairs, strict=True)]


def one_slice(case, arrays, stack):
    return decode(case, arrays, state=stack[2])[::-1]


def set_in_a_loop(case, arrays, stack):
    def layer(i, carry):
        stack, outs = carry
        out, state = decode(case, arrays, state=stack[i])
        return stack.at[i].set(state), outs.at[i].set(out)

    outs = jnp.zeros((LAYERS, *arrays["v"].shape), case.out_dtype)
    return lax.fori_loop(0, LAYERS, layer, (stack, outs))


def every_state_of_a_scan(case, arrays, stack):
    def token(state, _):
        out, state = decode(case, arrays, state=state)
        return state, (state, out)

    return lax.scan(token, stack[1], length=STEPS)[1]


def token_by_token(case, arrays, stack):
    state, results = stack[1], []
    for _ in range(STEPS):
        out, state = decode(case, arrays, state=state)
        results.append((state, out))
    return [jnp.stack(x) for x in zip(*results, strict=True)]


def output_slice(case, arrays, stack):
    outputs = jnp.zeros((LAYERS, *arrays["v"].shape), jnp.float32)

    def layer(i, carry):
        stack, outputs = carry
        out, state = decode(case, arrays, state=stack[i], output=outputs[i])
        return stack.at[i].set(state), outputs.at[i].set(out)

    return lax.fori_loop(0, LAYERS, layer, (stack, outputs))


def float32_outputs(case, arrays, stack):
    return layer_by_layer(
        case, {**arrays, "output": jnp.zeros(arrays["v"].shape)}, stack
    )


def mapped(case, arrays, stack, batch_size=None):
    def layer(state):
        return decode(case, arrays, state=state)[::-1]

    return lax.map(layer, stack, batch_size=batch_size)


def every_operand(case, arrays, stack):
    stacks = {n: jnp.stack([x] * LAYERS) for n, x in arrays.items()}
    stacks = lax.optimization_barrier(stacks)

    def layer(carry, i):
        given = {
            name: lax.dynamic_index_in_dim(x, i, keepdims=False)
            for name, x in stacks.items()
        }
        out, state = decode(case, given, state=stack[i])
        return carry, (state, out)

    return lax.scan(layer, 0, jnp.arange(LAYERS))[1]


PROGRAMS = {
    scan_over_layers: layer_by_layer,
    one_slice: lambda *x: [y[2] for y in layer_by_layer(*x)],
    set_in_a_loop: layer_by_layer,
    every_state_of_a_scan: token_by_token,
    output_slice: float32_outputs,
    mapped: layer_by_layer,
    ft.partial(mapped, batch_size=2): layer_by_layer,
    every_operand: layer_by_layer,
}
KEEP = (one_slice, every_state_of_a_scan)  # return no array like the stack
GRAPHS = {
    "xla_gpu_enable_command_buffer": "CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}


def inputs_of(case: Case):
    arrays = {n: jnp.asarray(x) for n, x in (case.inputs() | case.slots).items()}
    state = arrays.pop("state")
    rng = np.random.default_rng(3)
    stack = rng.standard_normal((LAYERS, *state.shape)).astype(state.dtype)
    return arrays, stack


def name_of(program) -> str:
    return getattr(program, "__name__", "mapped_in_batches")


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.slow] * (x in CASES[2:4])) for x in CASES],
    ids=lambda case: case.id,
)
@pytest.mark.parametrize(
    ("program", "donate"),
    [
        (program, donate)
        for program in PROGRAMS
        for donate in (False, True)
        if not donate or program not in KEEP
    ],
    ids=lambda x: ("kept", "donated")[x] if isinstance(x, bool) else name_of(x),
)
@pytest.mark.parametrize("graphs", [False, True], ids=["", "graphs"])
def test_slices_give_the_same_bits(program, case, donate, graphs, request):
    if graphs:
        request.getfixturevalue("gpu")
    arrays, stack = inputs_of(case)
    expected = PROGRAMS[program](case, arrays, jnp.asarray(stack))
    call = jax.jit(
        lambda stack: program(case, arrays, stack),
        donate_argnums=(0,) if donate else (),
        compiler_options=GRAPHS if graphs else None,
    )
    for _ in range(2 if graphs else 1):  # a second execution updates a graph
        given = jnp.array(stack)
        results = call(given)
        for got, want in zip(results, expected, strict=True):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    if not donate:
        assert np.asarray(given).tobytes() == stack.tobytes()
