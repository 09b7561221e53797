"""What every public function checks first, and how it says what is wrong: argument, expected, got.

Only what can be known without reading a tensor's values is checked here, so that no check waits for a device. Values
(token ids, `cu_seqlens`, temperatures) are checked inside the operators, where a CPU tensor can be read for free.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A short account of what came, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}"
    return f"{type(value).__name__} {value!r}"


def tensor(name: str, value: Any, meaning: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {meaning}, a torch.Tensor; got {describe(value)}")
    return value


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, where the logits are; got one on {value.device}")


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({meaning}); got {list(value.shape)}")


def floating(name: str, value: Tensor, meaning: str) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected {meaning} in a floating dtype; got {value.dtype}")


def integers(name: str, value: Tensor, meaning: str) -> None:
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected {meaning} in an integer dtype; got {value.dtype}")


def number(
    name: str,
    value: Any,
    meaning: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {meaning}, a number; got {describe(value)}")
    if not (value > above and value >= at_least and value <= at_most and -math.inf < value < math.inf):
        bound = (
            f" above {above:g}" if above > -math.inf else f" of at least {at_least:g}" if at_least > -math.inf else ""
        )
        bound += f" and at most {at_most:g}" if at_most < math.inf else ""
        raise ValueError(f"{name}: expected {meaning}, a finite number{bound}; got {value}")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}; got {value!r}")


def may_read(tensor: Tensor) -> bool:
    """Whether a check may look at values: that waits for a GPU, so only under GSPO_KERNELS_DEBUG=1 there."""
    return tensor.device.type == "cpu" or os.environ.get("GSPO_KERNELS_DEBUG", "0") not in ("", "0")
