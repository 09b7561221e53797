"""The losses of the cases in float64, straight from the papers: what contestants are checked against.

Each takes a row's log-ratio [rows], advantages [sequences], mask [rows] and the sequence of each row [rows], and
returns the loss and its derivative by each row's log-probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILONS = {
    "gspo": (3e-4, 4e-4),
    "grpo": (0.2, 0.27),
    "ppo": (0.2, 0.27),
}  # what the ratio may fall short of 1, and exceed it


def means(values: Tensor, mask: Tensor, sequence_of: Tensor, sequences: int) -> Tensor:
    """[rows] -> [sequences], over unmasked rows."""
    sums = torch.zeros(sequences, dtype=torch.float64, device=values.device).index_add_(0, sequence_of, values * mask)
    return sums / _lengths(mask, sequence_of, sequences)


def gspo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequence_of: Tensor) -> tuple[float, Tensor]:
    """GSPO (arXiv 2507.18071): one ratio a sequence, the geometric mean of its tokens' ratios."""
    sequences = advantages.shape[0]
    ratio = means(log_ratio, mask, sequence_of, sequences).exp()
    loss, slope = _clipped(ratio, advantages, *EPSILONS["gspo"])
    of_tokens = (slope / (sequences * _lengths(mask, sequence_of, sequences)))[sequence_of]
    return float(loss.mean()), torch.where(mask, of_tokens, 0.0)


def grpo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequence_of: Tensor) -> tuple[float, Tensor]:
    """GRPO (arXiv 2402.03300): a ratio and a clip of its own for each token; mean over tokens, then over sequences."""
    sequences = advantages.shape[0]
    loss, slope = _clipped(log_ratio.exp(), advantages[sequence_of], *EPSILONS["grpo"])
    of_tokens = slope / (sequences * _lengths(mask, sequence_of, sequences))[sequence_of]
    return float(means(loss, mask, sequence_of, sequences).mean()), torch.where(mask, of_tokens, 0.0)


def ppo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequence_of: Tensor) -> tuple[float, Tensor]:
    """PPO, clipped (arXiv 1707.06347): ratio and clip as GRPO's; one mean over all tokens."""
    loss, slope = _clipped(log_ratio.exp(), advantages[sequence_of], *EPSILONS["ppo"])
    return float(loss[mask].mean()), torch.where(mask, slope / mask.sum(), 0.0)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A), and its derivative by the logarithm of the ratio."""
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    outside = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return loss, torch.where(outside, 0.0, -ratio * advantages)


def _lengths(mask: Tensor, sequence_of: Tensor, sequences: int) -> Tensor:
    return sequence_of[mask].bincount(minlength=sequences)


LOSSES = {"gspo": gspo, "grpo": grpo, "ppo": ppo}
