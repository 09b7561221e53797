"""Advantages of responses from their rewards, without a value model: estimators that compare responses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.collectives import Ranks, gather, ranks_of
from ..base.devices import check_float64
from ..base.groups import groups_of
from ..base.layout import as_bool, batch_shape

BASELINES = ("mean", "leave_one_out", "leave_one_out_max", "batch_mean")
NORMALIZATIONS = ("std", "batch_std", "none")


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    baseline: str = "mean",
    normalize: str = "std",
    eps: float = 1e-6,
    group: Any = None,
) -> Tensor:
    """The reward of a response minus a baseline, divided by a standard deviation. The defaults are GRPO's.

    | estimator | `baseline` | `normalize` |
    |---|---|---|
    | GRPO (arXiv 2402.03300, section 4.1.2) | "mean" | "std" |
    | Dr. GRPO (arXiv 2503.20783) | "mean" | "none" |
    | RLOO (arXiv 2402.14740) | "leave_one_out" | "none" |
    | REINFORCE++ with a baseline (arXiv 2501.03262) | "mean" | "batch_std" |
    | REINFORCE++ (the same paper), which needs no groups | "batch_mean" | "batch_std" |
    | the group's maximum, for pass@k (arXiv 2503.19595); verl's `grpo_passk` | "leave_one_out_max" | "none" or "std" |

    A group is the responses to one prompt. A NaN reward, such as that of a judge that failed, is left out: no mean,
    deviation, maximum or count includes it, and its own advantage is 0.

    Args:
        rewards: [R], float32, float64 or integers: one reward per response.
        group_size: responses per prompt, adjacent in `rewards`. Give either this or `group_ids`.
        group_ids: [R] integers: the prompt of each response, in any order.
        baseline: what is subtracted. "mean": the mean reward of the group. "leave_one_out": the mean of the others in
            the group. "leave_one_out_max": the advantage is the maximum of the group minus the maximum of the others,
            so that only the best response has one, and none if two are the best. "batch_mean": the mean of all rewards.
        normalize: "std" divides by the sample standard deviation of the group's rewards (n - 1, as TRL and verl do);
            "batch_std" by that of all advantages in the batch; "none" does not divide. "batch_mean" needs one of the
            last two.
        eps: added to the standard deviation.
        group: the data-parallel ranks that share the batch, for "batch_mean" and "batch_std": one collective, which
            every rank has to call. The responses to one prompt have to be on one rank. None: this rank's batch.

    Returns: [R] float32. Exactly 0 throughout a group of equal rewards, and for a group of one; with "batch_mean",
        throughout a batch of equal rewards.
    """
    rewards = checks.tensor("rewards", rewards, "one reward per response, [responses]").detach()
    checks.numbers("rewards", rewards)
    check_float64(rewards.device)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape [responses]; got {list(rewards.shape)}")
    checks.choice("baseline", baseline, BASELINES)
    checks.choice("normalize", normalize, NORMALIZATIONS)
    eps = checks.number("eps", eps, "added to the standard deviation", at_least=0.0)
    ranks = ranks_of("group", group)
    if ranks is not None and baseline != "batch_mean" and normalize != "batch_std":
        raise ValueError(
            'group: expected None, because nothing is computed over the batch; got a group. baseline="batch_mean" and '
            'normalize="batch_std" use one'
        )
    if baseline == "batch_mean" and normalize == "std":
        raise ValueError(
            'normalize: expected "batch_std" or "none" with baseline="batch_mean", because a group of equal rewards '
            "has a deviation of 0 and need not have the mean of the batch; got 'std'"
        )
    if baseline == "batch_mean" and group_size is None and group_ids is None:
        group_size = 1  # groups have no effect
    groups = groups_of(rewards, group_size, group_ids)

    values = rewards.double()
    counted = ~values.isnan()
    values = torch.where(counted, values, 0.0)
    size = groups.sum(counted.double())  # [R], of the group of each response, like all that follows
    mean = groups.sum(values) / size.clamp(min=1)
    highest = groups.maximum(torch.where(counted, values, -torch.inf))
    lowest = -groups.maximum(torch.where(counted, -values, -torch.inf))
    if baseline == "batch_mean":
        batch = _moments(values, counted, ranks)
        advantages = torch.where(batch.all_equal, 0.0, values - batch.mean)
    elif baseline == "leave_one_out_max":
        best = counted & (values == highest)
        second = groups.maximum(torch.where(counted & ~best, values, -torch.inf))
        advantages = torch.where(best & (groups.sum(best.double()) == 1) & (size > 1), values - second, 0.0)
    else:
        advantages = torch.where(lowest == highest, 0.0, values - mean)
        if baseline == "leave_one_out":
            advantages = advantages * (size / (size - 1).clamp(min=1))
    advantages = torch.where(counted, advantages, 0.0)

    if normalize == "std":
        squares = groups.sum(torch.where(counted, values - mean, 0.0).square())
        advantages = _divided(advantages, (squares / (size - 1).clamp(min=1)).sqrt() + eps)
    elif normalize == "batch_std":
        advantages = _divided(advantages, _moments(advantages, counted, ranks).std + eps)
    return advantages.float()


def _divided(advantages: Tensor, deviation: Tensor) -> Tensor:
    """0 stays 0, also where the deviation is 0 and so is `eps`."""
    return torch.where(advantages == 0, 0.0, advantages / deviation)


@torch.no_grad()
def whiten_advantages(
    advantages: Tensor, *, mask: Tensor | None = None, eps: float = 1e-8, group: Any = None
) -> Tensor:
    """`(advantages - mean) / (std + eps)` over the unmasked tokens of a batch, as PPO implementations do after GAE.

    verl whitens the advantages of `gae` in this way, and also those of REINFORCE++, where a long response counts more
    than a short one; `group_advantages` counts each response once.

    Args:
        advantages: [B, T] or packed [N], float32 or float64.
        mask: the same shape, True (or 1) where a token counts. Numbers at masked positions, NaN included, have no
            effect.
        eps: added to the sample standard deviation.
        group: the data-parallel ranks that share the batch: one collective. None: this rank's batch.

    Returns: the shape and dtype of `advantages`; 0 where masked, and throughout a batch of equal advantages.
    """
    checks.floats("advantages", checks.tensor("advantages", advantages, "advantages per token"))
    if advantages.ndim not in (1, 2):
        raise ValueError(f"advantages: expected [sequences, tokens] or, packed, [tokens]; got {list(advantages.shape)}")
    check_float64(advantages.device)
    eps = checks.number("eps", eps, "added to the standard deviation", at_least=0.0)
    ranks = ranks_of("group", group)
    counted = torch.ones_like(advantages, dtype=torch.bool)
    if mask is not None:
        checks.tensor("mask", mask, "True or 1 at the tokens that count")
        checks.shape("mask", mask, advantages.shape, "one per token")
        checks.same_device("mask", mask, advantages.device)
        counted = as_bool("mask", mask)
    values = advantages.double()
    batch = _moments(values, counted, ranks)
    whitened = (values - batch.mean) / (batch.std + eps)
    return torch.where(counted & ~batch.all_equal, whitened, 0.0).to(advantages.dtype)


class _Moments(NamedTuple):
    """0-d, of a batch over all ranks."""

    mean: Tensor
    std: Tensor  # of a sample: n - 1
    all_equal: Tensor  # bool


def _moments(values: Tensor, counted: Tensor, ranks: Ranks | None) -> _Moments:
    """Each rank sends its own moments, about its own mean: no digits are lost to a large mean."""
    values, counted = values.reshape(-1), counted.reshape(-1)
    count = counted.sum().double()
    mean = torch.where(counted, values, 0.0).sum() / count.clamp(min=1)
    squares = torch.where(counted, values - mean, 0.0).square().sum()
    infinity = values.new_full((1,), torch.inf)  # an empty batch has no extremes
    lowest, highest = (
        torch.cat([torch.where(counted, sign * values, torch.inf), infinity]).amin() * sign for sign in (1.0, -1.0)
    )
    mine = torch.stack([count, mean, squares, lowest, highest])
    counts, means, squares, lows, highs = (mine[None] if ranks is None else gather(mine, ranks)).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp(min=1)
    squares = (squares + counts * (means - mean).square()).sum()
    return _Moments(mean, (squares / (total - 1).clamp(min=1)).sqrt(), lows.amin() == highs.amax())


@torch.no_grad()
def group_token_counts(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """How many unmasked tokens the group of each sequence has: the `group_tokens` of losses with "group_mean".

    Count over all responses of the groups, before they are split over micro-batches or ranks, and split the counts as
    the sequences are split.

    Args:
        mask: [B, T] or packed [N], True (or 1) where a token counts: as in the losses.
        cu_seqlens: [S + 1], of packed sequences.
        group_size: sequences per group, adjacent. Give either this or `group_ids`.
        group_ids: [B] or [S] integers: the group (the prompt) of each sequence, in any order.

    Returns: [B] or [S] float64. No host sync.
    """
    checks.tensor("mask", mask, "True or 1 at the tokens that count")
    lengths = batch_shape(mask.shape, mask, cu_seqlens, mask.device).layout().lengths
    return groups_of(lengths, group_size, group_ids).sum(lengths)
