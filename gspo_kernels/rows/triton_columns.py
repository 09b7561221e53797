"""Addresses of a row's columns, and how the Triton kernels load them. One program per row.

A row may start at any address and have any length. It is read in blocks of [REPEAT, LANES, WIDTH] columns: WIDTH
columns are one 16-byte access, each thread is a lane and holds REPEAT such accesses in registers.

Which columns a lane sums depends on their numbers alone: the same row gives the same bits at every address. Where a row
does not start on a 16-byte boundary, a thread takes its columns out of two aligned accesses (on NVIDIA; elsewhere it
reads them one by one). Columns of a gradient are independent, so there blocks begin where accesses are aligned.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import functools

import triton
import triton.language as tl

from .triton_math import INFINITY, LN2_HI, LOG2E_HI, LOG2E_LO, fma, join_columns, quotient


@triton.jit
def row_pointer(data, row, inner, outer_stride, inner_stride):
    """Address of a row of [outer, inner, vocab] data. In 64 bits: there may be more than 2^31 elements."""
    outer = row // inner
    return data + (outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride)


@triton.jit
def columns_before_boundary(pointer, vocab, WIDTH: tl.constexpr):
    """Columns of the head: those before the first 16-byte boundary."""
    bytes_before = (16 - pointer.to(tl.int64) % 16) % 16
    return tl.minimum((bytes_before // (16 // WIDTH)).to(tl.int32), vocab)


@triton.jit
def column_pointers(pointer, at, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses of the columns `at` from `pointer`, a block of whole 16-byte accesses if ALIGNED.

    Alignment hints must be attached to the sum itself; Triton drops them from arguments.
    """
    here = pointer + at
    if ALIGNED:
        here = tl.max_contiguous(tl.multiple_of(here, 16), WIDTH)
    return here


