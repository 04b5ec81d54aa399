"""The machine code that ships."""

import re

import pytest

from ptx import module, sass

pytestmark = pytest.mark.usefixtures("built")
INSTANCES = [(K, VT) for K in (64, 128, 192, 256) for VT in (16, 32, 64)]
INSTANCE = pytest.mark.parametrize(("K", "VT"), INSTANCES)


def code(K: int, VT: int) -> list[str]:
    return module.sass()[f"gdn_decode_kv_f32_k{K}_vt{VT}"]


def test_every_kernel_is_looked_at():
    found = {
        tuple(map(int, re.search(r"k(\d+)_vt(\d+)$", symbol).groups()))
        for symbol in module.sass()
    }
    assert found == set(INSTANCES)
    assert set(module.sass()) == set(module.resources()) == set(module.kernels())


@INSTANCE
def test_nothing_in_local_memory(K, VT):
    assert [text for text in code(K, VT) if sass.is_local(text)] == []
    resources = module.resources()[f"gdn_decode_kv_f32_k{K}_vt{VT}"]
    assert resources.local_bytes == 0
    assert resources.stack_bytes == 0


@INSTANCE
def test_state_is_loaded_and_stored_16_bytes_at_a_time(K, VT):
    text = code(K, VT)
    assert sum(sass.is_wide(line, "LDG") for line in text) == K // 8
    # And `out`, where it is float32.
    assert sum(sass.is_wide(line, "STG") for line in text) == K // 8 + 1


@INSTANCE
def test_all_state_loads_are_issued_before_the_first_use_of_any(K, VT):
    text = code(K, VT)
    loads = sass.wide_loads(text)
    assert len(loads) == K // 8
    assert loads[-1] < sass.first_wait(text, "LDG.128")


# With 255 registers or few less, ptxas stages q and k in the middle of the loads.
LATE = pytest.mark.xfail(reason="ptxas waits for q and k before the last state loads")


@pytest.mark.parametrize(
    ("K", "VT"),
    [
        pytest.param(K, VT, marks=LATE if VT == 16 and K > 128 else ())
        for K, VT in INSTANCES
    ],
)
def test_all_state_loads_are_issued_before_anything_waits(K, VT):
    text = code(K, VT)
    assert sass.wide_loads(text)[-1] < sass.first_wait(text)


def test_a_use_between_loads_is_seen():
    text = [
        "IADD3 R4, R4, R6, RZ",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "@P0 FADD R0, R0, R7",
        "LDG.E.EF.128 R8, desc[UR4][R2.64+0x10]",
    ]
    assert sass.wide_loads(text) == [1, 3]
    assert sass.first_wait(text, "LDG.128") == sass.first_wait(text) == 2


def test_a_load_whose_address_is_loaded_waits():
    text = ["LDG.E.64 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R4.64]"]
    assert sass.first_wait(text) == 1
    assert sass.first_wait(text, "LDG.128") == 2


def test_local_memory_is_seen():
    assert sass.is_local("@!P1 LDL.64 R2, [R1]")
    assert sass.is_local("STL [R1+0x8], R2")
    assert not sass.is_local("LDC R1, c[0x0][0x28]")
