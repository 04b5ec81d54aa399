"""Arithmetic opcodes against plain Python integers, and the errors for unknown ones."""

import operator

import numpy as np
import pytest

from . import fixtures
from .fault import FaultError, UnsupportedError
from .opcodes import NUMPY_TYPES, OPERATIONS
from .parser import parse

CORNERS = [0, 1, 2, 31, 32, 33, 63, 64, 0x7F, 0x80, 0x7FFF, 0x8000, 0x12345678]
CORNERS += [
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7FFFFFFFFFFFFFFF,
    1 << 63,
    (1 << 64) - 1,
]


def pairs(kind: str, second: str):
    """All pairs of corners as arrays of two types, and as Python integers."""

    def cast(kind):
        dtype = NUMPY_TYPES[kind]
        bits = 8 * dtype.itemsize
        return np.array([x & ((1 << bits) - 1) for x in CORNERS], f"u{bits // 8}").view(
            dtype
        )

    a, b = np.meshgrid(cast(kind), cast(second))
    return a.ravel(), b.ravel()


def wrapped(values, kind: str) -> list[int]:
    """Python integers as the type holds them."""
    dtype = NUMPY_TYPES[kind]
    bits = 8 * dtype.itemsize
    low = [int(x) & ((1 << bits) - 1) for x in values]
    return np.array(low, f"u{bits // 8}").view(dtype).tolist()


EXPECTED = {
    "add.s32": operator.add,
    "add.s64": operator.add,
    "sub.s32": operator.sub,
    "sub.s64": operator.sub,
    "max.s64": max,
    "div.u32": lambda a, b: a // b if b else 0,
    "rem.u32": lambda a, b: a % b if b else 0,
    "mul.lo.s32": operator.mul,
    "mul.lo.s64": operator.mul,
    "mul.wide.s32": operator.mul,
    "mul.wide.u16": operator.mul,
    "mul.wide.u32": operator.mul,
    "mul.hi.u32": lambda a, b: (a * b) >> 32,
    "and.b16": operator.and_,
    "and.b32": operator.and_,
    "and.b64": operator.and_,
    "or.b32": operator.or_,
    "or.b64": operator.or_,
    "shl.b32": lambda a, b: a << min(b, 64),
    "shl.b64": lambda a, b: a << min(b, 64),
    "shr.u32": lambda a, b: a >> min(b, 64),
    "shr.u64": lambda a, b: a >> min(b, 64),
    "shr.s32": lambda a, b: a >> min(b, 64),
    "shr.s64": lambda a, b: a >> min(b, 64),
    "setp.eq.s16": operator.eq,
    "setp.eq.s32": operator.eq,
    "setp.eq.b32": operator.eq,
    "setp.eq.s64": operator.eq,
    "setp.ne.s16": operator.ne,
    "setp.ne.s32": operator.ne,
    "setp.ne.s64": operator.ne,
    "setp.lt.s32": operator.lt,
    "setp.lt.u32": operator.lt,
    "setp.lt.s64": operator.lt,
    "setp.lt.u64": operator.lt,
    "setp.gt.s32": operator.gt,
    "setp.gt.u32": operator.gt,
    "setp.gt.s64": operator.gt,
    "setp.ge.s32": operator.ge,
    "setp.ge.u32": operator.ge,
    "setp.ge.s64": operator.ge,
    "setp.le.s32": operator.le,
    "setp.le.s64": operator.le,
}


@pytest.mark.parametrize("opcode", EXPECTED)
def test_integers(opcode):
    operation = OPERATIONS[opcode]
    a, b = pairs(*operation.operands)
    with np.errstate(all="ignore"):
        actual = operation.compute(a, b)
    assert actual.dtype == NUMPY_TYPES[operation.result]
    expected = map(EXPECTED[opcode], a.tolist(), b.tolist())
    if operation.result == "pred":
        assert actual.tolist() == list(expected)
    else:
        assert actual.tolist() == wrapped(expected, operation.result)


def test_every_integer_operation_is_tested():
    tested_elsewhere = {"prmt.b32", "bfi.b32", "mad.lo.s32"}
    tested_elsewhere |= {"neg.s32", "neg.s64", "not.pred"}
    tested_elsewhere |= {f"selp.{kind}" for kind in ("b32", "b64", "f32")}
    tested_elsewhere |= {"and.pred", "or.pred", "xor.pred"}
    tested_elsewhere |= {"setp.ge.f32", "setp.gt.f32", "setp.ltu.f32"}
    integers = {name for name, op in OPERATIONS.items() if op.kind == "integer"}
    assert integers == set(EXPECTED) | tested_elsewhere


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0x3210, 0x44332211),
        (0x7654, 0x887766F5),
        (0x5410, 0x66F52211),
        (0x1010, 0x22112211),
        (0x0123, 0x11223344),
        (0xC8FE, 0xFF00FF00),  # signs of bytes 4, 0, 7 and 6
    ],
)
def test_prmt(selector, expected):
    a, b = np.uint32([0x44332211]), np.uint32([0x887766F5])
    assert OPERATIONS["prmt.b32"].compute(a, b, np.uint32(selector))[0] == expected


@pytest.mark.parametrize(
    ("position", "length", "expected"),
    [
        (4, 8, 0xFFFFF34F),
        (28, 8, 0x4FFFFFFF),  # bits past the word are lost
        (0, 32, 0x1234),
        (5, 0, 0xFFFFFFFF),
        (32, 4, 0xFFFFFFFF),
        (256, 4, 0xFFFFFFF4),  # positions and lengths have 8 bits
    ],
)
def test_bit_field_insert(position, length, expected):
    a, b = np.uint32([0x1234]), np.uint32([0xFFFFFFFF])
    insert = OPERATIONS["bfi.b32"].compute
    assert insert(a, b, np.uint32(position), np.uint32(length))[0] == expected


