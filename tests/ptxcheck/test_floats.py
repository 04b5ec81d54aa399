"""float32 of the machine against exact fractions."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import floats

F32 = np.float32
SMALLEST = 2.0**-149


def round_exact(x: Fraction, mode: str, digits=24, least=-126, most=127):
    """Rounds to a binary format: "n" nearest even, "d" down."""
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    quotient = x / unit
    count = {"n": round, "d": math.floor}[mode](quotient)
    value = count * unit
    largest = (Fraction(2) - Fraction(2) ** (1 - digits)) * Fraction(2) ** most
    if abs(value) > largest:
        away = mode == "n" or (mode == "d" and x < 0)
        value = math.inf if away else largest
        return math.copysign(float(value), x)
    return float(value)


def random_floats(rng, count: int) -> np.ndarray:
    """Finite float32 of every exponent, subnormals too."""
    x = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(F32)
    return np.where(np.isfinite(x), x, F32(1.5))


def adversarial(rng, count: int, digits=24, near=(-40, 41)):
    """Triples whose a b + c lies so close to a tie of float32 that float64 hits it."""
    near = rng.integers(*near, count)
    c = rng.integers(1 << digits - 1, 1 << digits, count) * 2.0**near
    # a b is half a unit of c, or 2**-46 of that less.
    nudge = rng.choice([0, 2.0**-23], count)
    a = (1 + nudge) * 2.0 ** (near // 2)
    b = (1 - nudge) * 2.0 ** (near - 1 - near // 2) * rng.choice([-1, 1], count)
    return a.astype(F32), b.astype(F32), c.astype(F32)


def triples():
    rng = np.random.default_rng(0)
    a, b, c = (random_floats(rng, 4000) for _ in range(3))
    yield a, b, c
    # Of one size, so that the product and c meet.
    yield a, b, (-(a.astype(float) * b)).clip(-3e38, 3e38).astype(F32)
    yield adversarial(rng, 4000)
    # Results among the subnormals.
    yield adversarial(rng, 4000, digits=22, near=(-149, -148))
    tiny = [
        (rng.integers(-(1 << 24), 1 << 24, 4000) * 2.0**scale).astype(F32)
        for scale in (-85, -88, -160)
    ]
    yield tuple(tiny)


def assert_same_bits(actual, expected):
    actual = np.asarray(actual, F32)
    expected = np.asarray(expected, np.float64).astype(F32)
    # The reference knows no sign of zero; it has a test of its own.
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    assert same.all(), (actual[~same][:5], expected[~same][:5])


@pytest.mark.parametrize(
    ("function", "mode"), [(floats.fma, "n"), (floats.fma_rm, "d")]
)
def test_fma_is_rounded_once(function, mode):
    for a, b, c in triples():
        exact = [
            round_exact(
                Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), mode
            )
            for x, y, z in zip(a, b, c, strict=True)
        ]
        with np.errstate(all="ignore"):
            assert_same_bits(function(a, b, c), exact)


@pytest.mark.parametrize("subnormal", [False, True])
def test_adversarial_triples_defeat_double_rounding(subnormal):
    where = {"digits": 22, "near": (-149, -148)} if subnormal else {}
    a, b, c = adversarial(np.random.default_rng(0), 4000, **where)
    naive = (a.astype(float) * b + c).astype(F32)
    assert (naive != floats.fma(a, b, c)).sum() > 100


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=500, deadline=None)
@given(FLOATS, FLOATS, FLOATS)
def test_fma_of_any_numbers(a, b, c):
    exact = round_exact(Fraction(a) * Fraction(b) + Fraction(c), "n")
    arrays = (np.array([x], F32) for x in (a, b, c))
    with np.errstate(all="ignore"):
        assert_same_bits(floats.fma(*arrays), [exact])


def test_difference():
    a, b, _ = next(triples())
    exact = [
        round_exact(Fraction(float(x)) - Fraction(float(y)), "n")
        for x, y in zip(a, b, strict=True)
    ]
    with np.errstate(all="ignore"):
        assert_same_bits(floats.sub(a, b), exact)


def test_signs_of_zero():
    zero, one = np.array([0.0], F32), np.array([1.0], F32)
    assert not np.signbit(floats.fma(one, one, -one))[0]
    assert np.signbit(floats.fma_rm(one, one, -one))[0]
    assert np.signbit(floats.fma(-zero, one, -zero))[0]
    assert not np.signbit(floats.maximum(-zero, zero))[0]
    assert np.signbit(floats.maximum(-zero, -zero))[0]
    assert not np.signbit(floats.saturate(-zero))[0]
    assert np.signbit(floats.negate(zero))[0]


def test_infinities_and_nan():
    inf, one, nan = (np.array([x], F32) for x in (np.inf, 1.0, np.nan))
    with np.errstate(all="ignore"):
        made = [
            floats.add(inf, -inf),
            floats.sub(inf, inf),
            floats.mul(inf, 0 * one),
            floats.fma(inf, one, -inf),
            floats.fma_rm(nan, one, one),
            floats.rsqrt(-one),
            floats.div(inf, one * F32(2.0**127)),
        ]
        assert [x.view(np.uint32)[0] for x in made] == [0x7FFFFFFF] * len(made)
        assert floats.maximum(nan, one)[0] == 1
        assert floats.saturate(nan)[0] == 0
        assert floats.fma_rm(inf, one, one)[0] == np.inf
        largest = np.array([np.finfo(F32).max])
        assert floats.fma_rm(-largest, one, -largest)[0] == -np.inf


@pytest.mark.parametrize(
    ("convert", "digits", "least", "most", "dtype"),
    [
        (floats.to_float16, 11, -14, 15, np.float16),
        (floats.to_bfloat16, 8, -126, 127, ml_dtypes.bfloat16),
    ],
)
def test_conversion_to_16_bits(convert, digits, least, most, dtype):
    rng = np.random.default_rng(1)
    ties = (rng.integers(0, 1 << 16, 2000) * 2.0 ** rng.integers(-40, 4, 2000)).astype(
        F32
    )
    x = np.concatenate([random_floats(rng, 4000), ties, F32([65519, 65520, 3.39e38])])
    exact = [round_exact(Fraction(float(v)), "n", digits, least, most) for v in x]
    with np.errstate(over="ignore"):
        assert (convert(x).view(dtype).astype(np.float64) == exact).all()
    assert convert(np.array([np.nan], F32))[0] == 0x7FFF


def test_float16_to_float32_is_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = floats.from_float16(bits)
    exact = bits.view(np.float16).astype(np.float64)
    assert (np.isnan(wide) == np.isnan(exact)).all()
    assert (wide[~np.isnan(exact)] == exact[~np.isnan(exact)]).all()


def test_approximations_stay_within_their_bounds():
    rng = np.random.default_rng(2)
    x = rng.uniform(-120, 120, 20000).astype(F32)
    y = np.exp2(rng.uniform(-120, 120, 20000)).astype(F32)
    for by in (-1, 0, 1):
        for actual, exact, largest in (
            (floats.ex2_ftz(x, by), np.exp2(x.astype(float)), floats.EX2_ERROR),
            (floats.rsqrt(y, by), y.astype(float) ** -0.5, floats.RSQRT_ERROR),
            (floats.div(F32([1]), y, by), 1 / y.astype(float), floats.DIV_ERROR),
        ):
            error = actual / exact - 1
            assert np.abs(error - by * largest).max() <= 2.0**-24


def test_flush_and_the_divisors_that_give_zero():
    subnormal = np.array([SMALLEST, -SMALLEST], F32)
    assert floats.ex2_ftz(subnormal).tolist() == [1, 1]
    assert floats.ex2_ftz(np.array([-127.0], F32))[0] == 0
    assert np.signbit(floats.flush(subnormal)).tolist() == [False, True]
    assert floats.div(F32([1]), F32([2.0**126]))[0] == F32(2.0**-126)
    assert floats.div(F32([1]), F32([2.0**126 * 1.5]))[0] == 0
