"""A clip range that fits a training: the bounds at which a given share of its responses would be clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClipRange:
    """Bounds of a ratio around 1, from 1 - eps_low to 1 + eps_high."""

    eps_low: float
    eps_high: float


@torch.no_grad()
def suggest_clip_range(
    log_ratio: Tensor | Sequence[Tensor],
    advantages: Tensor | Sequence[Tensor],
    share: float = 0.15,
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    current: tuple[float, float] | None = None,
) -> ClipRange:
    """The bounds at which `share` of the responses would be clipped, on each side of 1.

    A response with a positive advantage is clipped above 1 + eps_high, one with a negative advantage below 1 - eps_low;
    by token ratios it is clipped if any of its tokens is. `current` is kept on a side that says nothing.
    """
    ratios = [log_ratio] if isinstance(log_ratio, Tensor) else list(log_ratio)
    signs = [advantages] if isinstance(advantages, Tensor) else list(advantages)
    masks = [None] * len(ratios) if mask is None else [mask] if isinstance(mask, Tensor) else list(mask)
    sides = []
    for sign in (-1.0, 1.0):
        reach = []
        for r, a, m in zip(ratios, signs, masks, strict=True):
            signed = sign * r.double()
            if r.ndim == 2:  # a response is clipped if any of its tokens is
                signed = (signed if m is None else torch.where(m.bool(), signed, -torch.inf)).amax(1)
            reach.append(signed[sign * a > 0])
        found = torch.cat(reach)
        bound = torch.quantile(found, 1 - share).item() if len(found) else 0.0
        kept = sides.__len__()
        if bound > 0:
            sides.append(sign * math.expm1(sign * bound))
        elif current is not None:
            sides.append(current[kept])
        else:
            raise ValueError("log_ratio: no response on a side")
    return ClipRange(*sides)
