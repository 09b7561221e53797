"""Advantages of responses relative to the others of the same prompt (GRPO, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import checks


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    normalize: str = "std",
    eps: float = 1e-6,
) -> Tensor:
    """`(reward - mean of its group) / (std of its group + eps)`.

    Args:
        rewards: [R], float32, float64 or integers: one reward per response.
        group_size: responses per prompt, adjacent in `rewards`. Give either this or `group_ids`.
        group_ids: [R] integers: the prompt of each response, in any order.
        normalize: "std" divides by the sample standard deviation (n - 1, as TRL and verl do); "none" does not divide
            (Dr. GRPO, arXiv 2503.20783).
        eps: added to the standard deviation.

    Returns: [R] float32. Exactly 0 throughout a group of equal rewards, and for a group of one.
    """
    rewards = checks.tensor("rewards", rewards, "one reward per response, [responses]").detach()
    checks.numbers("rewards", rewards)
    if rewards.ndim != 1:
        raise ValueError(f"rewards: expected shape [responses]; got {list(rewards.shape)}")
    checks.choice("normalize", normalize, ("std", "none"))
    eps = checks.number("eps", eps, "added to the standard deviation", at_least=0.0)
    groups, count = _groups(rewards, group_size, group_ids)

    values = rewards.double()
    size = torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, groups, torch.ones_like(values))
    centred = values - (torch.zeros_like(size).index_add(0, groups, values) / size.clamp(min=1))[groups]
    lowest = torch.full_like(size, torch.inf).scatter_reduce(0, groups, values, "amin")
    highest = torch.full_like(size, -torch.inf).scatter_reduce(0, groups, values, "amax")
    if normalize == "std":
        variance = torch.zeros_like(size).index_add(0, groups, centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[groups]
    return torch.where((lowest == highest)[groups], 0.0, centred).float()


def _groups(rewards: Tensor, group_size: Any, group_ids: Any) -> tuple[Tensor, int]:
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size, group_ids: expected exactly one of them, which says what rewards to compare; got {got}"
        )
    if group_ids is not None:
        checks.integers("group_ids", checks.tensor("group_ids", group_ids, "one group per response"), "one group each")
        checks.shape("group_ids", group_ids, rewards.shape, "one group per reward")
        checks.same_device("group_ids", group_ids, rewards.device)
        found, groups = torch.unique(group_ids, return_inverse=True)
        return groups, found.numel()
    group_size = checks.whole("group_size", group_size, "how many responses each prompt has")
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the number of rewards, {rewards.numel()}; got {group_size}"
        )
    count = rewards.numel() // group_size
    return torch.arange(count, device=rewards.device).repeat_interleave(group_size), count
