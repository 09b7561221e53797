"""Statistics of a row of logits, in Triton. One program per row.

The mathematics is that of csrc/row_math.h, in float32 and in base 2: exp z_v = 2^(x_v scale) with
scale = log2(e) / temperature. The sums leave out the target; the rounding error of the logsumexp is kept.

Every lane has a running maximum and sums of its own; they are combined at the end of the row. Blocks without the target
have no mask.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_columns import (
    ABSENT,
    block_start,
    first_block,
    has_entries,
    is_active,
    load_columns,
    phase_of,
    row_kernel,
    row_pointer,
    scale_of,
)
from .triton_far import far_lse, largest_and_count
from .triton_math import (
    FAR,
    FLOOR,
    INFINITY,
    LN2_HI,
    LN2_LO,
    LOWEST,
    POWER_BITS,
    add_pairs,
    bounded,
    bounded_columns,
    exp,
    exp2,
    exp2_pair,
    expm1,
    float64_bits,
    fma,
    largest,
    log1p,
    log2_pair,
    prefetch,
    quotient,
    scale_pair,
    two_product,
    two_sum,
    widen,
    within_cap,
)
from .triton_tanh import LEAST_POWER, above_pivot, level_of, next_pivot, tanh_pair


@triton.jit
def add_block(x, there, highest, top, total, lost, weighted, scale, tanh_hi, tanh_lo, PTX: tl.constexpr,
               DTYPE: tl.constexpr):  # fmt: skip
    """Adds a block [REPEAT, LANES, WIDTH] of logits to the lanes' sums of e = 2^t and t e, t = x scale - top.

    `highest` is each lane's largest x. `total` is a compensated sum: the exact one is about total - lost. With a cap,
    t is (y - y_P) scale, where the pivot P is in the place of `top`, and x counts only where it is `there`.
    """
    if tanh_hi is None:
        new_top = tl.maximum(top, highest * scale)
        shift = top - new_top
    else:
        new_top, steep, shift = next_pivot(top, highest, scale, tanh_hi, tanh_lo, PTX)
    shrink = exp2(shift, PTX)
    if tanh_hi is None:
        t = fma(x, scale, -new_top[None, :, None])
    else:
        t = above_pivot(x, new_top[None, :, None], tanh_hi, tanh_lo, PTX) * steep[None, :, None]
        if there is not None:
            t = tl.where(there, t, LOWEST)
    e = exp2(t, PTX)
    if tanh_hi is None:
        weighted = (weighted + total * shift) * shrink + tl.sum(tl.sum(e * bounded(t, PTX, DTYPE), 2), 0)
    else:
        weighted = (weighted + total * shift) * shrink + tl.sum(tl.sum(e * t, 2), 0)
    added = tl.sum(tl.sum(e, 2), 0) - lost * shrink
    total = total * shrink
    new_total = total + added
    return new_top, new_total, (new_total - total) - added, weighted


@triton.jit
def _sum_others(row, vocab, first, target, scale, tanh_hi, tanh_lo, REPEAT: tl.constexpr, LANES: tl.constexpr,
                WIDTH: tl.constexpr, PTX: tl.constexpr, PREFETCH: tl.constexpr):  # fmt: skip
    """Sums of 2^t and t 2^t over every column but the target, t = x scale - top: (top as a pair, sum, weighted sum).

    If the `first` block is given, a block is loaded before the previous one is summed; the sums have the same bits.
    Valid where |top| is less than FAR; `statistics` handles the other rows. NaN or +inf gives NaN. With a cap, t is
    y scale - top, of any size, and +inf is as good as any large logit.
    """
    DTYPE: tl.constexpr = row.dtype.element_ty
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    phase = phase_of(row, WIDTH)
    full = vocab // BLOCK
    hole = tl.minimum(target // BLOCK, full)
    special = 1 + (hole < full).to(tl.int32)  # the incomplete block, and the target's if that is another
    plain = full + 1 - special

    at = tl.arange(0, BLOCK)
    top = tl.full([LANES], FLOOR if tanh_hi is None else LEAST_POWER, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    lost = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for SHIFTED in tl.static_range(2):
        if (phase != 0) == (SHIFTED == 1):
            if first is None or SHIFTED == 1:
                for i in range(0, plain):
                    if PREFETCH > 0 and PTX:
                        later = (i + PREFETCH) * BLOCK + tl.arange(0, LANES) * (REPEAT * WIDTH)
                        prefetch(row + tl.minimum(later, vocab - 1))
                    start = block_start(i, hole, BLOCK)
                    x = load_columns(row, phase, start, vocab, BLOCK, True, SHIFTED == 1, WIDTH, PTX)
                    x = bounded_columns(x, tanh_hi, PTX, DTYPE)
                    highest = largest(x, REPEAT, LANES, WIDTH, PTX, DTYPE)
                    x = tl.reshape(widen(x, tanh_hi, PTX, DTYPE), [REPEAT, LANES, WIDTH])
                    top, total, lost, weighted = add_block(
                        x, None, highest, top, total, lost, weighted, scale, tanh_hi, tanh_lo, PTX, DTYPE
                    )
            else:
                ahead = first
                if (hole == 0) & (plain > 0):
                    ahead = load_columns(row, phase, BLOCK, vocab, BLOCK, True, False, WIDTH, PTX)
                ahead = bounded_columns(ahead, tanh_hi, PTX, DTYPE)
                for i in range(0, plain):
                    if PREFETCH > 0 and PTX:
                        later = (i + 1 + PREFETCH) * BLOCK + tl.arange(0, LANES) * (REPEAT * WIDTH)
                        prefetch(row + tl.minimum(later, vocab - 1))
                    start = block_start(tl.minimum(i + 1, plain - 1), hole, BLOCK)
                    behind = load_columns(row, phase, start, vocab, BLOCK, True, False, WIDTH, PTX)
                    highest = largest(ahead, REPEAT, LANES, WIDTH, PTX, DTYPE)
                    x = tl.reshape(widen(ahead, tanh_hi, PTX, DTYPE), [REPEAT, LANES, WIDTH])
                    top, total, lost, weighted = add_block(
                        x, None, highest, top, total, lost, weighted, scale, tanh_hi, tanh_lo, PTX, DTYPE
                    )
                    ahead = bounded_columns(behind, tanh_hi, PTX, DTYPE)
            for i in range(0, special):
                start = tl.where(i == 0, full, hole) * BLOCK
                x = load_columns(row, phase, start, vocab, BLOCK, False, SHIFTED == 1, WIDTH, PTX)
                x = widen(bounded_columns(x, tanh_hi, PTX, DTYPE), tanh_hi, PTX, DTYPE)
                there = (at < vocab - start) & (at != target - start)
                x = tl.where(there, x, LOWEST)
                x = tl.reshape(x, [REPEAT, LANES, WIDTH])
                highest = tl.max(tl.max(x, 2), 0)
                if tanh_hi is not None:
                    there = tl.reshape(there, [REPEAT, LANES, WIDTH])
                    x = within_cap(x, tanh_hi)
                top, total, lost, weighted = add_block(
                    x, there, highest, top, total, lost, weighted, scale, tanh_hi, tanh_lo, PTX, DTYPE
                )
    return merge_lanes(top, total, lost, weighted, scale, tanh_hi, PTX)


@triton.jit
def merge_lanes(top, total, lost, weighted, scale, tanh_hi, PTX: tl.constexpr):
    """The lanes' sums as those of the row: (top as a pair, sum, weighted sum)."""
    base, base_lo = tl.max(top, 0), 0.0
    if tanh_hi is None:
        shift = top - base
    else:
        hi, lo = level_of(top, scale)
        base, base_lo = level_of(base, scale)
        shift = (hi - base) + (lo - base_lo)
    shrink = exp2(shift, PTX)
    return base, base_lo, tl.sum((total - lost) * shrink, 0), tl.sum((weighted + total * shift) * shrink, 0)


