"""Defects planted in the kernels that ship, by editing their PTX or their launch."""

import dataclasses
import re

import pytest
from cases import Case

from ptx import fault, launch
from ptx.fault import FaultError

pytestmark = pytest.mark.usefixtures("built")
CASE = Case(B=2, H=1, HV=2, K=64, V=64, q="float32", k="float32")


def edited(pattern: str, replacement: str, which: int = 0):
    """Edits one place of the PTX, the `which`-th that matches."""

    def edit(text: str) -> str:
        matches = list(re.finditer(pattern, text))
        assert len(matches) > max(which, 0), f"{pattern} not in the kernel"
        match = matches[which]
        changed = (
            text[: match.start()] + match.expand(replacement) + text[match.end() :]
        )
        assert changed != text
        return changed

    return edit


BARRIER = r"bar\.sync\s+0;"
STATE_LOAD = r"(ld\.global(?:\.cs)?\.v4\.u32 \{[^}]*\}), \[(%rd\d+)\]"
# `out` is stored so, too, where it is float32; as are zeros to it, of one register.
STREAMING_STORE = r"st\.global\.cs\.v4\.u32 \[(%rd\d+)\], (\{[^}]*\});"
PLAIN_STORE = r"st\.global\.v4\.f32 \[(%rd\d+)\], (\{[^}]*\});"
OUT_STORE = r"st\.global\.v4\.f32 \[%rd\d+\], \{(%f\d+), (?!\1)[^;]*;"
SHARED_STORE = r"st\.shared\.v2\.f32 \[(%r\d+)\]"
STORE = {16: "st.global.cs.v4.u32", 32: "st.global.cs.v4.u32"}
STORE[64] = "st.global.v4.f32"
TILES = pytest.mark.parametrize("VT", [16, 32, 64])


def edited_store(VT: int, replacement: str, which: int = 0, stores: int = 8):
    r"""Edits one of the last `stores` stores, which are the state's.

    \1 in the replacement is the address, \\2 the value.
    """
    streaming = VT < 64
    pattern = STREAMING_STORE if streaming else PLAIN_STORE
    return edited(pattern, replacement, which - stores)


def caught_in_kernel(VT: int, *kinds: str, case: Case = CASE, **edits) -> FaultError:
    inputs = case.inputs() | case.slots
    options = {**case.settings, "out_dtype": case.out_dtype, "VT": VT}
    with pytest.raises(FaultError) as caught:
        launch.decode(inputs, **options, **edits)
    assert caught.value.kind in kinds, caught.value
    return caught.value


@TILES
def test_unedited(VT):
    launch.decode(CASE.inputs(), VT=VT, edit=lambda text: text)


LENGTHS = pytest.mark.parametrize("T", [1, 2])


@TILES
@LENGTHS
def test_first_barrier_removed(VT, T):
    case, edit = dataclasses.replace(CASE, T=T), edited(BARRIER, "")
    found = caught_in_kernel(VT, fault.SHARED_RACE, case=case, edit=edit)
    assert "shared" in found.instruction
    assert found.line is not None


@pytest.mark.parametrize("VT", [32, 64])
@LENGTHS
def test_second_barrier_removed(VT, T):
    case, edit = dataclasses.replace(CASE, T=T), edited(BARRIER, "", 1)
    found = caught_in_kernel(VT, fault.SHARED_RACE, case=case, edit=edit)
    assert "ld.shared.v4" in found.instruction


@TILES
def test_next_token_staged_over_this_one(VT):
    case = dataclasses.replace(CASE, T=2)
    edit = edited(r"(xor\.b32 %r\d+, %r\d+), 1;", r"\1, 0;")
    caught_in_kernel(VT, fault.SHARED_RACE, fault.UNINITIALISED, case=case, edit=edit)


@TILES
def test_barrier_in_the_branch_of_one_lane(VT):
    # The one that stages the gates.
    branch = r"setp\.ne\.s32 %p\d+, %r\d+, 0;\s*@%p\d+ bra \$L__BB\w+;"
    edit = edited(branch, r"\g<0> bar.sync 0;")
    caught_in_kernel(VT, fault.BARRIER, edit=edit)


@TILES
@pytest.mark.parametrize("which", [0, 3, 7])
def test_state_store_one_element_off(VT, which):
    edit = edited_store(VT, rf"{STORE[VT]} [\1+4], \2;", which)
    caught_in_kernel(VT, fault.MISALIGNED, edit=edit)


@TILES
def test_state_store_one_access_off(VT):
    edit = edited_store(VT, rf"{STORE[VT]} [\1+16], \2;")
    caught_in_kernel(VT, fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT, edit=edit)


