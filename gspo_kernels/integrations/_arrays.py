"""What adapters share: checks of padded arrays, whose errors have the trainer's names, and parts of their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import as_bool
from ..losses.objectives import Objective


def mask_of_padded(
    logprobs: Mapping[str, Any],
    numbers: Mapping[str, Any],
    mask: tuple[str, Any],
    *,
    optional_logprobs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Checks that all arrays are [B, T]; returns the mask as bool.

    Args:
        logprobs: log-probabilities by name, float32 or float64; the first gives the shape and the device.
        numbers: other arrays by name: advantages, weights.
        mask: its name and the array, True or 1 where a token counts; None: all count.
        optional_logprobs: those that may be None.

    Raises: ValueError, TypeError: naming the argument, what was expected and what came.
    """
    first, likeness = next(iter(logprobs.items()))
    checks.tensor(first, likeness, "log-probabilities [B, T]")
    if likeness.ndim != 2:
        raise ValueError(f"{first}: expected shape [responses, tokens]; got {list(likeness.shape)}")

    def check(name: str, value: Any, meaning: str) -> None:
        checks.tensor(name, value, f"{meaning} [B, T]")
        checks.shape(name, value, likeness.shape, f"that of {first}, one per token")
        checks.same_device(name, value, likeness.device)

    given = {name: x for name, x in (optional_logprobs or {}).items() if x is not None}
    for name, value in (*logprobs.items(), *given.items()):
        check(name, value, "log-probabilities")
        checks.digits(name, value)
    for name, value in numbers.items():
        check(name, value, "one number per token,")
        checks.numbers(name, value)
    mask_name, mask_value = mask
    if mask_value is None:
        found = torch.ones(likeness.shape, dtype=torch.bool, device=likeness.device)
    else:
        check(mask_name, mask_value, "True or 1 where a token counts,")
        found = as_bool(mask_name, mask_value)
    for name, value in logprobs.items():
        checks.log_probabilities(name, value, found)
    return found


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of unmasked values, 0 of none; of bools in float32."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def dual_clipped(objective: Objective, clipped_high: Tensor, advantages: Tensor) -> Tensor:
    """Bool: which of the units held at an upper bound the dual clip holds. Trainers log them apart, or not at all."""
    if getattr(objective, "dual_clip", None) is None:
        return torch.zeros_like(clipped_high)
    return clipped_high & (advantages < 0)
