"""Calls of `decode_deferred` for the machine, NaN wherever they are to read nothing."""

import dataclasses

import numpy as np

from tests.cases import DTYPES, Case
from tests.kernels import launch
from tests.kernels.launch import PENDING
from tests.oracle import deferred_rows

OUTSIDE = 99  # no slot


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row of a call does; of a ring of R entries, from the last if first < 0."""

    count: int
    first: int = 0
    fold: bool = False
    write: str = "same"  # or "other" or "outside"
    read: int | None = None  # instead of a slot of its own


def rows_of(window: int, T: int) -> list[Row]:
    """Every kind: few and many pending, rings that wrap, folds, other slots, none."""
    return [
        Row(0),
        Row(1, first=2),
        Row(window - 1),
        Row(window, first=-2),
        Row(2, first=-1),
        Row(3, first=-1, fold=True),
        Row(0, fold=True),
        Row(4, first=1, write="other"),
        Row(0, write="other"),
        Row(window, write="outside"),
        Row(2, fold=True, write="outside"),
        Row(window - T, first=-3),
        Row(0, read=-1),
        Row(0, read=OUTSIDE),
        Row(-1),
        Row(window + 1),
        Row(1, first=OUTSIDE),
        Row(1, first=-OUTSIDE),
    ]


def inputs_of(case: Case, rows: list[Row], window: int, R: int) -> dict:
    """A call's arrays, NaN wherever it is to read nothing."""
    case = dataclasses.replace(case, B=len(rows), N=2 * len(rows))
    given, rng = case.inputs(), np.random.default_rng(1)
    B, N, T, H, HV, K, V = (
        getattr(case, n) for n in ("B", "N", "T", "H", "HV", "K", "V")
    )
    own, other = rng.permutation(N).astype(np.int32).reshape(2, B)
    reads = np.array(
        [
            row.read if row.read is not None else slot
            for row, slot in zip(rows, own, strict=True)
        ],
        np.int32,
    )
    to = {"same": reads, "other": other, "outside": np.full(B, OUTSIDE)}
    writes = np.array([to[row.write][n] for n, row in enumerate(rows)], np.int32)
    cursors = np.zeros((N, 2), np.int32)
    for row, slot in zip(rows, own, strict=True):
        wraps = -R <= row.first < 0
        cursors[slot] = row.first + R * wraps, row.count
    slots = {"state_indices": reads, "output_state_indices": writes}
    slots["fold"] = np.array([row.fold for row in rows], np.int32)
    pending = [
        rng.standard_normal((N, H, R, K)).astype(DTYPES[case.k]),
        rng.standard_normal((N, HV, R, V)).astype(np.float32) / np.float32(np.sqrt(K)),
        rng.uniform(0.2, 1, (N, HV, R)).astype(np.float32),
    ]
    inputs = given | {"pending": pending, "cursors": cursors, **slots}
    read, _ = launch.touched_entries(inputs, window)
    arrays = dict(zip(PENDING, pending, strict=True)) | {"state": inputs["state"]}
    for name, x in arrays.items():
        x[~read[name]] = np.nan
    live = {row.n for row in deferred_rows(cursors, R, window, T, **slots)}
    for n in set(range(B)) - live:
        for name in ("q", "k", "v", "a", "b", "g", "beta"):
            if name in inputs:
                inputs[name][n] = np.nan
        if 0 <= reads[n] < N:  # bad cursors
            inputs["state"][reads[n]] = np.nan
    return inputs
