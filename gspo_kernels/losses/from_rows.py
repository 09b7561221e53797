"""A loss, and log-probabilities, from rows that were checked: of logits, and of kept columns' logits alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..rows import vocab_shard
from ..rows.both import row_stats_of_both
from ..rows.dispatch import Backend
from ..rows.operators import link_of, row_stats, row_stats_and_gradient, with_gradient
from ..rows.types import RowOptions, Rows, RowStats, Upstream, stats_dtype
from ..rows.vocab_shard import VocabShard
from . import fused_loss
from .token_stage import LossOutput, TokenInputs


class TokenLogprobs(NamedTuple):
    """Per token, in the token layout; differentiable; 0 where masked."""

    logprobs: Tensor  # log p(token), float32 (float64 for float64 logits)
    entropy: Tensor  # of the whole distribution, same dtype
    lse: Tensor  # logsumexp of logits / temperature, float64


class KeptLogprobs(NamedTuple):
    """Of the distribution over the kept columns, and of that over all columns; both differentiable."""

    kept: TokenLogprobs
    full: TokenLogprobs | None  # None where it was not asked for


def loss_of_rows(
    logits: Tensor,
    rows: Rows,
    inputs: TokenInputs,
    chosen: Backend,
    overwrite_logits: bool = False,
    shard: VocabShard | None = None,
) -> LossOutput:
    """`logits`: the caller's, of which `rows.logits` is a view."""
    options = RowOptions(overwrite_logits, chosen.name)
    fused = fused_loss.takes_rows_of(chosen, inputs)
    if shard is not None:
        found = vocab_shard.row_stats(rows, shard, options)
        if not fused:
            return loss_of_stats(inputs, found)
        return fused_loss.loss_of_rows(inputs, found.logprobs, found.entropy)
    one_pass = (
        _gradient_is_known(inputs, chosen, fused)
        and logits.requires_grad
        and torch.is_grad_enabled()
        and not checks.watched(logits)
        and logits.dtype != torch.float16  # a loss scaler's factor has to come in before the rounding to fp16
        and rows.kept_form != "gathered"  # whose gradient is small
    )
    if fused:
        return fused_loss.policy_loss(rows, inputs, options, one_pass)
    if one_pass:
        stage = inputs.stage()
        upstream = Upstream(stage.gradient_on_policy().to(stats_dtype(logits.dtype)).reshape(rows.token_ids.shape))
        link = link_of(logits) if overwrite_logits else logits
        found, gradient = row_stats_and_gradient(rows, upstream, options)
        with torch.no_grad():
            statistics = found.logprobs.reshape(-1), found.entropy.reshape(-1)
            value, stats = stage.loss(*statistics)
            if bool(stats.approx_kl.isnan()):  # the same on every rank; read on a CPU alone
                has_nan = stage.gradient(*statistics)[0].isnan().reshape(rows.token_ids.shape)
                gradient[..., : rows.vocab_size][has_nan] = torch.nan
        return LossOutput(with_gradient(value, link, gradient, options.backend), stats)
    return loss_of_stats(inputs, row_stats(rows, options))


def loss_of_stats(inputs: TokenInputs, found: RowStats) -> LossOutput:
    return inputs.stage().loss(found.logprobs.reshape(-1), found.entropy.reshape(-1))


def _gradient_is_known(inputs: TokenInputs, backend: Backend, fused: bool) -> bool:
    """Whether a row's gradient can be written while the row is read for the first time."""
    if fused:
        return inputs.gradient_is_known() or fused_loss.has_row_slopes(inputs, backend)
    # NaN in one row concerns its whole sequence, if that has one ratio: to look for it is free on a CPU alone.
    return inputs.gradient_is_known() and inputs.batch.device.type == "cpu"


def logprobs_of_rows(
    rows: Rows, options: RowOptions, shard: VocabShard | None, shape: torch.Size, full_distribution: bool
) -> TokenLogprobs | KeptLogprobs:
    """`shape`: of the caller's tokens. Rows that keep some columns give `KeptLogprobs`."""
    if rows.kept_ids is None:
        return of_tokens(_stats(rows, shard, options), shape)
    if not full_distribution:
        return KeptLogprobs(of_tokens(_stats(rows, shard, options), shape), None)
    if shard is None:
        kept, full = row_stats_of_both(rows, options)
    else:
        kept, full = _stats(rows, shard, options), _stats(rows.whole(), shard, options)
    return KeptLogprobs(of_tokens(kept, shape), of_tokens(full, shape))


def _stats(rows: Rows, shard: VocabShard | None, options: RowOptions) -> RowStats:
    return row_stats(rows, options) if shard is None else vocab_shard.row_stats(rows, shard, options)


def of_tokens(found: RowStats, shape: torch.Size) -> TokenLogprobs:
    return TokenLogprobs(*(x.reshape(shape) for x in found))
