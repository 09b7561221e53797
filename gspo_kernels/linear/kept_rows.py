"""Losses and log-probabilities of kept columns from hidden states.

Rows with entries take the sparse head, and from its logits on the code of losses from logits. Rows without entries keep
the whole vocabulary: the full head computes them, and their statistics are merged with those of the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import fused_loss
from ..losses.from_rows import KeptLogprobs, loss_of_rows, loss_of_stats, of_tokens
from ..losses.stats import HeadWork
from ..losses.token_stage import LossOutput, TokenInputs
from ..rows import vocab_shard
from ..rows.arguments import RowArrays, kept_form
from ..rows.dispatch import Backend, choose
from ..rows.kept import KeptTokens
from ..rows.operators import row_stats
from ..rows.types import RowOptions, Rows, RowStats
from .operators import linear_row_stats
from .products import sum_dtype
from .schedule import chunk_size
from .sparse_head import kept_logits
from .types import HeadArguments, KeptColumns


class KeptRows(NamedTuple):
    """Rows that keep some columns, of arguments that were checked."""

    arguments: HeadArguments
    arrays: RowArrays
    kept: KeptTokens
    chosen: Backend
    sparse_weight_grad: bool

    @property
    def every(self) -> bool:
        """Whether every unmasked row is known to have entries."""
        return kept_form(self.kept, self.arrays.mask) == "every"

    def logits(self) -> Tensor:
        """[entries]"""
        columns = KeptColumns(self.kept.token_ids, self.kept.offsets, self.sparse_weight_grad)
        return kept_logits(replace(self.arguments, backend=self.chosen.name), columns)

    def stats(self, rows: Rows) -> RowStats:
        options, shard = RowOptions(False, self.chosen.name), self.arguments.shard
        return row_stats(rows, options) if shard is None else vocab_shard.row_stats(rows, shard, options)

    def without_entries(self) -> Tensor:
        """bool [outer, inner], the unmasked rows that keep the whole vocabulary."""
        found = (self.kept.counts == 0).view(self.arrays.token_ids.shape)
        return found if self.arrays.mask is None else found & self.arrays.mask

    def full_stats(self, mask: Tensor | None) -> RowStats:
        """Of these rows, by the full head; 0 elsewhere."""
        return linear_row_stats(replace(self.arguments, mask=mask))

    def merged(self, of_kept: RowStats, full: RowStats) -> RowStats:
        """The full head's statistics for rows without entries."""
        whole = self.without_entries()
        return RowStats(*(torch.where(whole, x, y) for x, y in zip(full, of_kept, strict=True)))


def kept_rows(arguments: HeadArguments, arrays: RowArrays, kept: KeptTokens, sparse_weight_grad: bool) -> KeptRows:
    """Chooses the backend of the rows; refuses one that is named and cannot take them."""
    entries = arguments.hidden.new_empty(kept.token_ids.shape[0], dtype=sum_dtype(arguments.dtype))
    rows = arrays.gathered(entries, kept)
    chosen = choose(rows.logits, arguments.backend, rows.fields_set())
    return KeptRows(arguments, arrays, kept, chosen, sparse_weight_grad)


def loss_of_kept_rows(of: KeptRows, inputs: TokenInputs) -> LossOutput:
    logits = of.logits()
    rows = of.arrays.gathered(logits, of.kept)
    if of.every:
        loss, stats = loss_of_rows(logits, rows, inputs, of.chosen, shard=of.arguments.shard)
    else:
        found = of.merged(of.stats(rows), of.full_stats(of.without_entries()))
        if fused_loss.takes_rows_of(of.chosen, inputs):
            loss, stats = fused_loss.loss_of_rows(inputs, found.logprobs, found.entropy)
        else:
            loss, stats = loss_of_stats(inputs, found)
    return LossOutput(loss, replace(stats, head=_work(of)))


@torch.no_grad()
def _work(of: KeptRows) -> HeadWork:
    """Of the full head, before the backward."""
    nothing = torch.zeros((), device=of.kept.device)
    if of.every:
        return HeadWork(nothing, nothing, nothing, nothing)
    arguments = of.arguments
    columns = arguments.vocab_size if arguments.shard is None else arguments.shard.usual_columns
    chunk = chunk_size(arguments.chunk_bytes, columns, arguments.dtype, of.kept.device.type, gradient=False)
    rows = of.without_entries().sum(dtype=torch.float32)
    return HeadWork(rows, nothing, nothing, (rows / chunk.max_rows).ceil())


def logprobs_of_kept_rows(of: KeptRows, shape: torch.Size, full_distribution: bool) -> KeptLogprobs:
    """`shape`: of the caller's tokens."""
    of_kept = of.stats(of.arrays.gathered(of.logits(), of.kept))
    if full_distribution:
        full = of.full_stats(of.arrays.mask)
        return KeptLogprobs(of_tokens(of.merged(of_kept, full), shape), of_tokens(full, shape))
    if not of.every:
        of_kept = of.merged(of_kept, of.full_stats(of.without_entries()))
    return KeptLogprobs(of_tokens(of_kept, shape), None)
