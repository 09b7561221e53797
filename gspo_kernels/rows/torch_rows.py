"""The row mathematics in plain torch, for any device, dtype and strides: the fallback and the kernels' reference.

Follows csrc/row_math.h: the target stays out of the sums, sums are taken in float64, and `log p = -softplus(d)` with
`d = logsumexp(others) - z_target`, so a confident row keeps its relative accuracy. The gradient finds the
row's maximum again and is relative to it, so logits may be as large as their dtype allows. Works through blocks of
rows, so the extra memory is one block for any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .types import ABSENT, Rows, RowStats, TokenSlope, Upstream, capped, empty_stats, log_share
from .types import scaled_logits as scaled_logits

name = "reference"
honours: frozenset[str] = frozenset({"row_indices", "tanh_scale", "kept"})
has_kernels = False
runs_stage_in_triton = False
computes_slopes = False
_BLOCK_ELEMENTS = 1 << 22


def unsupported_reasons(logits: Tensor) -> list[str]:
    return []


def reason_not_default(logits: Tensor) -> str:
    return ""


def describe() -> str:
    return "plain torch"


def forward(rows: Rows) -> RowStats:
    stats = empty_stats(rows)
    for block in _blocks(rows):
        active, target = block.active(), block.target_logits()
        logprob, entropy, lse = _statistics(block.others(), target, block.temperatures())
        block.put(stats.logprobs, torch.where(active, logprob, 0.0))
        block.put(stats.lse, torch.where(active, lse, 0.0))
        block.put(stats.entropy, torch.where(active, entropy, 0.0))
    return stats


def backward(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
    arrays = upstream.by_statistic()
    for block in _blocks(rows):
        g_l, g_h, g_lse = (block.get(g) for g in arrays)
        active = block.active() & ((g_l != 0) | (g_h != 0) | (g_lse != 0))
        temperature, row_lse, row_entropy = block.temperatures(), block.get(stats.lse), block.get(stats.entropy)

        base = block.logits.amax(-1)
        log_p = _below(block.logits, base, temperature)  # but for `lost`
        p = log_p.exp()
        lost = p.sum(-1, dtype=torch.float64).log() - block.log_share(row_lse, row_entropy)
        lost = torch.where((base == -torch.inf) & (row_lse > -torch.inf), 0.0, lost)  # a shard without logits
        constant = (g_lse - g_l - g_h * (row_entropy - lost)) * torch.exp(-lost) / temperature
        slope = -g_h * torch.exp(-lost) / temperature
        through_entropy = torch.where(p > 0, p * log_p, p) * slope[:, None].to(p.dtype)
        result = p * constant[:, None].to(p.dtype) + through_entropy

        log_p_target = block.get(stats.logprobs)
        p_target = log_p_target.exp()
        through_p = torch.where(p_target > 0, p_target * (g_lse - g_h * (log_p_target + row_entropy)), p_target)
        at_target = (through_p - g_l * torch.expm1(log_p_target)) / temperature
        result.scatter_(1, block.targets[:, None], at_target[:, None].to(result.dtype))

        if rows.tanh_scale is not None:
            result = result * block.slope()
        block.put_gradient(gradient, _flush(torch.where(active[:, None], result, 0.0)))


def forward_backward(rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None) -> RowStats:
    assert slope is None
    stats = forward(rows)
    backward(rows, stats, upstream, gradient)
    return stats


def scale(values: Tensor, factor: Tensor) -> None:
    for part in values:
        part.copy_(_flush((part if part.dtype == torch.float64 else part.float()) * factor))


def _flush(gradient: Tensor) -> Tensor:
    """Subnormals as zero: they slow every later matrix product by an order of magnitude."""
    return torch.where(gradient.abs() < torch.finfo(torch.float32).tiny, 0.0, gradient)


def _statistics(others: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """others: [rows, vocab] logits with -inf for the target; target, temperature: [rows] float64."""
    base = others.amax(-1)
    t = _below(others, base, temperature)
    base = torch.where(base == -torch.inf, 0.0, base).double()
    weights = t.exp()
    total = weights.sum(-1, dtype=torch.float64)
    rest = base / temperature + total.log()
    target = torch.where(target == torch.inf, torch.nan, target)  # a caller's bug, and not a certainty
    d = (base - target) / temperature + total.log()
    logprob = -_softplus(d)
    lse = torch.logaddexp(rest, target / temperature)  # -inf for a row of -inf, where d is NaN
    log_rest = -_softplus(-d)  # log of the probability that is not the target's
    weighted = torch.where(weights > 0, weights * t, weights).sum(-1, dtype=torch.float64)
    entropy_of_rest = torch.where(total > 0, total.log() - weighted / total, total)
    p, p_rest = logprob.exp(), log_rest.exp()
    entropy = torch.where(p > 0, -p * logprob, p) + torch.where(
        p_rest > 0, p_rest * (entropy_of_rest - log_rest), p_rest
    )
    return logprob, entropy, lse


def _below(logits: Tensor, base: Tensor, temperature: Tensor) -> Tensor:
    """(logits - base) / temperature, in the logits' dtype; -inf where all of a row are."""
    base = torch.where(base == -torch.inf, 0.0, base)
    return (logits - base[:, None]) / temperature[:, None].to(logits.dtype)


