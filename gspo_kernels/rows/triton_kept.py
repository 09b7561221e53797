"""Rows that keep some of the columns, in Triton: statistics and gradient over the row's entries. One program per row.

A row of few entries takes one step of one warp; rows of up to all columns loop. Sums are taken as over whole rows, lane
by lane; entry i of a row belongs to lane i mod LANES, whatever the other rows are. The gradient of a row is zeros, and
then its entries: their values go through an array by entry, because they may lie over the logits they come from.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_backward import cap_coefficients, coefficients, common_factor, gradient_of, upstream_of, write_zeros
from .triton_columns import (
    ABSENT,
    entries_of,
    is_active,
    is_column,
    kept_target,
    load_entries,
    load_ids,
    row_kernel,
    row_pointer,
    scale_of,
)
from .triton_far import far_gradient, far_values, is_far, largest_logit_of, saved_lse
from .triton_forward import add_block, combine_sums, merge_lanes, store_statistics
from .triton_math import FLOOR, INFINITY, LOWEST, narrow, within_cap
from .triton_tanh import LEAST_POWER


@triton.jit
def _add_entries(row, ids, start, count, vocab, target, top, total, lost, weighted, target_logit, found, scale, tanh_hi,
                 tanh_lo, REPEAT: tl.constexpr, LANES: tl.constexpr, GATHERED: tl.constexpr,
                 PTX: tl.constexpr):  # fmt: skip
    """Adds REPEAT entries a lane to its sums, but for the target, whose logit is added to `target_logit`."""
    at = start + tl.arange(0, REPEAT * LANES)
    id = load_ids(ids, at, count)
    x = load_entries(row, id, at, vocab, GATHERED)
    there = id != ABSENT
    is_target = there & (id == target)
    target_logit += tl.sum(tl.reshape(tl.where(is_target, x, 0.0), [REPEAT, LANES]), 0)
    found += tl.sum(tl.reshape(is_target.to(tl.int32), [REPEAT, LANES]), 0)
    there &= id != target
    x = tl.where(there, x, LOWEST)
    x = tl.reshape(tl.where(x < LOWEST, LOWEST, x), [REPEAT, LANES, 1])
    highest = tl.max(tl.max(x, 2), 0)
    if tanh_hi is not None:
        there = tl.reshape(there, [REPEAT, LANES, 1])
        x = within_cap(x, tanh_hi)
    top, total, lost, weighted = add_block(
        x, there, highest, top, total, lost, weighted, scale, tanh_hi, tanh_lo, PTX, tl.float32
    )
    return top, total, lost, weighted, target_logit, found


@triton.jit
def _statistics_of_entries(row, ids, count, vocab, target, scale, scale_error, tanh_hi, tanh_lo, REPEAT: tl.constexpr,
                           LANES: tl.constexpr, GATHERED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """(logprob, entropy, lse as pair and power); NaN where the target is not one of the entries, or an id no column.

    Without a target on this rank (ABSENT) the log-probability is -inf.
    """
    top = tl.full([LANES], FLOOR if tanh_hi is None else LEAST_POWER, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    lost = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    target_logit = tl.zeros([LANES], tl.float32)
    found = tl.zeros([LANES], tl.int32)
    top, total, lost, weighted, target_logit, found = _add_entries(
        row, ids, 0, count, vocab, target, top, total, lost, weighted, target_logit, found, scale, tanh_hi, tanh_lo, 1,
        LANES, GATHERED, PTX,
    )  # fmt: skip
    for start in range(LANES, count, REPEAT * LANES):
        top, total, lost, weighted, target_logit, found = _add_entries(
            row, ids, start, count, vocab, target, top, total, lost, weighted, target_logit, found, scale, tanh_hi,
            tanh_lo, REPEAT, LANES, GATHERED, PTX,
        )  # fmt: skip
    base, base_lo, sum_others, weighted_others = merge_lanes(top, total, lost, weighted, scale, tanh_hi, PTX)
    logit = tl.where(tl.sum(found, 0) == 1, tl.sum(target_logit, 0), float("nan"))
    if tanh_hi is None:
        logit = tl.where(logit == INFINITY, float("nan"), logit)  # as in `statistics`
    logit = tl.where(target == ABSENT, -INFINITY, logit)
    logprob, entropy, hi, lo, power = combine_sums(
        row, ids, count, vocab, target, logit, base, base_lo, sum_others, weighted_others, scale, scale_error, tanh_hi,
        tanh_lo, LANES, GATHERED,
    )  # fmt: skip
    nothing = (target == ABSENT) & (hi == -INFINITY)  # of this row on this rank
    return tl.where(nothing, -INFINITY, logprob), tl.where(nothing, 0.0, entropy), hi, lo, power


@triton.jit
def _logit_of_entry(row, ids, count, vocab, target, BLOCK: tl.constexpr, GATHERED: tl.constexpr):
    """The logit of the entry that is the target; 0 without one."""
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        id = load_ids(ids, at, count)
        x = load_entries(row, id, at, vocab, GATHERED)
        found += tl.where((id == target) & (id != ABSENT), x, 0.0)
    return tl.sum(found, 0)


@triton.jit
def _gradient_by_entry(row, ids, count, vocab, target, by_entry, g_logprob, g_entropy, g_lse, logprob, entropy, lse_hi,
                       lse_lo, power, scale, scale_error, tanh_hi, tanh_lo, SLOPE: tl.constexpr, BLOCK: tl.constexpr,
                       GATHERED: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Writes the gradient of each entry's logit into `by_entry`; 0 where the id is ABSENT."""
    DTYPE: tl.constexpr = by_entry.dtype.element_ty
    base, constant, slope, at_target = coefficients(
        g_logprob, g_entropy, g_lse, logprob, entropy, lse_hi, lse_lo, scale
    )
    pivot, steep = 0.0, scale
    if tanh_hi is not None:
        logit = _logit_of_entry(row, ids, count, vocab, target, BLOCK, GATHERED)
        base, constant, slope, at_target, steep, pivot = cap_coefficients(
            base, constant, slope, at_target, entropy, lse_hi, lse_lo, scale, logit, tanh_hi, tanh_lo, PTX
        )
    far = is_far(lse_hi, power, tanh_hi)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        id = load_ids(ids, at, count)
        x = load_entries(row, id, at, vocab, GATHERED)
        is_target = id == target
        if far:
            largest_logit = largest_logit_of(lse_hi, lse_lo, power, entropy, scale, scale_error)
            a, b, c, d = far_values(g_logprob, g_entropy, g_lse, entropy, scale)
            g = far_gradient(x == largest_logit, is_target, a, b, c, d)
        else:
            x = within_cap(x, tanh_hi)
            g = gradient_of(x, base, constant, slope, steep, pivot, tanh_hi, tanh_lo, SLOPE, PTX, tl.float32)
            g = tl.where(is_target, at_target, g)
        g = narrow(tl.where(id == ABSENT, 0.0, g), DTYPE)
        tl.store(by_entry + at, g, mask=at < count)


