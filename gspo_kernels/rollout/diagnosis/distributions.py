"""Which distribution old log-probabilities are of: fits of a temperature and of sampling filters to some rows.

Fits look at a sample of rows, whose logits are read as float32. What was found is then computed for all rows by the
function that the losses use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...losses.from_logits import token_logprobs
from ...rows.kept import KeptTokens

SAMPLED = 1 << 24  # logits of the sample
MOST_ROWS = 4096
MOST = 20.0  # nats: a larger difference counts as this
COLUMNS = 1024  # most likely columns of a row that filters are fitted to
LOWEST, HIGHEST, STEPS = 0.1, 10.0, 47  # temperatures that are tried first
TOP_P = (*(x / 100 for x in range(95, 0, -5)), *(x / 100 for x in range(99, 49, -1) if x % 5), 0.995, 0.999)
ROUND = 19  # of these, that are tried together with top_k
TOP_K = (*range(2, 11), 20, 30, 40, 50, 64, 100, 200, 500)
MIN_P = (0.1, 0.05, 0.2, 0.01, 0.02, 0.3, 0.5, 0.03, 0.15, 0.25, 0.005, 0.001)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 0.5, 1.2, 1.1, 0.4, 0.3, 1.5)  # tried together with filters


class Distribution:
    """Log-probabilities of tokens under the trainer's logits: at any temperature, over any kept columns."""

    def __init__(
        self,
        logits: Tensor,
        token_ids: Tensor,
        temperature: float | Tensor,
        kept: KeptTokens | None,
        vocab_size: int,
    ) -> None:
        self.logits, self.shape = logits.detach(), token_ids.shape
        self.token_ids = token_ids.reshape(-1).long()
        self.temperature, self.kept, self.vocab_size = temperature, kept, vocab_size
        self._known = dict[int, Tensor]()

    def logprobs(self, shift: int = 0) -> Tensor:
        """[N] float64 as the loss computes them, of `token_ids[t + shift]`; NaN where there is no such column."""
        if shift not in self._known:
            self._known[shift] = self.at(self.temperature, shift, self.kept)
        return self._known[shift]

    def at(
        self, temperature: float | Tensor, shift: int = 0, kept: KeptTokens | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """The same at another temperature, over these columns."""
        ids = self.token_ids.roll(-shift) if ids is None else ids
        there = (ids >= 0) & (ids < self.vocab_size)
        if kept is not None:
            there = there & _is_kept(kept, ids)
        if isinstance(temperature, Tensor) and temperature.shape == (*self.shape[:1], 1):
            temperature = temperature.expand(self.shape)
        arrays = ids.masked_fill(~there, 0).view(self.shape)
        with torch.no_grad():
            if kept is None:
                found = token_logprobs(
                    self.logits,
                    arrays,
                    mask=there.view(self.shape),
                    temperature=temperature,
                    vocab_size=self.vocab_size,
                )
            else:
                found = token_logprobs(
                    self.logits, arrays, mask=there.view(self.shape), temperature=temperature,
                    vocab_size=self.vocab_size, kept=kept, full_distribution=False,
                ).kept  # fmt: skip
        return torch.where(there, found.logprobs.reshape(-1).double(), torch.nan)

    def most_likely(self) -> Tensor:
        """[N] int64: the column with the largest logit."""
        return self.logits[..., : self.vocab_size].argmax(-1).reshape(-1)

    def filtered(self, temperature: float | Tensor, mask: Tensor, **filters: Any) -> Tensor:
        """[N], over the columns that the filters keep; NaN where they do not keep the token."""
        kept = KeptTokens.from_logits(
            self.logits, temperature=temperature, mask=mask.view(self.shape), vocab_size=self.vocab_size, **filters
        )
        return self.at(temperature, kept=kept)

    def rounded(self, dtype: torch.dtype, mask: Tensor) -> Tensor:
        """[N], of logits that are rounded to `dtype` first; NaN where masked. Some rows at a time."""
        found = torch.full_like(mask, torch.nan, dtype=torch.float64)
        there = mask & (self.token_ids >= 0) & (self.token_ids < self.vocab_size)
        given = self.temperature
        by_row = given.detach().expand(self.shape).reshape(-1) if isinstance(given, Tensor) else None
        for rows in there.nonzero()[:, 0].split(max(1, SAMPLED // max(1, self.vocab_size))):
            with torch.no_grad():
                some = token_logprobs(
                    self.rows_of(rows).to(dtype), self.token_ids[rows],
                    temperature=self.temperature if by_row is None else by_row[rows],
                )  # fmt: skip
            found[rows] = some.logprobs.double()
        return found

    @property
    def temperature_is_not_1(self) -> bool:
        return isinstance(self.temperature, Tensor) or self.temperature != 1.0

    def rows_of(self, rows: Tensor) -> Tensor:
        """[rows, V] in float32, or float64 for such logits."""
        if self.logits.ndim == 3:
            length = self.shape[1]
            found = self.logits[rows // length, rows % length]
        else:
            found = self.logits[rows]
        found = found[..., : self.vocab_size]
        return found if found.dtype == torch.float64 else found.float()


def _is_kept(kept: KeptTokens, ids: Tensor) -> Tensor:
    """[N] bool: whether a row keeps this id, or all."""
    row_of = torch.arange(ids.numel(), device=ids.device).repeat_interleave(kept.counts)
    found = kept.counts == 0
    found[row_of[kept.token_ids == ids[row_of]]] = True
    return found


class Temperature(NamedTuple):
    value: float  # in place of the given number, or what a given tensor is multiplied by
    mean: float  # difference that remains in the sample, nats


class Filter(NamedTuple):
    options: dict[str, float]  # of `KeptTokens.from_logits`
    temperature: float  # as in `Temperature`
    mean: float
    rows: Tensor  # [R] int64, those of the sample that were compared
    logprobs: Tensor  # [R] float64, of their tokens


class Sample:
    """Some rows of the logits, to fit temperatures and filters to."""

    def __init__(self, distribution: Distribution, rows: Tensor) -> None:
        """rows: [R] int64, numbers of rows that may be compared."""
        most = max(1, min(MOST_ROWS, SAMPLED // max(1, distribution.vocab_size)))
        if rows.numel() > most:
            rows = rows[torch.linspace(0, rows.numel() - 1, most, device=rows.device, dtype=torch.float64).long()]
        self.distribution, self.rows = distribution, rows
        self.z = distribution.rows_of(rows)  # [R, V]
        given = distribution.temperature
        self.is_number = not isinstance(given, Tensor) or given.ndim == 0
        if self.is_number:
            self.unit = self.z.new_ones(rows.numel())  # [R], times `value` of a Temperature
        else:
            assert isinstance(given, Tensor)
            self.unit = given.detach().expand(distribution.shape).reshape(-1)[rows].to(self.z.dtype)
        steps = torch.linspace(
            math.log(LOWEST), math.log(HIGHEST), STEPS, device=rows.device, dtype=torch.float64
        ).exp()  # fmt: skip
        self.grid = steps.tolist()
        self.lse = torch.stack([self._lse(x) for x in self.grid])  # [STEPS, R]

    @property
    def given(self) -> float:
        """The loss's temperature, as the value of a `Temperature`."""
        return float(self.distribution.temperature) if self.is_number else 1.0

    def as_argument(self, value: float) -> float | Tensor:
        return value if self.is_number else self.distribution.temperature * value

    def _lse(self, value: float) -> Tensor:
        return (self.z / (self.unit * value)[:, None]).logsumexp(-1).double()

    def _columns(self, shift: int) -> Tensor:
        """[R] float64: the logit of each row's token; NaN where there is no such column."""
        ids = self.distribution.token_ids.roll(-shift)[self.rows]
        there = (ids >= 0) & (ids < self.distribution.vocab_size)
        logit = self.z.gather(1, ids.masked_fill(~there, 0)[:, None])[:, 0].double()
        return torch.where(there, logit, torch.nan)

    def temperature(self, old: Tensor, counted: Tensor, shift: int = 0) -> Temperature | None:
        """The temperature at which these old log-probabilities [N] differ least. None: too few to compare."""
        target, logit = old[self.rows], self._columns(shift)
        use = counted[self.rows] & target.isfinite() & logit.isfinite()
        if int(use.sum()) < 8:
            return None

        def difference(value: float, lse: Tensor) -> float:
            r = (logit / (self.unit.double() * value) - lse - target)[use]
            return float(r.abs().nan_to_num(MOST).clamp(max=MOST).mean())

        means = [difference(x, lse) for x, lse in zip(self.grid, self.lse, strict=True)]
        best = min(range(STEPS), key=means.__getitem__)
        if means[best] > 0.5:  # a step of the grid moves no log-probability by so much
            return Temperature(self.grid[best], means[best])
        low, high = self.grid[max(0, best - 1)], self.grid[min(STEPS - 1, best + 1)]
        return Temperature(*_least(lambda x: difference(x, self._lse(x)), low, high))

    def difference_at(self, value: float, old: Tensor, counted: Tensor, shift: int = 0) -> float:
        target, logit = old[self.rows], self._columns(shift)
        r = (logit / (self.unit.double() * value) - self._lse(value) - target)[counted[self.rows]]
        return float(r.abs().nan_to_num(MOST).clamp(max=MOST).mean())

    def likeliest_temperature(self, counted: Tensor) -> tuple[float, float] | None:
        """At which these tokens are most likely, and its standard error: what they were sampled at, if from the rest.

        Maximum likelihood, with the curvature of a parabola through three values of 1 / temperature.
        """
        use = counted[self.rows]
        logit = self._columns(0)
        use = use & logit.isfinite()
        if int(use.sum()) < 64:
            return None

        def cost(value: float) -> float:
            return float((self._lse(value) - logit / (self.unit.double() * value))[use].sum())

        value, least = _least(cost, 0.2, 5.0)
        step = 0.02
        curvature = (cost(1 / (1 / value * (1 + step))) + cost(1 / (1 / value * (1 - step))) - 2 * least) / step**2
        return (value, value / math.sqrt(curvature)) if curvature > 1.0 else None

    def filters(self, old: Tensor, counted: Tensor, values: tuple[float, ...]) -> Iterator[Filter]:
        """The best of each kind of filter, at the best of these temperatures.

        A filter divides all probabilities that it keeps by their sum: new - old is the logarithm of that sum.
        """
        logit, target = self._columns(0), old[self.rows]
        use = counted[self.rows] & target.isfinite() & logit.isfinite()
        if int(use.sum()) < 8:
            return
        logit, target, rows, unit = logit[use], target[use], self.rows[use], self.unit[use].double()
        ordered = self.z[use].topk(min(COLUMNS, self.z.shape[1])).values.double()  # [R, K], descending
        rank = (self.z[use] > logit[:, None]).sum(-1)  # [R], of the token
        best = dict[str, Filter]()
        for value in values:
            lse = self._lse(value)[use]
            probabilities = (ordered / (unit * value)[:, None] - lse[:, None]).exp()
            mass = probabilities.cumsum(-1).clamp(max=1.0)  # [R, K], of the n + 1 most likely columns
            logprob = logit / (unit * value) - lse
            for kind, (options, size) in _sets(probabilities, mass).items():
                known = size <= mass.shape[1]  # [R, H]; a larger set has columns that were not sorted
                over_set = logprob[:, None] - mass.gather(1, size.clamp(max=mass.shape[1]) - 1).log()
                left = (over_set - target[:, None]).abs() + (rank[:, None] >= size)  # 1 for a token that is not kept
                enough = known.sum(0) >= 8
                means = torch.where(known, left.clamp(max=MOST), 0.0).sum(0) / known.sum(0).clamp(min=1)
                means = torch.where(enough, means, MOST)
                h = int(means.argmin())
                if kind not in best or float(means[h]) < 0.9 * best[kind].mean - 1e-9:
                    best[kind] = Filter(options[h], value, float(means[h]), rows, over_set[:, h])
        yield from best.values()


def _sets(probabilities: Tensor, mass: Tensor) -> dict[str, tuple[list[dict[str, float]], Tensor]]:
    """Of each kind the filters that are tried, H, and how many columns each keeps of every row, [R, H]."""
    rows, columns = mass.shape
    like: dict[str, Any] = {"dtype": mass.dtype, "device": mass.device}
    top_k = [k for k in TOP_K if k < columns]
    k = torch.tensor(top_k, dtype=torch.int64, device=mass.device)
    p, fewer_p = torch.tensor(TOP_P, **like), torch.tensor(TOP_P[:ROUND], **like)
    m = torch.tensor(MIN_P, **like)

    whole = bool((mass[:, -1] > 1 - 1e-6).all())  # all of the vocabulary was sorted, or all that counts
    most_known = columns if whole else columns + 1

    def at_least(share: Tensor) -> Tensor:  # [R, H]: columns until their probabilities are this together
        return torch.searchsorted(mass, share) + 1

    found: dict[str, tuple[list[dict[str, float]], Tensor]] = {
        "top_p": ([{"top_p": x} for x in TOP_P], at_least(p.expand(rows, -1).contiguous()).clamp(max=most_known)),
        "min_p": (
            [{"min_p": x} for x in MIN_P],
            torch.searchsorted(-probabilities, -m * probabilities[:, :1], right=True).clamp(min=1),
        ),
    }
    if top_k:
        within = (mass[:, k - 1, None] * fewer_p).flatten(1)  # [R, K P]
        most = k[:, None].expand(-1, ROUND).flatten()
        found["top_k"] = [{"top_k": x} for x in top_k], k.expand(rows, -1)
        pairs = [{"top_k": x, "top_p": y} for x in top_k for y in TOP_P[:ROUND]]
        found["top_k, top_p"] = pairs, torch.minimum(at_least(within), most)
    return {kind: found[kind] for kind in ("top_k", "top_p", "min_p", "top_k, top_p") if kind in found}


def _least(function: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    """Where a function with one minimum is least, by golden sections of the logarithm, and its value."""
    a, b = math.log(low), math.log(high)
    ratio = (math.sqrt(5) - 1) / 2
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    at_c, at_d = function(math.exp(c)), function(math.exp(d))
    while b - a > 1e-6:
        if at_c <= at_d:
            b, d, at_d = d, c, at_c
            c = b - ratio * (b - a)
            at_c = function(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + ratio * (b - a)
            at_d = function(math.exp(d))
    return (math.exp(c), at_c) if at_c <= at_d else (math.exp(d), at_d)