@triton.jit
def _combine(base, base_lo, total, weighted, target_hi, target_lo, scale_error):
    """(logprob, entropy, lse as a pair) from the others' sums and the target's exponent; see csrc/row_math.h."""
    alone = total == 0.0  # no other column, or -inf in all of them
    log_hi, log_lo = log2_pair(tl.where(alone, 1.0, total))
    rest_hi, rest_lo = add_pairs(base, base_lo, log_hi, log_lo)
    rest_hi = tl.where(alone, -INFINITY, rest_hi)
    d_hi, d_lo = add_pairs(rest_hi, rest_lo, -target_hi, -target_lo)  # base 2
    d_hi = tl.where((rest_hi != rest_hi) | (target_hi != target_hi), rest_hi + target_hi, d_hi)
    d_hi, d_lo = two_sum(d_hi, d_lo + tl.where(tl.abs(d_hi) < INFINITY, d_hi * scale_error, 0.0))
    sure = d_hi <= 0.0
    near = log1p(exp2_pair(tl.where(sure, d_hi, -d_hi), tl.where(sure, d_lo, -d_lo)))  # softplus(-|d|)
    near = tl.where(d_hi == d_hi, near, d_hi)

    d, d_tail = scale_pair(d_hi, d_lo, LN2_HI, LN2_LO)
    logprob = tl.where(sure, -near, -((d + near) + d_tail))
    lse_hi, lse_lo = scale_pair(tl.where(sure, target_hi, rest_hi), tl.where(sure, target_lo, rest_lo), LN2_HI, LN2_LO)
    nothing = alone & (target_hi == -INFINITY)  # lse is -inf, and the rest NaN
    lse_hi, lse_lo = add_pairs(lse_hi, lse_lo, tl.where(nothing, 0.0, near), 0.0)

    # Entropy of {target, others}, plus the share of the others times their own: no term is negative.
    log_others = tl.where(sure, d - near, -near)
    p, p_others = exp(logprob), tl.where(sure, -expm1(logprob), exp(log_others))  # 1 - p without its cancellation
    own = tl.where(alone, 0.0, ((log_hi - quotient(weighted, tl.where(alone, 1.0, total))) + log_lo) * LN2_HI)
    entropy = tl.where(p > 0.0, -p * logprob, 0.0) + tl.where(p_others > 0.0, p_others * (own - log_others), 0.0)
    return logprob, tl.where(d_hi == d_hi, entropy, d_hi), lse_hi, lse_lo


