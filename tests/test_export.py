"""Programs that outlive a process: export, caches, and what tracing alone shows."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_gdn
from tests.cases import F32, Case
from tests.hlo import TARGET
from tests.meshes import host_arrays, on_one_device, split, step

pytestmark = pytest.mark.usefixtures("host")

# float32, which files of NumPy know.
DENSE = Case(B=4, T=2, H=2, HV=4, K=64, V=32, **F32)
POOL = Case(**DENSE.__dict__ | {"N": 9, "reads": (1, 2, -1, 8)})


def exported(case: Case, function=None) -> export.Exported:
    """Exports a donating step for both platforms, any number of rows and slots."""
    B, N = export.symbolic_shape("B, N")

    def spec(name: str, x: np.ndarray) -> jax.ShapeDtypeStruct:
        rows = N if name == "state" and case.N is not None else B
        weight = name in ("A_log", "dt_bias")
        return jax.ShapeDtypeStruct(
            x.shape if weight else (rows, *x.shape[1:]), x.dtype
        )

    specs = {name: spec(name, x) for name, x in host_arrays(case).items()}
    return export.export(
        jax.jit(function or step(case), donate_argnums=0),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
    )(specs.pop("state"), specs)


RELOAD = """
import sys
from pathlib import Path
import jax, numpy as np
from jax import export
import jax.numpy as jnp
import jax_gdn

program = export.deserialize(open(sys.argv[1], "rb").read())
arrays = {name: jnp.array(x) for name, x in np.load(sys.argv[2]).items()}
state = arrays.pop("state")
where = state.unsafe_buffer_pointer()
compiled = jax.jit(program.call, donate_argnums=0).lower(state, arrays).compile()
assert " copy(" not in compiled.as_text(), compiled.as_text()
state, out = compiled(state, arrays)
assert state.unsafe_buffer_pointer() == where
np.savez(sys.argv[3], state=state, out=out)
"""


def run(code: str, *arguments, cwd, **environment: str) -> str:
    """Runs code in a fresh process with one CPU device, and returns what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.cuda_build
@pytest.mark.parametrize("case", [DENSE, POOL], ids=["dense", "pool"])
def test_reloaded_in_a_fresh_process(case, tmp_path):
    """With other sizes than it was traced with; in place and without a copy."""
    program = exported(case)
    assert program.platforms == ("cpu", "cuda")
    (tmp_path / "program").write_bytes(program.serialize())
    changes = {"B": 3, "N": 7, "reads": (6, -1, 0)} if case is POOL else {"B": 7}
    this = Case(**case.__dict__ | changes)
    np.savez(tmp_path / "arrays.npz", **host_arrays(this))
    run(RELOAD, "program", "arrays.npz", "results.npz", cwd=tmp_path)
    got = np.load(tmp_path / "results.npz")
    want = on_one_device(step(this), *split(host_arrays(this)))
    for name, x in zip(("state", "out"), want, strict=True):
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.cuda_build
def test_both_platforms_hold_the_call():
    text = exported(DENSE).mlir_module()
    assert text.count(f"@{TARGET}") == 1
    assert "stablehlo.exponential" not in text  # of the reference


@pytest.mark.cuda_build
def test_any_number_of_tokens():
    (T,) = export.symbolic_shape("T")
    arrays = host_arrays(DENSE)
    specs = {
        name: jax.ShapeDtypeStruct((len(x), T, *x.shape[2:]), x.dtype)
        if name in ("q", "k", "v", "a", "b")
        else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in arrays.items()
    }
    program = export.export(
        jax.jit(step(DENSE)),
        platforms=("cpu", "cuda"),
        disabled_checks=jax_gdn.DISABLE_JAX_EXPORT_CHECKS,
    )(*split(specs))
    given = split(jax.tree.map(jnp.asarray, arrays))
    got, want = program.call(*given), jax.jit(step(DENSE))(*given)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.cuda_build
def test_fallback_is_exported_for_its_platform_alone():
    odd = Case(B=4, K=96)
    with pytest.warns(UserWarning, match="got K = 96"):
        text = exported(odd).mlir_module()
    assert text.count(f"@{TARGET}") == 1
    assert "stablehlo.exponential" in text


