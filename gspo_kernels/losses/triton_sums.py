"""Sums of float32 over a block that lose nothing to rounding, in Triton.

A sum is two numbers a lane: what has been added up, and what the additions lost.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from ..rows.triton_math import two_sum


@triton.jit
def add(total, rest, x):
    """total + rest + x, with what the addition lost kept in rest."""
    total, lost = two_sum(total, x)
    return total, rest + lost


@triton.jit
def leading_digits(total, largest, LANES: tl.constexpr):
    """The leading digits of `total`: those of all lanes add up without any rounding, whatever cancels among them.

    `largest` of the lanes' magnitudes.
    """
    bits = (largest * LANES).to(tl.int32, bitcast=True)
    anchor = ((((bits >> 23) + 1) << 23) | 0x400000).to(tl.float32, bitcast=True)  # 1.5 times a power of two above all
    return (total + anchor) - anchor


@triton.jit
def in_two(total, rest, largest):
    """Two numbers a lane whose plain sums over all lanes add up to the sum of total + rest."""
    leading = leading_digits(total, largest, total.shape[0])
    return leading, (total - leading) + rest


# A reduction over warps goes through shared memory at a fixed cost: several are therefore stacked into one.


@triton.jit
def _stack4(a, b, c, d):
    """[.., 2, 2], in the registers where they are."""
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def _scalars4(stack):
    """Of a stack of scalars, in their order."""
    ab, cd = tl.split(stack)
    a, b = tl.split(ab)
    c, d = tl.split(cd)
    return a, b, c, d


@triton.jit
def maxima4(a, b, c, d):
    return _scalars4(tl.max(_stack4(a, b, c, d), 0))


@triton.jit
def sums4(a, b, c, d):
    return _scalars4(tl.sum(_stack4(a, b, c, d), 0))


@triton.jit
def _maxima8(a, b, c, d, e, f, g, h):
    first, last = tl.split(tl.max(tl.join(_stack4(a, b, c, d), _stack4(e, f, g, h)), 0))
    return _scalars4(first) + _scalars4(last)


@triton.jit
def sums8(a, b, c, d, e, f, g, h):
    first, last = tl.split(tl.sum(tl.join(_stack4(a, b, c, d), _stack4(e, f, g, h)), 0))
    return _scalars4(first) + _scalars4(last)


@triton.jit
def sums_and_extremes(
    loss, loss_rest, ratios, ratios_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest, low, high, saturated,
    ratio_max, negative_min,
):  # fmt: skip
    """Over all lanes, in the same order: the first ten are five sums in two numbers each, the last two maxima."""
    zeros = tl.zeros_like(loss)
    top_loss, top_ratios, top_approx, top_ref, top_h, ratio_max, negative_min, _ = _maxima8(
        tl.abs(loss), tl.abs(ratios), tl.abs(approx_kl), tl.abs(ref_kl), tl.abs(h), ratio_max, negative_min, zeros
    )
    loss, loss_rest = in_two(loss, loss_rest, top_loss)
    ratios, ratios_rest = in_two(ratios, ratios_rest, top_ratios)
    approx_kl, approx_rest = in_two(approx_kl, approx_rest, top_approx)
    ref_kl, ref_rest = in_two(ref_kl, ref_rest, top_ref)
    h, h_rest = in_two(h, h_rest, top_h)
    first, last = tl.split(tl.sum(tl.join(
        tl.join(_stack4(loss, ratios, approx_kl, ref_kl), _stack4(loss_rest, ratios_rest, approx_rest, ref_rest)),
        tl.join(_stack4(h, h_rest, low, high), _stack4(saturated, zeros, zeros, zeros)),
    ), 0))  # fmt: skip
    leading, rests = tl.split(first)
    entropies_and_clipped, others = tl.split(last)
    loss, ratios, approx_kl, ref_kl = _scalars4(leading)
    loss_rest, ratios_rest, approx_rest, ref_rest = _scalars4(rests)
    h, h_rest, low, high = _scalars4(entropies_and_clipped)
    saturated, _, _, _ = _scalars4(others)
    return (loss, loss_rest, ratios, ratios_rest, approx_kl, approx_rest, ref_kl, ref_rest, h, h_rest, low, high,
            saturated, ratio_max, negative_min)  # fmt: skip
