"""Deferred state writes: what is computed, kept, folded and rolled back."""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_gdn
from tests.cases import DTYPES, LAYOUTS, Case
from tests.oracle import OUT_TOLERANCE, STATE_TOLERANCE, assert_close, decode64

IMPLEMENTATIONS = ("native", "xla")
ON_HOST = pytest.mark.usefixtures("host")
SIZES = {"B": 3, "H": 2, "HV": 4, "K": 32, "V": 16}
BFLOAT16 = DTYPES["bfloat16"]


def case_of(**changes) -> Case:
    return Case(**SIZES | {"output": "float32"} | changes)


def inputs_of(case: Case, seed: int = 0) -> dict:
    """A call's arrays but its state; keys correlated, as after SiLU; decays near 1."""
    arrays = dataclasses.replace(case, seed=seed).inputs()
    del arrays["state"]
    arrays["k"] = (arrays["k"].astype(np.float32) + 0.5).astype(arrays["k"].dtype)
    if not case.given:
        arrays["A_log"] = arrays["A_log"] - 4
    shape = arrays["v"].shape
    return arrays | {"output": np.zeros(shape, DTYPES[case.output or case.q])}


@dataclasses.dataclass
class Server:
    """States, what is pending beside them, and what they stand for, in float64."""

    case: Case
    window: int = 8
    max_tokens: int | None = None
    implementation: str = "native"

    def __post_init__(self):
        case = self.case
        first = case.inputs()["state"]
        self.state = jnp.array(first)
        self.plain = first.astype(np.float64)
        pending = jax_gdn.new_pending(
            first,
            case.H,
            window=self.window,
            max_tokens=self.max_tokens or case.T,
            k_dtype=DTYPES[case.k],
            state_layout=case.layout,
            per_channel=case.per_channel,
        )
        # What is not pending is never read.
        self.pending = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), pending)
        self.cursors = jax_gdn.new_cursors(len(first))
        settings = dict(case.settings, implementation=self.implementation)
        call = ft.partial(jax_gdn.decode_deferred, **settings)
        self.call = jax.jit(
            lambda state, pending, cursors, rest: call(
                state=state, pending=pending, cursors=cursors, **rest
            ),
            donate_argnums=(0, 1),
        )

    def step(self, inputs, accepted=None, *, check=True, **slots):
        """One call; `accepted` tokens a row are kept. Checks and returns `out`."""
        T, given = inputs["q"].shape[1], {n: jnp.asarray(x) for n, x in inputs.items()}
        marks = {name: jnp.asarray(x) for name, x in slots.items()}
        out, self.state, self.pending = self.call(
            self.state, self.pending, self.cursors, given | marks
        )
        kept = None if accepted is None else jnp.asarray(accepted)
        self.cursors = jax_gdn.advance_cursors(
            self.cursors, self.pending, T, **marks, accepted=kept
        )
        slots.pop("fold", None)
        plain = {name: x for name, x in inputs.items() if name != "output"}
        if check:
            want, _ = decode64(**plain, state=self.plain, **slots, **self.case.settings)
            assert_close(out, want, OUT_TOLERANCE, "out")
        self._advance_plain(plain, accepted, slots)
        return np.asarray(out)

    def join(self, slot: int, state: np.ndarray):
        """A new request takes a slot; what its ring holds is of the last one."""
        self.state = self.state.at[slot].set(state)
        self.cursors = self.cursors.at[slot].set(0)
        self.plain[slot] = state

    def _advance_plain(self, plain, accepted, slots):
        B, T = plain["q"].shape[:2]
        reads = slots.get("state_indices", np.arange(B))
        writes = slots.get("output_state_indices", reads)
        before = self.plain.copy()
        for n, (read, write) in enumerate(zip(reads, writes, strict=True)):
            if not (0 <= read < len(before) and 0 <= write < len(before)):
                continue
            kept = T if accepted is None else accepted[n]
            after = before[read : read + 1]
            if kept:
                row = {
                    name: x if name in ("A_log", "dt_bias") else x[n : n + 1, :kept]
                    for name, x in plain.items()
                }
                _, after = decode64(**row, state=after, **self.case.settings)
            self.plain[write] = after[0]

    def materialize(self):
        return jax_gdn.materialize(
            self.state, self.pending, self.cursors, state_layout=self.case.layout
        )

    def check_states(self, tolerance=STATE_TOLERANCE):
        assert_close(self.materialize(), self.plain, tolerance, "state")