def _softplus(d: Tensor) -> Tensor:
    """log(1 + exp d) without torch's shortcut to d above a threshold, and 0 at -inf."""
    return d.clamp(min=0.0) + torch.log1p(torch.exp(-d.abs()))


class _Block:
    """A run of rows, flattened to [rows, columns] in the precision the arithmetic runs in.

    Of rows that keep some columns, the logits of all others are -inf. They have one column more, of -inf as well: the
    target of a row whose token is on another rank.
    """

    def __init__(self, rows: Rows, outer: int, begin: int, end: int) -> None:
        self.rows, self.outer, self.span = rows, outer, slice(begin, end)
        self._entries = None if rows.kept_ids is None else _Entries(rows, outer, begin, end)
        if rows.kept_form == "gathered":
            assert self._entries is not None
            logits = rows.logits[0, 0].new_zeros(self._entries.shape)
            logits[self._entries.at] = rows.logits[0, 0, self._entries.span]
        elif rows.row_indices is None:
            logits = rows.logits[outer, self.span, : rows.vocab_size]
        else:
            logits = rows.logits[0, rows.row_indices[self.span], : rows.vocab_size]
        self._given = logits
        logits = logits if rows.tanh_scale is None else capped(rows, logits)
        self.logits = logits if logits.dtype == torch.float64 else logits.float()
        token_ids = rows.token_ids[outer, self.span]
        self.targets = torch.where(self.active(), token_ids, 0)  # columns; a masked row's id may be anything
        if self._entries is not None:
            self.logits, self.targets = self._entries.alone(self.logits, token_ids)

    def slope(self) -> Tensor:
        """The derivative of tanh(tanh_scale * logit) by the logit, also where it is small."""
        assert self.rows.tanh_scale is not None
        e = torch.exp(-2.0 * (self._given.double() * self.rows.tanh_scale).abs())
        slope = 4.0 * self.rows.tanh_scale * e / (1.0 + e).square()
        return torch.nn.functional.pad(slope, (0, self.logits.shape[1] - slope.shape[1]))

    def active(self) -> Tensor:
        if self.rows.mask is None:
            return torch.ones(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)
        return self.rows.mask[self.outer, self.span]

    def temperatures(self) -> Tensor:
        if self.rows.temperature.ndim == 0:
            return self.logits.new_full((self.logits.shape[0],), float(self.rows.temperature), dtype=torch.float64)
        return self.rows.temperature[self.outer, self.span].double()

    def target_logits(self) -> Tensor:
        return self.logits.gather(1, self.targets[:, None])[:, 0].double()

    def others(self) -> Tensor:
        return self.logits.scatter(1, self.targets[:, None], -torch.inf)

    def log_share(self, row_lse: Tensor, row_entropy: Tensor) -> Tensor:
        """Logarithm of these columns' share of the row. The logits may be a shard of it; 0 where they are all of it."""
        _, entropy, lse = _statistics(self.others(), self.target_logits(), self.temperatures())
        return log_share(lse, row_lse, entropy, row_entropy, self.logits.dtype)

    def get(self, array: Tensor | None) -> Tensor:
        if array is None:
            return self.logits.new_zeros(self.logits.shape[0], dtype=torch.float64)
        return array[self.outer, self.span].double()

    def put(self, array: Tensor, values: Tensor) -> None:
        array[self.outer, self.span] = values.to(array.dtype)

    def put_gradient(self, gradient: Tensor, values: Tensor) -> None:
        if self._entries is None:
            self.put(gradient[..., : self.rows.vocab_size], values)
            return
        values = torch.where(self._entries.outside, 0.0, values)  # also of a row that is NaN
        if self.rows.kept_form == "gathered":
            gradient[0, 0, self._entries.span] = values[self._entries.at].to(gradient.dtype)
        else:
            self.put(gradient[..., : self.rows.vocab_size], values[:, :-1])


