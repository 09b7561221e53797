"""The order in which rows are multiplied by the head, so that few products are computed and one chunk of logits exists.

A row's logits are needed twice: for its statistics, and for its gradient, which needs the row's coefficient
(dL/d of its statistics). How many other rows a coefficient depends on decides the cost, in multiplications of
N x D x V:

    single_pass     the coefficients are known while the chunk's logits exist: 2 forward, 4 backward on the active rows
    deferred_scale  the head needs no gradient: 2 forward, 2 backward with coefficients of 1; the gradients of the
                    hidden states are multiplied by the coefficients afterwards
    recompute       2 forward, then 2 to compute the logits of the active rows again, and 4 backward on them
    statistics      no gradient is needed: 2 forward

With a frozen weight, 4 backward are 2. The head includes a low-rank term, whose r columns count for little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..base import checks
from .products import PRODUCT_ROWS, default_chunk_bytes, gradients_are_half_width, sum_dtype

_ROUND = 64  # rows, and on a GPU columns: products are fastest at multiples of it


class Step(NamedTuple):
    """Rows [start, stop), which belong to sequences [first, last)."""

    mode: str  # see above
    start: int
    stop: int
    first: int
    last: int


class ChunkSize(NamedTuple):
    """How many rows of logits are computed at a time."""

    max_rows: int  # a sequence with more rows does not fit into a chunk
    default_rows: int  # for everything but one sequence that needs more
    multiple: int = _ROUND  # a chunk is a multiple of it, unless it is smaller

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """[start, stop) in chunks of almost equal size."""
        return even_parts(start, stop, self.default_rows, self.multiple)


def plan(
    lengths: Sequence[int],
    chunk: ChunkSize,
    *,
    depends_on: str,
    gradient: bool = True,
    deferred_scale: bool = False,
) -> list[Step]:
    """Steps over sequences of `lengths` rows, which lie one after the other.

    Args:
        depends_on: what a coefficient depends on: its own row ("token"), its "sequence", or the whole "batch".
        gradient: whether any operand needs a gradient.
        deferred_scale: whether gradients may be multiplied by their coefficients afterwards.
    """
    total = sum(lengths)
    if not gradient or depends_on == "token":
        mode = "single_pass" if gradient else "statistics"
        ranges = [(mode, start, stop) for start, stop in chunk.parts(0, total)]
    else:
        ranges = []
        for start, stop in _groups(lengths if depends_on == "sequence" else [total], chunk.default_rows):
            fits = stop - start <= chunk.max_rows
            too_long = "deferred_scale" if deferred_scale else "recompute"
            ranges.append(("single_pass" if fits else too_long, start, stop))
    return list(_with_sequences(ranges, lengths))


def even_parts(start: int, stop: int, most: int, multiple: int = _ROUND) -> Iterator[tuple[int, int]]:
    """[start, stop) in equal parts of at most `most`; parts are rounded up to the multiple if `most` reaches it."""
    count = -(-(stop - start) // most)
    size = 0 if count == 0 else -(-(stop - start) // count)
    if most >= multiple:
        size = min(-(-size // multiple) * multiple, most)
    while start < stop:
        yield start, min(start + size, stop)
        start += size


def row_stride(vocab: int, device: str) -> int:
    """Columns from one row of a chunk to the next. On a GPU it is a multiple of 64, which aligns every row."""
    return -(-vocab // _ROUND) * _ROUND if device == "cuda" else vocab


def chunk_size(chunk_bytes: int | None, vocab: int, dtype: torch.dtype, device: str, gradient: bool) -> ChunkSize:
    """How many rows of logits fit into `chunk_bytes`. Raises ValueError if not one does.

    Args:
        chunk_bytes: None: `default_chunk_bytes`. On a GPU the buffer for logits never has fewer rows than one product,
            `PRODUCT_ROWS`; smaller chunks take the same memory, and more time.
        dtype: of the operands of the products.
        gradient: whether any operand needs a gradient.
    """
    itemsize = sum_dtype(dtype).itemsize
    row_bytes = row_stride(vocab, device) * itemsize
    if chunk_bytes is None:
        least = row_bytes * PRODUCT_ROWS.get(device, 1)
        chunk_bytes = max(default_chunk_bytes(device, dtype, gradient), least)
    elif (chunk_bytes := checks.whole("chunk_bytes", chunk_bytes, "the memory for logits")) < row_bytes:
        raise ValueError(
            f"chunk_bytes: expected at least {row_bytes}, one row of {vocab} logits in {itemsize * 8}-bit floats; "
            f"got {chunk_bytes}"
        )
    multiple = PRODUCT_ROWS.get(device, _ROUND)
    rows = _round_down(chunk_bytes // row_bytes, multiple)
    if gradient and gradients_are_half_width(device, dtype):
        # Two chunks: the gradients of the first, at half the width of logits, stay beside the logits of the second.
        return ChunkSize(rows, max(1, _round_down(rows * 2 // 3, multiple)))
    return ChunkSize(rows, rows, multiple)


def _round_down(rows: int, multiple: int) -> int:
    return rows // multiple * multiple if rows >= multiple else rows


def _groups(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole sequences with at most `most` rows; a longer sequence has a range to itself."""
    start = stop = 0
    for length in lengths:
        if stop + length - start > most:
            if stop > start:
                yield start, stop
            start = stop
        stop += length
    if stop > start:
        yield start, stop


def _with_sequences(ranges: Sequence[tuple[str, int, int]], lengths: Sequence[int]) -> Iterator[Step]:
    """Adds to each range its sequences: the first that ends after its start, to the last that begins before its end."""
    first = begin = 0  # sequence `first` begins at row `begin`
    for mode, start, stop in ranges:
        while begin + lengths[first] <= start:
            begin += lengths[first]
            first += 1
        last, end = first, begin
        while end < stop:
            end += lengths[last]
            last += 1
        yield Step(mode, start, stop, first, last)
