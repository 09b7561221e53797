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
from .both_heads import BothOutputs, both_heads
from .products import sum_dtype
from .sparse_head import kept_logits
from .types import HeadArguments, KeptColumns


class KeptRows(NamedTuple):
    """Rows that keep some columns, of arguments that were checked."""

    arguments: HeadArguments
    arrays: RowArrays
    kept: KeptTokens
    chosen: Backend
    sparse_weight_grad: bool
    every: bool  # whether every unmasked row is known to have entries

    @property
    def columns(self) -> KeptColumns:
        return KeptColumns(self.kept.token_ids, self.kept.offsets, self.chosen.name, self.sparse_weight_grad)

    def kept_alone(self) -> RowStats:
        """Statistics of the rows that keep some columns; 0 elsewhere."""
        return self.stats(self.arrays.gathered(kept_logits(self.arguments, self.columns), self.kept))

    def kept_and_full(self, full: Tensor | None) -> tuple[RowStats, BothOutputs]:
        """Statistics over the columns that rows keep, and what both heads have found.

        Args:
            full: the rows that the full head computes, too: all that keep the whole vocabulary are among them. None:
                all rows.
        """
        found, whole = both_heads(self.arguments, self.columns, full), self.without_entries()
        of_kept = self.stats(self.arrays.gathered(found.kept_logits, self.kept))
        merged = (torch.where(whole, x, y) for x, y in zip(found.full_stats(), of_kept, strict=True))
        return RowStats(*merged), found

    def stats(self, rows: Rows) -> RowStats:
        options, shard = RowOptions(False, self.chosen.name), self.arguments.shard
        return row_stats(rows, options) if shard is None else vocab_shard.row_stats(rows, shard, options)

    def without_entries(self) -> Tensor:
        """bool [outer, inner], the unmasked rows that keep the whole vocabulary."""
        found = (self.kept.counts == 0).view(self.arrays.token_ids.shape)
        return found if self.arrays.mask is None else found & self.arrays.mask


def kept_rows(arguments: HeadArguments, arrays: RowArrays, kept: KeptTokens, sparse_weight_grad: bool) -> KeptRows:
    """Chooses the backend of the rows; refuses one that is named and cannot take them."""
    entries = arguments.hidden.new_empty(kept.token_ids.shape[0], dtype=sum_dtype(arguments.dtype))
    rows = arrays.gathered(entries, kept)
    chosen = choose(rows.logits, arguments.backend, rows.fields_set())
    every = kept_form(kept, arrays.mask) == "every"
    return KeptRows(arguments, arrays, kept, chosen, sparse_weight_grad, every)


def loss_of_kept_rows(of: KeptRows, inputs: TokenInputs) -> LossOutput:
    if of.every:
        logits = kept_logits(of.arguments, of.columns)
        rows = of.arrays.gathered(logits, of.kept)
        loss, stats = loss_of_rows(logits, rows, inputs, of.chosen, shard=of.arguments.shard)
        work = torch.zeros(len(HeadWork._fields), device=of.kept.device)
    else:
        found, both = of.kept_and_full(of.without_entries())
        work = both.head_work.detach()
        if fused_loss.takes_rows_of(of.chosen, inputs):
            loss, stats = fused_loss.loss_of_rows(inputs, found.logprobs, found.entropy)
        else:
            loss, stats = loss_of_stats(inputs, found)
    return LossOutput(loss, replace(stats, head=HeadWork(*work.unbind())))


def logprobs_of_kept_rows(of: KeptRows, shape: torch.Size, full_distribution: bool) -> KeptLogprobs:
    """`shape`: of the caller's tokens."""
    if full_distribution:
        of_kept, both = of.kept_and_full(of.arrays.mask)
        return KeptLogprobs(of_tokens(of_kept, shape), of_tokens(both.full_stats(), shape))
    of_kept = of.kept_alone() if of.every else of.kept_and_full(of.without_entries())[0]
    return KeptLogprobs(of_tokens(of_kept, shape), None)
