"""The kernels of `triton_sparse.py`: sums over D for each entry, over a row's entries, over the entries of an id."""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..rows.triton_columns import ABSENT
from ..rows.triton_math import INFINITY, narrow

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Arguments that vary from call to call do not trigger recompilation.
_VARIES = [
    "entries", "hidden_rows", "weight_rows", "out_rows", "hidden_stride", "weight_stride", "out_stride", "depth",
]  # fmt: skip
_ANY_ADDRESS = [
    "ids", "offsets", "rows", "active", "gradient", "hidden", "weight", "order", "destination", "out",
]  # fmt: skip
_kernel = functools.partial(triton.jit, do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANY_ADDRESS)


@triton.jit
def _load(data, stride, rows, there, column, depth, ALIGNED: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """float32 of columns of some rows, rounded to DTYPE first; 0 where a row is not `there`, and past the end."""
    READ: tl.constexpr = data.dtype.element_ty
    BITS: tl.constexpr = WIDTH * READ.primitive_bitwidth
    BYTES: tl.constexpr = 16 if BITS > 128 else BITS // 8  # Triton 3.4 has no `min` of constants
    here = data + (rows.to(tl.int64) * stride)[:, None] + column[None, :]
    inside = column < depth
    if ALIGNED:
        here = tl.max_contiguous(tl.multiple_of(here, [1, BYTES]), [1, WIDTH])
        inside = column // WIDTH * WIDTH < depth
    x = tl.load(here, mask=there[:, None] & inside[None, :], other=0)
    if DTYPE.primitive_bitwidth < 32 and READ != DTYPE:  # also from one dtype of 16 bits to the other
        return narrow(x.to(tl.float32), DTYPE).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def _store(data, stride, row, column, depth, values, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    BITS: tl.constexpr = WIDTH * data.dtype.element_ty.primitive_bitwidth
    BYTES: tl.constexpr = 16 if BITS > 128 else BITS // 8
    here = data + row.to(tl.int64) * stride + column
    inside = column < depth
    if ALIGNED:
        here = tl.max_contiguous(tl.multiple_of(here, BYTES), WIDTH)
        inside = column // WIDTH * WIDTH < depth
    tl.store(here, narrow(values, data.dtype.element_ty), mask=inside)


@triton.jit
def _is_active(active, rows, there):
    """Which of these rows are active; False where not `there`."""
    if active is None:
        return there
    else:
        return tl.load(active + rows, mask=there, other=0) != 0


@_kernel()
def kept_logits_kernel(
    hidden, hidden_stride: tl.int64, hidden_rows: tl.int64, weight, weight_stride: tl.int64, weight_rows: tl.int64,
    ids, rows, active, entries: tl.int64, out, depth: tl.int32,
    ADD: tl.constexpr, ALIGNED: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Logits of ENTRIES entries. Those of one row read the same hidden states, which are then in the L1 cache."""
    LANES: tl.constexpr = BLOCK // WIDTH
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    mine = at < entries
    id = tl.load(ids + at, mask=mine, other=ABSENT)
    row = tl.load(rows + at, mask=mine, other=0)
    known = (id >= 0) & (id < weight_rows) & (row >= 0) & (row < hidden_rows)
    on = _is_active(active, row, mine & (row >= 0) & (row < hidden_rows))
    there = known & on
    total = tl.zeros([ENTRIES, LANES], tl.float32)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        w = _load(weight, weight_stride, id, there, column, depth, ALIGNED, WIDTH, DTYPE)
        h = _load(hidden, hidden_stride, row, there, column, depth, ALIGNED, WIDTH, DTYPE)
        total += tl.sum(tl.reshape(w * h, [ENTRIES, LANES, WIDTH]), 2)
    x = tl.sum(total, 1)
    if ADD:
        x += tl.load(out + at, mask=mine, other=0.0)
    x = tl.where(known, x, tl.where(id == ABSENT, -INFINITY, float("nan")))
    tl.store(out + at, tl.where(on, x, 0.0), mask=mine)


@_kernel()
def hidden_gradient_kernel(
    gradient, weight, weight_stride: tl.int64, weight_rows: tl.int64, ids, offsets, active, entries: tl.int64,
    out, out_stride: tl.int64, depth: tl.int32,
    ALIGNED: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row's gradient: the sum over its entries, ENTRIES at a time."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.minimum(tl.maximum(tl.load(offsets + row), 0), entries)
    end = tl.minimum(tl.load(offsets + row + 1), entries)
    if active is not None:
        end = tl.where(tl.load(active + row) != 0, end, begin)
    total = tl.zeros([BLOCK], tl.float32)
    at = begin + tl.arange(0, ENTRIES)
    next_id = tl.load(ids + at, mask=at < end, other=ABSENT)
    next_g = tl.load(gradient + at, mask=at < end, other=0.0)
    for _ in range(begin, end, ENTRIES):
        id, g = next_id, next_g
        at += ENTRIES  # the next ones are loaded while rows of the head are on their way
        next_id = tl.load(ids + at, mask=at < end, other=ABSENT)
        next_g = tl.load(gradient + at, mask=at < end, other=0.0)
        there = (id >= 0) & (id < weight_rows) & (g != 0.0)
        w = _load(weight, weight_stride, id, there, column, depth, ALIGNED, WIDTH, DTYPE)
        total += tl.sum(tl.where(there, g, 0.0)[:, None] * w, 0)
    _store(out, out_stride, row, column, depth, total, ALIGNED, WIDTH)


@triton.jit
def _entries_of_id(order, ids, at, entries, id):
    """The entries at these places of the order, and which of them have this id."""
    e = tl.load(order + at, mask=at < entries, other=0)
    return e, (at < entries) & (tl.load(ids + e) == id)


@_kernel()
def weight_gradient_kernel(
    gradient, hidden, hidden_stride: tl.int64, hidden_rows: tl.int64, ids, rows, active, entries: tl.int64, order,
    destination, out, out_stride: tl.int64, out_rows: tl.int64, depth: tl.int32,
    ALIGNED: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of the gradient of a row of the head: the sum over the entries that have its id, in their order."""
    start = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + tl.load(order + start))
    before = tl.load(ids + tl.load(order + tl.maximum(start - 1, 0)))
    to = tl.load(destination + start)
    if (id < 0) | ((start > 0) & (before == id)) | (to < 0) | (to >= out_rows):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    at = start + tl.arange(0, ENTRIES)
    e, same = _entries_of_id(order, ids, at, entries, id)
    more = start >= 0
    while more:
        at += ENTRIES  # the next ones are looked up while hidden states of these are on their way
        next_e, next_same = _entries_of_id(order, ids, at, entries, id)
        row = tl.load(rows + e, mask=same, other=-1)
        g = tl.load(gradient + e, mask=same, other=0.0)
        there = (g != 0.0) & (row >= 0) & (row < hidden_rows)
        there = _is_active(active, row, there)
        h = _load(hidden, hidden_stride, row, there, column, depth, ALIGNED, WIDTH, DTYPE)
        total += tl.sum(tl.where(there, g, 0.0)[:, None] * h, 0)
        more = tl.max(next_same.to(tl.int32), 0) != 0
        e, same = next_e, next_same
    _store(out, out_stride, to, column, depth, total, ALIGNED, WIDTH)