def test_predicates():
    a, b = np.array([[False, True, False, True], [False, False, True, True]])
    both = (OPERATIONS[f"{name}.pred"].compute(a, b).tolist() for name in ("and", "or"))
    assert list(both) == [[False, False, False, True], [False, True, True, True]]
    assert OPERATIONS["xor.pred"].compute(a, b).tolist() == [False, True, True, False]
    assert OPERATIONS["not.pred"].compute(a).tolist() == [True, False, True, False]


def test_multiply_add_wraps():
    x = np.int32([3, -3, 1 << 30])
    result = OPERATIONS["mad.lo.s32"].compute(x, np.int32([5, 5, 4]), np.int32([1] * 3))
    assert result.tolist() == [16, -14, 1]


@pytest.mark.parametrize("name", ["f16x2", "bf16x2"])
def test_the_first_of_a_pair_is_the_upper_half(name):
    one, zero = np.float32([1]), np.float32([0])
    pair = OPERATIONS[f"cvt.rn.{name}.f32"].compute(one, zero)
    assert pair.tolist() == [{"f16x2": 0x3C00, "bf16x2": 0x3F80}[name] << 16]


def test_shuffle_by_index():
    outcome = fixtures.run(
        """shfl.sync.idx.b32 %r6|%p1, %r3, 5, 31, -1;
        st.global.u32 [%rd2], %r6; ret;"""
    )
    assert outcome.out.tolist() == [5] * 32 + [37] * 32


def test_what_selp_does_not_choose_may_hold_nothing():
    text = "setp.lt.u32 %p1, %r1, {}; selp.b32 %r6, %r1, %r9, %p1;"
    text += "st.global.u32 [%rd2], %r6; ret;"
    assert fixtures.run(text.format(64)).out.tolist() == list(range(64))
    with pytest.raises(FaultError, match="%r9"):
        fixtures.run(text.format(63))


def test_nan_compares_as_the_opcode_says():
    a = np.float32([1, np.nan, 0, -1, 0])
    b = np.float32([0, 0, np.nan, 0, -0.0])
    less = OPERATIONS["setp.ltu.f32"].compute(a, b).tolist()
    assert less == [False, True, True, True, False]
    not_less = OPERATIONS["setp.ge.f32"].compute(a, b).tolist()
    assert not_less == [True, False, False, False, True]
    greater = OPERATIONS["setp.gt.f32"].compute(a, b).tolist()
    assert greater == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("opcode", "value", "expected"),
    [
        ("cvt.u16.u32", 0xABCD1234, 0x1234),
        ("cvt.u32.u16", 0xFFFF, 0xFFFF),
        ("cvt.u32.u64", 0x1_0000_0005, 5),
        ("cvt.u64.u32", 0xFFFFFFFF, 0xFFFFFFFF),
        ("neg.s32", -5, 5),
        ("neg.s32", -(1 << 31), -(1 << 31)),
        ("neg.s64", -5, 5),
        ("cvt.s64.s32", -5, -5),
        ("cvt.sat.f32.f32", -3.0, 0),
        ("cvt.sat.f32.f32", 3.0, 1),
    ],
)
def test_conversions(opcode, value, expected):
    operation = OPERATIONS[opcode]
    x = np.array([value], NUMPY_TYPES[operation.operands[0]])
    result = operation.compute(x)
    assert result[0] == expected
    assert result.dtype == NUMPY_TYPES[operation.result]


def test_registers_larger_than_the_type_that_is_loaded():
    outcome = fixtures.run(
        """ld.global.s32 %rd4, [%rd1];
        shr.s64 %rd4, %rd4, 32;
        cvt.u32.u64 %r6, %rd4;
        st.global.u32 [%rd2], %r6;
        ret;""",
        data=np.array([-1, 1] * 32, np.int32),
    )
    assert outcome.out.tolist() == [-1, 0] * 32


@pytest.mark.parametrize(
    "unknown",
    [
        "add.ftz.f32 %f1, %f1, %f1;",
        "add.sat.s32 %r6, %r6, %r6;",
        "mad.hi.s32 %r6, %r6, %r6, %r6;",
        "ld.global.ca.u32 %r6, [%rd1];",
        "ld.volatile.global.u32 %r6, [%rd1];",
        "ld.shared.cs.u32 %r6, [%r4];",
        "ld.local.u32 %r6, [%rd1];",
        "st.param.u32 [%rd1], %r6;",
        "shfl.sync.down.b32 %r6, %r6, 1, 31, -1;",
        "barrier.sync 0;",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r6};",
        "atom.global.add.u32 %r6, [%rd1], 1;",
        "cvt.rz.f32.s32 %f1, %r6;",
        "membar.gl;",
    ],
)
def test_unknown_opcodes_are_named(unknown):
    opcode = unknown.split()[0].rstrip(";")
    with pytest.raises(UnsupportedError, match=opcode.replace(".", r"\.")):
        fixtures.run(unknown + "ret;")


@pytest.mark.parametrize(
    "unknown",
    [
        ".local .align 4 .b8 frame[16];",
        "{ .reg .b32 t; }",
        '.pragma "other";',
        "mov.u32 %r6, %clock;",
        "mov.u32 %r6, nowhere;",
    ],
)
def test_unknown_declarations_and_operands_are_named(unknown):
    with pytest.raises(UnsupportedError):
        fixtures.run(unknown + "ret;")


def test_unknown_directive_of_the_module():
    with pytest.raises(UnsupportedError, match="const"):
        parse(".version 9.0\n.const .b8 table[4];\n")
