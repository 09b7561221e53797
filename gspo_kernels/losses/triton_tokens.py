"""The numbers of a block of tokens, in Triton: loads, log-ratios, ratios and KL estimators.

Everything is selected, nothing multiplied by a mask: a masked token's numbers never reach an arithmetic that could make
a NaN of them.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from ..base.scalars import FINITE as _FINITE
from ..rows.triton_math import exp, expm1, two_sum

FINITE = tl.constexpr(_FINITE)


@triton.jit
def finite(x):
    """Infinities as +-1e30; NaN stays."""
    return tl.where(x > FINITE, FINITE, tl.where(x < -FINITE, -FINITE, x))


@triton.jit
def load(array, at, there):
    return tl.load(array + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_pair(array, at, there):
    """Finite numbers, those of float64 as the sum of two."""
    x = tl.load(array + at, mask=there, other=0.0)
    if x.dtype == tl.float64:
        x = finite(x)
        hi = x.to(tl.float32)
        return hi, tl.where(tl.abs(x) < FINITE, x - hi.to(tl.float64), 0.0).to(tl.float32)
    else:
        hi = finite(x.to(tl.float32))
        return hi, tl.zeros_like(hi)


@triton.jit
def counted(mask, at, there):
    """Which of these tokens count."""
    if mask is None:
        return there
    else:
        return there & (tl.load(mask + at, mask=there, other=0) != 0)


@triton.jit
def log_ratio_of(logprobs, old_logprobs, at, counts):
    """(logprob - old as a pair; both numbers); 0 where nothing counts, and on-policy where the logprob is a number."""
    zero = tl.zeros_like(at).to(tl.float32)
    if logprobs is None:
        return zero, zero, zero, zero
    else:
        new = finite(load(logprobs, at, counts))
        if old_logprobs is None:
            return new - new, zero, new, new
        else:
            old, old_rest = load_pair(old_logprobs, at, counts)
            hi, lo = two_sum(new, -old)
            return hi, lo - old_rest, new, old


@triton.jit
def rollout_of(rollout_logprobs, at, counts, old):
    """The engine's log-probabilities; those of the old policy where there are none."""
    if rollout_logprobs is None:
        return old
    else:
        found, _ = load_pair(rollout_logprobs, at, counts)
        return found


@triton.jit
def ratio_of(log_ratio, max_log_ratio):
    return exp(tl.where(log_ratio > max_log_ratio, max_log_ratio, log_ratio))


@triton.jit
def exp_excess(x):
    """e^x - 1 - x."""
    p = x * 2.7557319e-6 + 2.4801588e-5
    p = p * x + 0.00019841270
    p = p * x + 0.0013888889
    p = p * x + 0.0083333338
    p = p * x + 0.041666668
    p = p * x + 0.16666667
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.5, p * x * x, expm1(x) - x)


@triton.jit
def between(x, bound):
    """x within +-bound; NaN stays."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def kl_of(logprobs, ref_logprobs, at, counts, max_log_ratio, ESTIMATOR: tl.constexpr):
    """(KL(pi || ref) at each token, its derivative by the log-probability)."""
    ref, ref_rest = load_pair(ref_logprobs, at, counts)
    gap = ref - finite(load(logprobs, at, counts))
    if ref_logprobs.dtype.element_ty == tl.float64:
        gap += ref_rest
    d = between(gap, max_log_ratio)
    if ESTIMATOR == "k1":
        value, slope = -d, tl.zeros_like(d) + 1.0
    elif ESTIMATOR == "k2":
        value, slope = d * d * 0.5, -d
    else:
        value, slope = exp_excess(d), -expm1(d)
    return value, tl.where(tl.abs(gap) > max_log_ratio, 0.0, slope)
