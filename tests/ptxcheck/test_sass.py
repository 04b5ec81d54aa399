"""Questions to machine code, asked of texts whose answers are known."""

from . import sass
from .fixtures import FRAME
from .parser import parse


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


def test_widths():
    text = [
        "@P0 LDG.E.U16 R2, desc[UR4][R0.64]",
        "LDG.E R2, desc[UR4][R0.64]",
        "LDG.E.EF.64 R2, desc[UR4][R0.64]",
        "STG.E.128 desc[UR4][R0.64], R4",
        "STS.128 [R0], R4",
    ]
    widths = {("LDG", 2): 1, ("LDG", 4): 1, ("LDG", 8): 1, ("STG", 16): 1}
    assert sass.widths(text) == widths
    body = """ld.global.u16 %rs1, [%rd1]; ld.global.u32 %r6, [%rd1];
        ld.global.cs.v2.u32 {%r6, %r7}, [%rd1]; st.shared.u32 [%r4], %r6;
        st.global.v4.u32 [%rd2], {%r6, %r6, %r6, %r6}; ret;"""
    kernel = parse(FRAME.format(body=body, log2_threads=6))["kernel"]
    assert sass.ptx_widths(kernel) == widths


def test_a_late_load_of_the_PTX_is_seen():
    load = "ld.global.v4.u32 {{%r{0}0, %r{0}1, %r{0}2, %r{0}3}}, [%rd1+{0}];"
    use = "@%p1 add.s32 %r6, %r13, %r6;"

    def late(*body: str) -> int:
        kernel = parse(FRAME.format(body=" ".join(body), log2_threads=6))["kernel"]
        return len(sass.late_ptx_loads(kernel))

    first, second = load.format(1), load.format(2)
    assert late(first, second, use) == 0
    assert late(first, use, second) == 1
    assert (
        late("ld.global.u32 %r13, [%rd1]; add.s32 %r6, %r13, %r6;", first, second) == 0
    )
    assert late(first, "@%p1 bra $end;", second, "$end: ret;") == 0
