"""Groups of sequences, such as the responses to one prompt: sums and maxima over the group of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .layout import Segments, segment_sum


class Groups:
    """Sums and maxima in a fixed order and without a host sync."""

    def __init__(self, ids: Tensor) -> None:
        in_order, self._order = torch.sort(ids, stable=True)
        is_new = torch.ones_like(in_order, dtype=torch.bool)
        is_new[1:] = in_order[1:] != in_order[:-1]
        index = is_new.cumsum(0) - 1  # which group, of at most as many as there are sequences
        self._of = torch.empty_like(index).index_copy_(0, self._order, index)
        boundaries = torch.searchsorted(index, torch.arange(ids.numel() + 1, device=ids.device))
        self._segments = Segments(boundaries, index, ids.new_zeros((), dtype=torch.float64))

    def sum(self, values: Tensor) -> Tensor:
        """[sequences] float64 -> [sequences]"""
        return segment_sum(values[self._order], self._segments)[self._of]

    def maximum(self, values: Tensor) -> Tensor:
        return torch.full_like(values, -torch.inf).scatter_reduce(0, self._of, values, "amax")[self._of]


def groups_of(responses: Tensor, group_size: Any, group_ids: Any) -> Groups:
    """The groups of [sequences], by a caller's `group_size` or `group_ids`, checked."""
    if (group_size is None) == (group_ids is None):
        got = "neither" if group_size is None else "both"
        raise ValueError(
            f"group_size, group_ids: expected exactly one of them, to say which responses belong together; got {got}"
        )
    if group_ids is not None:
        checks.integers("group_ids", checks.tensor("group_ids", group_ids, "one group per response"), "one group each")
        checks.shape("group_ids", group_ids, responses.shape, "one group per response")
        checks.same_device("group_ids", group_ids, responses.device)
        return Groups(group_ids.long())
    group_size = checks.whole("group_size", group_size, "how many responses each prompt has")
    if group_size < 1 or responses.numel() % group_size:
        raise ValueError(
            f"group_size: expected a divisor of the number of responses, {responses.numel()}; got {group_size}"
        )
    return Groups(torch.arange(responses.numel(), device=responses.device) // group_size)