FORMS = [
    *(case_of(layout=layout, T=T) for layout in LAYOUTS for T in (1, 2, 5, 8)),
    case_of(q="float32", k="float32", v="float16", a="float32", b="float16"),
    case_of(k="float16", T=3, H=1),
    case_of(K=7, V=3, H=4),
    case_of(given=True, a="float32", T=2),
    case_of(lower_bound=-5.0, allow_neg_eigval=True),
    case_of(use_qk_l2norm=False, scale=0.3, qk_norm=0.5),
    case_of(qk_norm=1e-3, T=2),
]
PER_CHANNEL = [
    case_of(per_channel=True, T=T, layout=layout)
    for T, layout in ((1, "KV"), (3, "VK"))
]


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        pytest.param(
            *(case, implementation),
            marks=[pytest.mark.slow] * (implementation == "xla" and i > 2),
            id=f"{case.id}-{implementation}",
        )
        for i, case in enumerate(FORMS)
        for implementation in IMPLEMENTATIONS
    ],
)
@ON_HOST
def test_float64(case, implementation):
    """Rows at different counts, a part of each draft taken back."""
    server = Server(case, implementation=implementation)
    rng = np.random.default_rng(1)
    for i in range(11):
        accepted = rng.integers(0, case.T + 1, case.B) if case.T > 1 else None
        server.step(inputs_of(case, i), accepted)
    server.check_states()


@pytest.mark.parametrize("case", PER_CHANNEL, ids=lambda case: case.id)
@ON_HOST
def test_a_decay_a_channel_is_the_reference(case):
    server = Server(case, implementation="xla")
    for i in range(10):
        server.step(inputs_of(case, i))
    server.check_states()
    with pytest.warns(UserWarning, match="decode_deferred falls back to the reference"):
        Server(case, implementation=None).step(inputs_of(case))


def run_pool(case: Case, implementation: str, steps: int) -> None:
    """Rows join, leave, move to other slots, fold and are padding, at random."""
    server = Server(case, implementation=implementation)
    rng = np.random.default_rng(0)
    states = case.inputs()["state"]
    for i in range(steps):
        if i % 4 == 3:
            server.join(int(rng.integers(case.N)), states[rng.integers(case.N)])
        reads = rng.permutation(case.N)[: case.B]
        free = np.setdiff1d(np.arange(case.N), reads)
        moves = rng.random(case.B) < 0.15
        writes = np.where(moves, rng.permutation(free)[: case.B], reads)
        writes = np.where(rng.random(case.B) < 0.1, -1, writes)
        reads = np.where(rng.random(case.B) < 0.1, case.N, reads)
        accepted = rng.integers(0, case.T + 1, case.B)
        fold = rng.random(case.B) < 0.1
        slots = {"state_indices": reads, "output_state_indices": writes}
        slots = {name: x.astype(np.int32) for name, x in slots.items()}
        out = server.step(inputs_of(case, i), accepted, **slots, fold=fold)
        assert (out[reads == case.N] == 0).all()
        if i % 50 == 49:
            server.check_states()
    server.check_states()


POOL_CASES = [case_of(N=7, T=T, layout=layout) for T, layout in ((1, "KV"), (3, "VK"))]


