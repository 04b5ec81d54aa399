"""Products of small matrices, as tensor cores take them: mma.sync of bfloat16.

PTX leaves open in what order the terms of a sum are added, and how they are rounded.
Here the products are exact, they and the accumulator are added in float64, and the sum
is rounded to float32 once. Hardware does otherwise, so the machine's bits are not the
chip's: of Hopper it has been measured that terms are cut off at 24 bits or a few more,
counted from the largest, and so is the sum. That is at most MMA_ERROR off for each term
of MMA_TERMS, relative to the largest, and once more relative to the sum;
`approximate_by` (-1 to 1) moves results by that much of it.
"""

from __future__ import annotations

import numpy as np

from . import floats
from .lanes import WARP

ROWS, COLUMNS, DEPTH = 16, 8, 16
MMA_TERMS = DEPTH + 1
MMA_ERROR = 2.0**-23

# Where a lane's registers lie, [register, lane], by their first element: g numbers the
# groups of four lanes, t the lanes of one. Pairs are of neighbours along the depth.
_g, _t = np.divmod(np.arange(WARP), 4)
A_ROW = np.stack([_g, _g + 8, _g, _g + 8])
A_DEPTH = np.stack([2 * _t, 2 * _t, 2 * _t + 8, 2 * _t + 8])
B_DEPTH = np.stack([2 * _t, 2 * _t + 8])
B_COLUMN = np.stack([_g, _g])
C_ROW = np.stack([_g, _g, _g + 8, _g + 8])
C_COLUMN = np.stack([2 * _t, 2 * _t + 1, 2 * _t, 2 * _t + 1])


def _halves(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper bfloat16 of words, as float64."""
    upper = (pairs & np.uint32(0xFFFF0000)).view(np.float32)
    lower = (pairs << np.uint32(16)).view(np.float32)
    return lower.astype(np.float64), upper.astype(np.float64)


def multiply_add(a, b, c, approximate_by: float = 0) -> np.ndarray:
    """m16n8k16: a b + c, all by registers, [register, warp, lane].

    `a` (4 registers) and `b` (2) are words of two bfloat16, `c` (4) is float32.
    """
    warps = c.shape[1]
    A = np.empty((warps, ROWS, DEPTH))
    B = np.empty((warps, DEPTH, COLUMNS))
    C = np.empty((warps, ROWS, COLUMNS))
    for register, pairs in enumerate(a):
        for half, values in enumerate(_halves(pairs)):
            A[:, A_ROW[register], A_DEPTH[register] + half] = values
    for register, pairs in enumerate(b):
        for half, values in enumerate(_halves(pairs)):
            B[:, B_DEPTH[register] + half, B_COLUMN[register]] = values
    for register, values in enumerate(c):
        C[:, C_ROW[register], C_COLUMN[register]] = values
    total, largest = C.copy(), np.abs(C)
    for k in range(DEPTH):
        term = A[:, :, k, None] * B[:, k, None, :]
        total += term
        largest = np.maximum(largest, np.abs(term))
    if approximate_by:
        error = MMA_ERROR * (MMA_TERMS * largest + np.abs(total))
        total = np.where(np.isfinite(total), total + approximate_by * error, total)
    result = floats.canonical(total.astype(np.float32))
    return np.stack([result[:, r, n] for r, n in zip(C_ROW, C_COLUMN, strict=True)])