@triton.jit
def block_pointers(pointer, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """Addresses of the block that starts at `pointer`, on a 16-byte boundary. `widen` takes what is loaded there."""
    if PTX and pointer.dtype.element_ty.primitive_bitwidth == 16:
        return column_pointers(pointer.to(tl.pointer_type(tl.int32)), tl.arange(0, BLOCK // 2), WIDTH // 2, True)
    else:
        return column_pointers(pointer, tl.arange(0, BLOCK), WIDTH, True)


@triton.jit
def block_start(i, hole, BLOCK: tl.constexpr):
    """First column of the i-th whole block, not counting block `hole`."""
    return (i + (i >= hole).to(tl.int32)) * BLOCK


@triton.jit
def phase_of(row, WIDTH: tl.constexpr):
    """Columns between the last 16-byte boundary and the row's first column."""
    return (row.to(tl.int64) % 16 // (16 // WIDTH)).to(tl.int32)


@triton.jit
def first_block(row, vocab, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr):
    """The first block of a row on a 16-byte boundary, if it is whole. Its load depends on no other load."""
    here = block_pointers(row - phase_of(row, WIDTH), BLOCK, WIDTH, PTX)
    return tl.load(here, mask=tl.full(here.shape, BLOCK, tl.int32) <= vocab)


@triton.jit
def load_columns(row, phase, start, vocab, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SHIFTED: tl.constexpr,
                 WIDTH: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """A block from column `start` of a row that begins `phase` columns after a 16-byte boundary, as `widen` takes it.

    If not WHOLE, columns past the row's end have undefined values. Every 16-byte access contains a column of the row.
    """
    if SHIFTED and not PTX:
        at = tl.arange(0, BLOCK)
        if WHOLE:
            return tl.load(row + start + at)
        else:
            return tl.load(row + start + at, mask=start + at < vocab, other=0)
    else:
        low = block_pointers(row - phase + start, BLOCK, WIDTH, PTX)
        high = block_pointers(row - phase + start + WIDTH, BLOCK, WIDTH, PTX)
        if WHOLE:
            x = tl.load(low)
            if SHIFTED:
                x = join_columns(x, tl.load(high), phase, PTX)
        else:
            left = vocab + phase - start  # columns from the boundary on
            ITEMS: tl.constexpr = BLOCK // low.shape[0]  # columns per loaded item
            group = tl.arange(0, BLOCK // ITEMS) // (WIDTH // ITEMS) * WIDTH
            x = tl.load(low, mask=group < left, other=0)
            if SHIFTED:
                y = tl.load(high, mask=group + WIDTH < left, other=0)
                x = join_columns(x, y, phase, PTX)
        return x


@triton.jit
def edges(head, body, vocab, WIDTH: tl.constexpr):
    """(columns, which of them exist) of head and tail, each shorter than WIDTH."""
    at = tl.arange(0, 2 * WIDTH)
    column = tl.where(at < WIDTH, at, head + body + at - WIDTH)
    return column, column < tl.where(at < WIDTH, head, vocab)


@triton.jit
def scale_of(row, temperature, scale, scale_error):
    """(log2(e) / temperature of a row, its relative error): the arguments, or from the array of temperatures."""
    if temperature is None:
        return scale, scale_error
    else:
        t = tl.load(temperature + row)
        s = quotient(t * 0.0 + LOG2E_HI, t) + LOG2E_LO / t
        return s, (fma(-s, t, t * 0.0 + LOG2E_HI) + LOG2E_LO) * LN2_HI


@triton.jit
def is_active(mask, row):
    if mask is None:
        return True
    else:
        return tl.load(mask + row) != 0


# ---- rows that keep some columns

ABSENT = tl.constexpr(-(1 << 31))  # as in types.py


@triton.jit
def entries_of(kept_offsets, row, entries):
    """(Where a row's entries begin, how many there are), never outside of all `entries`."""
    begin = tl.minimum(tl.maximum(tl.load(kept_offsets + row), 0), entries)
    end = tl.minimum(tl.load(kept_offsets + row + 1), entries)
    return begin, tl.minimum(tl.maximum(end - begin, 0), 0x7FFF0000).to(tl.int32)


@triton.jit
def has_entries(kept_offsets, row, entries):
    if kept_offsets is None:
        return False
    else:
        _, count = entries_of(kept_offsets, row, entries)
        return count > 0


@triton.jit
def kept_target(token_ids, row):
    """The id to find among a row's entries; -1 if there can be none."""
    token = tl.load(token_ids + row)
    return tl.where((token >= 0) & (token <= 0x7FFFFFFF) | (token == ABSENT), token, -1).to(tl.int32)


@triton.jit
def load_ids(ids, at, count):
    return tl.load(ids + at, mask=at < count, other=ABSENT)


@triton.jit
def is_column(id, vocab, GATHERED: tl.constexpr):
    """Whether the logit of an id may be read."""
    if GATHERED:
        return id >= 0
    else:
        return (id >= 0) & (id < vocab)


@triton.jit
def load_entries(row, id, at, vocab, GATHERED: tl.constexpr):
    """float32 logits of the entries `at`: -inf where the id is ABSENT, NaN where it is no column."""
    column = at if GATHERED else id
    x = tl.load(row + column, mask=is_column(id, vocab, GATHERED), other=float("nan")).to(tl.float32)
    return tl.where(id == ABSENT, -INFINITY, x)


# Arguments that vary from call to call do not trigger recompilation. Integers have declared types: otherwise Triton
# chooses 32 or 64 bits by the value, and a stride of 2^31 or more compiles another kernel.

_VARIES = [
    "outer_stride", "inner_stride", "inner", "vocab", "counts_size", "scale", "scale_error", "tanh_hi", "tanh_lo",
    "gradient_outer_stride", "gradient_inner_stride", "rows", "sequences", "entries",
]  # fmt: skip
_ANY_ADDRESS = [
    "logits", "token_ids", "mask", "temperature", "row_indices", "logprobs", "entropies", "lses", "g_logprobs",
    "g_entropies", "g_lses", "factor", "counts", "gradient", "values", "loss", "numbers", "cu_seqlens", "kept_ids",
    "kept_offsets", "by_entry",
]  # fmt: skip
row_kernel = functools.partial(triton.jit, do_not_specialize=_VARIES, do_not_specialize_on_alignment=_ANY_ADDRESS)
