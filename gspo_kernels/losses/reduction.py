"""Aggregation: from numbers per token to one loss. Counts are divided by here and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.collectives import ranks_of, sum_over_ranks
from ..base.groups import groups_of
from ..base.layout import BatchShape, Layout, batch_shape

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum", "group_mean")


def token_shares(
    layout: Layout, aggregation: str, normalizer: float | Tensor | None, group_tokens: Tensor | None = None
) -> Tensor:
    """The weight of each token's number in the loss, by sequence: `loss = sum_i share_i sum_t x_it`.

    - "sequence_mean": mean over a sequence's unmasked tokens, then over sequences;
    - "token_mean":    mean over all unmasked tokens;
    - "sequence_sum":  sum over a sequence's unmasked tokens, mean over sequences;
    - "group_mean":    mean over the unmasked tokens of a group's sequences, then over groups.

    A sequence without an unmasked token is not counted. `normalizer` replaces the local `count`: with a global one, the
    shares of any split of the batch add up to the whole. An invalid one is replaced by 1 here: the two functions below
    make the loss and its gradient NaN.

    Args:
        group_tokens: [sequences], for "group_mean": how many unmasked tokens the group of each sequence has.

    Returns: [sequences] float64, NaN where the layout's lengths are.
    """
    found = count(layout, aggregation, group_tokens)
    if normalizer is None:
        share = 1.0 / torch.where(found > 0, found, torch.where(found == 0, 1.0, found))
    else:
        if isinstance(normalizer, Tensor):
            normalizer = torch.where(_counts(normalizer), normalizer, 1)
        share = torch.where(found.isnan(), found, torch.ones_like(found) / normalizer)
    if aggregation == "sequence_mean":
        return share / layout.lengths.clamp(min=1)
    if aggregation == "group_mean":
        return share / _of_groups(layout, group_tokens)
    return share.expand(layout.lengths.shape)


def count(layout: Layout, aggregation: str, group_tokens: Tensor | None = None) -> Tensor:
    """0-d float64, what the loss is divided by: tokens, sequences with an unmasked token, or groups.

    Of groups that are split over micro-batches or ranks, parts are counted: their tokens over the group's.
    """
    return _counted(layout, aggregation, group_tokens).sum()


def _counted(layout: Layout, aggregation: str, group_tokens: Tensor | None) -> Tensor:
    """[sequences], what each adds to the count; NaN where the layout's lengths are."""
    if aggregation == "token_mean":
        return layout.lengths
    if aggregation == "group_mean":
        return layout.lengths / _of_groups(layout, group_tokens)
    return layout.lengths.clamp(max=1)


def _of_groups(layout: Layout, group_tokens: Tensor | None) -> Tensor:
    """[sequences] float64, what to divide by; 1 for a sequence without tokens, whatever its number is."""
    assert group_tokens is not None
    return torch.where(layout.lengths == 0, 1.0, group_tokens.double().clamp(min=1))


def nan_if_no_count(loss: Tensor, layout: Layout, normalizer: float | Tensor | None) -> Tensor:
    """The loss, or NaN if the normalizer is no count. 0 is a count where every token is masked."""
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
    meaning = "a global count of sequences, of tokens for token_mean, or of groups for group_mean"
    if isinstance(normalizer, Tensor):
        checks.tensor("normalizer", normalizer, meaning)
        checks.shape("normalizer", normalizer, (), "one global count")
        checks.same_device("normalizer", normalizer, device)
        checks.numbers("normalizer", normalizer)
        without_comparisons = normalizer.dtype in (torch.uint16, torch.uint32)
        return normalizer.double() if without_comparisons else normalizer  # else no launch for it
    return None if normalizer is None else checks.number("normalizer", normalizer, meaning, above=0.0)


def check_group_tokens(aggregation: str, group_tokens: Any, batch: BatchShape) -> Tensor | None:
    """[sequences], checked."""
    if (group_tokens is not None) != (aggregation == "group_mean"):
        expected = "how many tokens each sequence's group has" if group_tokens is None else "None"
        got = "None. group_token_counts(mask, group_size=...) counts them" if group_tokens is None else "a tensor"
        raise ValueError(f"group_tokens: expected {expected}, because aggregation is {aggregation!r}; got {got}")
    if group_tokens is None:
        return None
    found = batch.per_sequence("group_tokens", group_tokens, "unmasked tokens of its group")
    if all(checks.may_read(x) and not checks.watched(x) for x in (found, batch.mask) if x is not None):
        own = batch.layout().local_lengths
        fewer = (own > 0) & (found.double() < own)  # not of NaN
        if bool(fewer.any()):
            i = int(fewer.nonzero()[0])
            raise ValueError(
                f"group_tokens: expected how many unmasked tokens the group of each sequence has, at least those of "
                f"the sequence itself; got {found[i].item():g} for sequence {i}, which has {own[i].item():g}. "
                "group_token_counts(mask, group_size=...) counts them over whole groups"
            )
    return found


