"""The gradient of a row of logits from those of its statistics, in Triton. One program per row."""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_columns import (
    block_pointers,
    block_start,
    column_pointers,
    columns_before_boundary,
    edges,
    has_entries,
    is_active,
    row_kernel,
    row_pointer,
    scale_of,
)
from .triton_far import is_far, largest_logit_of, saved_lse, write_far
from .triton_math import (
    INFINITY,
    LN2_HI,
    LOG2E_HI,
    LOG2E_LO,
    TINY,
    add_pairs,
    bounded,
    bounded_columns,
    exp,
    exp2_pair,
    expm1,
    fma,
    narrow,
    quotient,
    scale_pair,
    scaled_exp2,
    scaled_exp2_twice,
    widen,
    widen_loaded,
    within_cap,
)
from .triton_tanh import above_pivot_and_derivative, level_of, pivot_near, steepness, tanh_pair


@triton.jit
def coefficients(g_logprob, g_entropy, g_lse, logprob, entropy, lse_hi, lse_lo, scale):
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
def cap_coefficients(base, constant, slope, at_target, entropy, lse_hi, lse_lo, scale, logit, tanh_hi, tanh_lo,
                     PTX: tl.constexpr):  # fmt: skip
    """(base, constant, slope, target, scale, pivot) of a row with a cap, from what `coefficients` returned:

        dL/dx = 2^t (constant + slope t) E / (E + 1)^2,    t = (E - P) / (E + 1) scale - base,

    see triton_tanh.py. The pivot P belongs to the row's mean logit, about which most of the probability is. `logit`:
    the target's.
    """
    pivot = pivot_near(((lse_hi - entropy) + lse_lo) / (scale * LN2_HI))
    level_hi, level_lo = level_of(pivot, scale)
    base, lost = add_pairs(base, 0.0, -level_hi, -level_lo)
    tanh_scale = tanh_hi * (0.5 * LN2_HI)
    factor = exp2_pair(-lost, 0.0) * (4.0 * tanh_scale)
    constant, slope = factor * (constant - slope * lost), factor * slope
    _, _, derivative = tanh_pair(logit, tanh_hi, tanh_lo)
    at_target *= derivative * tanh_scale
    at_target = tl.where(tl.abs(at_target) < TINY, 0.0, at_target)
    return base, constant, slope, at_target, steepness(pivot, scale, PTX), pivot


@triton.jit
def logit_of(source, vocab, target):
    """A row's logit of the target, or 0 if it has none.

    Where the gradient is written over the logits, a thread may read it after another thread has replaced it. Then that
    other thread is the one that writes the target's column.
    """
    return tl.load(source + target, mask=(target >= 0) & (target < vocab), other=0.0).to(tl.float32)


@triton.jit
def gradient_of(x, base, constant, slope, scale, pivot, tanh_hi, tanh_lo, SLOPE: tl.constexpr, PTX: tl.constexpr,
                DTYPE: tl.constexpr):  # fmt: skip
    """dL/dx of a block of columns, none of them the target."""
    if tanh_hi is None:
        t = fma(x, scale, -base)
        if SLOPE:
            return scaled_exp2(t, fma(bounded(t, PTX, DTYPE), slope, constant), PTX)
        else:
            return scaled_exp2(t, tl.zeros_like(t) + constant, PTX)
    else:
        above, derivative = above_pivot_and_derivative(x, pivot, tanh_hi, tanh_lo, PTX)
        t = fma(above, scale, -base)
        if SLOPE:
            return scaled_exp2_twice(t, derivative, fma(t, slope, constant), PTX)
        else:
            return scaled_exp2_twice(t, derivative, tl.zeros_like(t) + constant, PTX)


