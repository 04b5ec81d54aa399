"""The machine code that ships."""

import pytest

from ptx import module, sass

pytestmark = pytest.mark.usefixtures("built")
INSTANCE = pytest.mark.parametrize(
    "one", module.instances(), ids=lambda one: one.symbol
)


def test_every_kernel_is_looked_at():
    assert set(module.sass()) == {one.symbol for one in module.instances()}
    assert set(module.sass()) == set(module.resources()) == set(module.kernels())


@INSTANCE
def test_nothing_in_local_memory(one):
    code = module.sass()[one.symbol]
    assert [text for text in code if sass.is_local(text)] == []
    resources = module.resources()[one.symbol]
    assert resources.local_bytes == 0
    assert resources.stack_bytes == 0


def piece_bytes(one):
    """Of v and `out`, as bfloat16, that a thread of "KV" loads and stores at once."""
    return 2 * min(one.columns, 4)


def loads_beside_the_state(one):
    """Loads of the same width, of v and of a thread's own entries of q and k."""
    of_v = 1 if one.access_bytes == piece_bytes(one) else 0
    if one.layout == "VK" or not one.gate_warp:
        return of_v
    classes = 16 // one.row_groups  # of a thread
    return of_v + (2 * one.K // 64 if 8 * classes == one.access_bytes else 0)


@INSTANCE
def test_state_is_loaded_and_stored_in_whole_accesses(one):
    code, size = module.sass()[one.symbol], one.access_bytes
    loads = one.accesses + loads_beside_the_state(one)
    assert sum(sass.is_wide(text, "LDG", size) for text in code) == loads
    # "KV" stores so many columns of `out` at once, bfloat16 in a "step", else float32
    # too: of a row as of padding.
    like_out = one.layout == "KV" and size == piece_bytes(one) * (1 if one.step else 2)
    stores = one.accesses + (2 * one.columns // 4 if like_out else 0)
    assert sum(sass.is_wide(text, "STG", size) for text in code) == stores


@INSTANCE
def test_all_state_loads_are_issued_before_anything_waits(one):
    code, size = module.sass()[one.symbol], one.access_bytes
    assert len(sass.wide_loads(code, size)) >= one.accesses
    assert sass.late_loads(code, size) == 0


def test_a_late_load_is_seen():
    slot = ["LDG.E R2, desc[UR4][R0.64]", "IMAD R3, R2, R2, RZ"]
    loads = [f"LDG.E.128 R{r}, desc[UR4][R2.64]" for r in (4, 8)]
    assert sass.late_loads(slot + loads) == 0
    assert sass.late_loads([*slot, loads[0], "FADD R0, R0, R7", loads[1]]) == 1


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