@TILES
def test_state_load_one_row_off(VT):
    # The last of K / 8 rows: thread group 7 reads the next head's first row.
    edit = edited(STATE_LOAD, rf"\1, [\2+{4 * CASE.V}]", CASE.K // 8 - 1)
    caught_in_kernel(VT, fault.BLOCK_CONFLICT, fault.OUT_OF_BOUNDS, edit=edit)


@TILES
def test_shared_index_one_off(VT):
    # q written one float2 further: its first is missing, k's first written twice.
    edit = edited(SHARED_STORE, r"st.shared.v2.f32 [\1+8]")
    caught_in_kernel(VT, fault.SHARED_RACE, fault.UNINITIALISED, edit=edit)


@TILES
def test_row_of_the_state_not_written(VT):
    edit = edited_store(VT, "")
    found = caught_in_kernel(VT, fault.UNWRITTEN, edit=edit)
    assert "state" in found.detail


@TILES
def test_out_not_written(VT):
    found = caught_in_kernel(VT, fault.UNWRITTEN, edit=edited(OUT_STORE, ""))
    assert "out" in found.detail


@TILES
def test_value_vector_not_staged(VT):
    edit = edited(r"st\.shared\.v4\.f32 [^;]*;", "")
    caught_in_kernel(VT, fault.UNINITIALISED, edit=edit)


@TILES
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_block_too_many(VT, axis):
    def edit_plan(plan):
        grid = list(plan["grid"])
        grid[axis] += 1
        return {**plan, "grid": tuple(grid)}

    kinds = (fault.OUT_OF_BOUNDS, fault.BLOCK_CONFLICT)
    caught_in_kernel(VT, *kinds, edit_plan=edit_plan)


@TILES
@pytest.mark.parametrize("axis", [1, 2])
def test_one_block_too_few(VT, axis):
    def edit_plan(plan):
        grid = list(plan["grid"])
        grid[axis] -= 1
        return {**plan, "grid": tuple(grid)}

    caught_in_kernel(VT, fault.UNWRITTEN, edit_plan=edit_plan)


def test_kernel_for_more_rows():
    def edit_plan(plan):
        return {**plan, "symbol": plan["symbol"].replace("k64", "k128")}

    caught_in_kernel(16, fault.OUT_OF_BOUNDS, fault.BLOCK_CONFLICT, edit_plan=edit_plan)


def test_kernel_for_fewer_rows():
    def edit_plan(plan):
        return {**plan, "symbol": plan["symbol"].replace("k128", "k64")}

    with pytest.raises(FaultError, match=fault.UNWRITTEN):
        launch.decode(Case(B=1, H=1, HV=1, V=16).inputs(), VT=16, edit_plan=edit_plan)


# One block, one slot of a pool of three.
SLOT = Case(B=1, H=1, HV=1, K=64, V=64, N=3, reads=(1,))
SLOT_BYTES = 4 * SLOT.K * SLOT.V


@TILES
@pytest.mark.parametrize("offset", [-SLOT_BYTES, SLOT_BYTES])
def test_a_slot_beside_is_written(VT, offset):
    also = rf"\g<0> {STORE[VT]} [\1+{offset}], \2;"
    edit = edited_store(VT, also)
    found = caught_in_kernel(VT, fault.UNADDRESSED, case=SLOT, edit=edit)
    assert "state" in found.detail


@TILES
def test_a_slot_beside_is_read(VT):
    edit = edited(STATE_LOAD, rf"\1, [\2+{SLOT_BYTES}]")
    caught_in_kernel(VT, fault.UNINITIALISED, case=SLOT, edit=edit)


@TILES
def test_padding_is_not_padding(VT):
    case = dataclasses.replace(SLOT, reads=(SLOT.N,))
    # The slot's upper bound is not looked at.
    edit = edited(r"selp\.b64 (%rd\d+), (%rd\d+), -1, %p\d+;", r"mov.u64 \1, \2;")
    found = caught_in_kernel(VT, fault.OUT_OF_BOUNDS, case=case, edit=edit)
    assert "ld.global" in found.instruction


ROWS = dataclasses.replace(CASE, layout="VK")


def test_vk_state_store_one_access_off():
    edit = edited_store(4, rf"{STORE[16]} [\1+16], \2;", stores=2)
    kinds = (fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT)
    caught_in_kernel(4, *kinds, case=ROWS, edit=edit)


def test_vk_state_load_one_row_off():
    edit = edited(STATE_LOAD, rf"\1, [\2+{4 * ROWS.K}]", 1)
    kinds = (fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT, fault.OUT_OF_BOUNDS)
    caught_in_kernel(4, *kinds, case=ROWS, edit=edit)


def test_vk_state_not_written():
    edit = edited_store(4, "", 1, stores=2)
    caught_in_kernel(4, fault.UNWRITTEN, case=ROWS, edit=edit)


def test_vk_shuffle_in_part_of_a_warp():
    branch = r"shfl\.sync\.bfly\.b32"
    edit = edited(branch, r"setp.lt.u32 %p1, %tid.x, 7; @%p1 \g<0>")
    # The other lanes go on without what it brings.
    caught_in_kernel(4, fault.WARP_SYNC, fault.REGISTER, case=ROWS, edit=edit)
