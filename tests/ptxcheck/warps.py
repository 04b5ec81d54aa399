"""What the lanes of a warp do together, all of them at one instruction.

shfl.sync and bar.warp.sync wait for the lanes of their mask, mma.sync for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import fault, matrices
from .lanes import WARP, Lanes
from .parser import Vector
from .program import MULTIPLY, SHUFFLES, unknown

if TYPE_CHECKING:
    from .machine import Batch

ALL_LANES = np.uint32(0xFFFFFFFF)


def _operand(batch: Batch, lanes: Lanes, operand, kind: str) -> np.ndarray:
    getter = batch.program.compiler.getter(operand, kind)
    return np.broadcast_to(getter(batch, lanes), len(lanes))


def _meet(batch: Batch, pc: int, lanes: Lanes, mask_operand=None) -> Lanes | None:
    """The threads whose warp is complete by their masks; the others wait."""
    if pc in batch.waiting:
        batch.join(batch.waiting, pc, lanes)
        lanes = batch.waiting.pop(pc)
    mask = np.full(len(lanes), ALL_LANES)
    if mask_operand is not None:
        mask = _operand(batch, lanes, mask_operand, "b32")
    here = np.zeros(lanes.warps, np.uint32)
    np.bitwise_or.at(here, lanes.row, np.uint32(1) << lanes.lane.astype(np.uint32))
    outside = (mask >> lanes.lane.astype(np.uint32)) & 1 == 0
    batch.site(batch.code[pc], lanes).raise_if(
        outside, fault.WARP_SYNC, detail="executed by a lane outside its mask"
    )
    complete = mask & ~here[lanes.row] == 0
    if not complete.all():
        batch.waiting[pc] = batch.subset(lanes, ~complete)
    lanes = batch.subset(lanes, complete)
    if len(lanes) == 0:
        return None
    batch.counters.executed[pc] += lanes.warps
    batch.join(batch.ready, pc + 1, lanes)
    return lanes


def barrier(batch: Batch, pc: int, lanes: Lanes) -> None:
    """bar.warp.sync."""
    (mask,) = batch.code[pc].operands
    met = _meet(batch, pc, lanes, mask)
    if met is not None:
        if len(met) != met.warps * WARP:  # a part of a warp
            raise unknown(batch.code[pc])
        batch.shared.warp_barrier(met.first_of_warp // WARP)


def shuffle(batch: Batch, pc: int, lanes: Lanes) -> None:
    """Each lane takes the value of lane ^ b (bfly) or b (idx) of its segment."""
    target, value, offset, clamp, mask = batch.code[pc].operands
    met = _meet(batch, pc, lanes, mask)
    if met is None:
        return
    lanes = met
    value, offset, clamp = (
        _operand(batch, lanes, operand, "b32").astype(np.uint32)
        for operand in (value, offset, clamp)
    )
    lane = lanes.lane.astype(np.uint32)
    segment = (clamp >> np.uint32(8)) & np.uint32(31)
    last = (lane & segment) | (clamp & np.uint32(31) & ~segment)
    offset &= np.uint32(31)
    if batch.code[pc].opcode == "shfl.sync.idx.b32":
        source = (lane & segment) | (offset & ~segment)
    else:
        source = lane ^ offset
    in_range = source <= last
    source = np.where(in_range, source, lane)
    present = lanes.by_warp(np.ones(len(lanes), bool), False)
    batch.site(batch.code[pc], lanes).raise_if(
        ~present[lanes.row, source],
        fault.WARP_SYNC,
        detail="takes the value of a lane that does not take part",
    )
    shuffled = lanes.by_warp(value, 0)[lanes.row, source]
    results = target.items if isinstance(target, Vector) else (target,)
    for item, result in zip(results, (shuffled, in_range), strict=False):
        batch.program.compiler.setter(item)(batch, lanes, result)


def multiply(batch: Batch, pc: int, lanes: Lanes) -> None:
    """mma.sync: a product of matrices that lie in the registers of a warp."""
    target, *sources = (operand.items for operand in batch.code[pc].operands)
    met = _meet(batch, pc, lanes)
    if met is None:
        return
    a, b, c = (
        np.stack([_operand(batch, met, x, kind).reshape(-1, WARP) for x in registers])
        for registers, kind in zip(sources, ("b32", "b32", "f32"), strict=True)
    )
    result = matrices.multiply_add(a, b, c, batch.approximate_by)
    for register, values in zip(target, result, strict=True):
        batch.program.compiler.setter(register)(batch, met, values.ravel())


CONTROLS = {
    "bar.warp.sync": barrier,
    **dict.fromkeys(SHUFFLES, shuffle),
    MULTIPLY: multiply,
}
