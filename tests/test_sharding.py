"""Meshes: what is computed, what waits for whom, and what is copied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_gdn
from tests.cases import Case
from tests.hlo import calls, collectives, copies, opcodes, state_aliases
from tests.meshes import (
    KINDS,
    assert_same_bits,
    compile_and_run,
    host_arrays,
    label,
    mesh_of,
    on_one_device,
    put,
    specs_of,
    split,
    step,
)

pytestmark = pytest.mark.usefixtures("host")

SIZES = {"B": 4, "H": 4, "HV": 8, "K": 64, "V": 32}
BOTH = ("b", "h")
POOL = {"N": 6, "reads": (5, 0, 3, -1), "writes": (1, 6, 3, 4)}


def case(**changes) -> Case:
    return Case(**SIZES | changes)


IN_PLACE = [
    (case(), {}),
    (case(T=3), {}),
    (case(T=2, layout="VK", per_channel=True, state="bfloat16"), {}),
    # Key heads whole where they do not divide, or only in part.
    (case(H=2), {"key_heads": None}),
    (case(H=2, HV=12), {"key_heads": None}),
    (case(H=1), {"key_heads": None}),
    (case(HV=16), {"b": None, "h": BOTH, "key_heads": "b"}),
    (case(HV=16), {"b": None, "h": BOTH, "key_heads": None}),
    (case(HV=4), {}),
    (case(), {"key_heads": None}),
    (case(B=1), {"b": None}),
    (case(B=8), {"b": BOTH, "h": None, "key_heads": None}),
    # Pools over heads: every device has the slots of its heads.
    (case(**POOL), {"b": None}),
    (case(**POOL, T=2, layout="VK"), {"b": None, "h": BOTH[::-1], "key_heads": "h"}),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("case", "specs"), IN_PLACE, ids=label)
def test_rows_and_heads_split_in_place(case, specs, kind):
    mesh = mesh_of(kind)
    text, shard, kept, _ = compile_and_run(case, mesh, specs_of(case, **specs))
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    name = {"float32": "f32", "bfloat16": "bf16"}[case.state]
    assert copies(text, shard, name) == 0
    assert kept


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sharded_state_leads(kind):
    """All else whole: nothing is gathered, every device takes what it needs."""
    specs = dict.fromkeys(specs_of(case()), P()) | {"state": P("b", "h")}
    text, _, kept, got = compile_and_run(case(), mesh_of(kind), specs)
    assert collectives(text) == []
    assert kept
    assert got[1].sharding.spec[:3] == ("b", None, "h")


def test_whole_state_is_not_gathered_for_sharded_values():
    """Where types say that the new state is whole, its operands become so, not it."""
    specs = specs_of(case(), state=P())
    text, *_, got = compile_and_run(case(), mesh_of(AxisType.Explicit), specs)
    assert "all-gather" in collectives(text)
    assert not re.search(r"f32\[\d+,\d+,64,32\]\S* all-gather", text)
    assert got[0].sharding.is_fully_replicated


def test_sharded_values_lead_where_the_state_is_whole():
    specs = specs_of(case(), state=P())
    text, *_, got = compile_and_run(case(), mesh_of(AxisType.Auto), specs)
    assert collectives(text) == []
    assert got[0].sharding.spec == P("b", "h")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("case", "specs"),
    [
        (
            case(),
            {"b": None, "h": None, "key_heads": None, "state": P(None, None, "h")},
        ),
        (case(), {"h": None, "key_heads": None, "state": P("b", None, None, "h")}),
        (case(**POOL), {"b": None, "state": P("b", "h")}),  # over N
        (case(**POOL), {"b": "b"}),  # rows, each of which may write any slot
    ],
    ids=label,
)
def test_other_splits_gather_and_are_right(case, specs, kind):
    text, *_ = compile_and_run(case, mesh_of(kind), specs_of(case, **specs))
    assert "all-gather" in collectives(text)
    assert calls(text) == 1


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_context_mesh(kind):
    """Under set_mesh only a constraint says how the state is split."""
    constrain = {
        AxisType.Auto: lax.with_sharding_constraint,
        AxisType.Explicit: jax.sharding.reshard,
    }[kind]

    def call(state, rest):
        return step(case())(constrain(state, P("b", "h")), rest)

    state, rest = split(host_arrays(case()))
    want = on_one_device(step(case()), state, rest)
    with jax.set_mesh(mesh_of(kind)):
        assert_same_bits(jax_gdn.decode(state=state, **rest), want[::-1])
        compiled = jax.jit(call).lower(state, rest).compile()
        got = compiled(state, rest)
    assert_same_bits(got, want)
    assert collectives(compiled.as_text()) == []
    assert got[0].sharding.shard_shape(got[0].shape) == (2, 2, 64, 32)


def test_axes_of_both_kinds():
    devices = np.array(jax.devices("cpu")).reshape(2, 4)
    mesh = jax.sharding.Mesh(devices, BOTH, (AxisType.Auto, AxisType.Explicit))
    text, shard, kept, _ = compile_and_run(case(), mesh, specs_of(case()))
    assert collectives(text) == []
    assert copies(text, shard) == 0
    assert kept


def scan(case: Case):
    def call(state, rest):
        return lax.scan(lambda s, _: step(case)(s, rest), state, length=3)

    return call


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scan_of_sharded_steps(kind):
    text, shard, kept, _ = compile_and_run(
        case(), mesh_of(kind), specs_of(case()), scan(case())
    )
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    assert copies(text, shard) == 0
    assert kept


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("program", [step, scan])
def test_shard_map(program, kind, check_vma):
    mesh, this = mesh_of(kind), case(T=2)
    specs = specs_of(this)
    state_spec, rest_specs = split({n: specs[n] for n in host_arrays(this)})
    steps = (None,) if program is scan else ()
    mapped = jax.shard_map(
        program(this),
        mesh=mesh,
        in_specs=(state_spec, rest_specs),
        out_specs=(state_spec, P(*steps, "b", None, "h")),
        check_vma=check_vma,
    )
    want = on_one_device(program(this), *split(host_arrays(this)))
    state, rest = split(put(host_arrays(this), mesh, specs))
    compiled = jax.jit(mapped, donate_argnums=0).lower(state, rest).compile()
    text = compiled.as_text()
    assert collectives(text) == []
    assert state_aliases(text) == 1
    assert copies(text, (2, 2, 64, 32)) == 0
    assert_same_bits(compiled(state, rest), want)


def only(axis: str, specs: dict[str, P]) -> dict[str, P]:
    """Drops the other mesh axes from specs."""
    return {n: P(*(x if x == axis else None for x in s)) for n, s in specs.items()}


def partly_manual(function, this: Case, axis: str, **settings):
    specs = only(axis, specs_of(this) | {"out": P("b", None, "h")})
    state_spec, rest_specs = split({n: specs[n] for n in host_arrays(this)})
    return jax.shard_map(
        function,
        in_specs=(state_spec, rest_specs),
        out_specs=(state_spec, specs["out"]),
        axis_names={axis},
        **settings,
    )


@pytest.mark.parametrize(("outer", "inner"), [BOTH, BOTH[::-1]])
def test_nested_shard_maps(outer, inner):
    mesh, this = mesh_of(AxisType.Auto), case()
    call = partly_manual(step(this), this, inner)
    call = partly_manual(call, this, outer, mesh=mesh)
    text, shard, kept, _ = compile_and_run(this, mesh, specs_of(this), call)
    assert collectives(text) == []
    assert copies(text, shard) == 0
    assert kept


def test_partly_manual_is_refused():
    """XLA cannot partition inside a manual region: said before anything runs."""
    mesh, this = mesh_of(AxisType.Auto), case()
    state, rest = split(put(host_arrays(this), mesh, specs_of(this)))
    call = partly_manual(step(this), this, "b", mesh=mesh)
    with pytest.raises(
        NotImplementedError, match=r"jax_gdn.decode: .*got \['h'\] that"
    ):
        jax.jit(call).lower(state, rest)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mapped_over", ["b", None])
def test_vmap_on_a_mesh(mapped_over, kind):
    """Mapped axes are split like any other: a pool for each data-parallel group."""
    names = ("q", "k", "v", "state", "a", "b", "state_indices")
    this = case(N=6, reads=(5, 0, 3, -1))
    arrays = {
        n: np.stack([x, x[::-1]]) if n in names else x
        for n, x in host_arrays(this).items()
    }
    heads = specs_of(this, b=None)
    if mapped_over and kind == AxisType.Explicit:
        heads = dict.fromkeys(heads, P())  # jax 0.10 gathers where both are split
    specs = {n: P(mapped_over, *heads[n]) if n in names else heads[n] for n in arrays}
    axes = {n: 0 if n in names else None for n in arrays}
    axes.pop("state")
    call = jax.vmap(step(this), (0, axes))
    text, got = compile_and_run_mapped(call, arrays, mesh_of(kind), specs)
    assert collectives(text) == []
    assert calls(text) == state_aliases(text) == 1
    assert got[0].sharding.spec[0] == mapped_over


def compile_and_run_mapped(call, arrays, mesh, specs):
    want = on_one_device(call, *split(arrays))
    state, rest = split(put(arrays, mesh, specs))
    compiled = jax.jit(call).lower(state, rest).compile()
    got = compiled(state, rest)
    assert_same_bits(got, want)
    return compiled.as_text(), got


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reference_needs_no_collective_either(kind):
    this = case(T=2)
    function = step(this, implementation="xla")
    want = on_one_device(function, *split(host_arrays(this)))
    state, rest = split(put(host_arrays(this), mesh_of(kind), specs_of(this)))
    compiled = jax.jit(function).lower(state, rest).compile()
    assert collectives(compiled.as_text()) == []
    assert_same_bits(compiled(state, rest), want)


def test_one_device_has_nothing_of_it():
    """The compiled program is a call on the arguments, as before there were meshes."""
    state, rest = split(jax.device_put(host_arrays(case()), jax.devices("cpu")[0]))
    compiled = jax.jit(step(case()), donate_argnums=0).lower(state, rest).compile()
    alone = opcodes(compiled.as_text())
    assert alone <= {"parameter", "custom-call", "get-tuple-element", "tuple"}
    mesh = mesh_of(AxisType.Auto, (1, 1), devices=jax.devices("cpu")[:1])
    sharded = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), rest)
    on_mesh = jax.jit(step(case()), donate_argnums=0).lower(
        jax.device_put(jnp.array(state), NamedSharding(mesh, P("b", "h"))), sharded
    )
    assert "CustomSPMDPartitioning" not in on_mesh.as_text()
