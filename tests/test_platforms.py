"""Which implementation runs where, and what is said when it is not the native one."""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest

import jax_gdn
from jax_gdn import _registration
from tests import test_deferred_transformations as deferred
from tests.cases import Case
from tests.hlo import DEFERRED_TARGET, TARGET

ODD = Case(K=96, V=40)


def lower(platform: str, case: Case = Case(), **settings) -> str:
    arrays = [jnp.asarray(x) for x in case.inputs().values()]
    # A new function each time, so that nothing is answered from a cache.
    call = jax.jit(lambda *x: jax_gdn.decode(*x, **settings))
    return call.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


CUDA_BUILD = pytest.mark.cuda_build


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=CUDA_BUILD)])
@pytest.mark.parametrize("implementation", [None, "native"])
def test_native_platforms(platform, implementation):
    assert f"@{TARGET}" in lower(platform, implementation=implementation)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu", "rocm"])
def test_reference_anywhere(platform):
    assert "custom_call" not in lower(platform, implementation="xla")


def test_host_takes_any_size():
    assert f"@{TARGET}" in lower("cpu", ODD, implementation="native")


@pytest.mark.parametrize(
    ("platform", "case", "reason"),
    [
        ("tpu", Case(), "there is no native kernel for tpu"),
        ("rocm", Case(), "there is no native kernel for rocm"),
        *(
            pytest.param(
                "cuda", case, f"the CUDA kernel takes {what}", marks=CUDA_BUILD
            )
            for case, what in [
                (ODD, "K of 64, 128, 192 or 256; got K = 96"),
                (Case(V=40), "V in multiples of 16; got V = 40"),
                (
                    Case(B=65536, H=1, HV=1, K=64, V=1),
                    "V in multiples of 16; got V = 1",
                ),
            ]
        ),
    ],
)
def test_fallback_names_its_reason(platform, case, reason):
    message = f"jax_gdn.decode falls back to the reference: {reason}"
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        assert "custom_call" not in lower(platform, case)
    assert len(warned) == 1
    with pytest.raises(NotImplementedError, match=re.escape(reason)) as error:
        lower(platform, case, implementation="native")
    assert 'implementation="xla"' in str(error.value)


def lower_deferred(platform: str, implementation=None, **sizes) -> str:
    call = jax.jit(lambda *x: deferred.step(*x, implementation=implementation))
    traced = call.trace(*deferred.call_of(**sizes))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "size"), [("cpu", 24), pytest.param("cuda", 128, marks=CUDA_BUILD)]
)
@pytest.mark.parametrize("implementation", [None, "native"])
def test_native_platforms_of_deferred_writes(platform, size, implementation):
    text = lower_deferred(platform, implementation, K=size, V=size)
    assert f"@{DEFERRED_TARGET}" in text


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        ("tpu", "there is no native kernel for tpu"),
        pytest.param(
            "cuda",
            "the CUDA kernel of decode_deferred takes K = V = 128; got K = 64, V = 128",
            marks=CUDA_BUILD,
        ),
    ],
)
def test_deferred_writes_fall_back_with_their_reason(platform, reason):
    message = f"jax_gdn.decode_deferred falls back to the reference: {reason}"
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        assert "custom_call" not in lower_deferred(platform, K=64, V=128)
    assert len(warned) == 1
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        lower_deferred(platform, "native", K=64, V=128)


@CUDA_BUILD
def test_grid_limit():
    reason = _registration.cuda.why_unsupported(65536, 1, 64, 64)
    assert reason == "the CUDA kernel takes B and HV up to 65535; got B = 65536, HV = 1"
    assert _registration.cuda.why_unsupported(65535, 65535, 64, 64) is None


@CUDA_BUILD
def test_old_gpu_is_refused_by_name():
    reason = _registration.cuda.why_unsupported_device("NVIDIA A100", 8, 0)
    assert reason.startswith("the GPU (NVIDIA A100) has compute capability 8.0; ")
    assert 'Pass implementation="xla".' in reason
    for major, minor in ((9, 0), (10, 3), (12, 0)):
        assert _registration.cuda.why_unsupported_device("x", major, minor) is None


def test_build_without_cuda(monkeypatch):
    monkeypatch.setattr(_registration, "cuda", None)
    # A batch size no other test has: the trace must be new.
    with pytest.warns(UserWarning, match="this build of jax_gdn has no CUDA kernels"):
        assert "custom_call" not in lower("cuda", Case(B=7))


def test_cpu_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower("cpu", Case(K=33, V=9))


def test_eager_calls_trace_once():
    from jax_gdn._decode import _decode

    arrays = [jnp.asarray(x) for x in Case(B=11).inputs().values()]
    before = _decode._cache_size()
    for _ in range(5):
        jax_gdn.decode(*arrays)
    assert _decode._cache_size() == before + 1
