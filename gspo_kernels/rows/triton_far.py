"""Far rows, in Triton: rows whose logits are so large that only the largest ones have a probability.

Beyond 7.4e8 in base 2 float32 logits are 44 or more apart: of all columns but the target, only those that equal the
largest have a probability. Such rows are read a second time, by plain loops that count these columns.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_columns import load_entries, load_ids
from .triton_math import (
    FAR_LSE,
    INFINITY,
    LN2_HI,
    LN2_LO,
    POWER,
    POWER_BITS,
    TINY,
    add_pairs,
    exp,
    expm1,
    float64_pair,
    fma,
    narrow,
    scale_pair,
    two_product,
)


@triton.jit
def largest_and_count(row, ids, columns, vocab, target, BLOCK: tl.constexpr, GATHERED: tl.constexpr):
    """(The largest logit of all columns but the target, how many have it): (-inf, 0) if none, NaN for NaN or +inf.

    `columns`: how many there are, all of the row's or, with `ids`, those of its entries.
    """
    at = tl.arange(0, BLOCK)
    largest_logit = tl.full([BLOCK], -INFINITY, tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        if ids is None:
            there = (start + at < columns) & (start + at != target)
            x = tl.load(row + start + at, mask=there, other=-INFINITY).to(tl.float32)
        else:
            id = load_ids(ids, start + at, columns)
            x = tl.where(id == target, -INFINITY, load_entries(row, id, start + at, vocab, GATHERED))
        x = tl.where(x == x, x, INFINITY)
        new_largest = tl.maximum(largest_logit, x)
        count = tl.where(largest_logit == new_largest, count, 0.0) + tl.where(x == new_largest, 1.0, 0.0)
        largest_logit = new_largest
    highest = tl.max(largest_logit, 0)
    count = tl.sum(tl.where(largest_logit == highest, count, 0.0), 0)
    count = tl.where(highest == INFINITY, float("nan"), count)
    return highest, tl.where(highest == -INFINITY, 0.0, count)


@triton.jit
def _inverse_temperature(scale, scale_error):
    """1 / temperature as a pair; with an error of 0, what the rounded scale makes of it."""
    rounded = tl.zeros((), tl.float32) + scale
    return scale_pair(rounded, rounded * scale_error, LN2_HI, LN2_LO)


@triton.jit
def _last_of_rounded_scale(scale):
    """A power of two: up to this logit, 2^29 to 2^30 nats from 0, lse is of the rounded scale; beyond, exact.

    `write_gradient` works with the rounded scale; `largest_logit_of` and vocabulary shards need an lse that is exact.
    """
    inverse, _ = _inverse_temperature(scale, 0.0)
    return ((2.0**30 / inverse).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def far_lse(hi, lo, reference, scale, scale_error):
    """reference / temperature + (hi + lo) as (pair, power): pair times power, which is 1 or 2^32."""
    exact = tl.abs(reference) > _last_of_rounded_scale(scale)
    inverse_hi, inverse_lo = _inverse_temperature(scale, tl.where(exact, scale_error, 0.0))
    power = tl.where(tl.abs(reference) >= 2.0**60, POWER, 1.0)
    near = reference / power
    far_hi, far_lo = two_product(near, inverse_hi)
    hi, lo = add_pairs(far_hi, far_lo + near * inverse_lo, hi / power, lo / power)
    return hi, lo, tl.where(tl.abs(hi) < INFINITY, power, 1.0)


@triton.jit
def saved_lse(bits):
    """A row's lse as (pair, power)."""
    exponent = ((bits >> 52) & 0x7FF).to(tl.int32)
    beyond = (exponent >= 1023 + 100) & (exponent < 2047)
    hi, lo = float64_pair(tl.where(beyond, bits - POWER_BITS, bits))
    return hi, lo, tl.where(beyond, POWER, 1.0)


@triton.jit
def is_far(lse_hi, power, tanh_hi):
    """Whether only a row's largest logits have a probability, by its lse. NaN and -inf are not far; nor is a cap."""
    if tanh_hi is not None:
        return False
    else:
        return (tl.abs(lse_hi) * power >= FAR_LSE) & (tl.abs(lse_hi) < INFINITY)


@triton.jit
def largest_logit_of(lse_hi, lse_lo, power, entropy, scale, scale_error):
    """The largest logit of a far row, temperature (lse - entropy), rounded to what it is."""
    hi, lo = add_pairs(lse_hi, lse_lo, -entropy / power, 0.0)
    last = _last_of_rounded_scale(scale)
    rounded_hi, rounded_lo = _inverse_temperature(scale, 0.0)
    beyond = (tl.abs(hi) - last * rounded_hi) + (tl.where(hi < 0.0, -lo, lo) - last * rounded_lo)
    exact = (power > 1.0) | (beyond > last * rounded_hi * 2.0**-25)  # a quarter of what the next logit is away
    inverse_hi, inverse_lo = _inverse_temperature(scale, tl.where(exact, scale_error, 0.0))
    q = hi / inverse_hi
    rest = fma(-q, inverse_hi, hi) + (lo - q * inverse_lo)
    return (q + rest / inverse_hi) * power


@triton.jit
def _no_subnormal(x):
    return tl.where(tl.abs(x) < TINY, 0.0, x)


@triton.jit
def far_values(g_logprob, g_entropy, g_lse, entropy, scale):
    """The four numbers that a far row's gradient consists of: at a largest logit and elsewhere, then of the target.

    Every largest logit has the probability exp(-entropy), others have 0.
    """
    p, inverse_temperature = exp(-entropy), scale * LN2_HI
    nothing = g_entropy * 0.0  # or NaN
    at_largest = _no_subnormal((g_lse - g_logprob + nothing) * p * inverse_temperature)
    elsewhere = tl.where(at_largest == at_largest, 0.0, at_largest)
    target_largest = _no_subnormal((p * g_lse - g_logprob * expm1(-entropy) + nothing) * inverse_temperature)
    target_elsewhere = _no_subnormal((g_logprob + nothing) * inverse_temperature)
    return at_largest, elsewhere, target_largest, target_elsewhere


@triton.jit
def far_gradient(is_largest, is_target, at_largest, elsewhere, target_largest, target_elsewhere):
    of_target = tl.where(is_largest, target_largest, target_elsewhere)
    return tl.where(is_target, of_target, tl.where(is_largest, at_largest, elsewhere))


@triton.jit
def write_far(source, destination, vocab, target, largest_logit, g_logprob, g_entropy, g_lse, entropy, scale,
              BLOCK: tl.constexpr):  # fmt: skip
    """Writes the gradient of such a row."""
    DTYPE: tl.constexpr = destination.dtype.element_ty
    a, b, c, d = far_values(g_logprob, g_entropy, g_lse, entropy, scale)
    at = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        there = start + at < vocab
        is_largest = tl.load(source + start + at, mask=there, other=0).to(tl.float32) == largest_logit
        g = far_gradient(is_largest, start + at == target, a, b, c, d)
        tl.store(destination + start + at, narrow(g, DTYPE), mask=there)
