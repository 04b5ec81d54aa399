"""Defects planted in the kernels of `decode_deferred`, by editing their PTX."""

import functools

import pytest

from tests.kernels import launch, module
from tests.kernels.deferred import Row, inputs_of
from tests.kernels.launch import PENDING
from tests.kernels.test_defects import CONFLICT, Edit, edited, moved
from tests.ptxcheck import fault
from tests.ptxcheck.fault import FaultError
from tests.ptxcheck.parser import Instruction

pytestmark = pytest.mark.usefixtures("built")
KERNELS = (
    "gdn_kv_bf16_k128_vt64_deferred_token",
    "gdn_vk_f32_k128_vt64_deferred_tokens",
)
EACH = pytest.mark.parametrize("kernel", KERNELS)


def run(kernel: str, edit: Edit | None = None) -> launch.Result:
    case = module.of_symbol(kernel).case()
    # Each of a lane's four entries is the first that is not pending, of some row.
    rows = [Row(count, fold=True) for count in (5, 6, 8, 9)]
    inputs = inputs_of(case, rows, 16, 18)
    options = {**case.settings, "window": 16, "kernel": kernel}
    return launch.decode(inputs, **options, edit=edit)


unedited = functools.cache(run)


def first_store(kernel: str, name: str) -> tuple[int, list[Instruction]]:
    """Place of the first store to a ring, and the code."""
    result = unedited(kernel)
    traffic = result.counters.traffic.items()
    at = min(pc for (pc, n), t in traffic if n == name and t.is_write)
    return at, result.program.kernel.code


def caught(kernel: str, *kinds: str, edit: Edit) -> None:
    with pytest.raises(FaultError) as found:
        run(kernel, edit)
    assert found.value.kind in kinds, found.value


@EACH
def test_every_value_head_writes_k(kernel):
    at, code = first_store(kernel, "pending.k")
    heads = [i for i in code[:at] if "%ctaid.y" in i.text][-1]
    guard = next(i for i in code if i.line > heads.line and i.opcode == "bra")
    caught(kernel, *CONFLICT, edit=edited(guard, lambda line: "\n"))


@EACH
@pytest.mark.parametrize("which", range(5))
def test_a_fold_reads_past_the_cursor(kernel, which):
    """Of the decays, or of one of a lane's four entries."""
    code = unedited(kernel).program.kernel.code
    arrived = next(i for i in code if i.opcode == "bar.arrive").line
    checks = [i for i in code if i.line > arrived and i.opcode == "setp.ge.s32"]
    edit = edited(checks[which], lambda line: line.replace("setp.ge", "setp.gt"))
    caught(kernel, fault.UNINITIALISED, *CONFLICT, edit=edit)


@EACH
@pytest.mark.parametrize("name", PENDING)
def test_an_entry_beside_is_appended(kernel, name):
    at, code = first_store(kernel, name)
    size = {"pending.k": 2 * 128, "pending.u": 4 * 128, "pending.decay": 4}[name]
    caught(kernel, fault.UNWRITTEN, edit=moved(code[at], size))
