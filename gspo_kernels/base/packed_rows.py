"""Boundaries of sequences in rows that a trainer packed, found on the device and without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bounds_of"]


def bounds_of(numbers: Tensor) -> Tensor:
    """`cu_seqlens` of a packed batch, int64 [N + 2].

    There are at most as many sequences as tokens; those that the batch does not have are empty, and count nowhere.

    Args:
        numbers: int64 [N], from 0 to N and never decreasing: which sequence a token belongs to.
    """
    return torch.searchsorted(numbers, torch.arange(len(numbers) + 2, device=numbers.device))
