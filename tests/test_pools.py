"""Pools of slots: what is read, what is written, and all that is not touched."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify

import jax_gdn
from tests.cases import DTYPES, LAYOUTS, Case
from tests.hlo import calls, copies, state_aliases

B, T, N, K, V = 3, 2, 8, 64, 32


def case(**changes) -> Case:
    given = {"B": B, "T": T, "N": N, "K": K, "V": V}
    return Case(**{**given, "reads": (6, -1, 2), "writes": (4, 1, 2), **changes})


def run(case: Case, state, implementation="native"):
    arrays = case.inputs()
    arrays["state"] = state
    slots = {name: jnp.asarray(x) for name, x in case.slots.items()}
    return jax_gdn.decode(
        **arrays, **slots, **case.settings, implementation=implementation
    )


def written_slots(case: Case) -> set[int]:
    """Returns the slots that the reference writes."""
    writes = case.reads if case.writes is None else case.writes
    rows = zip(case.reads, np.reshape(writes, (case.B, -1)), strict=True)
    slots = {int(w) for r, ws in rows if 0 <= r < case.N for w in ws}
    return {w for w in slots if 0 <= w < case.N}


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state", sorted(DTYPES))
@pytest.mark.parametrize(
    "writes",
    [
        (4, 1, -1),
        ((4, 0), (1, 1), (2, 99)),
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(((7, 7), (0, 0), (-1, 5)), marks=pytest.mark.slow),
    ],
)
def test_other_slots_keep_their_bytes(writes, state, layout, implementation):
    """All slots that no row reads hold NaN; none of it is read or written over."""
    this = case(writes=writes, state=state, layout=layout)
    pool = this.inputs()["state"]
    unread = [slot for slot in range(N) if slot not in this.reads]
    pool[unread] = np.nan
    out, new = run(this, pool, implementation)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert not np.asarray(out)[1].any()  # the padded row
    written = written_slots(this)
    for slot in range(N):
        same = np.asarray(new)[slot].tobytes() == pool[slot].tobytes()
        assert same == (slot not in written), slot
        if slot in written:
            assert np.isfinite(np.asarray(new)[slot].astype(np.float32)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_padding(layout):
    this = case(reads=(-1, N, 2**31 - 1), writes=None, layout=layout)
    pool = this.inputs()["state"]
    out, new = run(this, np.full_like(pool, np.nan))
    assert not np.asarray(out).any()
    assert np.isnan(np.asarray(new)).all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_snapshots_are_the_states_between(layout, per_channel):
    """A snapshot after token t is bitwise what a call with t + 1 tokens leaves."""
    this = case(
        T=3,
        reads=(6, 0, 2),
        writes=((1, 3, 4), (5, 5, 0), (7, -1, 2)),
        layout=layout,
        per_channel=per_channel,
    )
    arrays = this.inputs()
    _, snapshots = run(this, arrays["state"])
    for row, slots in enumerate(this.writes):
        for t, slot in enumerate(slots):
            if slot < 0 or slot in slots[t + 1 :]:
                continue
            short = {n: x for n, x in arrays.items()}
            for name in ("q", "k", "v", "a", "b"):
                short[name] = arrays[name][row : row + 1, : t + 1]
            short["state"] = arrays["state"][this.reads[row]][None]
            _, state = jax_gdn.decode(**short, state_layout=layout)
            got = np.asarray(snapshots)[slot]
            np.testing.assert_array_equal(got, np.asarray(state)[0])


def programs():
    def one(pool, rest):
        out, pool = jax_gdn.decode(state=pool, **rest)
        return pool, out

    def scan(pool, rest):
        return lax.scan(lambda p, _: one(p, rest), pool, length=3)

    def while_loop(pool, rest):
        def body(carry):
            i, pool = carry
            return i + 1, one(pool, rest)[0]

        return lax.while_loop(lambda c: c[0] < 3, body, (0, pool))[::-1]

    return [one, scan, while_loop]


@pytest.mark.parametrize("writes", [None, (4, 1, 2), ((4, 0), (1, 1), (2, 5))])
@pytest.mark.parametrize("program", programs(), ids=lambda f: f.__name__)
def test_donated_pool_is_aliased_whole(program, writes):
    """No gather, no scatter, no copy: the kernel finds the slots itself."""
    this = case(writes=writes)
    rest = {n: jnp.asarray(x) for n, x in (this.inputs() | this.slots).items()}
    # A copy: memory that NumPy owns cannot be donated.
    pool = jnp.array(rest.pop("state"))
    where = pool.unsafe_buffer_pointer()
    compiled = jax.jit(program, donate_argnums=0).lower(pool, rest).compile()
    text = compiled.as_text()
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, pool.shape) == 0
    assert "gather(" not in text
    assert "scatter(" not in text
    assert "dynamic-slice(" not in text.replace("dynamic-slice(s32", "")
    assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes
    updated, _ = compiled(pool, rest)
    assert updated.unsafe_buffer_pointer() == where


# What is free in every version, on the host and on a GPU. On jax 0.10 XLA copies the
# whole pool where `switch` passes it through last or has more branches, and where
# `cond` passes it through first on the host, or last on a GPU; a barrier around what
# passes through does not help.
BRANCHES = {
    "switch": lambda busy, decode, pool: lax.switch(
        busy.astype(jnp.int32), [lambda x: x, decode], pool
    ),
    "no branch, slots of -1": lambda busy, decode, pool: decode(pool, busy),
}


def branching(name):
    """Returns (pool, rest) -> pool, which may decode, and its arguments."""
    this = case(writes=None)
    rest = {n: jnp.asarray(x) for n, x in (this.inputs() | this.slots).items()}
    pool = jnp.array(rest.pop("state"))
    rest["busy"] = jnp.array(True)

    def program(pool, rest):
        arrays = dict(rest)
        busy = arrays.pop("busy")

        def decode(pool, every_row=jnp.array(True)):
            slots = jnp.where(every_row, arrays["state_indices"], -1)
            given = arrays | {"state_indices": slots}
            return jax_gdn.decode(state=pool, **given)[1]

        return BRANCHES[name](busy, decode, pool)

    return program, pool, rest


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_passes_a_pool_through_is_free(name):
    """Where nothing is to do, the pool passes through; both ways in its own buffer."""
    program, pool, rest = branching(name)
    call = jax.jit(program, donate_argnums=0)
    before, where = np.array(pool), pool.unsafe_buffer_pointer()
    compiled = call.lower(pool, rest).compile()
    assert copies(compiled.as_text(), pool.shape) == 0
    assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes
    pool = compiled(pool, rest | {"busy": jnp.array(False)})
    np.testing.assert_array_equal(np.asarray(pool), before)
    pool = compiled(pool, rest)
    assert pool.unsafe_buffer_pointer() == where
    expected = jax_gdn.decode(
        state=before, **{n: x for n, x in rest.items() if n != "busy"}
    )[1]
    np.testing.assert_array_equal(np.asarray(pool), np.asarray(expected))


SHARED = [
    ((3, 1, 3), None, "rows 0 and 2 both write slot 3"),
    ((3, 1, 2), (4, 0, 4), "rows 0 and 2 both write slot 4"),
    ((3, 1, 2), ((4, 5), (0, 4), (6, 7)), "rows 0 and 1 both write slot 4"),
    ((3, 1, 2), (4, 3, 5), "row 0 reads slot 3, which row 1 writes"),
    ((3, 1, 2), ((4, 4), (0, 6), (7, 1)), "row 1 reads slot 1, which row 2 writes"),
]
APART = [
    ((3, 1, 2), None),
    ((-1, -1, 8), None),
    ((3, -1, 3), (4, 4, 5)),  # a row that is padding writes nothing
    ((3, 1, 2), (-1, 99, -1)),
    ((3, 1, 2), ((4, 4), (1, 1), (2, 5))),  # a row is not in its own way
]


@pytest.mark.parametrize(("reads", "writes", "message"), SHARED)
def test_rows_in_each_others_way_are_named(reads, writes, message):
    given = [np.array(x, np.int32) for x in (reads, writes) if x is not None]
    check = ft.partial(jax_gdn.check_slots, num_slots=N)
    with pytest.raises(checkify.JaxRuntimeError, match=f"check_slots: {message}"):
        check(*given)
    error, _ = jax.jit(checkify.checkify(lambda *x: check(*x)))(*given)
    assert error.get().startswith(f"jax_gdn.check_slots: {message}")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([np.array([0, 2**32])], ValueError, "`state_indices` .* fit into int32"),
        ([np.zeros(2)], TypeError, "`state_indices` must be int32; got float32"),
        ([np.zeros((2, 1), int)], ValueError, r"`state_indices` .*\[B\]; got \[2, 1\]"),
        ([np.array(0)], ValueError, r"`state_indices` .*\[B\]; got \[\]"),
        (
            [np.zeros(2, int), np.zeros(4, int)],
            ValueError,
            r"`output_state_indices` .*\[B\] = \[2\]; got \[4\]",
        ),
    ],
)
def test_what_is_checked_are_slots(given, error, message):
    with pytest.raises(error, match=message):
        jax_gdn.check_slots(*given, num_slots=N)


@pytest.mark.parametrize(("reads", "writes"), APART)
def test_rows_apart_pass(reads, writes):
    given = [np.array(x, np.int32) for x in (reads, writes) if x is not None]
    jax_gdn.check_slots(*given, num_slots=N)
    jax_gdn.check_slots(np.zeros(1, np.int32), num_slots=N)
    jax_gdn.check_slots(np.zeros(0, np.int32), num_slots=N)