class _Entries:
    """The entries of a run of rows, and their place in a matrix [rows, columns + 1] of logits."""

    def __init__(self, rows: Rows, outer: int, begin: int, end: int) -> None:
        assert rows.kept_ids is not None and rows.kept_offsets is not None
        first = outer * rows.token_ids.shape[1]
        offsets = rows.kept_offsets[first + begin : first + end + 1].clamp(0, rows.kept_ids.shape[0])
        self.counts = offsets.diff()
        self.span = slice(int(offsets[0]), int(offsets[-1]))  # reads: this backend may wait for its device
        self._ids = rows.kept_ids[self.span].long()
        row_of = torch.arange(end - begin, device=offsets.device).repeat_interleave(self.counts)
        self._keeps_all = (self.counts == 0) & (rows.kept_form == "some")
        if rows.kept_form == "gathered":
            columns = torch.arange(self._ids.shape[0], device=offsets.device) - (offsets[:-1] - offsets[0])[row_of]
            width = int(self.counts.max()) if end > begin else 0
        else:
            columns, width = self._ids.clamp(0, rows.vocab_size - 1), rows.vocab_size
        self.shape, self.at = (end - begin, width), (row_of, columns)
        self._bad = torch.zeros(end - begin, dtype=torch.bool, device=offsets.device)
        if rows.kept_form != "gathered":
            wrong = (self._ids != ABSENT) & (columns != self._ids)
            self._bad.index_put_((row_of[wrong],), self._bad.new_ones(()))
        self.outside = torch.ones(end - begin, width + 1, dtype=torch.bool, device=offsets.device)
        here = self._ids != ABSENT
        self.outside[row_of[here], columns[here]] = False
        self.outside[:, :-1] &= ~self._keeps_all[:, None]

    def alone(self, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """([rows, columns + 1], the column of each row's token); -inf outside; NaN where the token is not kept."""
        row_of, columns = self.at
        logits = torch.nn.functional.pad(logits, (0, 1)).masked_fill(self.outside, -torch.inf)
        is_token = (self._ids != ABSENT) & (self._ids == token_ids[row_of])
        targets = torch.full_like(token_ids, self.shape[1])
        targets[row_of[is_token]] = columns[is_token]
        missing = (targets == self.shape[1]) & (token_ids != ABSENT)
        targets = torch.where(self._keeps_all, token_ids.clamp(0, self.shape[1]), targets)
        bad = (self._bad | missing) & ~self._keeps_all
        return logits.masked_fill(bad[:, None], torch.nan), targets


def _blocks(rows: Rows) -> Iterator[_Block]:
    outer, inner = rows.token_ids.shape
    step = max(1, _BLOCK_ELEMENTS // max(rows.vocab_size, 1))
    for i in range(outer):
        for begin in range(0, inner, step):
            yield _Block(rows, i, begin, min(begin + step, inner))
