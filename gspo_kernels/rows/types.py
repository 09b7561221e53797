"""The values that travel between the losses and the row kernels: rows of logits in, a few numbers per row out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Logits, and everything that defines the numbers of each row. Arrays are contiguous, `[outer, inner]`.

    To add an optional field: one line here (None: absent), its name in `honours` of every backend that computes with
    it. All other backends refuse rows that have it, by name.

    A gradient may have another dtype than the logits. It may share their memory, if its row i overlaps row i of the
    logits alone.
    """

    logits: Tensor  # [outer, inner, columns], any strides
    token_ids: Tensor  # int64
    mask: Tensor | None  # bool; rows that are False are not read. None: every row is active
    temperature: (
        Tensor  # what logits are divided by: fp32 (fp64 for fp64 logits) per row, or one number, 0-d fp64 on the CPU
    )
    vocab_size: int  # columns from this one on are padding: they are not read, and their gradient is 0
    row_indices: Tensor | None = None  # int64, for `backward` alone: row i is logits[0, row_indices[i]]
    tanh_scale: Tensor | None = None  # 0-d fp64 on the CPU: tanh(tanh_scale * logit) is what the temperature divides
    # The columns that rows keep: the distribution is that over them alone. All three are None, or none is.
    kept_ids: Tensor | None = None  # [entries] int32; `ABSENT`: a column of another rank
    kept_offsets: Tensor | None = None  # [outer * inner + 1] int64: where each row's entries begin
    kept_form: str | None = None  # see `KeptForm`

    def has_entries(self) -> Tensor:
        """bool [outer, inner], which rows keep the columns of their entries. The others keep all."""
        assert self.kept_offsets is not None
        return (self.kept_offsets.diff() > 0).view(self.token_ids.shape)

    def whole(self) -> Rows:
        """The same rows with all columns."""
        return self._replace(kept_ids=None, kept_offsets=None, kept_form=None)

    def fields_set(self) -> list[str]:
        """Names of the optional fields that are not None; "kept" for the three of the columns that rows keep."""
        names = [name for name in Rows._field_defaults if getattr(self, name) is not None]
        return list(dict.fromkeys("kept" if name.startswith("kept_") else name for name in names))


OPTIONAL_FIELDS = ("row_indices", "tanh_scale", "kept")  # as `fields_set` names them

# What rows that keep some columns look like.
#   some      a row without entries keeps all columns
#   every     every unmasked row has entries; one without is NaN
#   gathered  `logits` [1, 1, entries] are those of the entries alone, and so is their gradient. `vocab_size` is their
#             number, and ids only say which entry is the row's token. An unmasked row without entries is NaN.
KeptForm = Literal["some", "every", "gathered"]

# No column of this rank. As a kept id: its logit is -inf, its gradient is not written. As the token of a row with
# entries: no entry is the token, `backward` does not read the saved log-probability, and its upstream gradient is 0.
ABSENT = -(1 << 31)


class RowOptions(NamedTuple):
    """How rows are computed; no number depends on it but by rounding."""

    overwrite_logits: bool  # whether the gradient is written over the logits
    backend: str  # the name of the backend that was chosen for them


class RowStats(NamedTuple):
    """Per row, `[outer, inner]`: zero where the row is masked."""

    logprobs: Tensor  # log p(token), fp32 (fp64 for fp64 logits); -inf where the number is too large for it
    entropy: Tensor  # of the row's distribution, same dtype
    lse: Tensor  # logsumexp of logits / temperature, fp64: in fp32, large logits would leave no digits for p


