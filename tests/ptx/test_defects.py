"""Defects planted in the kernels that ship, by editing their PTX or their launch."""

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
STATE_STORE = r"st\.global(?:\.cs)?\.v4\.f32 \[(%rd\d+)\]"
STATE_LOAD = r"(ld\.global(?:\.cs)?\.v4\.f32 \{[^}]*\}), \[(%rd\d+)\]"
SHARED_STORE = r"st\.shared\.v2\.f32 \[(%r\d+)\]"
TILES = pytest.mark.parametrize("VT", [16, 32, 64])


def caught_in_kernel(VT: int, *kinds: str, **edits) -> FaultError:
    with pytest.raises(FaultError) as caught:
        launch.decode(CASE.inputs(), VT=VT, **edits)
    assert caught.value.kind in kinds, caught.value
    return caught.value


@TILES
def test_unedited(VT):
    launch.decode(CASE.inputs(), VT=VT, edit=lambda text: text)


@TILES
def test_first_barrier_removed(VT):
    found = caught_in_kernel(VT, fault.SHARED_RACE, edit=edited(BARRIER, ""))
    assert "ld.shared" in found.instruction
    assert found.line is not None


@pytest.mark.parametrize("VT", [32, 64])
def test_second_barrier_removed(VT):
    found = caught_in_kernel(VT, fault.SHARED_RACE, edit=edited(BARRIER, "", 1))
    assert "ld.shared.v4" in found.instruction


@TILES
def test_barrier_in_the_branch_of_one_lane(VT):
    # The one that stages the gates.
    branch = r"setp\.ne\.s32 %p\d+, %r\d+, 0;\s*@%p\d+ bra \$L__BB\w+;"
    edit = edited(branch, r"\g<0> bar.sync 0;")
    caught_in_kernel(VT, fault.BARRIER, edit=edit)


@TILES
@pytest.mark.parametrize("which", [0, 3, 7])
def test_state_store_one_element_off(VT, which):
    edit = edited(STATE_STORE, r"st.global.v4.f32 [\1+4]", which)
    caught_in_kernel(VT, fault.MISALIGNED, edit=edit)


@TILES
def test_state_store_one_access_off(VT):
    edit = edited(STATE_STORE, r"st.global.v4.f32 [\1+16]")
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
    edit = edited(r"st\.global(\.cs)?\.v4\.f32 [^;]*;", "")
    found = caught_in_kernel(VT, fault.UNWRITTEN, edit=edit)
    assert "state" in found.detail


@TILES
def test_out_not_written(VT):
    edit = edited(r"st\.global\.(v4\.)?f32 \[[^;]*;", "", -1)
    found = caught_in_kernel(VT, fault.UNWRITTEN, edit=edit)
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