@triton.jit
def statistics(pointer, token_ids, row, vocab, first, scale, scale_error, tanh_hi, tanh_lo, REPEAT: tl.constexpr,
               LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr, PREFETCH: tl.constexpr):  # fmt: skip
    """(logprob, entropy, lse as pair and power); all NaN where the token id is not one of the vocabulary's."""
    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < vocab)
    target = tl.where(known, token, 0).to(tl.int32)
    target_logit = tl.load(pointer + target, mask=known, other=float("nan")).to(tl.float32)
    if tanh_hi is None:
        # An error of the caller: it must not look like p = 1.
        target_logit = tl.where(target_logit == INFINITY, float("nan"), target_logit)
    base, base_lo, total, weighted = _sum_others(
        pointer, vocab, first, target, scale, tanh_hi, tanh_lo, REPEAT, LANES, WIDTH, PTX, PREFETCH
    )
    return combine_sums(
        pointer, None, vocab, vocab, target, target_logit, base, base_lo, total, weighted, scale, scale_error, tanh_hi,
        tanh_lo, 1024, False,
    )  # fmt: skip


@triton.jit
def combine_sums(pointer, ids, columns, vocab, target, target_logit, base, base_lo, total, weighted, scale, scale_error,
                 tanh_hi, tanh_lo, BLOCK: tl.constexpr, GATHERED: tl.constexpr):  # fmt: skip
    """(logprob, entropy, lse as pair and power) from the sums over all columns but the target.

    Where the largest logit or the target's is far from 0, numbers are combined relative to the larger of both; no
    logit with a cap is. `ids` and `columns` are those of `largest_and_count`.
    """
    reference, power = tl.zeros((), tl.float32), tl.full((), 1.0, tl.float32)
    if tanh_hi is None:
        others_far = tl.abs(base) >= FAR  # also where nothing is above the floor
        target_far = tl.abs(target_logit * scale) >= FAR
        if others_far | target_far:
            highest, count = largest_and_count(pointer, ids, columns, vocab, target, BLOCK, GATHERED)
            reference = tl.maximum(tl.where(others_far, highest, 0.0), target_logit)
            nothing_far = (highest == -INFINITY) & (target_far == 0)
            reference = tl.where(nothing_far | (reference == -INFINITY), 0.0, reference)
            base = tl.where(others_far, (highest - reference) * scale, base - reference * scale)
            total = tl.where(others_far, count, total)
            weighted = tl.where(others_far, 0.0, weighted)
        target_hi, target_lo = two_product(target_logit - reference, scale)
        logprob, entropy, hi, lo = _combine(base, base_lo, total, weighted, target_hi, target_lo, scale_error)
        if others_far | target_far:
            # A difference of logits may not fit float32, where divided by the temperature it does.
            quarter = (target_logit * 0.25 - reference * 0.25) * (scale * LN2_HI)
            logprob = tl.where((logprob == -INFINITY) & (target_logit > -INFINITY), quarter * 4.0, logprob)
            hi, lo, power = far_lse(hi, lo, reference, scale, scale_error)
    else:
        target_hi, target_lo, _ = tanh_pair(target_logit, tanh_hi, tanh_lo)
        target_hi, target_lo = scale_pair(target_hi, target_lo, scale, 0.0)
        if ids is not None:
            target_hi = tl.where(target == ABSENT, -INFINITY, target_hi)
        logprob, entropy, hi, lo = _combine(base, base_lo, total, weighted, target_hi, target_lo, scale_error)
    return logprob, entropy, hi, lo, power


@triton.jit
def store_statistics(row, logprob, entropy, lse_hi, lse_lo, power, logprobs, entropies, lses):
    tl.store(logprobs + row, logprob)
    tl.store(entropies + row, entropy)
    bits = float64_bits(lse_hi, lse_lo)
    tl.store(lses + row, tl.where(power > 1.0, bits + POWER_BITS, bits))


@row_kernel()
def forward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    logprobs, entropies, lses, kept_offsets, entries: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Log-probability of the token, entropy and logsumexp of each row; zeros where masked. Reads a row once.

    Rows with entries are left to `kept_forward_kernel`.
    """
    row = tl.program_id(0)
    if has_entries(kept_offsets, row, entries):
        return
    if is_active(mask, row):
        pointer = row_pointer(logits, row, inner, outer_stride, inner_stride)
        first = None
        if logits.dtype.element_ty.primitive_bitwidth == 16:
            first = first_block(pointer, vocab, REPEAT * LANES * WIDTH, WIDTH, PTX)
        s, error = scale_of(row, temperature, scale, scale_error)
        logprob, h, hi, lo, power = statistics(
            pointer, token_ids, row, vocab, first, s, error, tanh_hi, tanh_lo, REPEAT, LANES, WIDTH, PTX, 0
        )
        store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
    else:
        zero = tl.zeros((), tl.float32)
        store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)
