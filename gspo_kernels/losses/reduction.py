"""Aggregation: from numbers per token to one loss. Counts are divided by here and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.collectives import ranks_of, sum_over_ranks
from ..base.layout import BatchShape, Layout, batch_shape

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum")


def token_shares(layout: Layout, aggregation: str, normalizer: float | Tensor | None) -> Tensor:
    """The weight of each token's number in the loss, by sequence: `loss = sum_i share_i sum_t x_it`.

    - "sequence_mean": mean over a sequence's unmasked tokens, then over sequences;
    - "token_mean":    mean over all unmasked tokens;
    - "sequence_sum":  sum over a sequence's unmasked tokens, mean over sequences.

    A sequence without an unmasked token is not counted. `normalizer` replaces the local count (of sequences, or of
    tokens for "token_mean"): with a global one, the shares of any split of the batch add up to the whole. One that is
    no count stands for 1 here: the two functions below make the loss and its gradient NaN.

    Returns: [sequences] float64, NaN where the layout's lengths are.
    """
    count = layout.num_tokens if aggregation == "token_mean" else layout.num_sequences
    if normalizer is None:
        share = 1.0 / count.clamp(min=1)
    else:
        if isinstance(normalizer, Tensor):
            normalizer = torch.where(_counts(normalizer), normalizer, 1)
        share = torch.where(count.isnan(), count, torch.ones_like(count) / normalizer)
    if aggregation == "sequence_mean":
        return share / layout.lengths.clamp(min=1)
    return share.expand(layout.lengths.shape)


def nan_if_no_count(loss: Tensor, layout: Layout, normalizer: float | Tensor | None) -> Tensor:
    """The loss, or NaN if the normalizer is no count; 0 is one where nothing counts."""
    if not isinstance(normalizer, Tensor):
        return loss
    is_count = _counts(normalizer) | ((normalizer == 0) & (layout.num_tokens == 0))
    return loss + torch.where(is_count, 0.0, torch.nan)  # added, so that the gradient of the loss goes on: see below


def nan_gradient_if_no_count(values: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """`values`; if the normalizer is no count, their gradient is NaN wherever it is not 0."""
    return _NanGradient.apply(values, _counts(normalizer)) if isinstance(normalizer, Tensor) else values


def _counts(normalizer: Tensor) -> Tensor:
    """0-d bool, whether it is a positive finite number."""
    return (normalizer > 0) & (normalizer < torch.inf)


class _NanGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, counts: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return torch.where(counts | (gradient == 0), gradient, torch.nan), None


def check(aggregation: Any, normalizer: Any, device: torch.device) -> float | Tensor | None:
    """The normalizer, checked."""
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    meaning = "a global count of sequences, or of tokens for token_mean"
    if isinstance(normalizer, Tensor):
        checks.tensor("normalizer", normalizer, meaning)
        checks.shape("normalizer", normalizer, (), "one global count")
        checks.same_device("normalizer", normalizer, device)
        checks.numbers("normalizer", normalizer)
        without_comparisons = normalizer.dtype in (torch.uint16, torch.uint32)
        return normalizer.double() if without_comparisons else normalizer  # else no launch for it
    return None if normalizer is None else checks.number("normalizer", normalizer, meaning, above=0.0)


def check_count(normalizer: Any, batch: BatchShape, name: str = "normalizer") -> None:
    """The value of a tensor, where it can be read for free."""
    if not isinstance(normalizer, Tensor):
        return
    if not all(checks.may_read(x) and not checks.watched(x) for x in (normalizer, batch.mask) if x is not None):
        return
    count = float(normalizer)
    of_nothing = count == 0 and (not batch.tokens.numel() or (batch.mask is not None and not bool(batch.mask.any())))
    if not (0 < count < math.inf or of_nothing):
        raise ValueError(
            f"{name}: expected a global count of sequences, or of tokens for token_mean, a finite number above 0 "
            f"(0 only where no token counts); got a tensor of {count:g}"
        )


@torch.no_grad()
def global_count(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    aggregation: str = "sequence_mean",
    group: Any = None,
    cp_group: Any = None,
    averaged: bool = False,
) -> Tensor:
    """How many sequences, or tokens, a batch has over all ranks and micro-batches: the `normalizer` of its losses.

    With it each rank and each micro-batch returns its share of the whole batch's loss, and the gradients of the shares
    add up to its gradient. Count once an optimizer step, over the masks of all its micro-batches: counts of several
    masks add up too. One collective over `group`, and one over `cp_group`; no host sync.

    Args:
        mask: [B, T] or packed [N], True (or 1) where a token counts: what the losses are given on this rank. A rank
            with an empty batch passes an empty mask, and still takes part.
        cu_seqlens: [S + 1], of packed sequences.
        aggregation: what the losses have. "token_mean" (PPO's) counts tokens; "sequence_mean" and "sequence_sum" count
            sequences that have an unmasked token.
        group: the ranks whose gradients are summed or averaged: data-parallel and, if there are any, context-parallel
            ones. None: this rank alone.
        cp_group: the ranks of `group` that have tokens of the same sequences.
        averaged: for what averages gradients over `group` instead of summing them, as DDP and FSDP do: the count is
            then divided by its number of ranks.

    Returns: 0-d float64, on the mask's device. 0 where nothing counts, of which losses make 0. NaN for wrong boundaries
    that could not be checked.
    """
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    checks.tensor("mask", mask, "True or 1 at the tokens that count")
    ranks = ranks_of("group", group)
    if averaged and ranks is None:
        raise ValueError(
            "group: expected the ranks over which gradients are averaged, because averaged is True; got None"
        )
    layout = batch_shape(mask.shape, mask, cu_seqlens, mask.device, ranks_of("cp_group", cp_group)).layout()
    if ranks is None:
        return layout.num_tokens if aggregation == "token_mean" else layout.num_sequences
    count = layout.local_lengths.sum() if aggregation == "token_mean" else layout.share().sum()
    count = sum_over_ranks(count, ranks, crosses=False).round()
    return count / ranks.size if averaged else count
