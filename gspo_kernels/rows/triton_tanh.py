"""Capped logits, in Triton: a row's logit is y = tanh(tanh_scale x), and z = y / temperature.

With E = e^(2 tanh_scale x), y is (E - 1) / (E + 1). The kernels compute how far y is from that of a pivot, a number P
that takes E's place:

    y - y_P = 2 / (P + 1) * (E - P) / (E + 1),        1 - y^2 = 4 E / (E + 1)^2.

So y itself, whose rounding to float32 is worth 2e-6 in a log-probability at a cap of 30, is never rounded; E is not
rounded before P is subtracted from it; and where y is near y_P, or near 1, no digits are lost. The sums' pivot is the
largest logit of a lane, so errors are relative to the distance from it. The gradient's is about the row's mean logit.

`tanh_hi + tanh_lo` is 2 tanh_scale log2(e), so E = 2^(x (tanh_hi + tanh_lo)). Both are None where there is no cap.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import LN2_HI, LN2_LO, TINY, add_pairs, fma, quotient, scale_pair, two_product, two_sum, within_cap

LEAST_POWER = tl.constexpr(2.0**-125)  # of what `within_cap` returns, and about the least E / (E + 1)^2
MOST_PIVOT = tl.constexpr(2.0**60)  # its y is 1 to all digits of a pair
_SHIFT = tl.constexpr(1.5 * 2.0**23 + 127)  # added to n, it leaves n + 127 in the lowest bits


@triton.jit
def _power(x, tanh_hi, tanh_lo):
    """(N, p) with E = N (1 + p), where N is a power of two, for logits from `within_cap`. p is good to 2e-8."""
    shifted = fma(x, tanh_hi, _SHIFT)
    n = shifted - _SHIFT
    f = fma(x, tanh_lo, fma(x, tanh_hi, -n))  # from -1/2 to 1/2
    p = f * 0.00015403512 + 0.0013390736
    p = fma(p, f, 0.009618238)
    p = fma(p, f, 0.055503573)
    p = fma(p, f, 0.24022649)
    p = fma(p, f, 0.69314718) * f
    return (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True), p


@triton.jit
def _about_reciprocal(x, PTX: tl.constexpr):
    """1 / x, off by at most a unit in the last place on NVIDIA, where it is one instruction."""
    code: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(code, "=f,f", [x], tl.float32, True, 1) if PTX else 1.0 / x


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1 / x, rounded: the step leaves the square of an error."""
    r = _about_reciprocal(x, PTX)
    return fma(fma(-r, x, 1.0), r, r)


@triton.jit
def above_pivot(x, pivot, tanh_hi, tanh_lo, PTX: tl.constexpr):
    """(E - P) / (E + 1) of logits from `within_cap`.

    To be multiplied by `steepness`: that is t. The reciprocal's unit in the last place changes 2^t by at most 6e-8: it
    is relative to t, and t 2^t is 0.53 at most.
    """
    n, p = _power(x, tanh_hi, tanh_lo)
    return fma(n, p, n - pivot) * _about_reciprocal(fma(n, p, n + 1.0), PTX)


@triton.jit
def above_pivot_and_derivative(x, pivot, tanh_hi, tanh_lo, PTX: tl.constexpr):
    """The same, rounded once for the sake of far columns, and E / (E + 1)^2.

    The latter is good to 4e-7 of itself, and less than 2^-126 where `within_cap` changed the logit.
    """
    n, p = _power(x, tanh_hi, tanh_lo)
    up, down = fma(n, p, n - pivot), fma(n, p, n + 1.0)
    r = _about_reciprocal(down, PTX)
    q = up * r
    return fma(fma(-q, down, up), r, q), fma(fma(n, p, n) * r, r, -LEAST_POWER)


@triton.jit
def steepness(pivot, scale, PTX: tl.constexpr):
    """(y - y_P) scale is this times `above_pivot`; rounded once, for its error is one of every t."""
    whole, part = two_sum(pivot, 1.0)
    r = _about_reciprocal(whole, PTX)
    q = 2.0 * scale * r
    return fma(fma(-q, whole, 2.0 * scale) - q * part, r, q)


@triton.jit
def next_pivot(pivot, highest, scale, tanh_hi, tanh_lo, PTX: tl.constexpr):
    """(The larger of a pivot and what belongs to the logit `highest`, its steepness, (old y - new y) scale)."""
    n, p = _power(within_cap(highest, tanh_hi), tanh_hi, tanh_lo)
    found = tl.maximum(pivot, tl.minimum(fma(n, p, n), MOST_PIVOT))
    steep = steepness(found, scale, PTX)
    return found, steep, (pivot - found) * _reciprocal(pivot + 1.0, PTX) * steep


@triton.jit
def _quotient_of_pairs(x_hi, x_lo, y_hi, y_lo):
    q = quotient(x_hi, y_hi)
    rest = fma(-q, y_hi, x_hi) + (x_lo - q * y_lo)
    return two_sum(q, rest / y_hi)


@triton.jit
def level_of(pivot, scale):
    """y_P scale as a pair."""
    up_hi, up_lo = two_sum(pivot, -1.0)
    down_hi, down_lo = two_sum(pivot, 1.0)
    hi, lo = _quotient_of_pairs(up_hi, up_lo, down_hi, down_lo)
    return scale_pair(hi, lo, scale, 0.0)


@triton.jit
def pivot_near(y):
    """A pivot whose y is about this, from -1 to 1."""
    y = tl.minimum(tl.maximum(y, -1.0), 1.0)
    return tl.minimum((1.0 + y) / tl.maximum(1.0 - y, 2.0**-24), MOST_PIVOT)


@triton.jit
def tanh_pair(x, tanh_hi, tanh_lo):
    """(y as a pair, good to about 1e-9 of itself; 1 - y^2) of one logit."""
    x = within_cap(x, tanh_hi)
    hi, lo = scale_pair(x, 0.0, tanh_hi, tanh_lo)
    shifted = hi + _SHIFT
    n = shifted - _SHIFT
    g_hi, g_lo = scale_pair(hi - n, lo, LN2_HI, LN2_LO)  # e^g, from -0.35 to 0.35
    tail = g_hi * 0.00019841270 + 0.0013888889
    tail = fma(tail, g_hi, 0.0083333338)
    tail = fma(tail, g_hi, 0.041666668)
    tail = fma(tail, g_hi, 0.16666667)
    square_hi, square_lo = two_product(g_hi, g_hi)
    p_hi, p_lo = add_pairs(g_hi, g_lo, 0.5 * square_hi, fma(g_hi, g_lo, 0.5 * square_lo))
    p_hi, p_lo = add_pairs(p_hi, p_lo, tail * square_hi * g_hi, 0.0)
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    up_hi, up_lo = two_sum(power, -1.0)
    up_hi, up_lo = add_pairs(up_hi, up_lo, power * p_hi, power * p_lo)
    down_hi, down_lo = two_sum(power, 1.0)
    down_hi, down_lo = add_pairs(down_hi, down_lo, power * p_hi, power * p_lo)
    y_hi, y_lo = _quotient_of_pairs(up_hi, up_lo, down_hi, down_lo)
    derivative = fma(fma(power, p_hi, power) / down_hi, 1.0 / down_hi, -LEAST_POWER)
    return y_hi, y_lo, 4.0 * tl.where(derivative < TINY, 0.0, derivative)
