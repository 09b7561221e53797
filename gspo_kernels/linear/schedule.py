"""In which order rows meet the head, so that few products are computed and one chunk of logits is ever held.

A row's logits are wanted twice: for its statistics, and for its gradient once the coefficient of the row is known. How
much must be seen before a coefficient is known decides what that costs, in multiplications of N x D x V:

    at_once      coefficients known while the chunk's logits lie there: 2 forward, 4 backward on the active rows
    unscaled     the head wants no gradient: 2 forward, 2 backward; a row's gradient gets its coefficient afterwards
    two_phases   2 forward, then 2 again for the logits and 4 backward, both on the active rows
    statistics   no gradient is wanted: 2 forward
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import checks

_ROUND = 64  # rows, and on a GPU columns: products run best on such multiples


class Step(NamedTuple):
    """Rows [start, stop), those of sequences [first, last) or of parts of them."""

    way: str  # see above
    start: int
    stop: int
    first: int
    last: int


class ChunkRows(NamedTuple):
    """How many rows of logits are brought in at a time."""

    most: int  # a sequence that has more is not seen as a whole
    usual: int  # as long as no sequence has more


def plan(
    lengths: Sequence[int], rows: ChunkRows, *, together: str, gradient: bool = True, unscaled: bool = False
) -> list[Step]:
    """Steps for sequences of `lengths` rows, one after the other, some `rows` of logits at a time.

    Args:
        together: what must have been seen before a coefficient is known: nothing but the row ("token"), its
            "sequence", or the whole "batch".
        gradient: whether one is wanted.
        unscaled: whether a gradient may get its coefficients afterwards.
    """
    total = sum(lengths)
    if not gradient or together == "token":
        way = "at_once" if gradient else "statistics"
        groups = [(way, start, stop) for start, stop in pieces(0, total, rows.usual)]
    else:
        groups = []
        for start, stop in _groups(lengths if together == "sequence" else [total], rows.usual):
            fits = stop - start <= rows.most
            groups.append(("at_once" if fits else "unscaled" if unscaled else "two_phases", start, stop))
    return list(_with_sequences(groups, lengths))


def pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in equal parts of at most `most`."""
    count = -(-(stop - start) // most)
    size = 0 if count == 0 else -(-(stop - start) // count)
    if most >= _ROUND:
        size = min(-(-size // _ROUND) * _ROUND, most)
    while start < stop:
        yield start, min(start + size, stop)
        start += size


def row_stride(vocab: int, device: str) -> int:
    """Columns from one row of a chunk to the next: on a GPU every row begins where products and kernels like it."""
    return -(-vocab // _ROUND) * _ROUND if device == "cuda" else vocab


def rows_per_chunk(
    chunk_bytes: int | None, vocab: int, itemsize: int, device: str, usual: int, keeps: bool = False
) -> ChunkRows:
    """How many rows of logits `chunk_bytes` hold; None: `usual` bytes. Raises ValueError where that is none.

    `keeps`: gradients of logits take half their memory and stay there, until the next rows leave no more room.
    """
    a_row = row_stride(vocab, device) * itemsize
    if chunk_bytes is None:
        chunk_bytes = max(usual, a_row)
    elif (chunk_bytes := checks.whole("chunk_bytes", chunk_bytes, "the memory for logits")) < a_row:
        raise ValueError(
            f"chunk_bytes: expected at least {a_row}, one row of {vocab} logits in {itemsize * 8}-bit floats; "
            f"got {chunk_bytes}"
        )
    most = _round_down(chunk_bytes // a_row)
    # two chunks: the gradients of the first, at half their size, beside the logits of the second
    return ChunkRows(most, max(1, _round_down(most * 2 // 3)) if keeps else most)


def _round_down(rows: int) -> int:
    return rows // _ROUND * _ROUND if rows >= _ROUND else rows


def _groups(lengths: Sequence[int], usual: int) -> Iterator[tuple[int, int]]:
    """Neighbours of `usual` rows together; one that has more stands alone."""
    start = stop = 0
    for length in lengths:
        if stop + length - start > usual:
            if stop > start:
                yield start, stop
            start = stop
        stop += length
    if stop > start:
        yield start, stop


def _with_sequences(groups: Sequence[tuple[str, int, int]], lengths: Sequence[int]) -> Iterator[Step]:
    """The sequences of each group: the first one that ends behind its start, to the last that begins before its end."""
    first = begin = 0  # sequence `first` begins at row `begin`
    for way, start, stop in groups:
        while begin + lengths[first] <= start:
            begin += lengths[first]
            first += 1
        last, end = first, begin
        while end < stop:
            end += lengths[last]
            last += 1
        yield Step(way, start, stop, first, last)
