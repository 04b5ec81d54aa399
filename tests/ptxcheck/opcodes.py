"""What each arithmetic instruction computes: the table to extend for a new opcode.

An entry names the result's type, the operands' types and a function of arrays of those
types. Whatever is not here (nor among the machine's own instructions) raises
`UnsupportedError`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable

import numpy as np

from . import floats

NUMPY_TYPES = {
    "pred": np.dtype(bool),
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.uint16),  # 16-bit floats are bits, until they are converted
    "bf16": np.dtype(np.uint16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """`compute(*operands)`; a bounded one takes `approximate_by` too."""

    result: str
    operands: tuple[str, ...]
    compute: Callable[..., np.ndarray]
    kind: str
    is_bounded: bool = False


# Like PTX, NumPy shifts in zeros, or the sign of a signed type, however far.


def _shift_left(a, count):
    return a << count.astype(a.dtype)


def _shift_right(a, count):
    return a >> count.astype(a.dtype)


def _insert_bits(a, b, position, length):
    """bfi.b32: the low bits of a, so many, at a position of b."""
    position, length = (np.minimum(x & np.uint32(255), 32) for x in (position, length))
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)) << position
    return ((a.astype(np.uint64) << position & mask) | (b & ~mask)).astype(np.uint32)


def _permute_bytes(a, b, selector):
    """prmt.b32: each nibble of the selector picks a byte of b:a or spreads its sign."""
    pool = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (pool >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint32(0xFF), np.uint32(0))
        picked = np.where(nibble & np.uint32(8), sign, byte.astype(np.uint32))
        result |= picked << np.uint32(8 * i)
    return result


def _multiply_high(a, b):
    return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(
        a.dtype
    )


def _multiply_wide(a, b):
    wide = f"{a.dtype.kind}{2 * a.itemsize}"
    return a.astype(wide) * b.astype(wide)


def _multiply_add(a, b, c):
    return a * b + c


def _convert(result: str) -> Callable[[np.ndarray], np.ndarray]:
    """Integers: sign or zero extension by the operand's type, or truncation."""
    return lambda a: a.astype(NUMPY_TYPES[result])


def _pair(rounded) -> Callable:
    """Two rounded values in one register, the first in its upper half."""

    def compute(a, b):
        return rounded(a).astype(np.uint32) << np.uint32(16) | rounded(b)

    return compute


def _select(a, b, predicate):
    return np.where(predicate, a, b)


def _integer(name: str, compute) -> tuple[str, Operation]:
    kind = name.rsplit(".", 1)[1]
    return name, Operation(kind, (kind, kind), compute, "integer")


def _shift(name: str, compute) -> tuple[str, Operation]:
    kind = name.rsplit(".", 1)[1]
    return name, Operation(kind, (kind, "u32"), compute, "integer")


def _compare(name: str, compute) -> tuple[str, Operation]:
    kind = name.rsplit(".", 1)[1]
    return name, Operation("pred", (kind, kind), compute, "integer")


def _conversion(name: str, compute=None) -> tuple[str, Operation]:
    *_, result, operand = name.split(".")
    compute = compute or _convert(result)
    return name, Operation(result, (operand,), compute, "conversion")


def _float(name: str, count: int, compute) -> tuple[str, Operation]:
    return name, Operation("f32", ("f32",) * count, compute, "float32")


def _special(name: str, count: int, compute) -> tuple[str, Operation]:
    return name, Operation("f32", ("f32",) * count, compute, "special", is_bounded=True)


