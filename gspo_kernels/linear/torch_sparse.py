"""The three products of a sparse head in plain torch, for any device, dtype and strides: fallback and reference.

A sparse head multiplies a row of hidden states by a few rows of the head, its entries (`Entries`). Operands are
gathered one block at a time, so memory is one block whatever the number of entries. Products are exact and sums are
taken in the dtype of the gradients. Each sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..rows.types import ABSENT
from .products import sum_dtype
from .types import Entries

_BLOCK_BYTES = 4 << 20
_MIN_COLUMNS = 16


def kept_logits(hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor, add: bool) -> None:
    """The logit of each entry -> `out` [E], or added to it.

    An entry of another rank has -inf, one of a row that is not active 0, and an id outside of the weight NaN.
    """
    step = max(1, _BLOCK_BYTES // (hidden.shape[1] * out.itemsize))
    for start in range(0, len(out), step):
        block = slice(start, start + step)
        ids, rows = entries.ids[block].long(), entries.rows[block]
        of_rows, of_columns = (_gathered(x, i, dtype) for x, i in ((hidden, rows), (weight, ids)))
        logits = (of_rows * of_columns).sum(-1)
        logits = out[block] + logits if add else logits
        logits = torch.where(_inside(ids, weight), logits, torch.where(ids == ABSENT, -torch.inf, torch.nan))
        if entries.active is not None:
            logits = torch.where(entries.active[rows], logits, 0.0)
        out[block] = logits


def hidden_gradient(gradient: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor) -> None:
    """The sum of gradient times weight over each row's entries -> `out` [N, D], rounded once.

    Entries whose gradient is 0 are skipped: their part of the weight may be NaN.
    """
    has_gradient = (gradient != 0) & _inside(entries.ids, weight)
    for columns in _column_blocks(out, len(gradient)):
        of_columns = _gathered(weight[:, columns], entries.ids, dtype)
        terms = torch.where(has_gradient[:, None], gradient[:, None] * of_columns, 0.0)
        sums = terms.new_zeros(len(out), terms.shape[1])
        _add_rows(sums, entries.rows, terms)
        out[:, columns] = sums.to(out.dtype)


def weight_gradient(
    gradient: Tensor,
    hidden: Tensor,
    entries: Entries,
    order: Tensor,
    destination: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """The sum of gradient times hidden states over the entries of each column -> rows of `out`, rounded once.

    Entries whose gradient is 0 are skipped: their hidden states may be NaN.

    Args:
        order: int64 [E], the entries sorted by id, in the order of the entries where ids are equal.
        destination: int64 [E]: the entries of a column are a run of the sorted entries. Where a run begins, the row of
            `out` that its sum is written to.
        out: [any, D], zeros.
    """
    if not len(gradient) or not len(out):
        return
    ids, rows, gradient = entries.ids[order], entries.rows[order], gradient[order]
    inside = (ids >= 0) & (destination >= 0) & (destination < len(out))
    has_gradient = (gradient != 0) & inside
    begins = torch.cat([ids.new_ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])
    run = begins.cumsum(0) - 1
    # What a run is written to. There are as many of them as entries, so that no number has to be read on the host; the
    # runs that are not there add 0 to the first row.
    found = torch.where(begins & inside, destination, 0)
    targets = found.new_zeros(len(run) + 1).scatter_(0, torch.where(begins, run, len(run)), found)[:-1]
    for columns in _column_blocks(out, len(gradient)):
        of_rows = _gathered(hidden[:, columns], rows, dtype)
        terms = torch.where(has_gradient[:, None], gradient[:, None] * of_rows, 0.0)
        sums = torch.zeros_like(terms)
        _add_rows(sums, run, terms)
        _add_rows(out[:, columns], targets, sums.to(out.dtype))


def _inside(ids: Tensor, weight: Tensor) -> Tensor:
    return (ids >= 0) & (ids < len(weight))


def _gathered(matrix: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """These rows as operands, rounded to `dtype`, in the dtype of sums. Rows that are not there are any other one."""
    if not len(matrix):
        return matrix.new_zeros(len(index), matrix.shape[1], dtype=sum_dtype(dtype))
    found = matrix.index_select(0, index.clamp(0, len(matrix) - 1))
    return found.to(dtype).to(sum_dtype(dtype))


def _column_blocks(out: Tensor, entries: int) -> Iterator[slice]:
    step = max(_MIN_COLUMNS, _BLOCK_BYTES // (4 * max(entries + len(out), 1)))
    for start in range(0, out.shape[1], step):
        yield slice(start, start + step)


def _add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """Adds rows in the order of `values`: on a CPU `index_add_` takes them one by one; `index_put_` sorts on a GPU."""
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)