@pytest.mark.parametrize(
    "implementation", ["native", pytest.param("xla", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.id)
@ON_HOST
def test_pool(case, implementation):
    run_pool(case, implementation, 60)


@pytest.mark.slow
@pytest.mark.parametrize("case", POOL_CASES, ids=lambda case: case.id)
@ON_HOST
def test_two_thousand_steps(case):
    run_pool(case, "native", 2000)


@pytest.mark.parametrize(
    ("max_tokens", "share", "most"), [(1, 0.167, 0.18), (8, 0.236, 0.25)]
)
def test_the_memory_of_rings(max_tokens, share, most):
    """The shares of a float32 state that the documentation names."""
    state = jax.ShapeDtypeStruct((1, 32, 128, 128), jnp.float32)
    rings = jax.eval_shape(
        lambda: jax_gdn.new_pending(state, 16, max_tokens=max_tokens)
    )
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(rings)]
    assert round(sum(sizes) / (state.size * 4), 3) == share < most


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("state", "unit"), [("bfloat16", 2**-8), ("float16", 2**-11)])
@ON_HOST
def test_states_of_16_bits_are_rounded_once_a_window(layout, state, unit):
    """Half a unit in the last place each time: of four windows at most two units."""
    case = case_of(state=state, layout=layout)
    server = Server(case)
    for i in range(32):
        server.step(inputs_of(case, i), check=False)
    assert server.state.dtype == DTYPES[state]
    state = jax_gdn.materialize(
        server.state.astype(jnp.float32),
        server.pending,
        server.cursors,
        state_layout=layout,
    )
    error = np.abs(np.asarray(state, np.float64) - server.plain).max()
    assert 0 < error <= 2 * unit * np.abs(server.plain).max()


@ON_HOST
def test_a_bfloat16_state_drifts_a_third_of_what_it_does_in_decode():
    case = case_of(state="bfloat16", K=64, V=32, B=2)
    server = Server(case, window=16)
    state = jnp.array(server.state)
    for i in range(200):
        inputs = inputs_of(case, i)
        server.step(inputs, check=False)
        given = {name: jnp.asarray(x) for name, x in inputs.items()}
        _, state = jax_gdn.decode(**given, state=state)

    def drift(state):
        return np.sqrt(np.mean((np.asarray(state, np.float64) - server.plain) ** 2))

    folded = server.state.astype(jnp.float32)
    folded = jax_gdn.materialize(folded, server.pending, server.cursors)
    assert drift(folded) < drift(state) / 3


def bits(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("layout", "implementation"), [("KV", "native"), ("VK", "native"), ("KV", "xla")]
)
@ON_HOST
def test_what_was_taken_back_changes_nothing(layout, implementation):
    """Not a bit of what follows, whatever the rejected tokens held."""
    case = case_of(T=4, layout=layout)
    ends = []
    for held in (0, 1, np.nan):
        server = Server(case, implementation=implementation)
        outs = []
        for i in range(7):
            inputs = inputs_of(case, i)
            accepted = np.array([(i + n) % 5 for n in range(case.B)])
            for n, kept in enumerate(accepted):
                for name in ("q", "k", "v", "a", "b"):
                    other = inputs_of(case, 99)[name][n, kept:] * BFLOAT16.type(held)
                    inputs[name][n, kept:] = other
            out = server.step(inputs, accepted, check=False)
            outs.append([row[:kept] for row, kept in zip(out, accepted, strict=True)])
        ends.append(bits((outs, server.materialize())))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize(("layout", "T"), [("KV", 1), ("VK", 3)])
@ON_HOST
def test_a_row_alone_has_the_same_bits(layout, T):
    case = case_of(T=T, layout=layout, B=5)
    together, alone = Server(case), Server(case)
    alone.state = alone.state[2:3]
    alone.pending = jax.tree.map(lambda x: x[2:3], alone.pending)
    alone.cursors = alone.cursors[2:3]
    for i in range(6):
        inputs = inputs_of(case, i)
        inputs["v"][0] = np.nan  # stays in its row
        out = together.step(inputs, check=False)
        again = {
            n: x if n in ("A_log", "dt_bias") else x[2:3] for n, x in inputs.items()
        }
        given = {name: jnp.asarray(x) for name, x in again.items()}
        other, alone.state, alone.pending = alone.call(
            alone.state, alone.pending, alone.cursors, given
        )
        alone.cursors = jax_gdn.advance_cursors(alone.cursors, alone.pending, T)
        assert out[2:3].tobytes() == np.asarray(other).tobytes()
        assert np.isnan(out[0]).any()
        assert not np.isnan(out[1:]).any()
    assert bits(together.materialize()[2:3]) == bits(alone.materialize())