@pytest.mark.cuda_build
def test_export_of_mapped_and_differentiated_programs():
    def mapped(state, rest):
        names = ("A_log", "dt_bias")
        axes = {name: None if name in names else 0 for name in rest}
        call = jax.vmap(lambda s, r: jax_gdn.decode(state=s, **r), (0, axes))
        rest = {n: x if n in names else x[None] for n, x in rest.items()}
        out, state = call(state[None], rest)
        return state[0], out[0]

    def differentiated(state, rest):
        def total(state):
            out, state = jax_gdn.decode(state=state, **rest)
            return state.sum() + out.astype(jnp.float32).sum(), out

        gradient, out = jax.grad(total, has_aux=True)(state)
        return gradient, out

    state, rest = split(host_arrays(DENSE))
    for function in (mapped, differentiated):
        program = export.deserialize(exported(DENSE, function).serialize())
        got = jax.jit(program.call)(state, rest)
        want = on_one_device(function, state, rest)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(x), y)


def test_without_the_published_checks_export_refuses():
    state, rest = split(host_arrays(DENSE))
    with pytest.raises(ValueError, match=TARGET):
        export.export(jax.jit(step(DENSE)))(state, rest)


def test_symbolic_heads_are_refused():
    K = export.symbolic_shape("K")[0]
    shapes = {name: list(x.shape) for name, x in host_arrays(DENSE).items()}
    for name in ("q", "k"):
        shapes[name][-1] = K
    specs = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    with pytest.raises(ValueError, match=r"`q` must have a known K, .* got K"):
        jax.eval_shape(lambda x: jax_gdn.decode(**x), specs)


CACHED = """
import sys
from pathlib import Path
import jax, jax.monitoring, numpy as np
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jax_gdn

where = sys.argv[2]
kind = AxisType.Explicit if where == "explicit" else AxisType.Auto
mesh = jax.make_mesh((2,), ("b",), axis_types=(kind,))
split = lambda *x: NamedSharding(mesh, P(*x)) if where != "one" else None
call = lambda *x: jax_gdn.decode(*x)
spec = (P("b"),) * 4 + (P(), P("b"), P(), P("b"))
if where == "shard_map":
    call = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=P("b"))
shapes = [(2, 1, 2, 16)] * 3 + [(2, 2, 16, 16), (2,), (2, 1, 2), (2,), (2, 1, 2)]
arrays = [
    jax.device_put(jnp.zeros(s), split(*p)) for s, p in zip(shapes, spec, strict=True)
]
events.clear()
jax.block_until_ready(jax.jit(call)(*arrays))
print([name for name in events if "cache_hits" in name or "cache_misses" in name])
"""


@pytest.mark.parametrize("where", ["one", "shard_map", "explicit"])
def test_second_process_hits_the_cache(where, tmp_path):
    """On Auto meshes custom_partitioning puts an address into JAX's key."""
    first, second = (run(CACHED, "cache", where, cwd=tmp_path) for _ in range(2))
    assert "cache_misses" in first
    assert "cache_hits" in second
    assert "cache_misses" not in second


def test_tracing_alone():
    arrays = host_arrays(DENSE)
    out, state = jax.eval_shape(lambda x: jax_gdn.decode(**x), arrays)
    assert (out.shape, out.dtype) == (arrays["v"].shape, jnp.float32)
    assert (state.shape, state.dtype) == (arrays["state"].shape, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: jax_gdn.decode(**x))(arrays)
    assert [x.aval.shape for x in jaxpr.jaxpr.outvars] == [out.shape, state.shape]


def test_scope_names_the_call():
    state, rest = split(host_arrays(DENSE))

    def call(state, rest):
        with jax.named_scope("layer7"):
            return step(DENSE)(state, rest)

    text = jax.jit(call).lower(state, rest).compile().as_text()
    line = next(x for x in text.split("\n") if f'"{TARGET}"' in x)
    assert "layer7/" in line
    assert "/jax_gdn.decode/" in line


def test_checkpoint_changes_nothing():
    state, rest = split(host_arrays(DENSE))
    want = on_one_device(step(DENSE), state, rest)
    got = on_one_device(jax.checkpoint(step(DENSE)), state, rest)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


# Of jax_gdn 0.1.0 under jax 0.9.1, by `exported(KEPT)`.
KEPT = Case(**POOL.__dict__ | {"writes": (1, 3, 4, -1), "layout": "VK"})
KEPT = dataclasses.replace(KEPT, state="bfloat16")


def test_a_program_of_the_version_before_runs():
    """The promise of the target's name: `decode.v1` keeps its meaning."""
    path = Path(__file__).parent / "golden" / "decode_v1.jax_export"
    program = export.deserialize(bytearray(path.read_bytes()))
    assert "jax_gdn.decode.v1" in program.mlir_module()
    state, rest = split(host_arrays(KEPT))
    want = on_one_device(step(KEPT), state, rest)
    got = jax.jit(program.call)(state, rest)
    np.testing.assert_array_equal(np.asarray(got[0]), want[0])
    np.testing.assert_array_equal(np.asarray(got[1]), want[1])
