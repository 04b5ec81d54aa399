"""Defects planted in the kernels that ship, by editing their PTX or their launch."""

import dataclasses
import re

import pytest
from tests.cases import Case

from tests.kernels import launch, module
from tests.ptxcheck import fault
from tests.ptxcheck.fault import FaultError

pytestmark = pytest.mark.usefixtures("built")
LOOP = "gdn_decode_kv_f32_k64_vt64_c4_g8"  # over tokens; of any dtypes
STEPS = ("gdn_step_kv_f32_k64_vt16_c4_g8", "gdn_step_kv_f32_k64_vt64_c4_g8")
APART = "gdn_step_kv_f32_k64_vt64_c4_g16_gw"  # its first warp makes the gates
PAIRS = "gdn_step_kv_f32_k128_vt16_c2_g16_gw"  # likewise; two columns a thread
ROWS_KERNEL = "gdn_step_vk_f32_k64_vt16_r4_streaming"  # likewise
ROWS_LOOP = "gdn_decode_vk_f32_k64_vt64_r16_plain"
KERNELS = pytest.mark.parametrize("kernel", [LOOP, *STEPS, APART])
GATE_WARP = pytest.mark.parametrize(
    ("kernel", "threads"),
    [(PAIRS, 160), (APART, 288), (ROWS_KERNEL, 160)],
)
STAGED = pytest.mark.parametrize("kernel", [LOOP, *STEPS])  # q and k
WARPS = pytest.mark.parametrize("kernel", [LOOP, *STEPS[1:]])  # that, in several warps
# Whose gates are handed on, from one warp to others.
GATES = pytest.mark.parametrize("kernel", [LOOP, *STEPS[1:], APART, ROWS_KERNEL])
STEP_CASE = Case(B=2, H=1, HV=2, K=64, V=64)
LOOP_CASE = dataclasses.replace(STEP_CASE, q="float32", k="float32")


def case_of(kernel: str) -> Case:
    one = module.instance_of(kernel)
    base = STEP_CASE if one.step else LOOP_CASE
    return dataclasses.replace(base, K=one.K, V=one.K, layout=one.layout)


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
STATE_STORE = (
    r"(st\.global(?:\.cs)?\.v4\.(?:u32|f32)) \[(%rd\d+)(?:\+\d+)?\], (\{[^}]*\});"
)
OUT_STORE = r"st\.global\.v4\.f32 \[%rd\d+\], \{(%f\d+), (?!\1)[^;]*;"
NARROW_OUT_STORE = r"st\.global\.v2\.u32 [^;]*;"
SHARED_STORE = r"(st\.shared\.v2\.[uf]32) \[(%r\d+)\]"


def rows_of(kernel: str) -> int:
    """Of a thread."""
    return module.instance_of(kernel).accesses


def edited_store(kernel: str, replacement: str, which: int = 0):
    r"""Edits one of the last stores of 16 bytes, which are the state's.

    \1 in the replacement is the instruction, \\2 the address, \\3 the value.
    """
    return edited(STATE_STORE, replacement, which - rows_of(kernel))


def caught_in_kernel(
    kernel: str, *kinds: str, case: Case | None = None, **edits
) -> FaultError:
    case = case or case_of(kernel)
    inputs = case.inputs() | case.slots
    options = {**case.settings, "out_dtype": case.out_dtype, "kernel": kernel}
    with pytest.raises(FaultError) as caught:
        launch.decode(inputs, **options, **edits)
    assert caught.value.kind in kinds, caught.value
    return caught.value


@KERNELS
def test_unedited(kernel):
    launch.decode(case_of(kernel).inputs(), kernel=kernel, edit=lambda text: text)


@WARPS
@pytest.mark.parametrize("which", [0, 1])
def test_barrier_removed(kernel, which):
    # After the inputs are staged, and after the sums of each warp are there. What
    # loops has one more, before its next round.
    edit = edited(BARRIER, "", which + (kernel == LOOP))
    found = caught_in_kernel(kernel, fault.SHARED_RACE, edit=edit)
    assert "shared" in found.instruction
    assert found.line is not None


@GATE_WARP
def test_meeting_with_the_gate_warp_removed(kernel, threads):
    # "VK" reads what nobody wrote yet; "KV" has sums there by then.
    edit = edited(rf"bar\.sync\s+1, {threads};", "")
    kind = fault.UNINITIALISED if kernel == ROWS_KERNEL else fault.SHARED_RACE
    caught_in_kernel(kernel, kind, edit=edit)


