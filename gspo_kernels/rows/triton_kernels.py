"""The row kernels in Triton: statistics of a row of logits, its gradient, or both in one launch. One program a row.

The mathematics is that of csrc/row_math.h, in float32 and in base 2: exp z_v = 2^(x_v scale) with
scale = log2(e) / temperature. The sums leave out the target; the rounding error of the logsumexp is kept.

A row may start at any address and have any length. It is read in blocks of [REPEAT, LANES, WIDTH] columns: WIDTH
columns are one 16-byte access, each thread is a lane and holds REPEAT such accesses in registers. Every lane has a
running maximum and sums of its own; they are combined at the end of the row. Blocks without the target have no mask.

Beyond 7.4e8 in base 2 float32 logits are 44 or more apart: of all columns but the target, only those that equal the
largest have a probability. Such rows, called far, are read a second time, by plain loops that count these columns.

Which columns a lane adds up depends on their numbers alone: the same row gives the same bits at every address. Where a
row does not start on a 16-byte boundary, a thread takes its columns out of two aligned accesses (on NVIDIA; elsewhere
it reads them one by one). Columns of a gradient are independent, so there blocks begin where accesses are aligned.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .triton_math import (
    FAR,
    FAR_LSE,
    FLOOR,
    INFINITY,
    LN2_HI,
    LN2_LO,
    LOG2E_HI,
    LOG2E_LO,
    LOWEST,
    POWER,
    POWER_BITS,
    TINY,
    add_pairs,
    bounded,
    bounded_columns,
    exp,
    exp2,
    exp2_pair,
    expm1,
    float64_bits,
    float64_pair,
    fma,
    halves,
    join_columns,
    largest,
    log1p,
    log2_pair,
    narrow,
    prefetch,
    quotient,
    scale_pair,
    scaled_exp2,
    two_product,
    two_sum,
    widen,
    widen_loaded,
)

# ---- where a row lies


@triton.jit
def _row_pointer(data, row, inner, outer_stride, inner_stride):
    """Address of a row of [outer, inner, vocab] data. In 64 bits: there may be more than 2^31 elements."""
    outer = row // inner
    return data + (outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride)


@triton.jit
def _columns_before_boundary(pointer, vocab, WIDTH: tl.constexpr):
    """Columns of the head: those before the first 16-byte boundary."""
    bytes_before = (16 - pointer.to(tl.int64) % 16) % 16
    return tl.minimum((bytes_before // (16 // WIDTH)).to(tl.int32), vocab)


@triton.jit
def _columns(pointer, at, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of the columns `at` from `pointer`, a block of whole 16-byte accesses if ALIGNED.

    The compiler cannot know the alignment and is told. Told of an argument instead of this sum, it would forget.
    """
    here = pointer + at
    if ALIGNED:
        here = tl.max_contiguous(tl.multiple_of(here, 16), WIDTH)
    return here