OPERATIONS: dict[str, Operation] = dict(
    [
        _float("add.f32", 2, floats.add),
        _float("sub.f32", 2, floats.sub),
        _float("mul.f32", 2, floats.mul),
        _float("fma.rn.f32", 3, floats.fma),
        _float("fma.rm.f32", 3, floats.fma_rm),
        _float("max.f32", 2, floats.maximum),
        _float("neg.f32", 1, floats.negate),
        _float("abs.f32", 1, floats.absolute),
        _special("ex2.approx.ftz.f32", 1, floats.ex2_ftz),
        _special("rsqrt.approx.f32", 1, floats.rsqrt),
        _special("div.approx.f32", 2, floats.div),
        *(_integer(name, operator.add) for name in ("add.s32", "add.s64")),
        *(_integer(name, operator.sub) for name in ("sub.s32", "sub.s64")),
        _integer("max.s64", np.maximum),
        *(_integer(name, operator.mul) for name in ("mul.lo.s32", "mul.lo.s64")),
        # By zero, what PTX leaves open is 0.
        _integer("div.u32", operator.floordiv),
        _integer("rem.u32", operator.mod),
        *(
            (f"neg.{kind}", Operation(kind, (kind,), operator.neg, "integer"))
            for kind in ("s32", "s64")
        ),
        *(
            _integer(f"and.{kind}", operator.and_)
            for kind in ("b16", "b32", "b64", "pred")
        ),
        *(_integer(name, operator.or_) for name in ("or.b32", "or.b64", "or.pred")),
        _integer("xor.pred", operator.xor),
        ("not.pred", Operation("pred", ("pred",), operator.invert, "integer")),
        ("mad.lo.s32", Operation("s32", ("s32",) * 3, _multiply_add, "integer")),
        *(_shift(name, _shift_left) for name in ("shl.b32", "shl.b64")),
        *(
            _shift(name, _shift_right)
            for name in ("shr.u32", "shr.u64", "shr.s32", "shr.s64")
        ),
        _integer("mul.hi.u32", _multiply_high),
        ("mul.wide.s32", Operation("s64", ("s32", "s32"), _multiply_wide, "integer")),
        ("mul.wide.u16", Operation("u32", ("u16", "u16"), _multiply_wide, "integer")),
        ("mul.wide.u32", Operation("u64", ("u32", "u32"), _multiply_wide, "integer")),
        ("bfi.b32", Operation("b32", ("b32",) * 4, _insert_bits, "integer")),
        ("prmt.b32", Operation("b32", ("b32",) * 3, _permute_bytes, "integer")),
        *(
            _compare(f"setp.eq.{kind}", operator.eq)
            for kind in ("s16", "s32", "b32", "s64")
        ),
        *(_compare(f"setp.ne.{kind}", operator.ne) for kind in ("s16", "s32", "s64")),
        *(
            _compare(f"setp.lt.{kind}", operator.lt)
            for kind in ("s32", "u32", "s64", "u64")
        ),
        *(
            _compare(f"setp.gt.{kind}", operator.gt)
            for kind in ("s32", "u32", "s64", "f32")
        ),
        *(
            _compare(f"setp.ge.{kind}", operator.ge)
            for kind in ("s32", "u32", "s64", "f32")
        ),
        *(_compare(f"setp.le.{kind}", operator.le) for kind in ("s32", "s64")),
        _compare("setp.ltu.f32", lambda a, b: ~(a >= b)),  # true of NaN, too
        *(
            (f"selp.{kind}", Operation(kind, (kind, kind, "pred"), _select, "integer"))
            for kind in ("b32", "b64", "f32")
        ),
        _conversion("cvt.u16.u32"),
        _conversion("cvt.u32.u16"),
        _conversion("cvt.u32.u64"),
        _conversion("cvt.u64.u32"),
        _conversion("cvt.s64.s32"),
        _conversion("cvt.sat.f32.f32", floats.saturate),
        _conversion("cvt.f32.f16", floats.from_float16),
        *(
            (name, Operation("b32", ("f32", "f32"), _pair(rounded), "conversion"))
            for name, rounded in (
                ("cvt.rn.f16x2.f32", floats.to_float16),
                ("cvt.rn.bf16x2.f32", floats.to_bfloat16),
            )
        ),
    ]
)