@GATE_WARP
def test_arrival_of_the_gate_warp_removed(kernel, threads):
    edit = edited(rf"bar\.arrive\s+1, {threads};", "")
    found = caught_in_kernel(kernel, fault.BARRIER, edit=edit)
    assert "32 threads missing, first 0" in str(found)


def test_barrier_of_one_warp_removed():
    edit = edited(r"bar\.warp\.sync\s+-1;", "", -1)
    caught_in_kernel(STEPS[0], fault.SHARED_RACE, edit=edit)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_barrier_removed_in_a_second_round(which):
    """Before the next tokens are staged, after, and after the sums are there."""
    case = dataclasses.replace(LOOP_CASE, T=8)
    caught_in_kernel(
        LOOP, fault.SHARED_RACE, case=case, edit=edited(BARRIER, "", which)
    )


@WARPS
def test_barrier_in_the_branch_of_one_lane(kernel):
    # The one that stages the gates.
    edit = edited(r"st\.shared\.v4\.f32 [^;]*;", r"bar.sync 0; \g<0>")
    caught_in_kernel(kernel, fault.BARRIER, edit=edit)


@KERNELS
@pytest.mark.parametrize("which", [0, 1, -1])
def test_state_store_one_element_off(kernel, which):
    edit = edited_store(kernel, r"\1 [\2+4], \3;", which % rows_of(kernel))
    caught_in_kernel(kernel, fault.MISALIGNED, edit=edit)


@KERNELS
def test_state_store_one_access_off(kernel):
    edit = edited_store(kernel, r"\1 [\2+16], \3;")
    caught_in_kernel(kernel, fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT, edit=edit)


@KERNELS
def test_state_load_one_row_off(kernel):
    # The last of its rows: the last group reads the next head's first row.
    edit = edited(STATE_LOAD, rf"\1, [\2+{4 * STEP_CASE.V}]", rows_of(kernel) - 1)
    caught_in_kernel(kernel, fault.BLOCK_CONFLICT, fault.OUT_OF_BOUNDS, edit=edit)


@STAGED
def test_shared_index_one_off(kernel):
    # q written one float2 further: its first is missing, k's first written twice.
    edit = edited(SHARED_STORE, r"\1 [\2+8]")
    caught_in_kernel(kernel, fault.SHARED_RACE, fault.UNINITIALISED, edit=edit)


@pytest.mark.parametrize(("kernel", "columns"), [(APART, 4), (PAIRS, 2)])
def test_sums_one_piece_off(kernel, columns):
    # The last of a warp's lands on the next warp's first, whose own is missing.
    store = rf"(st\.shared\.v{columns}\.f32) \[(%r\d+)\]"
    edit = edited(store, rf"\1 [\2+{4 * columns}]")
    kinds = fault.SHARED_RACE, fault.UNINITIALISED
    caught_in_kernel(kernel, *kinds, edit=edit)


def test_out_one_pair_off():
    edit = edited(r"(st\.global\.u32) \[(%rd\d+)\], (%r\d+);", r"\1 [\2+4], \3;")
    kinds = fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT, fault.OUT_OF_BOUNDS
    caught_in_kernel(PAIRS, *kinds, edit=edit)


@KERNELS
def test_row_of_the_state_not_written(kernel):
    edit = edited_store(kernel, "")
    found = caught_in_kernel(kernel, fault.UNWRITTEN, edit=edit)
    assert "state" in found.detail


@KERNELS
def test_out_not_written(kernel):
    store = OUT_STORE if kernel == LOOP else NARROW_OUT_STORE
    edit = edited(store, "")  # what stores zeros for padding stands behind
    found = caught_in_kernel(kernel, fault.UNWRITTEN, edit=edit)
    assert "out" in found.detail


@GATES
def test_gates_not_staged(kernel):
    edit = edited(r"st\.shared\.v4\.f32 [^;]*;", "")
    caught_in_kernel(kernel, fault.UNINITIALISED, edit=edit)


@KERNELS
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_block_too_many(kernel, axis):
    def edit_plan(plan):
        grid = list(plan["grid"])
        grid[axis] += 1
        return {**plan, "grid": tuple(grid)}

    kinds = (fault.OUT_OF_BOUNDS, fault.BLOCK_CONFLICT)
    caught_in_kernel(kernel, *kinds, edit_plan=edit_plan)