@triton.jit
def _block(pointer, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """Addresses of the block that starts at `pointer`, on a 16-byte boundary. What they hold is an input of `widen`."""
    if PTX and pointer.dtype.element_ty.primitive_bitwidth == 16:
        return _columns(pointer.to(tl.pointer_type(tl.int32)), tl.arange(0, BLOCK // 2), WIDTH // 2, True)
    else:
        return _columns(pointer, tl.arange(0, BLOCK), WIDTH, True)


@triton.jit
def _block_start(i, hole, BLOCK: tl.constexpr):
    """First column of the i-th whole block, not counting block `hole`."""
    return (i + (i >= hole).to(tl.int32)) * BLOCK


@triton.jit
def _prefetch_row(row, vocab, BLOCKS: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Brings the first BLOCKS blocks of a row to the L2 cache of an NVIDIA GPU; nothing past the row's end."""
    for i in tl.static_range(BLOCKS):
        prefetch(row + tl.minimum((i * LANES + tl.arange(0, LANES)) * (REPEAT * WIDTH), vocab - 1))


@triton.jit
def _load_columns(row, phase, start, vocab, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SHIFTED: tl.constexpr,
                  WIDTH: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """A block from column `start` of a row that begins `phase` columns behind a 16-byte boundary; input of `widen`.

    If not WHOLE, columns past the row's end have undefined values. Every 16-byte access contains a column of the row.
    """
    if SHIFTED and not PTX:
        at = tl.arange(0, BLOCK)
        if WHOLE:
            return tl.load(row + start + at)
        else:
            return tl.load(row + start + at, mask=start + at < vocab, other=0)
    else:
        low = _block(row - phase + start, BLOCK, WIDTH, PTX)
        high = _block(row - phase + start + WIDTH, BLOCK, WIDTH, PTX)
        if WHOLE:
            x = tl.load(low)
            if SHIFTED:
                x = join_columns(x, tl.load(high), phase, PTX)
        else:
            left = vocab + phase - start  # columns from the boundary on
            ITEMS: tl.constexpr = BLOCK // low.shape[0]  # columns an item that is loaded
            group = tl.arange(0, BLOCK // ITEMS) // (WIDTH // ITEMS) * WIDTH
            x = tl.load(low, mask=group < left, other=0)
            if SHIFTED:
                y = tl.load(high, mask=group + WIDTH < left, other=0)
                x = join_columns(x, y, phase, PTX)
        return x


@triton.jit
def _scale_of(row, temperature, scale, scale_error):
    """(log2(e) / temperature of a row, its relative error): the arguments, or from the array of temperatures."""
    if temperature is None:
        return scale, scale_error
    else:
        t = tl.load(temperature + row)
        s = quotient(t * 0.0 + LOG2E_HI, t) + LOG2E_LO / t
        return s, (fma(-s, t, t * 0.0 + LOG2E_HI) + LOG2E_LO) * LN2_HI


# ---- statistics


@triton.jit
def _add_block(x, highest, top, total, lost, weighted, scale, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """Adds a block [REPEAT, LANES, WIDTH] of logits to the lanes' sums of e = 2^t and t e, t = x scale - top.

    `highest` is each lane's largest x. `total` is a compensated sum: the exact one is about total - lost.
    """
    new_top = tl.maximum(top, highest * scale)
    shift = top - new_top
    shrink = exp2(shift, PTX)
    t = fma(x, scale, -new_top[None, :, None])
    e = exp2(t, PTX)
    weighted = (weighted + total * shift) * shrink + tl.sum(tl.sum(e * bounded(t, PTX, DTYPE), 2), 0)
    added = tl.sum(tl.sum(e, 2), 0) - lost * shrink
    total = total * shrink
    new_total = total + added
    return new_top, new_total, (new_total - total) - added, weighted


@triton.jit
def _phase(row, WIDTH: tl.constexpr):
    """Columns between the last 16-byte boundary and the row's first column."""
    return (row.to(tl.int64) % 16 // (16 // WIDTH)).to(tl.int32)


@triton.jit
def _first_block(row, vocab, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """The first block of a row on a 16-byte boundary, if it is whole. Its load depends on no other load."""
    here = _block(row - _phase(row, WIDTH), BLOCK, WIDTH, PTX)
    return tl.load(here, mask=tl.full(here.shape, BLOCK, tl.int32) <= vocab)


@triton.jit
def _sum_others(row, vocab, first, target, scale, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
                PTX: tl.constexpr, PREFETCH: tl.constexpr):  # fmt: skip
    """Sums of 2^t and t 2^t over every column but the target, t = x scale - top: (top, sum, weighted sum).

    With the `first` block given, a block is loaded before the previous one is summed; the sums have the same bits.
    Right where |top| is less than FAR: `_statistics` sees to all other rows. NaN or +inf gives NaN.
    """
    DTYPE: tl.constexpr = row.dtype.element_ty
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    phase = _phase(row, WIDTH)
    full = vocab // BLOCK
    hole = tl.minimum(target // BLOCK, full)
    special = 1 + (hole < full).to(tl.int32)  # the incomplete block, and the target's if that is another
    plain = full + 1 - special

    at = tl.arange(0, BLOCK)
    top = tl.full([LANES], FLOOR, tl.float32)
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
                    start = _block_start(i, hole, BLOCK)
                    x = _load_columns(row, phase, start, vocab, BLOCK, True, SHIFTED == 1, WIDTH, PTX)
                    x = bounded_columns(x, PTX, DTYPE)
                    highest = largest(x, REPEAT, LANES, WIDTH, PTX, DTYPE)
                    x = tl.reshape(widen(x, PTX, DTYPE), [REPEAT, LANES, WIDTH])
                    top, total, lost, weighted = _add_block(x, highest, top, total, lost, weighted, scale, PTX, DTYPE)
            else:
                ahead = first
                if (hole == 0) & (plain > 0):
                    ahead = _load_columns(row, phase, BLOCK, vocab, BLOCK, True, False, WIDTH, PTX)
                ahead = bounded_columns(ahead, PTX, DTYPE)
                for i in range(0, plain):
                    if PREFETCH > 0 and PTX:
                        later = (i + 1 + PREFETCH) * BLOCK + tl.arange(0, LANES) * (REPEAT * WIDTH)
                        prefetch(row + tl.minimum(later, vocab - 1))
                    start = _block_start(tl.minimum(i + 1, plain - 1), hole, BLOCK)
                    behind = _load_columns(row, phase, start, vocab, BLOCK, True, False, WIDTH, PTX)
                    highest = largest(ahead, REPEAT, LANES, WIDTH, PTX, DTYPE)
                    x = tl.reshape(widen(ahead, PTX, DTYPE), [REPEAT, LANES, WIDTH])
                    top, total, lost, weighted = _add_block(x, highest, top, total, lost, weighted, scale, PTX, DTYPE)
                    ahead = bounded_columns(behind, PTX, DTYPE)
            for i in range(0, special):
                start = tl.where(i == 0, full, hole) * BLOCK
                x = _load_columns(row, phase, start, vocab, BLOCK, False, SHIFTED == 1, WIDTH, PTX)
                x = widen(bounded_columns(x, PTX, DTYPE), PTX, DTYPE)
                x = tl.where((at < vocab - start) & (at != target - start), x, LOWEST)
                x = tl.reshape(x, [REPEAT, LANES, WIDTH])
                highest = tl.max(tl.max(x, 2), 0)
                top, total, lost, weighted = _add_block(x, highest, top, total, lost, weighted, scale, PTX, DTYPE)

    base = tl.max(top, 0)
    shift = top - base
    shrink = exp2(shift, PTX)
    return base, tl.sum((total - lost) * shrink, 0), tl.sum((weighted + total * shift) * shrink, 0)


@triton.jit
def _combine(base, total, weighted, target_logit, scale, scale_error):
    """(logprob, entropy, lse as a pair) from the others' sums and the target logit; see csrc/row_math.h."""
    alone = total == 0.0  # no other column, or -inf in all of them
    log_hi, log_lo = log2_pair(tl.where(alone, 1.0, total))
    target_hi, target_lo = two_product(target_logit, scale)
    rest_hi, rest_lo = add_pairs(base, 0.0, log_hi, log_lo)
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
def _largest_and_count(row, vocab, target, BLOCK: tl.constexpr):
    """(The largest logit of all columns but the target, how many have it): (-inf, 0) if none, NaN for NaN or +inf."""
    at = tl.arange(0, BLOCK)
    largest_logit = tl.full([BLOCK], -INFINITY, tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        there = (start + at < vocab) & (start + at != target)
        x = tl.load(row + start + at, mask=there, other=-INFINITY).to(tl.float32)
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

    `_write_gradient` works with the rounded scale; `_largest_logit` and vocabulary shards need an lse that is exact.
    """
    inverse, _ = _inverse_temperature(scale, 0.0)
    return ((2.0**30 / inverse).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _far_lse(hi, lo, reference, scale, scale_error):
    """reference / temperature + (hi + lo) as (pair, power): pair times power, which is 1 or 2^32."""
    exact = tl.abs(reference) > _last_of_rounded_scale(scale)
    inverse_hi, inverse_lo = _inverse_temperature(scale, tl.where(exact, scale_error, 0.0))
    power = tl.where(tl.abs(reference) >= 2.0**60, POWER, 1.0)
    near = reference / power
    far_hi, far_lo = two_product(near, inverse_hi)
    hi, lo = add_pairs(far_hi, far_lo + near * inverse_lo, hi / power, lo / power)
    return hi, lo, tl.where(tl.abs(hi) < INFINITY, power, 1.0)


@triton.jit
def _statistics(pointer, token_ids, row, vocab, first, scale, scale_error, REPEAT: tl.constexpr, LANES: tl.constexpr,
                WIDTH: tl.constexpr, PTX: tl.constexpr, PREFETCH: tl.constexpr):  # fmt: skip
    """(logprob, entropy, lse as pair and power); all NaN where the token id is not one of the vocabulary's.

    Where the largest logit or the target's is far from 0, numbers are combined relative to the larger of both.
    """
    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < vocab)
    target = tl.where(known, token, 0).to(tl.int32)
    target_logit = tl.load(pointer + target, mask=known, other=float("nan")).to(tl.float32)
    target_logit = tl.where(target_logit == INFINITY, float("nan"), target_logit)  # a caller's error, no certainty
    base, total, weighted = _sum_others(pointer, vocab, first, target, scale, REPEAT, LANES, WIDTH, PTX, PREFETCH)
    reference, power = tl.zeros((), tl.float32), tl.full((), 1.0, tl.float32)
    others_far = tl.abs(base) >= FAR  # also where nothing is above the floor
    target_far = tl.abs(target_logit * scale) >= FAR
    if others_far | target_far:
        highest, count = _largest_and_count(pointer, vocab, target, 1024)
        reference = tl.maximum(tl.where(others_far, highest, 0.0), target_logit)
        nothing_far = (highest == -INFINITY) & (target_far == 0)
        reference = tl.where(nothing_far | (reference == -INFINITY), 0.0, reference)
        base = tl.where(others_far, (highest - reference) * scale, base - reference * scale)
        total = tl.where(others_far, count, total)
        weighted = tl.where(others_far, 0.0, weighted)
    logprob, entropy, hi, lo = _combine(base, total, weighted, target_logit - reference, scale, scale_error)
    if others_far | target_far:  # a difference of logits may not fit float32, where divided by the temperature it does
        quarter = (target_logit * 0.25 - reference * 0.25) * (scale * LN2_HI)
        logprob = tl.where((logprob == -INFINITY) & (target_logit > -INFINITY), quarter * 4.0, logprob)
        hi, lo, power = _far_lse(hi, lo, reference, scale, scale_error)
    return logprob, entropy, hi, lo, power


@triton.jit
def _store_statistics(row, logprob, entropy, lse_hi, lse_lo, power, logprobs, entropies, lses):
    tl.store(logprobs + row, logprob)
    tl.store(entropies + row, entropy)
    bits = float64_bits(lse_hi, lse_lo)
    tl.store(lses + row, tl.where(power > 1.0, bits + POWER_BITS, bits))


@triton.jit
def _counts(mask, row):
    if mask is None:
        return True
    else:
        return tl.load(mask + row) != 0


# ---- gradient


@triton.jit
def _coefficients(g_logprob, g_entropy, g_lse, logprob, entropy, lse_hi, lse_lo, scale):
    """(base, constant, slope, target): for every column but the target, with t = x scale - base,

        dL/dx = 2^t (constant + slope t),

    where `base` is the row's lse in base 2, rounded; the coefficients contain its rounding error.
    """
    base, lost = scale_pair(lse_hi, lse_lo, LOG2E_HI, LOG2E_LO)
    base = tl.where(base == -INFINITY, float("nan"), base)  # a row of -inf, which `widen` may have made finite
    factor = exp2_pair(-lost, 0.0) * (scale * LN2_HI)
    constant = factor * (g_lse - g_logprob - g_entropy * (entropy - lost * LN2_HI))
    p = exp(logprob)
    through_p = tl.where(p > 0.0, p * (g_lse - g_entropy * (logprob + entropy)), 0.0)
    target = (through_p - g_logprob * expm1(logprob)) * (scale * LN2_HI)
    return base, constant, -factor * g_entropy * LN2_HI, tl.where(tl.abs(target) < TINY, 0.0, target)


@triton.jit
def _saved_lse(bits):
    """A row's lse as (pair, power)."""
    exponent = ((bits >> 52) & 0x7FF).to(tl.int32)
    beyond = (exponent >= 1023 + 100) & (exponent < 2047)
    hi, lo = float64_pair(tl.where(beyond, bits - POWER_BITS, bits))
    return hi, lo, tl.where(beyond, POWER, 1.0)


@triton.jit
def _is_far(lse_hi, power):
    """Whether only a row's largest logits have a probability, by its lse. NaN and -inf are not far."""
    return (tl.abs(lse_hi) * power >= FAR_LSE) & (tl.abs(lse_hi) < INFINITY)


@triton.jit
def _largest_logit(lse_hi, lse_lo, power, entropy, scale, scale_error):
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
def _write_far(source, destination, vocab, target, largest_logit, g_logprob, g_entropy, g_lse, entropy, scale,
               BLOCK: tl.constexpr):  # fmt: skip
    """Writes the gradient of such a row: every largest logit has the probability exp(-entropy), others have 0."""
    DTYPE: tl.constexpr = destination.dtype.element_ty
    p, inverse_temperature = exp(-entropy), scale * LN2_HI
    nothing = g_entropy * 0.0  # or NaN
    at_largest = _no_subnormal((g_lse - g_logprob + nothing) * p * inverse_temperature)
    elsewhere = tl.where(at_largest == at_largest, 0.0, at_largest)
    target_largest = _no_subnormal((p * g_lse - g_logprob * expm1(-entropy) + nothing) * inverse_temperature)
    target_elsewhere = _no_subnormal((g_logprob + nothing) * inverse_temperature)
    at = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        there = start + at < vocab
        is_largest = tl.load(source + start + at, mask=there, other=0).to(tl.float32) == largest_logit
        of_target = tl.where(is_largest, target_largest, target_elsewhere)
        g = tl.where(start + at == target, of_target, tl.where(is_largest, at_largest, elsewhere))
        tl.store(destination + start + at, narrow(g, DTYPE), mask=there)


@triton.jit
def _gradient(x, base, constant, slope, scale, SLOPE: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """dL/dx of a block of columns, none of them the target."""
    t = fma(x, scale, -base)
    if SLOPE:
        return scaled_exp2(t, fma(bounded(t, PTX, DTYPE), slope, constant), PTX)
    else:
        return scaled_exp2(t, tl.zeros_like(t) + constant, PTX)


@triton.jit
def _edges(head, body, vocab, WIDTH: tl.constexpr):
    """(columns, which of them exist) of head and tail, each shorter than WIDTH."""
    at = tl.arange(0, 2 * WIDTH)
    column = tl.where(at < WIDTH, at, head + body + at - WIDTH)
    return column, column < tl.where(at < WIDTH, head, vocab)


@triton.jit
def _write_gradient(source, destination, vocab, target, base, constant, slope, at_target, scale, skip,
                    SLOPE: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
                    PTX: tl.constexpr):  # fmt: skip
    """Writes a row's gradient: a head up to a 16-byte boundary of `destination`, a body of whole accesses, a tail.

    Blocks run from the last to the first: what was read last is likely in the cache. Where `source` is not aligned as
    `destination` is, reads are narrow, writes are wide. The first `skip` blocks without the target are not written.
    """
    DTYPE: tl.constexpr = destination.dtype.element_ty
    READ: tl.constexpr = source.dtype.element_ty
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    head = _columns_before_boundary(destination, vocab, WIDTH)
    body = (vocab - head) // WIDTH * WIDTH
    x_body, g_body = source + head, destination + head
    full = body // BLOCK
    hole = target - head  # the column in the body
    hole = tl.where((hole >= 0) & (hole < full * BLOCK), hole // BLOCK, full)
    special = 1 + (hole < full).to(tl.int32)  # the incomplete block, and the target's if that is another
    plain = full + 1 - special
    in_step = x_body.to(tl.int64) % 16 == 0

    at = tl.arange(0, BLOCK)
    for ALIGNED in tl.static_range(2):
        if in_step == (ALIGNED == 1):
            for i in range(0, special):
                start = tl.where(i == 0, full, hole) * BLOCK
                there = at // WIDTH * WIDTH < body - start
                here = _columns(x_body + start, at, WIDTH, ALIGNED)
                x = widen_loaded(tl.load(here, mask=there, other=0), PTX)
                g = _gradient(x, base, constant, slope, scale, SLOPE, PTX, READ)
                g = narrow(tl.where(at == target - head - start, at_target, g), DTYPE)
                tl.store(_columns(g_body + start, at, WIDTH, True), g, mask=there)
            if ALIGNED == 1 and not SLOPE and READ.primitive_bitwidth == 16:
                if plain > skip:
                    start = _block_start(plain - 1, hole, BLOCK)
                    ahead = tl.load(_block(x_body + start, BLOCK, WIDTH, PTX))
                    ahead = bounded_columns(ahead, PTX, READ)
                    for i in range(0, plain - skip):
                        x = widen(ahead, PTX, READ)
                        here = _columns(g_body + start, at, WIDTH, True)
                        start = _block_start(tl.maximum(plain - 2 - i, skip), hole, BLOCK)
                        ahead = tl.load(_block(x_body + start, BLOCK, WIDTH, PTX))
                        ahead = bounded_columns(ahead, PTX, READ)
                        g = narrow(_gradient(x, base, constant, slope, scale, SLOPE, PTX, READ), DTYPE)
                        tl.store(here, g)
            else:
                for i in range(0, plain - skip):
                    start = _block_start(plain - 1 - i, hole, BLOCK)
                    x = widen_loaded(tl.load(_columns(x_body + start, at, WIDTH, ALIGNED)), PTX)
                    g = narrow(_gradient(x, base, constant, slope, scale, SLOPE, PTX, READ), DTYPE)
                    tl.store(_columns(g_body + start, at, WIDTH, True), g)

    column, there = _edges(head, body, vocab, WIDTH)
    x = tl.load(source + column, mask=there, other=0).to(tl.float32)
    t = fma(x, scale, -base)
    g = scaled_exp2(t, fma(tl.maximum(t, -127.0), slope, constant), PTX)
    tl.store(destination + column, narrow(tl.where(column == target, at_target, g), DTYPE), mask=there)


@triton.jit
def _kept_columns(pointer, hole, KEPT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses of the first KEPT whole blocks of a row on a 16-byte boundary, not counting block `hole`.

    No other access has the shape [KEPT, BLOCK]: Triton gives all accesses of one shape the widest layout among them.
    """
    start = _block_start(tl.arange(0, KEPT), hole, BLOCK)
    here = pointer + start[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.max_contiguous(tl.multiple_of(here, [1, 16]), [1, WIDTH])


@triton.jit
def _load_kept(row, hole, there, KEPT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """These blocks of 16-bit logits, if `there`; on NVIDIA two logits an int32."""
    if PTX:
        here = _kept_columns(row.to(tl.pointer_type(tl.int32)), hole, KEPT, BLOCK // 2, WIDTH // 2)
    else:
        here = _kept_columns(row, hole, KEPT, BLOCK, WIDTH)
    return tl.load(here, mask=tl.zeros(here.shape, tl.int1) | there, other=0)


@triton.jit
def _write_kept(kept, there, destination, hole, base, constant, scale, KEPT: tl.constexpr, BLOCK: tl.constexpr,
                WIDTH: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Writes the gradient of the kept blocks, if `there`."""
    DTYPE: tl.constexpr = destination.dtype.element_ty
    if there:
        if PTX:
            low, high = halves(bounded_columns(kept, PTX, DTYPE), DTYPE)
            x = tl.reshape(tl.join(low, high), [KEPT, BLOCK])
        else:
            x = kept.to(tl.float32)
        g = narrow(_gradient(x, base, constant, 0.0, scale, False, PTX, DTYPE), DTYPE)
        tl.store(_kept_columns(destination, hole, KEPT, BLOCK, WIDTH), g)


@triton.jit
def _write_zeros(destination, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    DTYPE: tl.constexpr = destination.dtype.element_ty
    head = _columns_before_boundary(destination, columns, WIDTH)
    body = (columns - head) // WIDTH * WIDTH
    at = tl.arange(0, BLOCK)
    for start in range(0, body, BLOCK):
        there = at // WIDTH * WIDTH < body - start
        tl.store(_columns(destination + head + start, at, WIDTH, True), tl.zeros([BLOCK], DTYPE), mask=there)
    column, there = _edges(head, body, columns, WIDTH)
    tl.store(destination + column, tl.zeros_like(column).to(DTYPE), mask=there)


@triton.jit
def _factor(factor, counts, counts_size):
    """The factor of all gradients: `factor[0]` / sum of `counts`; each may be absent. NaN if that is not above 0."""
    result = tl.full((), 1.0, tl.float32)
    if factor is not None:
        result = tl.load(factor).to(tl.float32)
    if counts is not None:
        at = tl.arange(0, 1024)
        total = tl.zeros((), tl.float32)
        for start in range(0, counts_size, 1024):
            total += tl.sum(tl.load(counts + start + at, mask=start + at < counts_size, other=0.0), 0)
        result = quotient(result, tl.where(total > 0.0, total, float("nan")))
    return result


@triton.jit
def _upstream(array, row, factor):
    if array is None:
        return tl.zeros((), tl.float32)
    else:
        g = tl.load(array + row)
        return tl.where(g != 0.0, g * factor, 0.0)  # an infinite factor leaves rows without a gradient alone


# ---- kernels. What varies from call to call does not select another compiled kernel. Integers have declared types:
# without one Triton takes 32 or 64 bits by the value, and a stride of 2^31 or more compiles another kernel.

_VARIES = ["outer_stride", "inner_stride", "inner", "vocab", "counts_size", "scale", "scale_error",
           "gradient_outer_stride", "gradient_inner_stride", "rows", "sequences"]  # fmt: skip
_ANY_ADDRESS = ["logits", "token_ids", "mask", "temperature", "places", "logprobs", "entropies", "lses", "g_logprobs",
                "g_entropies", "g_lses", "factor", "counts", "gradient", "values", "loss", "numbers",
                "cu_seqlens"]  # fmt: skip
_kernel = functools.partial(triton.jit, do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANY_ADDRESS)


@_kernel()
def forward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error,
    logprobs, entropies, lses,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Log-probability of the token, entropy and logsumexp of each row; zeros where masked. Reads a row once."""
    row = tl.program_id(0)
    if _counts(mask, row):
        pointer = _row_pointer(logits, row, inner, outer_stride, inner_stride)
        first = None
        if logits.dtype.element_ty.primitive_bitwidth == 16:
            first = _first_block(pointer, vocab, REPEAT * LANES * WIDTH, WIDTH, PTX)
        s, error = _scale_of(row, temperature, scale, scale_error)
        logprob, h, hi, lo, power = _statistics(
            pointer, token_ids, row, vocab, first, s, error, REPEAT, LANES, WIDTH, PTX, 0
        )
        _store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
    else:
        zero = tl.zeros((), tl.float32)
        _store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)


@_kernel()
def backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error,
    places, logprobs, entropies, lses, g_logprobs, g_entropies, g_lses, factor, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Gradient of each row from those of its statistics. Reads a row once and writes it; a row without one is zeroed.
    Row i is that of the logits or, with `places`, row places[i] of them; the gradient may have another dtype.

    The last rows come first: the forward read them last, so the cache may still have them.
    """
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    SLOPE: tl.constexpr = g_entropies is not None
    destination = _row_pointer(gradient, row, inner, gradient_outer_stride, gradient_inner_stride)
    common = _factor(factor, counts, counts_size)
    g_logprob = _upstream(g_logprobs, row, common)
    g_entropy = _upstream(g_entropies, row, common)
    g_lse = _upstream(g_lses, row, common)
    some = (g_logprob != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0)
    if _counts(mask, row) & some:
        s, error = _scale_of(row, temperature, scale, scale_error)
        hi, lo, power = _saved_lse(tl.load(lses + row))
        h = tl.load(entropies + row)
        base, constant, slope, at_target = _coefficients(
            g_logprob, g_entropy, g_lse, tl.load(logprobs + row), h, hi, lo, s
        )
        if places is None:
            source = _row_pointer(logits, row, inner, outer_stride, inner_stride)
        else:
            source = logits + tl.load(places + row) * inner_stride
        target = tl.load(token_ids + row).to(tl.int32)
        if _is_far(hi, power):
            largest_logit = _largest_logit(hi, lo, power, h, s, error)
            _write_far(source, destination, vocab, target, largest_logit, g_logprob, g_entropy, g_lse, h, s, LANES)
        else:
            _write_gradient(
                source, destination, vocab, target, base, constant, slope, at_target, s, 0, SLOPE, REPEAT, LANES,
                WIDTH, PTX,
            )  # fmt: skip
    else:
        _write_zeros(destination, vocab, BLOCK, WIDTH)


@_kernel()
def forward_backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error,
    logprobs, entropies, lses, g_logprobs, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
    PREFETCH: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Both at once, for a gradient by the log-probability that is known beforehand: the second read hits the cache.

    Of 16-bit logits, PREFETCH more blocks are prefetched to the L2 cache while a row is summed; the first KEPT blocks
    stay in registers and are not read a second time.
    """
    row = tl.program_id(0)
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    NARROW: tl.constexpr = logits.dtype.element_ty.primitive_bitwidth == 16
    destination = _row_pointer(gradient, row, inner, gradient_outer_stride, gradient_inner_stride)
    if _counts(mask, row):
        source = _row_pointer(logits, row, inner, outer_stride, inner_stride)
        first = None
        if NARROW:
            first = _first_block(source, vocab, BLOCK, WIDTH, PTX)
        if PREFETCH > 0 and PTX:
            _prefetch_row(source, vocab, PREFETCH + 1, REPEAT, LANES, WIDTH)
        target = tl.load(token_ids + row).to(tl.int32)
        skip = 0
        if KEPT > 0 and NARROW:
            full = vocab // BLOCK
            hole = tl.where((target >= 0) & (target < full * BLOCK), target // BLOCK, full)
            there = full - (hole < full).to(tl.int32) >= KEPT
            there &= (_phase(source, WIDTH) == 0) & (_phase(destination, WIDTH) == 0)
            kept = _load_kept(source, hole, there, KEPT, BLOCK, WIDTH, PTX)
            skip = there.to(tl.int32) * KEPT
        g_logprob = _upstream(g_logprobs, row, _factor(None, counts, counts_size))
        s, error = _scale_of(row, temperature, scale, scale_error)
        logprob, h, hi, lo, power = _statistics(
            source, token_ids, row, vocab, first, s, error, REPEAT, LANES, WIDTH, PTX, PREFETCH
        )
        _store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
        if g_logprob != 0.0:
            base, constant, slope, at_target = _coefficients(g_logprob, 0.0, 0.0, logprob, h, hi, lo, s)
            if _is_far(hi, power):
                largest_logit = _largest_logit(hi, lo, power, h, s, error)
                _write_far(source, destination, vocab, target, largest_logit, g_logprob, 0.0, 0.0, h, s, LANES)
            else:
                _write_gradient(
                    source, destination, vocab, target, base, constant, slope, at_target, s, skip, False, REPEAT,
                    LANES, WIDTH, PTX,
                )  # fmt: skip
                if KEPT > 0 and NARROW:
                    _write_kept(kept, there, destination, hole, base, constant, s, KEPT, BLOCK, WIDTH, PTX)
        else:
            _write_zeros(destination, vocab, BLOCK, WIDTH)
    else:
        zero = tl.zeros((), tl.float32)
        _store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)
        _write_zeros(destination, vocab, BLOCK, WIDTH)


@triton.jit
def _sequence_of(row, inner, cu_seqlens, sequences, rows):
    """First row of a row's sequence, and the row behind its last; never outside of the `rows`."""
    if cu_seqlens is None:
        begin = row // inner * inner
        end = begin + inner
    else:
        lane = tl.arange(0, 128)
        begin, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + rows
        for start in range(0, sequences + 1, 128):
            boundary = tl.load(cu_seqlens + start + lane, mask=start + lane <= sequences, other=0)
            boundary = tl.minimum(tl.maximum(boundary, 0), rows).to(tl.int32)
            begin = tl.maximum(begin, tl.max(tl.where(boundary <= row, boundary, 0), 0))
            end = tl.minimum(end, tl.min(tl.where(boundary > row, boundary, rows), 0))
    return begin, end


@triton.jit
def _some_nan(numbers, begin, end):
    lane = tl.arange(0, 128)
    found = tl.zeros([128], tl.int32)
    for start in range(begin, end, 128):
        x = tl.load(numbers + start + lane, mask=start + lane < end, other=0.0)
        found += (x != x).to(tl.int32)
    return tl.max(found, 0) > 0


@_kernel()
def scale_kernel(
    values, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32, rows: tl.int32, factor,
    loss, numbers, mask, cu_seqlens, sequences: tl.int32,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Multiplies rows in place by `factor[0]`; by exactly 1 there is nothing to do. A program scales several rows.

    If there is a `loss` and it is NaN: a row whose `numbers` are NaN becomes NaN, and if WHOLE, with it all other rows
    of its sequence that count. The sequences are rows of `inner` or, with `cu_seqlens`, as these say.
    """
    DTYPE: tl.constexpr = values.dtype.element_ty
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            pointer = _row_pointer(values, row, inner, outer_stride, inner_stride)
            head = _columns_before_boundary(pointer, vocab, WIDTH)
            body = (vocab - head) // WIDTH * WIDTH
            at = tl.arange(0, BLOCK)
            for start in range(0, body, BLOCK):
                there = at // WIDTH * WIDTH < body - start
                here = _columns(pointer + head + start, at, WIDTH, True)
                tl.store(here, narrow(_times(tl.load(here, mask=there, other=0), by), DTYPE), mask=there)
            column, there = _edges(head, body, vocab, WIDTH)
            here = pointer + column
            tl.store(here, narrow(_times(tl.load(here, mask=there, other=0), by), DTYPE), mask=there)
    if loss is not None:
        its_loss = tl.load(loss)
        if its_loss != its_loss:
            for row in range(tl.program_id(0), rows, tl.num_programs(0)):
                begin, end = row, row + 1
                if WHOLE:
                    begin, end = _sequence_of(row, inner, cu_seqlens, sequences, rows)
                if _counts(mask, row) & _some_nan(numbers, begin, end):
                    pointer = _row_pointer(values, row, inner, outer_stride, inner_stride)
                    column = tl.arange(0, 128)
                    for start in range(0, vocab, 128):
                        nan = tl.full([128], float("nan"), tl.float32).to(DTYPE)
                        tl.store(pointer + start + column, nan, mask=start + column < vocab)


@triton.jit
def _times(x, by):
    """x by in float32, subnormals as zero."""
    y = x.to(tl.float32) * by
    return tl.where(tl.abs(y) < TINY, 0.0, y)
