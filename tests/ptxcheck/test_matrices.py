"""mma.sync: which lane has what, who must take part, and how far off a chip may be."""

import math
from fractions import Fraction

import numpy as np
import pytest

from . import fault, fixtures, matrices
from .fault import FaultError

THREADS = 64  # two warps
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
REGISTERS = {"a": 4, "b": 2, "c": 4}
# A lane's words lie THREADS words apart: those of a in %r10 on, b in %r20 on.
LOAD = "".join(
    f"ld.global.{kind} {register}, [%rd1+{4 * THREADS * at}];"
    for at, (kind, register) in enumerate(
        [("u32", f"%r{10 + i}") for i in range(4)]
        + [("u32", f"%r{20 + i}") for i in range(2)]
        + [("f32", f"%f{i}") for i in range(4)]
    )
)
MULTIPLY = f"""{MMA} {{%f0, %f1, %f2, %f3}}, {{%r10, %r11, %r12, %r13}},
    {{%r20, %r21}}, {{%f0, %f1, %f2, %f3}};"""
STORE = "".join(f"st.global.f32 [%rd2+{4 * THREADS * i}], %f{i};" for i in range(4))
STORE += "ret;"


def place(name: str, element: int, lane: int) -> tuple[int, int]:
    """Row and column of a lane's element of a fragment, as PTX ISA 9.0 has it."""
    group, thread = lane >> 2, lane % 4
    if name == "a":
        row = group + (0 if element < 2 or 4 <= element < 6 else 8)
        return row, thread * 2 + (element & 1) + (0 if element < 4 else 8)
    if name == "b":
        return thread * 2 + (element & 1) + (0 if element < 2 else 8), group
    return group + (0 if element < 2 else 8), thread * 2 + (element & 1)


def fragments(a, b, c) -> np.ndarray:
    """The lanes' words, of matrices [warps, rows, columns]."""
    words = np.zeros((10, THREADS), np.uint32)
    for thread in range(THREADS):
        warp, lane = divmod(thread, 32)
        at = 0
        for name, matrix in (("a", a), ("b", b), ("c", c)):
            for register in range(REGISTERS[name]):
                if name == "c":
                    word = matrix[warp][place(name, register, lane)].view(np.uint32)
                else:
                    low, high = (
                        matrix[warp][place(name, 2 * register + half, lane)]
                        for half in (0, 1)
                    )
                    word = low.view(np.uint32) >> 16 | high.view(np.uint32)
                words[at, thread] = word
                at += 1
    return words.ravel().view(np.float32)


def run(a, b, c, body=LOAD + MULTIPLY + STORE) -> np.ndarray:
    """The product as matrices, [warps, 16, 8]."""
    data = fragments(a, b, c)
    out = fixtures.run(body, threads=THREADS, data=data, out_size=4 * THREADS).out
    result = np.zeros_like(c)
    for i in range(4):
        for thread in range(THREADS):
            warp, lane = divmod(thread, 32)
            result[warp][place("c", i, lane)] = out.reshape(4, THREADS)[i, thread]
    return result


def small_integers() -> tuple[np.ndarray, ...]:
    """Matrices whose product is exact, for each warp its own."""
    rng = np.random.default_rng(0)
    shapes = (2, 16, 16), (2, 16, 8), (2, 16, 8)
    return tuple(rng.integers(-128, 128, s).astype(np.float32) for s in shapes)


def test_product():
    a, b, c = small_integers()
    assert (run(a, b, c) == a @ b + c).all()


@pytest.mark.parametrize("register", ["%r10", "%r11", "%r12", "%r13", "%r20", "%r21"])
def test_an_operand_of_the_lane_beside_is_not_the_product(register):
    a, b, c = small_integers()
    wrong = f"shfl.sync.bfly.b32 {register}, {register}, 1, 31, -1;"
    result = run(a, b, c, LOAD + wrong + MULTIPLY + STORE)
    assert (result != a @ b + c).any(axis=(1, 2)).all()


def test_a_whole_warp_may_stay_away():
    a, b, c = small_integers()
    body = f"{LOAD} setp.ge.u32 %p1, %r1, 32; @%p1 bra $end; {MULTIPLY} $end: {STORE}"
    result = run(a, b, c, body)
    assert (result[0] == (a @ b + c)[0]).all()
    assert (result[1] == c[1]).all()


