"""Defects planted in the kernels that ship, by editing their PTX or their launch."""

import functools
import re
from collections.abc import Callable

import pytest

from tests.cases import Case
from tests.kernels import launch, module
from tests.ptxcheck import fault
from tests.ptxcheck.fault import FaultError
from tests.ptxcheck.parser import Instruction

pytestmark = pytest.mark.usefixtures("built")
TOKENS = "gdn_kv_f32_k64_tokens"
ONE_WARP = "gdn_kv_f32_k128_vt16_c4_token"  # beside the gate warp
PAIRS = "gdn_kv_f32_k128_vt16_c2_token"  # two columns a thread
WIDE = "gdn_kv_f32_k128_vt64_token"
CHANNEL = "gdn_kv_f32_k128_vt64_token_channel"
VK_TOKENS = "gdn_vk_f32_k64_tokens"
VK = "gdn_vk_f32_k128_vt16_r4_token"
VK_CHANNEL = "gdn_vk_f32_k128_vt16_token_channel"


def each(*kernels: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kernel", kernels)


SINGLE = (ONE_WARP, PAIRS, WIDE, CHANNEL, VK, VK_CHANNEL)
ALL = each(TOKENS, VK_TOKENS, *SINGLE)
Edit = Callable[[str], str]


def case_of(kernel: str, **changes) -> Case:
    return module.of_symbol(kernel).case(**changes)


@functools.cache
def accesses(kernel: str, name: str, is_write: bool) -> list[Instruction]:
    """The instructions that access a buffer, in the order of the code."""
    result = launch.run(case_of(kernel), kernel=kernel)
    traffic = sorted(result.counters.traffic.items(), key=lambda item: item[0])
    code = result.program.kernel.code
    return [code[p] for (p, n), t in traffic if (n, t.is_write) == (name, is_write)]


def instructions(kernel: str, opcode: str) -> list[Instruction]:
    """Those whose opcode begins so."""
    code = launch.shipped(kernel).kernel.code
    return [i for i in code if i.opcode.startswith(opcode)]


def gate_store(kernel: str) -> Instruction:
    """The last store to shared memory before the barrier that the gates are behind."""
    opcode = "bar.arrive" if kernel in SINGLE else "bar.sync"
    met = instructions(kernel, opcode)[0]
    before = [i for i in instructions(kernel, "st.shared") if i.line < met.line]
    return before[-1]


def edited(instruction: Instruction, change: Edit) -> Edit:
    """Edits one instruction of the PTX."""

    def edit(text: str) -> str:
        lines = text.splitlines(keepends=True)
        at = instruction.line - 1
        assert lines[at].count(";") == 1
        before, lines[at] = lines[at], change(lines[at])
        assert lines[at] != before
        return "".join(lines)

    return edit


def removed(instruction: Instruction) -> Edit:
    return edited(instruction, lambda line: "\n")


def moved(instruction: Instruction, bytes: int, also: bool = False) -> Edit:
    """Accesses what lies so much further, instead or also."""

    def further(match: re.Match) -> str:
        return f"[{match[1]}+{int(match[2] or 0) + bytes}]"

    def change(line: str) -> str:
        other = re.sub(r"\[([%\w$]+)(?:\+(-?\d+))?\]", further, line)
        return line + other if also else other

    return edited(instruction, change)


def caught(kernel: str, *kinds: str, case: Case | None = None, **edits) -> FaultError:
    case = case_of(kernel) if case is None else case
    with pytest.raises(FaultError) as found:
        launch.run(case, kernel=kernel, **edits)
    assert found.value.kind in kinds, found.value
    return found.value


UNORDERED = (fault.SHARED_RACE, fault.UNINITIALISED)
CONFLICT = (fault.THREAD_CONFLICT, fault.BLOCK_CONFLICT)


@ALL
def test_unedited(kernel):
    launch.run(case_of(kernel), kernel=kernel, edit=lambda text: text)


@pytest.mark.parametrize(
    ("kernel", "which"),
    [*((TOKENS, i) for i in range(3)), (VK_TOKENS, 0), (VK_TOKENS, 1)],
)
def test_barrier_removed(kernel, which):
    """Before the next tokens are staged; after; and after the sums of "KV"."""
    barrier = instructions(kernel, "bar.sync")[which]
    case = case_of(kernel, T=8)
    found = caught(kernel, fault.SHARED_RACE, case=case, edit=removed(barrier))
    assert "shared" in found.instruction
    assert found.line is not None


@each(*SINGLE)
def test_barrier_with_the_gate_warp_removed(kernel):
    barrier = instructions(kernel, "bar.sync")[0]
    caught(kernel, *UNORDERED, edit=removed(barrier))


@each(*SINGLE)
def test_arrival_of_the_gate_warp_removed(kernel):
    arrival = instructions(kernel, "bar.arrive")[0]
    found = caught(kernel, fault.BARRIER, edit=removed(arrival))
    assert "32 threads missing, first 0" in str(found)


def test_barrier_of_the_row_warps_removed():
    barrier = instructions(CHANNEL, "bar.sync")[1]
    caught(CHANNEL, fault.SHARED_RACE, edit=removed(barrier))


@ALL
def test_barrier_in_the_branch_of_one_lane(kernel):
    # The one that stages the gates.
    edit = edited(gate_store(kernel), lambda line: "bar.sync 0;\n" + line)
    caught(kernel, fault.BARRIER, edit=edit)


@ALL
@pytest.mark.parametrize("which", [0, 1, -1])
def test_state_store_one_element_off(kernel, which):
    store = accesses(kernel, "state", True)[which]
    caught(kernel, fault.MISALIGNED, edit=moved(store, 4))


@ALL
def test_state_store_one_access_off(kernel):
    store = accesses(kernel, "state", True)[0]
    size = module.of_symbol(kernel).access_bytes
    caught(kernel, *CONFLICT, edit=moved(store, size))


@ALL
def test_state_load_one_row_off(kernel):
    # The last of its rows: the last threads read the next head's first row.
    case = case_of(kernel)
    row = 4 * (case.V if case.layout == "KV" else case.K)
    edit = moved(accesses(kernel, "state", False)[-1], row)
    caught(kernel, *CONFLICT, fault.OUT_OF_BOUNDS, edit=edit)


@each(TOKENS, VK_TOKENS)
def test_shared_index_one_off(kernel):
    # q staged one access further: its first is missing, k's first written twice.
    store = instructions(kernel, "st.shared")[0]
    size = 8 if kernel == TOKENS else 16
    caught(kernel, *UNORDERED, edit=moved(store, size))


@each(PAIRS, WIDE, CHANNEL)
def test_sums_one_access_off(kernel):
    # The last of a warp's lands on the next warp's first, whose own is missing.
    store = instructions(kernel, "st.shared")[0]
    size = 4 * module.of_symbol(kernel).columns
    caught(kernel, *UNORDERED, edit=moved(store, size))


@each(CHANNEL, VK_CHANNEL)
def test_decay_one_access_off(kernel):
    rows_end = instructions(kernel, "bar.sync")[-1].line  # then the gate warp's code
    stores = instructions(kernel, "st.shared")
    store = next(i for i in stores if i.line > rows_end)
    caught(kernel, *UNORDERED, fault.OUT_OF_BOUNDS, edit=moved(store, 16))


@ALL
def test_out_one_element_off(kernel):
    store = accesses(kernel, "out", True)[0]
    size = 2 * (module.of_symbol(kernel).columns if "_kv_" in kernel else 1)
    caught(kernel, *CONFLICT, fault.OUT_OF_BOUNDS, edit=moved(store, size))


@ALL
@pytest.mark.parametrize("name", ["state", "out"])
def test_result_not_written(kernel, name):
    edit = removed(accesses(kernel, name, True)[0])
    found = caught(kernel, fault.UNWRITTEN, edit=edit)
    assert name in found.detail


@ALL
def test_gates_not_staged(kernel):
    caught(kernel, fault.UNINITIALISED, edit=removed(gate_store(kernel)))


def resized(axis: int, by: int) -> Callable[[dict], dict]:
    def edit_plan(plan):
        grid = list(plan["grid"])
        grid[axis] += by
        return {**plan, "grid": tuple(grid)}

    return edit_plan


@ALL
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_block_too_many(kernel, axis):
    kinds = (fault.OUT_OF_BOUNDS, *CONFLICT)
    caught(kernel, *kinds, edit_plan=resized(axis, 1))


@ALL
@pytest.mark.parametrize("axis", [1, 2])
def test_one_block_too_few(kernel, axis):
    caught(kernel, fault.UNWRITTEN, edit_plan=resized(axis, -1))


@pytest.mark.parametrize(
    ("planned", "run", "kinds"),
    [
        ("k64", "k192", (fault.OUT_OF_BOUNDS, fault.BLOCK_CONFLICT)),
        ("k192", "k64", (fault.UNWRITTEN,)),
    ],
)
def test_kernel_of_another_size(planned, run, kinds):
    def edit_plan(plan):
        return {**plan, "symbol": plan["symbol"].replace(planned, run)}

    kernel = TOKENS.replace("k64", planned)
    caught(kernel, *kinds, edit_plan=edit_plan)


def slot_of(kernel: str, slot: int = 1) -> Case:
    """One sequence with a slot of a pool of three."""
    return case_of(kernel, B=1, HV=1, N=3, reads=(slot,))


def slot_bytes(kernel: str) -> int:
    return 4 * case_of(kernel).K * case_of(kernel).V


@ALL
@pytest.mark.parametrize("direction", [-1, 1])
def test_a_slot_beside_is_written(kernel, direction):
    store = accesses(kernel, "state", True)[0]
    edit = moved(store, direction * slot_bytes(kernel), also=True)
    found = caught(kernel, fault.UNADDRESSED, case=slot_of(kernel), edit=edit)
    assert "state" in found.detail


@ALL
def test_a_slot_beside_is_read(kernel):
    edit = moved(accesses(kernel, "state", False)[0], slot_bytes(kernel))
    caught(kernel, fault.UNINITIALISED, case=slot_of(kernel), edit=edit)


@ALL
def test_padding_is_not_padding(kernel):
    def change(line: str) -> str:
        return re.sub(
            r"selp\.b32\s+(%r\d+), (%r\d+), -1, %p\d+;", r"mov.u32 \1, \2;", line
        )

    def edit(text: str) -> str:
        # Of every check of a slot that a block makes: warps of both kinds.
        checks = [i for i in instructions(kernel, "selp.b32") if ", -1, %p" in i.text]
        for check in checks:
            text = edited(check, change)(text)
        return text

    found = caught(kernel, fault.OUT_OF_BOUNDS, case=slot_of(kernel, 3), edit=edit)
    assert "global" in found.instruction


def test_vk_shuffle_in_part_of_a_warp():
    def change(line: str) -> str:
        return f"setp.lt.u32 %p1, %tid.x, 40; @%p1 {line.strip()}\n"

    edit = edited(instructions(VK, "shfl.sync.bfly")[0], change)
    # The other lanes go on without what it brings.
    caught(VK, fault.WARP_SYNC, fault.REGISTER, edit=edit)