@KERNELS
@pytest.mark.parametrize("axis", [1, 2])
def test_one_block_too_few(kernel, axis):
    def edit_plan(plan):
        grid = list(plan["grid"])
        grid[axis] -= 1
        return {**plan, "grid": tuple(grid)}

    caught_in_kernel(kernel, fault.UNWRITTEN, edit_plan=edit_plan)


def test_kernel_for_more_rows():
    def edit_plan(plan):
        return {**plan, "symbol": plan["symbol"].replace("k64", "k192")}

    kinds = fault.OUT_OF_BOUNDS, fault.BLOCK_CONFLICT
    caught_in_kernel(STEPS[0], *kinds, edit_plan=edit_plan)


def test_kernel_for_fewer_rows():
    def edit_plan(plan):
        return {**plan, "symbol": plan["symbol"].replace("k128", "k64")}

    case = Case(B=1, H=1, HV=1, V=16, q="float32")
    with pytest.raises(FaultError, match=fault.UNWRITTEN):
        launch.decode(case.inputs(), edit_plan=edit_plan)


# One block, one slot of a pool of three.
SLOT = Case(B=1, H=1, HV=1, K=64, V=64, N=3, reads=(1,))
SLOT_BYTES = 4 * SLOT.K * SLOT.V


@KERNELS
@pytest.mark.parametrize("offset", [-SLOT_BYTES, SLOT_BYTES])
def test_a_slot_beside_is_written(kernel, offset):
    also = rf"\g<0> \1 [\2+{offset}], \3;"
    edit = edited_store(kernel, also)
    found = caught_in_kernel(kernel, fault.UNADDRESSED, case=SLOT, edit=edit)
    assert "state" in found.detail


@KERNELS
def test_a_slot_beside_is_read(kernel):
    edit = edited(STATE_LOAD, rf"\1, [\2+{SLOT_BYTES}]")
    caught_in_kernel(kernel, fault.UNINITIALISED, case=SLOT, edit=edit)


@KERNELS
def test_padding_is_not_padding(kernel):
    case = dataclasses.replace(SLOT, reads=(SLOT.N,))
    # The slot's upper bound is not looked at.
    edit = edited(r"selp\.b32 (%r\d+), (%r\d+), -1, %p\d+;", r"mov.u32 \1, \2;")
    found = caught_in_kernel(kernel, fault.OUT_OF_BOUNDS, case=case, edit=edit)
    assert "ld.global" in found.instruction


ROWS = dataclasses.replace(STEP_CASE, layout="VK")


def test_vk_state_store_one_access_off():
    edit = edited_store(ROWS_KERNEL, r"\1 [\2+16], \3;")
    kinds = (fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT)
    caught_in_kernel(ROWS_KERNEL, *kinds, case=ROWS, edit=edit)


def test_vk_state_load_one_row_off():
    # The last of its rows: the last block reads the next head's first.
    edit = edited(STATE_LOAD, rf"\1, [\2+{4 * ROWS.K}]", rows_of(ROWS_KERNEL) - 1)
    kinds = (fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT, fault.OUT_OF_BOUNDS)
    caught_in_kernel(ROWS_KERNEL, *kinds, case=ROWS, edit=edit)


def test_vk_state_not_written():
    edit = edited_store(ROWS_KERNEL, "", 1)
    caught_in_kernel(ROWS_KERNEL, fault.UNWRITTEN, case=ROWS, edit=edit)


def test_vk_shuffle_in_part_of_a_warp():
    branch = r"shfl\.sync\.bfly\.b32"
    edit = edited(branch, r"setp.lt.u32 %p1, %tid.x, 7; @%p1 \g<0>")
    # The other lanes go on without what it brings.
    kinds = (fault.WARP_SYNC, fault.REGISTER)
    caught_in_kernel(ROWS_KERNEL, *kinds, case=ROWS, edit=edit)


@pytest.mark.parametrize("which", [0, 1])
def test_vk_barrier_removed(which):
    """Before the next tokens are staged, and after."""
    case = dataclasses.replace(ROWS, T=8)
    edit = edited(BARRIER, "", which)
    found = caught_in_kernel(ROWS_LOOP, fault.SHARED_RACE, case=case, edit=edit)
    assert "shared" in found.instruction