@ON_HOST
def test_the_ring_moves_and_folds_as_it_says():
    """Every eighth call of one token folds; a fold mask and another slot do, too."""
    case = case_of(N=5)
    server = Server(case, window=8)
    slots = {"state_indices": np.array([3, 0, -1], np.int32)}
    firsts, counts = [], []
    for i in range(20):
        before = np.asarray(server.state).copy()
        fold = np.array([False, i == 3, False])
        server.step(inputs_of(case, i), **slots, fold=fold)
        first, count = np.asarray(server.cursors[np.array([3, 0])]).T
        firsts.append(first)
        counts.append(count)
        changed = (np.asarray(server.state) != before).any(axis=(1, 2, 3))
        folds = {3: i > 0 and i % 8 == 0, 0: i == 3 or (i > 3 and (i - 3) % 8 == 0)}
        assert changed.tolist() == [folds.get(slot, False) for slot in range(5)]
    assert np.array(counts)[:, 0].tolist() == [1 + i % 8 for i in range(20)]
    assert np.array(firsts)[:, 0].tolist() == [i // 8 * 8 % 9 for i in range(20)]
    assert np.asarray(server.cursors[np.array([1, 2, 4])]).max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cursor", [(-1, 0), (9, 0), (0, -1), (0, 9), (2**31 - 1, 4)])
@ON_HOST
def test_cursors_outside_make_padding(cursor, implementation):
    server = Server(case_of(), window=8, implementation=implementation)
    server.step(inputs_of(server.case))
    server.cursors = server.cursors.at[1].set(jnp.array(cursor, jnp.int32))
    before = bits((server.state[1], jax.tree.map(lambda x: x[1], server.pending)))
    inputs = inputs_of(server.case, 1)
    out = server.step(inputs, check=False)
    assert (out[1] == 0).all()
    assert (out[0] != 0).any()
    after = bits((server.state[1], jax.tree.map(lambda x: x[1], server.pending)))
    assert before == after
    assert np.asarray(server.cursors[1]).tolist() == list(cursor)


ON_GPU = [
    case_of(K=128, V=128, layout=layout, state=state, T=T, N=5)
    for layout in LAYOUTS
    for state in DTYPES
    for T in (1, 4, 8)
]


@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.id)
def test_on_a_gpu(case, gpu):
    """Pools, moves, folds and roll back; the same bits again; all in place."""
    ends = []
    for _ in range(2):
        with jax.default_device(gpu):
            server = Server(case, window=16)
            kept = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(server.pending)]
            rng, outs = np.random.default_rng(0), []
            for i in range(20):
                reads = rng.permutation(case.N)[: case.B]
                free = np.setdiff1d(np.arange(case.N), reads)
                writes = np.where(rng.random(case.B) < 0.2, free[0], reads)
                writes[1:] = reads[1:]
                slots = {"state_indices": reads, "output_state_indices": writes}
                slots = {name: x.astype(np.int32) for name, x in slots.items()}
                fold = rng.random(case.B) < 0.1
                accepted = rng.integers(0, case.T + 1, case.B)
                check = case.state == "float32"
                inputs = inputs_of(case, i)
                outs.append(
                    server.step(inputs, accepted, **slots, fold=fold, check=check)
                )
            now = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(server.pending)]
            assert now == kept
            if case.state == "float32":
                server.check_states()
            ends.append(bits((outs, server.materialize())))
    assert ends[0] == ends[1]
