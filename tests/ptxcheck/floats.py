"""float32 as PTX defines it, over NumPy arrays.

Exact, bit for bit: `add`, `sub`, `mul`, `fma` in every rounding here, conversions and
`maximum`. A NaN that arithmetic makes is 0x7fffffff. Subnormals are kept, as PTX does
without .ftz.

Bounded: `ex2`, `rsqrt` and `div` of .approx. PTX ISA 9.0 gives each a largest error;
the machine returns the correctly rounded result, moved by `approximate_by` (-1 to 1)
times that error, so that a kernel can be run at both ends of what a chip may answer.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32
CANONICAL_NAN = np.array(0x7FFFFFFF, np.uint32).view(F32)[()]
SMALLEST_NORMAL = np.float32(2.0**-126)

# Largest errors, relative. From each instruction's page in PTX ISA 9.0, section 9.7.3.
EX2_ERROR = 2.0**-22  # ex2.approx.ftz.f32
RSQRT_ERROR = 2.0**-22.9  # rsqrt.approx.f32
DIV_ERROR = 2.0**-23  # div.approx.f32: 2 units in the last place, of 2**-24 or more


def canonical(x: np.ndarray) -> np.ndarray:
    """Replaces every NaN by the one that arithmetic makes. `x` is changed."""
    bad = np.isnan(x)
    if bad.any():
        x[bad] = CANONICAL_NAN
    return x


def add(a, b):
    """add.f32, rounded to nearest even."""
    return canonical(a + b)


def sub(a, b):
    """sub.f32, rounded to nearest even."""
    return canonical(a - b)


def mul(a, b):
    """mul.f32, rounded to nearest even."""
    return canonical(a * b)


def _two_sum(a, b):
    """float64 `s` nearest to a + b, and what it lacks: s + error is a + b exactly."""
    s = a + b
    c = s - a
    return s, (a - (s - c)) + (b - c)


def fma(a, b, c):
    """fma.rn.f32: a b + c with one rounding, to nearest even.

    The product of two float32 is exact in float64 (48 bits). Its sum with c is
    rounded there once, then again to float32: twice wrong only where the first
    rounding lands on a tie of the second, or where float32 is subnormal. There the
    first is made to odd, after which the second is right (53 >= 24 + 2 bits).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    bits = total.view(np.int64)
    # Below float32's last bit stands a one and 28 zeros: a tie.
    doubtful = (bits & 0x1FFFFFFF) == 0x10000000
    doubtful |= (np.abs(total) < SMALLEST_NORMAL) & (total != 0)
    if doubtful.any():
        product, c = np.broadcast_arrays(product, c)
        s, error = _two_sum(product[doubtful], c[doubtful])
        total[doubtful] = _to_odd(s, error)
    return canonical(total.astype(F32))


def _to_odd(s, error):
    """Rounds s + error to float64 so that an inexact result has an odd last bit."""
    bits = s.view(np.int64).copy()
    inexact = (error != 0) & (bits & 1 == 0)
    # A step away from zero adds one to the bits, whatever the sign.
    away = np.signbit(error) == np.signbit(s)
    bits[inexact] += np.where(away, 1, -1)[inexact]
    return bits.view(np.float64)


def _rounded_down(s, error):
    """Rounds s + error down to float32."""
    nearest = s.astype(F32)
    wide = nearest.astype(np.float64)
    # nearest - (s + error), whose sign is all that matters; s is within 2**29 units.
    above = np.isfinite(s) & ((wide > s) | ((wide == s) & (error < 0)))
    return np.where(above, np.nextafter(nearest, F32(-np.inf)), nearest)


def fma_rm(a, b, c):
    """fma.rm.f32, rounded down; an exact zero of opposite signs is -0."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    s, error = _two_sum(product, wide)
    result = _rounded_down(s, error)
    cancelled = (s == 0) & (np.signbit(product) != np.signbit(wide))
    return canonical(np.where(cancelled, F32(-0.0), result))


def maximum(a, b):
    """max.f32: a NaN loses against a number, and -0 against +0."""
    result = np.fmax(a, b)
    zero = (a == 0) & (b == 0)
    return canonical(np.where(zero, a + b, result) if zero.any() else result)


def negate(a):
    """neg.f32, a flip of the sign bit."""
    return (a.view(np.uint32) ^ np.uint32(0x80000000)).view(F32)


def absolute(a):
    """abs.f32, the sign bit cleared."""
    return (a.view(np.uint32) & np.uint32(0x7FFFFFFF)).view(F32)


def saturate(a):
    """cvt.sat.f32.f32: into [0, 1]; NaN and -0 become +0."""
    return np.where(a > 0, np.minimum(a, F32(1)), F32(0))


def to_float16(a):
    """cvt.rn.f16.f32; NaN becomes 0x7fff."""
    bits = a.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), bits)


def from_float16(a):
    """cvt.f32.f16, exact."""
    return canonical(a.view(np.float16).astype(F32))


def to_bfloat16(a):
    """cvt.rn.bf16.f32; NaN becomes 0x7fff."""
    bits = a.view(np.uint32)
    # Half a unit less a bit, and that bit back where the kept part is odd.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(np.uint16)


def flush(a):
    """.ftz: a subnormal becomes a zero of its sign."""
    return np.where(np.abs(a) < SMALLEST_NORMAL, np.copysign(F32(0), a), a)


def ex2_ftz(a, approximate_by: float = 0):
    """ex2.approx.ftz.f32, within EX2_ERROR."""
    exact = np.exp2(flush(a).astype(np.float64)) * (1 + approximate_by * EX2_ERROR)
    return canonical(flush(exact.astype(F32)))


def rsqrt(a, approximate_by: float = 0):
    """rsqrt.approx.f32, within RSQRT_ERROR."""
    exact = (1 + approximate_by * RSQRT_ERROR) / np.sqrt(a.astype(np.float64))
    return canonical(exact.astype(F32))


def div(a, b, approximate_by: float = 0):
    """div.approx.f32, within DIV_ERROR; by more than 2**126 it is 0, or NaN of inf."""
    exact = a.astype(np.float64) / b.astype(np.float64)
    result = (exact * (1 + approximate_by * DIV_ERROR)).astype(F32)
    huge = (np.abs(b) > F32(2.0**126)) & np.isfinite(b)
    if huge.any():
        nothing = np.where(np.isfinite(a), np.copysign(F32(0), result), CANONICAL_NAN)
        result = np.where(huge, nothing, result)
    return canonical(result)
