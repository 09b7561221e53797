"""What adapters share: checks whose errors have the trainer's names, and parts of their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import as_bool, batch_shape
from ..losses.objectives import Objective
from ..losses.reduction import check_count


def mask_of_padded(
    logprobs: Mapping[str, Any],
    numbers: Mapping[str, Any],
    mask: tuple[str, Any],
    *,
    optional_logprobs: Mapping[str, Any] | None = None,
    or_packed: bool = False,
) -> Tensor:
    """Checks that all arrays are [B, T], or, with `or_packed`, [N]; returns the mask as bool.

    Args:
        logprobs: log-probabilities by name, float32 or float64; the first gives the shape and the device.
        numbers: other arrays by name: advantages, weights.
        mask: its name and the array, True or 1 where a token counts; None: all count.
        optional_logprobs: those that may be None.

    Raises: ValueError, TypeError: naming the argument, what was expected and what came.
    """
    first, likeness = next(iter(logprobs.items()))
    shape = "[B, T] or packed [N]" if or_packed else "[B, T]"
    checks.tensor(first, likeness, f"log-probabilities {shape}")
    if likeness.ndim != 2 and not (or_packed and likeness.ndim == 1):
        packed = " or, packed, [tokens]" if or_packed else ""
        raise ValueError(f"{first}: expected shape [responses, tokens]{packed}; got {list(likeness.shape)}")

    def check(name: str, value: Any, meaning: str) -> None:
        checks.tensor(name, value, f"{meaning} {shape}")
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


def checked_count(name: str, count: Any, mask: Tensor) -> float | Tensor:
    """A trainer's global count, a number or 0-d; 0, where no token counts, as a tensor. No host sync on a GPU.

    Raises: ValueError, TypeError: naming the argument; 0 where the mask has a token is refused if it can be read.
    """
    found: float | Tensor
    if isinstance(count, Tensor):
        checks.shape(name, count, (), "one global count")
        found = count
    else:
        found = checks.number(name, count, "the count of all ranks", at_least=0.0)
        if found == 0:
            found = torch.zeros((), dtype=torch.float64, device=mask.device)
    check_count(found, batch_shape(mask.shape, mask, None, mask.device), name)
    return found


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Errors about arguments of this package get the names of the trainer's options: `renamed(eps_low="clip_min")`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if colon and name in names:
            raise type(error)(f"{names[name]}:{rest}") from None
        raise
