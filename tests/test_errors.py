"""Bad input: which error, naming which argument, saying what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import Case

CASE = Case(B=2, H=2, HV=4, K=64, V=32)
SHAPES = {
    "k": r"\[B, T, H, K\] = \[2, 1, 2, 64\]",
    "v": r"\[B, T, HV, V\] = \[2, 1, HV, V\]",
    "state": r"\[B, HV, K, V\] = \[2, 4, 64, 32\]",
    "A_log": r"\[HV\] = \[4\]",
    "a": r"\[B, T, HV\] = \[2, 1, 4\]",
    "dt_bias": r"\[HV\] = \[4\]",
    "b": r"\[B, T, HV\] = \[2, 1, 4\]",
    "output": r"\[B, T, HV, V\] = \[2, 1, 4, 32\]",
}
NAMES = ("q", *SHAPES)


def arguments(**changes):
    arrays = CASE.inputs()
    arrays["output"] = np.zeros((2, 1, 4, 32), np.float32)
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    return {**arrays, **changes}


def raises(error, match, **changes):
    with pytest.raises(error, match="jax_gdn: " + match):
        jax_gdn.decode(**arguments(**changes))
    # The same words under jit, before anything runs.
    static = {"scale", "use_qk_l2norm", "state_layout", "implementation"}
    settings = static & changes.keys()
    arrays = {n: x for n, x in arguments(**changes).items() if n not in settings}
    fixed = {name: changes[name] for name in settings}
    with pytest.raises(error, match="jax_gdn: " + match):
        jax.jit(lambda x: jax_gdn.decode(**x, **fixed))(arrays)


def test_arguments_are_right():
    jax_gdn.decode(**arguments())


@pytest.mark.parametrize("name", SHAPES)
def test_wrong_size(name):
    x = arguments()[name]
    wrong = jnp.concatenate([x, x[:1]])
    raises(
        ValueError, f"`{name}` must have shape {SHAPES[name]}; got ", **{name: wrong}
    )


@pytest.mark.parametrize("name", NAMES)
def test_wrong_rank(name):
    wrong = arguments()[name][None]
    raises(
        ValueError,
        rf"`{name}` must have shape \[.*\]; got \[1, {wrong.shape[1]}.*\].*\.",
        **{name: wrong},
    )


@pytest.mark.parametrize("name", NAMES)
def test_wrong_dtype(name):
    expected = "float32 or bfloat16 or float16"
    wrong = arguments()[name].astype(jnp.int32)
    raises(TypeError, f"`{name}` must be {expected}; got int32", **{name: wrong})


@pytest.mark.parametrize("name", NAMES[:-1])
def test_missing_array(name):
    raises(TypeError, f"`{name}` must be an array .*; got NoneType", **{name: None})


def test_where_an_expected_size_came_from():
    """The argument that is named may be the right one, beside a wrong one."""
    q = jnp.zeros((2, 1, 2, 63))
    match = r"`k` must have shape .*; got \[2, 1, 2, 64\] \(K = 63 from `q`\)\."
    raises(ValueError, match, q=q)
    b = jnp.zeros((1, 1, 5))
    match = r"`b` .*; got \[1, 1, 5\] \(B = 2 from `q`, HV = 4 from `v`\)\."
    raises(ValueError, match, b=b)

    match = r"`dt_bias` .*; got \[4\] \(HV = 4 from `v`, K = 64 from `q`\)\."
    raises(ValueError, match, a=jnp.zeros((2, 1, 4, 64)))


@pytest.mark.parametrize("scale", [10**400, 1e39, -1e300, float("nan")])
def test_scale_does_not_fit(scale):
    raises(ValueError, "`scale` must fit into float32; got ", scale=scale)


def test_pool_without_its_slots():
    pool = jnp.zeros((7, 4, 64, 32))
    match = r"`state` .* \(B = 2 from `q`\)\. A pool .* needs `state_indices`"
    raises(ValueError, match, state=pool)
    match = r"`state` .* \(B = 2 from `q`, V = 32 from `v`\)\. A pool .*`state_indices`"
    raises(ValueError, match, state=pool[..., :6])


def test_no_token():
    q = jnp.zeros((2, 0, 2, 64))
    raises(ValueError, "`q` must have T >= 1; got 0", q=q)


def test_tokens_disagree():
    k = jnp.zeros((2, 3, 2, 64))
    match = r"`k` must have shape \[B, T, H, K\] = \[2, 1, 2, 64\]; got \[2, 3, 2, 64\]"
    raises(ValueError, match, k=k)


def test_decay_a_channel_needs_its_bias():
    a = jnp.zeros((2, 1, 4, 64))
    match = r"`dt_bias` must have shape \[HV, K\] = \[4, 64\]; got \[4\]"
    raises(ValueError, match, a=a)
    match = (
        r"`a` must have shape \[B, T, HV, K\] = \[2, 1, 4, 64\]; got \[2, 1, 4, 65\]"
    )
    raises(ValueError, match, a=jnp.zeros((2, 1, 4, 65)))


def test_layout_of_the_state():
    match = (
        r"`state` must have shape \[B, HV, V, K\] = \[2, 4, 32, 64\]; got \[2, 4, 64"
    )
    raises(ValueError, match, state_layout="VK")
    match = "`state_layout` must be 'KV' or 'VK'; got 'kv'"
    raises(ValueError, match, state_layout="kv")


SLOTS = jnp.zeros(2, jnp.int32)


def test_slots_of_a_pool():
    pool = jnp.zeros((7, 4, 64, 32))
    both = {"state": pool, "state_indices": SLOTS, "output_state_indices": SLOTS}
    jax_gdn.decode(**arguments(**both))
    match = r"`state_indices` must have shape \[B\] = \[2\]; got \[3\]"
    raises(ValueError, match, **both | {"state_indices": jnp.zeros(3, jnp.int32)})
    match = "`state_indices` must be int32; got float32"
    raises(TypeError, match, **both | {"state_indices": jnp.zeros(2)})
    match = r"`output_state_indices` must have shape \[B\] = \[2\]; got \[1\]"
    raises(ValueError, match, **both | {"output_state_indices": SLOTS[:1]})
    match = r"`output_state_indices` must have shape \[B, T\] = \[2, 1\]; got \[2, 2\]"
    wrong = jnp.zeros((2, 2), jnp.int32)
    raises(ValueError, match, **both | {"output_state_indices": wrong})
    match = "`output_state_indices` needs `state_indices`"
    raises(ValueError, match, output_state_indices=SLOTS)
    match = r"`state` must have shape \[N, HV, K, V\] = \[N, 4, 64, 32\]; got \[7, 3"
    raises(ValueError, match, **both | {"state": pool[:, :3]})


def test_heads_do_not_divide():
    q = jnp.zeros((2, 1, 3, 64))
    raises(
        ValueError,
        "`v` must have HV a multiple of H = 3 from `q`; got HV = 4",
        q=q,
        k=q,
    )


def test_empty_axis():
    q = jnp.zeros((2, 1, 2, 0))
    raises(ValueError, "`q` must have K >= 1; got 0", q=q)


@pytest.mark.parametrize("scale", ["1", [1.0], np.ones(3), jnp.float32(1)])
def test_scale_is_no_number(scale):
    raises(
        TypeError,
        f"`scale` must be a Python number or None; got {type(scale).__name__}",
        scale=scale,
    )


def test_scale_is_traced():
    call = jax.jit(lambda scale: jax_gdn.decode(**arguments(), scale=scale))
    with pytest.raises(TypeError, match="`scale` must be a Python number or None"):
        call(0.5)


@pytest.mark.parametrize("slot", [2**32 + 1, 2**31, -(2**31) - 1, 2**64 - 1])
@pytest.mark.parametrize("name", ["state_indices", "output_state_indices"])
def test_slot_that_would_wrap_around(name, slot):
    """JAX makes a NumPy int64 an int32 by its lower half: 2^32 + 1 would be slot 1."""
    slots = {"state_indices": np.array([0, 1])}  # int64, which fits
    match = rf"`{name}` must hold slots that fit into int32; got {slot}\."
    jax_gdn.decode(**arguments(**slots))
    slots[name] = np.array([0, slot], np.int64 if slot < 2**63 else np.uint64)
    given = arguments(**slots)
    with pytest.raises(ValueError, match="jax_gdn: " + match):
        jax_gdn.decode(**given)
    with pytest.raises(ValueError, match=match):
        jax.jit(lambda q: jax_gdn.decode(**{**given, "q": q}))(given["q"])


@pytest.mark.parametrize("scale", [1, 0.37, np.float32(0.37), np.float64(0.37)])
def test_scale_is_a_number(scale):
    out, _ = jax_gdn.decode(**arguments(), scale=scale)
    expected, _ = jax_gdn.decode(**arguments(), scale=float(scale))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(expected))


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_l2norm_is_no_bool(value):
    raises(
        TypeError,
        f"`use_qk_l2norm` must be a bool; got {type(value).__name__}",
        use_qk_l2norm=value,
    )


@pytest.mark.parametrize("name", ["cuda", "", 1])
def test_unknown_implementation(name):
    raises(
        ValueError,
        f"`implementation` must be None or 'native' or 'xla'; got {name!r}",
        implementation=name,
    )
