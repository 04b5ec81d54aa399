"""The library's own launch plan, run over NumPy arrays placed at fake addresses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ptx import fault, machine, module
from ptx.counters import Counters
from ptx.lanes import Launch
from ptx.memory import Buffer, GlobalMemory
from ptx.program import Program

# Buffers lie 5 GiB apart: an index beyond one hits nothing, and an offset cut to 32
# bits does not go unnoticed.
FIRST_ADDRESS = 0x7F00_0000_0000
SPACING = 5 << 30


@dataclasses.dataclass
class Result:
    """Arrays by operand name as they are after the launch, and what it cost."""

    arrays: dict[str, np.ndarray]
    counters: Counters
    plan: dict
    program: Program


@functools.cache
def shipped(symbol: str) -> Program:
    """A kernel of the module that ships."""
    return Program(module.kernels()[symbol])


def plan_decode(operands, *, scale: float, use_qk_l2norm=True, VT=None) -> dict:
    """Asks the library for a launch; operands are (address, dtype, shape) by name."""
    from jax_gdn import _cuda

    return _cuda.plan(operands, scale, use_qk_l2norm, VT)


def run_plan(
    plan: dict,
    buffers: list[Buffer],
    *,
    written: tuple[str, ...] = (),
    program: Program | None = None,
    approximate_by: float = 0,
    blocks: range | None = None,
) -> Result:
    """Runs a plan over buffers.

    Args:
      plan: Symbol, grid, block, shared_bytes and arguments.
      buffers: What lies where. One may be a window into the operand it is named for.
      written: Names of buffers that the launch must write whole.
      program: Runs this instead of the shipped kernel of that symbol.
      approximate_by: What `machine.run` takes.
      blocks: Likewise.
    """
    program = program or shipped(plan["symbol"])
    if plan["block"][1:] != (1, 1):
        raise ValueError(f"block {plan['block']}: the machine knows x alone")
    launch = Launch(plan["symbol"], plan["grid"], plan["block"][0])
    memory = GlobalMemory(launch, buffers, program.granule["global"])
    counters = machine.run(
        program,
        launch,
        memory,
        plan["arguments"],
        plan["shared_bytes"],
        approximate_by,
        blocks,
    )
    for buffer in buffers:
        mask = memory.written(buffer.name)
        if buffer.name in written and not mask.all():
            raise launch.fault(
                fault.UNWRITTEN,
                f"{buffer.name}, {np.count_nonzero(~mask)} of {len(mask)} bytes",
                address=buffer.address + int(np.argmin(mask)),
            )
    after = {
        buffer.name: memory.contents(buffer.name)
        .view(buffer.data.dtype)
        .reshape(buffer.data.shape)
        for buffer in buffers
    }
    return Result(after, counters, plan, program)


def decode(
    inputs: dict[str, np.ndarray],
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    out_dtype: np.dtype | None = None,
    VT: int | None = None,
    edit: Callable[[str], str] | None = None,
    edit_plan: Callable[[dict], dict] = lambda plan: plan,
    approximate_by: float = 0,
) -> Result:
    """One `jax_gdn.decode` on the machine.

    `edit` changes the kernel's PTX and `edit_plan` its launch, to plant defects.
    """
    arrays = dict(inputs)
    arrays["out"] = np.zeros(inputs["v"].shape, out_dtype or inputs["q"].dtype)
    buffers = [
        Buffer(name, FIRST_ADDRESS + number * SPACING, array, name != "out")
        for number, (name, array) in enumerate(arrays.items())
    ]
    plan = plan_decode(
        {b.name: (b.address, str(b.data.dtype), list(b.data.shape)) for b in buffers},
        scale=inputs["q"].shape[-1] ** -0.5 if scale is None else scale,
        use_qk_l2norm=use_qk_l2norm,
        VT=VT,
    )
    program = None
    if edit is not None:
        text = edit(module.entry_text(plan["symbol"]))
        program = Program(module.parse(text)[plan["symbol"]])
    return run_plan(
        edit_plan(plan),
        buffers,
        written=("out", "state"),
        program=program,
        approximate_by=approximate_by,
    )
