"""What a backend is asked about and what it answers: vocabulary-sized rows in, a few numbers per row out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """Per row, `[outer, inner]`: zero where the row is masked."""

    logprobs: Tensor  # log p(token), fp32 (fp64 for fp64 logits); -inf where the number is too large for it
    entropy: Tensor  # of the row's distribution, same dtype
    lse: Tensor  # logsumexp of logits / temperature, fp64: an fp32 one would spoil p at large logits


def log_share(
    part: Tensor, whole: Tensor, entropy_of_part: Tensor, entropy_of_whole: Tensor, precision: torch.dtype
) -> Tensor:
    """part - whole, in float64: the logsumexps of some columns of a row and of all, told with their entropies.

    Numbers as large as 2^30 (float32; float64: 2^59) are 64 nats or more apart. Columns below the maximum then have a
    probability of 0, and lse = maximum + H has no digits for H, the logarithm of the number of ties: where the part has
    the maximum, the entropies tell its share.
    """
    epsilon = torch.finfo(precision).eps
    apart = torch.where(part == whole, 0.0, (part - entropy_of_part) - (whole - entropy_of_whole))  # also of inf
    same_maximum = (whole.abs() >= 128 / epsilon) & (apart > -epsilon / 8 * whole.abs())
    return torch.where(same_maximum, entropy_of_part - entropy_of_whole, part - whole)


class TokenClip(NamedTuple):
    """For losses with a ratio per token: from `Upstream.logprobs` where all ratios are 1 to what they are off-policy.

    A row whose ratio is held at a bound, or saturates, has no gradient; others' are multiplied by their ratio.
    """

    old_logprobs: Tensor  # [outer, inner], fp32
    advantages: Tensor  # fp32, one per row: for their signs
    eps_low: float
    eps_high: float
    dual_clip: float  # infinity for none
    max_log_ratio: float


class Upstream(NamedTuple):
    """dL/d of each of a row's statistics, contiguous `[outer, inner]`; None is zero.

    `factor` and `counts` spare a pass over these arrays: all are multiplied by the one, divided by the other's sum.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    factor: Tensor | None = None  # 0-d
    counts: Tensor | None = None  # [any number]
    tickets: Tensor | None = None  # 4 bytes of zeros, by which a kernel shares rows out; None: it makes some

    def some(self) -> Tensor:
        """bool, which rows have a gradient; of a row that has none nothing needs to be read."""
        given = [x != 0.0 for x in self[:3] if x is not None]
        return functools.reduce(torch.logical_or, given)

    def at(self, rows: Tensor) -> Upstream:
        """Of some rows, where arrays are [rows]."""
        return self._with(None if x is None else x.index_select(0, rows) for x in self[:3])

    def rows(self) -> Upstream:
        """Arrays [rows] as [1, rows]."""
        return self._with(None if x is None else x[None] for x in self[:3])

    def _with(self, arrays: Iterable[Tensor | None]) -> Upstream:
        logprobs, entropy, lse = arrays
        return self._replace(logprobs=logprobs, entropy=entropy, lse=lse)

    def by_statistic(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/dlogprobs, dL/dentropy, dL/dlse in full: with the factor, over the counts."""
        common = self.factor
        if self.counts is not None:
            total = self.counts.sum(dtype=torch.float64)
            share = 1.0 / torch.where(total > 0, total, torch.nan)
            common = share if common is None else common * share
        arrays = self.logprobs, self.entropy, self.lse
        if common is None:
            return arrays
        # Selected: a factor of NaN or infinity leaves rows without a gradient alone.
        scaled = (None if g is None else torch.where(g != 0, g * common, 0.0).to(g.dtype) for g in arrays)
        return tuple(scaled)  # type: ignore[return-value]


@dataclass(frozen=True)
class Rows:
    """Logits and what is asked about each of their rows; the arrays are contiguous, `[outer, inner]`.

    A gradient may have another dtype than the logits and lie over them, if row i of it does not overlap a row of them
    that is another row's place.
    """

    logits: Tensor  # [outer, inner, vocab], any strides
    token_ids: Tensor  # int64
    mask: Tensor | None  # bool; rows that are False are not read. None: every row counts
    temperature: Tensor  # what logits are divided by: fp32 per row, or one number, 0-d fp64 on the CPU
    places: Tensor | None = None  # int64; row i is logits[0, places[i]]. None: as they lie. For gradients alone


KERNEL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # of the C++ kernels


def address(array: Tensor | None) -> int:
    """As the C++ kernels take it."""
    return 0 if array is None else array.data_ptr()


def stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def empty_stats(logits: Tensor) -> RowStats:
    """Room for the statistics of [outer, inner, vocab] logits."""
    logprobs = torch.empty(logits.shape[:2], dtype=stats_dtype(logits), device=logits.device)
    return RowStats(logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs, dtype=torch.float64))