class TokenSlope(NamedTuple):
    """For losses whose dL/dlogprob depends on the row alone: what a kernel computes it from while it has the row.

    dL/dlogprob is `Upstream.logprobs`, a weight of the row, times `-weight * advantage + penalty * log_ratio`. There is
    no penalty beyond +-max_log_ratio. The
    ratio's `weight` is `exp(min(log_ratio, max_log_ratio))`, at most `max_weight`. A range bounds how far the policy
    has moved, by `measure`: "ratio": `exp(log_ratio) - 1`; "tv": the difference of the two policies' probabilities of
    the token; "kl": the KL divergence of the Bernoulli distributions (this token or another) of rollout and current
    policy, with the sign of that difference. Bounds are inside. A saturated ratio is outside where `outside` is "drop"
    and `max_weight` infinite.
    """

    old_logprobs: Tensor  # [outer, inner], fp32
    advantages: Tensor  # the same
    rollout_logprobs: Tensor | None  # the same, for "tv" and "kl"; None: old_logprobs
    max_log_ratio: float
    positive: tuple[float, float]  # the range for an advantage above 0
    negative: tuple[float, float]  # for all others
    outside: Literal["drop", "hold"]  # drop: without the first term; hold ("ratio" alone): the weight of the bound
    measure: Literal["ratio", "tv", "kl"]
    max_weight: float
    penalty: float


class Upstream(NamedTuple):
    """dL/d of each of a row's statistics, contiguous `[outer, inner]`; None is zero.

    `factor` and `counts` save a pass over these arrays: all of them are multiplied by `factor` and divided by the sum
    of `counts`.
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    lse: Tensor | None = None
    factor: Tensor | None = None  # 0-d
    counts: Tensor | None = None  # [any number]
    tickets: Tensor | None = None  # 4 bytes of zeros, a row counter for the CUDA kernel; None: it allocates one

    def some(self) -> Tensor:
        """bool, which rows have a gradient; the logits of the others need not be read."""
        given = [x != 0.0 for x in self[:3] if x is not None]
        return functools.reduce(torch.logical_or, given)

    def at(self, rows: Tensor) -> Upstream:
        """The upstream gradients of some rows; arrays are [rows]."""
        return self._with(None if x is None else x.index_select(0, rows) for x in self[:3])

    def rows(self) -> Upstream:
        """The same with arrays [1, rows] instead of [rows]."""
        return self._with(None if x is None else x[None] for x in self[:3])

    def contiguous(self) -> Upstream:
        if all(x is None or x.is_contiguous() for x in self[:3]):
            return self
        return self._with(None if x is None else x.contiguous() for x in self[:3])

    def _with(self, arrays: Iterable[Tensor | None]) -> Upstream:
        logprobs, entropy, lse = arrays
        return self._replace(logprobs=logprobs, entropy=entropy, lse=lse)

    def by_statistic(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dL/dlogprobs, dL/dentropy, dL/dlse in full: multiplied by the factor, divided by the sum of the counts."""
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


def stats_dtype(logits: torch.dtype) -> torch.dtype:
    return torch.float64 if logits == torch.float64 else torch.float32


def empty_stats(rows: Rows) -> RowStats:
    """Buffers for the statistics of these rows."""
    shape, logits = rows.token_ids.shape, rows.logits
    logprobs = torch.empty(shape, dtype=stats_dtype(logits.dtype), device=logits.device)
    return RowStats(logprobs, torch.empty_like(logprobs), torch.empty_like(logprobs, dtype=torch.float64))


def capped(rows: Rows, logits: Tensor) -> Tensor:
    """Logits of these rows, of any shape, as the temperature divides them; float64."""
    return logits.double() if rows.tanh_scale is None else torch.tanh(logits.double() * rows.tanh_scale)


def scaled_logits(rows: Rows, logits: Tensor) -> Tensor:
    """One logit of each row, divided by the temperature; float64."""
    return capped(rows, logits) / rows.temperature


def log_share(
    part: Tensor, whole: Tensor, entropy_of_part: Tensor, entropy_of_whole: Tensor, precision: torch.dtype
) -> Tensor:
    """part - whole, in float64, for the logsumexps of some columns of a row and of all; corrected by their entropies.

    Numbers as large as 2^30 (float32; float64: 2^59) are 64 nats or more apart. Columns below the maximum then have a
    probability of 0, and lse = maximum + H has no digits for H, the logarithm of the number of ties: where the part has
    the maximum, the difference of the entropies is its share.
    """
    epsilon = torch.finfo(precision).eps
    apart = torch.where(part == whole, 0.0, (part - entropy_of_part) - (whole - entropy_of_whole))  # also of inf
    same_maximum = (whole.abs() >= 128 / epsilon) & (apart > -epsilon / 8 * whole.abs())
    return torch.where(same_maximum, entropy_of_part - entropy_of_whole, part - whole)