@triton.jit
def _write_row(row, by_entry, ids, count, vocab, ZEROS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a row's gradient: zeros, then its entries.

    The first barrier is for logits that lie under the gradient, the second for columns that are written twice.
    """
    tl.debug_barrier()
    write_zeros(row, vocab, ZEROS, WIDTH)
    tl.debug_barrier()
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        id = load_ids(ids, at, count)
        tl.store(row + id, tl.load(by_entry + at, mask=at < count, other=0), mask=is_column(id, vocab, False))


@triton.jit
def _without_gradient(row, count, vocab, ZEROS: tl.constexpr, WIDTH: tl.constexpr, GATHERED: tl.constexpr):
    """Writes zeros: the whole row, or those of its entries."""
    if GATHERED:
        write_zeros(row, count, ZEROS, WIDTH)
    else:
        write_zeros(row, vocab, ZEROS, WIDTH)


@triton.jit
def _row_of(data, begin, row, inner, outer_stride, inner_stride, GATHERED: tl.constexpr):
    """Address of a row, gathered: of its first entry."""
    if GATHERED:
        return data + begin
    else:
        return row_pointer(data, row, inner, outer_stride, inner_stride)


@triton.jit
def _keeps_all(count, FORM: tl.constexpr):
    if FORM == "some":
        return count == 0
    else:
        return False


@row_kernel()
def kept_forward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    logprobs, entropies, lses, kept_ids, kept_offsets, entries: tl.int64,
    REPEAT: tl.constexpr, LANES: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Statistics of each row's entries; zeros where masked. FORM: see `KeptForm`.

    Rows without entries: "some" leaves them to `forward_kernel`, otherwise they are NaN.
    """
    GATHERED: tl.constexpr = FORM == "gathered"
    row = tl.program_id(0)
    begin, count = entries_of(kept_offsets, row, entries)
    if _keeps_all(count, FORM):
        return
    active = is_active(mask, row)
    if active:
        pointer = _row_of(logits, begin, row, inner, outer_stride, inner_stride, GATHERED)
        s, error = scale_of(row, temperature, scale, scale_error)
        target = kept_target(token_ids, row)
        logprob, h, hi, lo, power = _statistics_of_entries(
            pointer, kept_ids + begin, count, vocab, target, s, error, tanh_hi, tanh_lo, REPEAT, LANES, GATHERED, PTX
        )
        store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
    else:
        zero = tl.zeros((), tl.float32)
        store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)