@triton.jit
def write_gradient(source, destination, vocab, target, base, constant, slope, at_target, scale, pivot, tanh_hi,
                   tanh_lo, skip, SLOPE: tl.constexpr, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
                   PTX: tl.constexpr):  # fmt: skip
    """Writes a row's gradient: a head up to a 16-byte boundary of `destination`, a body of whole accesses, a tail.

    Blocks run from the last to the first: what was read last is likely in the cache. Where `source` is not aligned as
    `destination` is, reads are narrow, writes are wide. The first `skip` blocks without the target are not written.
    """
    DTYPE: tl.constexpr = destination.dtype.element_ty
    READ: tl.constexpr = source.dtype.element_ty
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    head = columns_before_boundary(destination, vocab, WIDTH)
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
                here = column_pointers(x_body + start, at, WIDTH, ALIGNED)
                x = widen_loaded(tl.load(here, mask=there, other=0), tanh_hi, PTX)
                g = gradient_of(x, base, constant, slope, scale, pivot, tanh_hi, tanh_lo, SLOPE, PTX, READ)
                g = narrow(tl.where(at == target - head - start, at_target, g), DTYPE)
                tl.store(column_pointers(g_body + start, at, WIDTH, True), g, mask=there)
            if ALIGNED == 1 and not SLOPE and READ.primitive_bitwidth == 16:
                if plain > skip:
                    start = block_start(plain - 1, hole, BLOCK)
                    ahead = tl.load(block_pointers(x_body + start, BLOCK, WIDTH, PTX))
                    ahead = bounded_columns(ahead, tanh_hi, PTX, READ)
                    for i in range(0, plain - skip):
                        x = widen(ahead, tanh_hi, PTX, READ)
                        here = column_pointers(g_body + start, at, WIDTH, True)
                        start = block_start(tl.maximum(plain - 2 - i, skip), hole, BLOCK)
                        ahead = tl.load(block_pointers(x_body + start, BLOCK, WIDTH, PTX))
                        ahead = bounded_columns(ahead, tanh_hi, PTX, READ)
                        g = gradient_of(x, base, constant, slope, scale, pivot, tanh_hi, tanh_lo, SLOPE, PTX, READ)
                        g = narrow(g, DTYPE)
                        tl.store(here, g)
            else:
                for i in range(0, plain - skip):
                    start = block_start(plain - 1 - i, hole, BLOCK)
                    x = widen_loaded(tl.load(column_pointers(x_body + start, at, WIDTH, ALIGNED)), tanh_hi, PTX)
                    g = gradient_of(x, base, constant, slope, scale, pivot, tanh_hi, tanh_lo, SLOPE, PTX, READ)
                    g = narrow(g, DTYPE)
                    tl.store(column_pointers(g_body + start, at, WIDTH, True), g)

    column, there = edges(head, body, vocab, WIDTH)
    x = tl.load(source + column, mask=there, other=0).to(tl.float32)
    if tanh_hi is None:
        t = fma(x, scale, -base)
        g = scaled_exp2(t, fma(tl.maximum(t, -127.0), slope, constant), PTX)
    else:
        x = within_cap(x, tanh_hi)
        g = gradient_of(x, base, constant, slope, scale, pivot, tanh_hi, tanh_lo, True, PTX, READ)
    tl.store(destination + column, narrow(tl.where(column == target, at_target, g), DTYPE), mask=there)


@triton.jit
def write_zeros(destination, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    DTYPE: tl.constexpr = destination.dtype.element_ty
    head = columns_before_boundary(destination, columns, WIDTH)
    body = (columns - head) // WIDTH * WIDTH
    at = tl.arange(0, BLOCK)
    for start in range(0, body, BLOCK):
        there = at // WIDTH * WIDTH < body - start
        tl.store(column_pointers(destination + head + start, at, WIDTH, True), tl.zeros([BLOCK], DTYPE), mask=there)
    column, there = edges(head, body, columns, WIDTH)
    tl.store(destination + column, tl.zeros_like(column).to(DTYPE), mask=there)


@triton.jit
def common_factor(factor, counts, counts_size):
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
def upstream_of(array, row, factor):
    if array is None:
        return tl.zeros((), tl.float32)
    else:
        g = tl.load(array + row)
        return tl.where(g != 0.0, g * factor, 0.0)  # an infinite factor leaves rows without a gradient alone


@row_kernel()
def backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    row_indices, logprobs, entropies, lses, g_logprobs, g_entropies, g_lses, factor, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64, kept_offsets, entries: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Gradient of each row from those of its statistics. Reads a row once and writes it; a row without one is zeroed.

    Row i belongs to row i of the logits, or with `row_indices` to their row row_indices[i]. The gradient may have
    another dtype. Rows with entries are left to `kept_backward_kernel`.

    The last rows come first: the forward read them last, so the cache may still have them.
    """
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    if has_entries(kept_offsets, row, entries):
        return
    BLOCK: tl.constexpr = REPEAT * LANES * WIDTH
    SLOPE: tl.constexpr = g_entropies is not None
    destination = row_pointer(gradient, row, inner, gradient_outer_stride, gradient_inner_stride)
    common = common_factor(factor, counts, counts_size)
    g_logprob = upstream_of(g_logprobs, row, common)
    g_entropy = upstream_of(g_entropies, row, common)
    g_lse = upstream_of(g_lses, row, common)
    some = (g_logprob != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0)
    if is_active(mask, row) & some:
        s, error = scale_of(row, temperature, scale, scale_error)
        hi, lo, power = saved_lse(tl.load(lses + row))
        h = tl.load(entropies + row)
        base, constant, slope, at_target = coefficients(
            g_logprob, g_entropy, g_lse, tl.load(logprobs + row), h, hi, lo, s
        )
        if row_indices is None:
            source = row_pointer(logits, row, inner, outer_stride, inner_stride)
        else:
            source = logits + tl.load(row_indices + row) * inner_stride
        target = tl.load(token_ids + row).to(tl.int32)
        pivot = 0.0
        if tanh_hi is not None:
            base, constant, slope, at_target, s, pivot = cap_coefficients(
                base, constant, slope, at_target, h, hi, lo, s, logit_of(source, vocab, target), tanh_hi, tanh_lo, PTX
            )
        if is_far(hi, power, tanh_hi):
            largest_logit = largest_logit_of(hi, lo, power, h, s, error)
            write_far(source, destination, vocab, target, largest_logit, g_logprob, g_entropy, g_lse, h, s, LANES)
        else:
            write_gradient(
                source, destination, vocab, target, base, constant, slope, at_target, s, pivot, tanh_hi, tanh_lo, 0,
                SLOPE, REPEAT, LANES, WIDTH, PTX,
            )  # fmt: skip
    else:
        write_zeros(destination, vocab, BLOCK, WIDTH)
