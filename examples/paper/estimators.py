"""Estimators: log-weights of responses by their length, and the scatter of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FEWEST = 30  # responses that a bin needs to be counted


def by_length(mask: Tensor, edges: Sequence[int], fewest: int = FEWEST) -> list[Tensor]:
    """The responses of each bin, [B] bool, without bins of few; a bin is from an edge to before the next."""
    lengths = mask.sum(1)
    bins = [(lengths >= low) & (lengths < high) for low, high in pairwise(edges)]
    return [held for held in bins if held.sum() >= fewest]


@dataclass(frozen=True)
class LogWeights:
    """Statistics of log w_t of some responses of about the same length."""

    length: float  # mean, in tokens
    responses: int
    token: float  # variance over all tokens of log w_t
    mean: float  # variance over responses of mean_t log w_t, the logarithm of s_i
    sum: float  # variance over responses of sum_t log w_t
    largest: float  # mean over responses of max_t |log w_t|
    drift: float  # mean over responses of mean_t log w_t

    @classmethod
    def of(cls, log_ratio: Tensor, mask: Tensor) -> LogWeights:
        """Both [B, T]."""
        mask, lengths = mask.bool(), mask.sum(1).double()
        r = torch.where(mask, log_ratio.double(), 0.0)
        total = r.sum(1)
        return cls(
            length=lengths.mean().item(),
            responses=len(lengths),
            token=r[mask].var().item(),
            mean=(total / lengths).var().item(),
            sum=total.var().item(),
            largest=r.abs().amax(1).mean().item(),
            drift=(total / lengths).mean().item(),
        )


def stacked(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def slope(lengths: Sequence[float], variances: Sequence[float]) -> float:
    """The exponent a of variance ~ length^a, by least squares on logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (lengths, variances))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


class Scatter:
    """Mean and covariance of vectors that are added one by one and not kept."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, vector: Tensor) -> None:
        vector = vector.double()
        self.count += 1
        self.total = self.total + vector
        self.squares += vector.square().sum().item()

    @property
    def trace(self) -> float:
        """The trace of the covariance, unbiased."""
        return (self.squares - self._mean_squared() * self.count) / (self.count - 1)

    @property
    def signal(self) -> float:
        """The squared norm of the expected vector, unbiased: by chance it may be negative."""
        return self._mean_squared() - self.trace / self.count

    def _mean_squared(self) -> float:
        return (self.total / self.count).square().sum().item()