def test_a_missing_lane():
    a, b, c = small_integers()
    body = f"{LOAD} setp.eq.s32 %p1, %r1, 37; @%p1 bra $end; {MULTIPLY} $end: {STORE}"
    with pytest.raises(FaultError, match="1 threads missing, first 37") as found:
        run(a, b, c, body)
    assert found.value.kind == fault.WARP_SYNC
    assert found.value.instruction.startswith(MMA)


def test_it_waits_for_lanes_that_come_another_way():
    a, b, c = small_integers()
    body = f"""{LOAD} mov.u32 %r8, 0; and.b32 %r7, %r1, 1;
    setp.eq.s32 %p1, %r7, 0; @!%p1 bra $odd;
    $meet: {MULTIPLY} bra.uni $end;
    $odd: add.s32 %r8, %r8, 1; bra.uni $meet;
    $end: {STORE}"""
    assert (run(a, b, c, body) == a @ b + c).all()


def terms_of_every_size(count=200):
    """`a`, `b`, `c` by registers of so many warps, with sums that cancel among them."""
    rng = np.random.default_rng(0)
    words = rng.standard_normal((12, count, 32)) * 2.0 ** rng.integers(
        -12, 13, (12, 1, 32)
    )
    words = (words.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).copy()
    words = words[::2] | words[1::2] >> np.uint32(16)
    c = rng.standard_normal((4, count, 32)).astype(np.float32)
    return words[:4], words[4:], c


def cut_off(x: Fraction, unit: Fraction) -> Fraction:
    return math.trunc(x / unit) * unit


def exponent(x: Fraction) -> int:
    return math.frexp(float(x))[1] - 1


def test_what_a_chip_cuts_off_is_within_the_error():
    """Terms cut off at 24 bits from the largest, and the sum at its own 24."""
    a, b, c = terms_of_every_size(1)
    low, exact, high = (matrices.multiply_add(a, b, c, by) for by in (-1, 0, 1))
    furthest = 0.0
    for lane in range(32):
        row, column = place("c", 0, lane)
        value = {"a": {}, "b": {}}
        for name, words in (("a", a), ("b", b)):
            for register, other in np.ndindex(len(words), 32):
                for half in (0, 1):
                    word = np.uint32(words[register, 0, other] << 16 * (1 - half))
                    bits = word & np.uint32(0xFFFF0000)
                    at = place(name, 2 * register + half, other)
                    value[name][at] = Fraction(float(bits.view(np.float32)))
        terms = [value["a"][row, k] * value["b"][k, column] for k in range(16)]
        terms.append(Fraction(float(c[0, 0, lane])))
        assert exact[0, 0, lane] == np.float32(float(sum(terms)))
        unit = Fraction(2) ** (max(map(exponent, terms)) - 23)
        total = sum(cut_off(term, unit) for term in terms)
        chip = float(cut_off(total, Fraction(2) ** (exponent(total) - 23)))
        assert low[0, 0, lane] <= chip <= high[0, 0, lane]
        furthest = max(
            furthest, abs(chip - exact[0, 0, lane]) / abs(high - exact)[0, 0, lane]
        )
    assert furthest > 0.05  # the bound is not far beyond what happens


def test_the_sum_is_rounded_once():
    a, b, c = (np.zeros(s, np.float32) for s in ((2, 16, 16), (2, 16, 8), (2, 16, 8)))
    a += 2.0**-13
    b += 2.0**-12
    c += 1  # each product alone would be lost
    assert (run(a, b, c) == 1 + 2.0**-21).all()


def test_what_is_not_finite():
    a, b, c = (np.zeros(s, np.float32) for s in ((2, 16, 16), (2, 16, 8), (2, 16, 8)))
    a[:, 3, 5], b[:, 5, 2], b[:, 5, 3] = np.inf, 1, -1
    result = run(a, b, c)
    assert (result[:, 3, 2] == np.inf).all()
    assert (result[:, 3, 3] == -np.inf).all()
    nan = np.isnan(result)  # inf times 0
    assert nan.sum() == 2 * 6
    assert set(result[nan].view(np.uint32).tolist()) == {0x7FFFFFFF}
    assert (result[~nan & np.isfinite(result)] == 0).all()
