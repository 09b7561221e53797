"""Multiplies a gradient in place, and sets rows of it to NaN, in Triton."""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import triton
import triton.language as tl

from .triton_columns import column_pointers, columns_before_boundary, edges, is_active, row_kernel, row_pointer
from .triton_math import TINY, narrow


@row_kernel()
def scale_kernel(
    values, outer_stride: tl.int64, inner_stride: tl.int64, inner: tl.int32, vocab: tl.int32, rows: tl.int32, factor,
    loss, numbers, mask, cu_seqlens, sequences: tl.int32,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Multiplies rows in place by `factor[0]`; a factor of exactly 1 writes nothing. A program scales several rows.

    If there is a `loss` and it is NaN, an active row whose `numbers` are NaN becomes NaN. If WHOLE, NaN propagates to
    all active rows of its sequence: `inner` rows or, with `cu_seqlens`, the rows between two boundaries.
    """
    DTYPE: tl.constexpr = values.dtype.element_ty
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            pointer = row_pointer(values, row, inner, outer_stride, inner_stride)
            head = columns_before_boundary(pointer, vocab, WIDTH)
            body = (vocab - head) // WIDTH * WIDTH
            at = tl.arange(0, BLOCK)
            for start in range(0, body, BLOCK):
                there = at // WIDTH * WIDTH < body - start
                here = column_pointers(pointer + head + start, at, WIDTH, True)
                tl.store(here, narrow(_times(tl.load(here, mask=there, other=0), by), DTYPE), mask=there)
            column, there = edges(head, body, vocab, WIDTH)
            here = pointer + column
            tl.store(here, narrow(_times(tl.load(here, mask=there, other=0), by), DTYPE), mask=there)
    if loss is not None:
        its_loss = tl.load(loss)
        if its_loss != its_loss:
            for row in range(tl.program_id(0), rows, tl.num_programs(0)):
                begin, end = row, row + 1
                if WHOLE:
                    begin, end = _sequence_of(row, inner, cu_seqlens, sequences, rows)
                if is_active(mask, row) & _some_nan(numbers, begin, end):
                    pointer = row_pointer(values, row, inner, outer_stride, inner_stride)
                    column = tl.arange(0, 128)
                    for start in range(0, vocab, 128):
                        nan = tl.full([128], float("nan"), tl.float32).to(DTYPE)
                        tl.store(pointer + start + column, nan, mask=start + column < vocab)


@triton.jit
def _sequence_of(row, inner, cu_seqlens, sequences, rows):
    """First row of a row's sequence, and the row after its last one; never outside of the `rows`."""
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


@triton.jit
def _times(x, by):
    """x by in float32, subnormals as zero."""
    y = x.to(tl.float32) * by
    return tl.where(tl.abs(y) < TINY, 0.0, y)