@row_kernel()
def kept_backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    logprobs, entropies, lses, g_logprobs, g_entropies, g_lses, factor, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64, kept_ids, kept_offsets,
    entries: tl.int64, by_entry,
    LANES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Gradient of each row from those of its statistics. Reads its entries; writes the row, or gathered the entries.

    `by_entry`: [entries] of the gradient's dtype; gathered, it is the gradient.
    """
    GATHERED: tl.constexpr = FORM == "gathered"
    row = tl.num_programs(0) - 1 - tl.program_id(0)
    begin, count = entries_of(kept_offsets, row, entries)
    if _keeps_all(count, FORM):
        return
    destination = _row_of(gradient, begin, row, inner, gradient_outer_stride, gradient_inner_stride, GATHERED)
    common = common_factor(factor, counts, counts_size)
    g_logprob = upstream_of(g_logprobs, row, common)
    g_entropy = upstream_of(g_entropies, row, common)
    g_lse = upstream_of(g_lses, row, common)
    some = (g_logprob != 0.0) | (g_entropy != 0.0) | (g_lse != 0.0)
    if is_active(mask, row) & some:
        source = _row_of(logits, begin, row, inner, outer_stride, inner_stride, GATHERED)
        s, error = scale_of(row, temperature, scale, scale_error)
        hi, lo, power = saved_lse(tl.load(lses + row))
        _gradient_by_entry(
            source, kept_ids + begin, count, vocab, kept_target(token_ids, row), by_entry + begin, g_logprob, g_entropy,
            g_lse, tl.load(logprobs + row), tl.load(entropies + row), hi, lo, power, s, error, tanh_hi, tanh_lo,
            g_entropies is not None, LANES, GATHERED, PTX,
        )  # fmt: skip
        if not GATHERED:
            _write_row(destination, by_entry + begin, kept_ids + begin, count, vocab, BLOCK, LANES, WIDTH)
    else:
        _without_gradient(destination, count, vocab, BLOCK, WIDTH, GATHERED)


@row_kernel()
def kept_forward_backward_kernel(
    logits, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32,
    token_ids, mask, temperature, scale, scale_error, tanh_hi, tanh_lo,
    logprobs, entropies, lses, g_logprobs, counts, counts_size: tl.int32,
    gradient, gradient_outer_stride: tl.int64, gradient_inner_stride: tl.int64, kept_ids, kept_offsets,
    entries: tl.int64, by_entry,
    REPEAT: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Both at once, for a gradient by the log-probability that is known in advance."""
    GATHERED: tl.constexpr = FORM == "gathered"
    row = tl.program_id(0)
    begin, count = entries_of(kept_offsets, row, entries)
    if _keeps_all(count, FORM):
        return
    destination = _row_of(gradient, begin, row, inner, gradient_outer_stride, gradient_inner_stride, GATHERED)
    active = is_active(mask, row)
    if active:
        source = _row_of(logits, begin, row, inner, outer_stride, inner_stride, GATHERED)
        g_logprob = upstream_of(g_logprobs, row, common_factor(None, counts, counts_size))
        s, error = scale_of(row, temperature, scale, scale_error)
        target = kept_target(token_ids, row)
        logprob, h, hi, lo, power = _statistics_of_entries(
            source, kept_ids + begin, count, vocab, target, s, error, tanh_hi, tanh_lo, REPEAT, LANES, GATHERED, PTX
        )
        store_statistics(row, logprob, h, hi, lo, power, logprobs, entropies, lses)
        if g_logprob != 0.0:
            _gradient_by_entry(
                source, kept_ids + begin, count, vocab, target, by_entry + begin, g_logprob, 0.0, 0.0, logprob, h, hi,
                lo, power, s, error, tanh_hi, tanh_lo, False, LANES, GATHERED, PTX,
            )  # fmt: skip
            if not GATHERED:
                _write_row(destination, by_entry + begin, kept_ids + begin, count, vocab, BLOCK, LANES, WIDTH)
        else:
            _without_gradient(destination, count, vocab, BLOCK, WIDTH, GATHERED)
    else:
        zero = tl.zeros((), tl.float32)
        store_statistics(row, zero, zero, zero, zero, zero, logprobs, entropies, lses)
        _without_gradient(destination, count, vocab, BLOCK, WIDTH, GATHERED)