def check_count(normalizer: Any, batch: BatchShape, name: str = "normalizer") -> None:
    """Refuses a tensor that is no count, where reading it is free."""
    if not isinstance(normalizer, Tensor):
        return
    if not all(checks.may_read(x) and not checks.watched(x) for x in (normalizer, batch.mask) if x is not None):
        return
    given = float(normalizer)
    of_nothing = given == 0 and (not batch.tokens.numel() or (batch.mask is not None and not bool(batch.mask.any())))
    if not (0 < given < math.inf or of_nothing):
        raise ValueError(
            f"{name}: expected a global count of sequences, of tokens for token_mean, or of groups for group_mean, a "
            f"finite number above 0 (0 only where no token counts); got a tensor of {given:g}"
        )


@torch.no_grad()
def global_count(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    aggregation: str = "sequence_mean",
    group_tokens: Tensor | None = None,
    advantages: Tensor | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    group: Any = None,
    cp_group: Any = None,
    averaged: bool = False,
) -> Tensor:
    """How many sequences, tokens or groups a batch has over all ranks and micro-batches: its losses' `normalizer`.

    With it each rank and each micro-batch returns its share of the whole batch's loss, and the gradients of the shares
    add up to its gradient. Count once an optimizer step, over the masks of all its micro-batches: counts of several
    masks add up too. One collective over `group`, and one or two over `cp_group`; no host sync.

    Args:
        mask: [B, T] or packed [N], True (or 1) where a token counts: the masks of the losses on this rank. A rank with
            an empty batch passes an empty mask: the collectives need every rank.
        cu_seqlens: [S + 1], of packed sequences.
        aggregation: what the losses have. "token_mean" (PPO's) counts tokens; "sequence_mean" and "sequence_sum" count
            sequences that have an unmasked token; "group_mean" counts groups.
        group_tokens: [B] or [S], for "group_mean", as in the losses (`group_token_counts`).
        advantages: per sequence or per token, as in the losses. Groups whose advantages are all 0 are then not counted
            (DAPO's dynamic sampling, arXiv 2503.14476, without sampling again): their tokens have no gradient, and do
            not dilute that of the others. A count of 0 becomes 1, for the loss is 0: so count all micro-batches of a
            step in one call. None: all are counted.
        group_size, group_ids: the groups, as in `group_advantages`, whole on this rank. Neither: each sequence is its
            own group, and one of advantage 0 is not counted though others of its prompt have an advantage.
        group: the ranks whose gradients are summed or averaged: data-parallel and, if there are any, context-parallel
            ones. None: this rank alone.
        cp_group: the ranks of `group` that have tokens of the same sequences.
        averaged: whether gradients are averaged over `group` instead of summed, as by DDP and FSDP: the count is then
            divided by its number of ranks.

    Returns: 0-d float64, on the mask's device. 0 where every token is masked; the losses are 0 then. NaN for wrong
    boundaries that could not be checked.
    """
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    checks.tensor("mask", mask, "True or 1 at the tokens that count")
    ranks = ranks_of("group", group)
    if averaged and ranks is None:
        raise ValueError(
            "group: expected the ranks over which gradients are averaged, because averaged is True; got None"
        )
    batch = batch_shape(mask.shape, mask, cu_seqlens, mask.device, ranks_of("cp_group", cp_group))
    layout = batch.layout()
    groups = check_group_tokens(aggregation, group_tokens, batch)
    counted = _counted(layout, aggregation, groups)
    if advantages is not None:
        some = _any_advantage(advantages, batch, layout)
        if group_size is not None or group_ids is not None:
            some = groups_of(layout.lengths, group_size, group_ids).sum(some.double()) != 0.0
        counted = torch.where(some, counted, 0.0 * counted)
    elif group_size is not None or group_ids is not None:
        name = "group_ids" if group_size is None else "group_size"
        raise ValueError(f"{name}: expected None without advantages, of which groups may have none; got a value")
    # A rank's part: of its own tokens under context parallelism, so that the sum over all ranks has each once.
    found = (counted * layout.share()).sum() if ranks is not None else counted.sum()
    if ranks is not None:
        found = sum_over_ranks(found, ranks, crosses=False)
    if aggregation != "group_mean":  # of which there may be parts
        found = found.round()
    if advantages is not None:
        found = torch.where(found == 0, torch.ones_like(found), found)
    return found / ranks.size if averaged and ranks is not None else found


def _any_advantage(advantages: Any, batch: BatchShape, layout: Layout) -> Tensor:
    """[sequences] bool, which have an unmasked token whose advantage is not 0."""
    values, per_token = batch.per_either("advantages", advantages, "advantages")
    some = layout.of_tokens(values) if per_token else layout.spread(values.double())
    return layout.sum((some != 0.0).double()) != 0.0
