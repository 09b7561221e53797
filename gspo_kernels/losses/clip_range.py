"""A clip range that fits a training: the bounds at which a given share of its recent responses would be clipped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.collectives import ranks_of
from .clipped import GMPO
from .objectives import Objective
from .recent_responses import KINDS, RecentResponses, Settings, recent_responses
from .weighted import CISPO

SIDES = ("low", "high")
MAX_LOG_RATIO = 20.0  # the losses' default: a bound above exp(20) clips nothing, and one below exp(-20) almost nothing


@dataclass(frozen=True)
class ClipRange:
    """What `suggest_clip_range` returns. Low is the side of negative advantages, high that of positive ones."""

    eps_low: float  # the range of the ratio is from 1 - eps_low to 1 + eps_high
    eps_high: float
    ratio_of: str  # what has a ratio: "sequence" or "token"
    share: float  # of the responses of a side that lie outside
    responses_low: int  # with a negative advantage: eps_low is their quantile
    responses_high: int  # with a positive advantage
    kept_low: bool  # whether eps_low is that of `current`, because these responses say nothing of it
    kept_high: bool
    noise_low: float | None = None  # share of these responses that `noise` alone would put below 1 - eps_low; None:
    noise_high: float | None = None  # without `noise`, or without a response


def suggest_clip_range(
    log_ratio: Tensor | Sequence[Tensor],
    advantages: Tensor | Sequence[Tensor],
    share: float = 0.15,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | Sequence[Tensor] | None = None,
    ratio_of: str | None = None,
    current: Any = None,
    noise: float | Tensor | None = None,
    cp_group: Any = None,
    group: Any = None,
) -> ClipRange:
    """The clip range that would have clipped `share` of the responses of recent updates, on each side of 1.

    GSPO, GSPO-token, GRPO and PPO clip a ratio above `1 + eps_high` if its advantage is positive, and below
    `1 - eps_low` if it is negative. With R_i the log-ratio of response i,

        eps_high = exp(q) - 1,    q: the (1 - share) quantile of  R_i  over the responses with a positive advantage
        eps_low = 1 - exp(-q),    q: the (1 - share) quantile of -R_i  over the responses with a negative advantage

    By token ratios, R_i is that of the response's most extreme token that has an advantage of this sign: the response
    counts if any of its tokens is clipped. So `share` is one of responses for GRPO too, whose `stats.clip_fraction` is
    one of tokens. Responses without a token, and those of advantage 0, do not count. The dual clip does not count.

    Pass all updates of the last rollouts, also the first of each, whose ratios are 1: then `share` is the mean over
    updates. This is no loss: it waits for the device once a call, or twice with `group`.

    Args:
        log_ratio: float32 or float64, `stats.log_ratio` of an update or a list of them: [S] of sequences, [B, T] of
            tokens, or packed [N] of tokens with `cu_seqlens`. Log-ratios of tokens are also
            `stats.logprobs - old_logprobs`. Those beyond -20 and 20, also infinite ones, count as -20 and 20. NaN is
            refused, unless masked.
        advantages: the losses' own, one per sequence or, with log-ratios of tokens, per token. A list if `log_ratio` is
            one.
        share: of the responses of a side, above 0 and below 1.
        mask: one per token, True (or 1) where it counts; or a list. With log-ratios of sequences it is needed for their
            lengths alone.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N; or a list.
        ratio_of: what the range is for, "sequence" (GSPO, GSPO-token) or "token" (GRPO, PPO). None: what `current`
            clips, if it is an objective or a `ClipRange`; else what `log_ratio` has by its shape. "sequence" with
            log-ratios of tokens takes their mean over each response, as GSPO does.
        current: the range in use, `(eps_low, eps_high)`, or an objective or a `ClipRange` that has them. It is kept on
            a side that says nothing: no response has that advantage; or the quantile is not beyond 1, as with
            on-policy updates alone; or the ratio there is below exp(-20) or above exp(20). None: such a side is a
            ValueError.
        noise: standard deviation in nats of the error of one token's log-probability, such as
            `rollout_mismatch(...).noise`, if `old_logprobs` are the engine's. It needs the lengths of responses: `mask`
            or `cu_seqlens`. Errors are taken as independent and normal. Their mean is -noise**2 / 2, minus the KL
            divergence from the engine to the trainer, which does not average out.
        cp_group: the ranks that share the tokens of each sequence, as in `policy_loss`; one collective.
        group: the data-parallel ranks, whose responses all count: two collectives, which every rank has to call, also
            one without a response or an update (an empty list). `noise` is their root mean square. All ranks get the
            same range.

    Returns: `ClipRange`.

    Warns:
        UserWarning: a side has fewer than 1 / share responses; or noise alone would clip at least half of `share` on a
            side: noise then has as large a part in the quantile as learning. See docs/engine-noise.md.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    share = _share(share)
    if ratio_of is not None:
        checks.choice("ratio_of", ratio_of, KINDS)
    low, high = _current(current)
    ratio_of = _ratio_of(ratio_of, current)
    batch = recent_responses(
        log_ratio, advantages, mask, cu_seqlens, ratio_of, noise, ranks_of("cp_group", cp_group),
        ranks_of("group", group), Settings(share, low, high),
    )  # fmt: skip
    reaches = batch.low.clamp(max=MAX_LOG_RATIO), batch.high.clamp(max=MAX_LOG_RATIO)
    sides = [
        _side(name, reach[reach > -torch.inf], batch.lengths[reach > -torch.inf], batch, share, kept)
        for name, reach, kept in zip(SIDES, reaches, (low, high), strict=True)
    ]
    for text in _warnings(sides, share, batch.noise):
        warnings.warn(text, stacklevel=2)
    below, above = sides
    return ClipRange(
        below.eps, above.eps, batch.ratio_of, share, below.responses, above.responses, below.kept, above.kept,
        below.noise, above.noise,
    )  # fmt: skip


# ---- arguments


def _share(share: Any) -> float:
    meaning = "the share of the responses of a side to clip"
    found = checks.number("share", share, meaning, above=0.0)
    if found >= 1:
        percent = f". {found:g}% is {found / 100:g}" if 1 < found < 100 else ""
        raise ValueError(f"share: expected {meaning}, a number above 0 and below 1; got {found}{percent}")
    return float(found)


def _current(current: Any) -> tuple[float | None, float | None]:
    if current is None:
        return None, None
    if isinstance(current, (GMPO, CISPO)):
        why = "is one of the log-ratio" if isinstance(current, GMPO) else "holds for advantages of either sign"
        raise ValueError(
            "current: expected the range of a loss that clips a ratio on the side that the advantage penalizes (GSPO, "
            f"GSPOToken, GRPO, PPO); got {current}, whose range {why}"
        )
    if hasattr(current, "eps_low") and hasattr(current, "eps_high") and not isinstance(current, type):
        pair = current.eps_low, current.eps_high
    elif isinstance(current, (tuple, list)) and len(current) == 2:
        pair = current[0], current[1]
    else:
        raise TypeError(
            "current: expected (eps_low, eps_high), or an objective or a ClipRange that has them; got "
            f"{checks.describe(current)}"
        )
    names = ("current: eps_low", "current: eps_high")
    low, high = (
        checks.number(name, x, "a bound to keep", at_least=0.0, or_infinite=True)
        for name, x in zip(names, pair, strict=True)
    )
    return float(low), float(high)


def _ratio_of(ratio_of: str | None, current: Any) -> str | None:
    """What the range is for, if an argument says it."""
    if isinstance(current, Objective):
        by_sequence = "sequence" in (current.ratio_of, current.depends_on)  # GSPO-token's ratio has a sequence's value
        of_current = "sequence" if by_sequence else "token" if current.depends_on == "token" else None
    else:
        of_current = current.ratio_of if isinstance(current, ClipRange) else None
    if None not in (ratio_of, of_current) and ratio_of != of_current:
        raise ValueError(
            f"ratio_of: expected {of_current!r} or None, because that is what current, {current}, clips; got "
            f"{ratio_of!r}. To keep its numbers in any case, pass current as (eps_low, eps_high)"
        )
    return ratio_of or of_current


# ---- a side


class _Side(NamedTuple):
    """The fields of `ClipRange` of one side."""

    name: str  # one of SIDES
    eps: float
    responses: int
    kept: bool
    noise: float | None


def _side(
    name: str, reach: Tensor, lengths: Tensor, batch: RecentResponses, share: float, current: float | None
) -> _Side:
    """`reach`, `lengths`: [responses] of this side, float64."""
    found = _eps(name, reach, share)
    if isinstance(found, str) and current is None:
        raise ValueError(
            f"current: expected a range to keep, such as GSPO() or (3e-4, 4e-4), because nothing determines "
            f"eps_{name}: {found}; got None. Or pass the log-ratios of other updates"
        )
    eps, kept = (current, True) if isinstance(found, str) else (found, False)
    assert eps is not None
    some = batch.noise is not None and len(reach) > 0
    by_noise = _by_noise(name, lengths, eps, batch.noise or 0.0, batch.ratio_of) if some else None
    return _Side(name, eps, len(reach), kept, by_noise)


def _eps(name: str, reach: Tensor, share: float) -> float | str:
    """The bound's distance from 1; or why there is none."""
    responses, count = _responses(name), len(reach)
    if not count:
        return f"there are no {responses}"
    bound = _quantile(reach, 1 - share)
    if bound <= 0:
        where, beyond = "below" if name == "low" else "above", int((reach > 0).sum())
        return (
            f"{beyond} of the {count} {responses} have a ratio {where} 1, too few for a share of {share:g}, as with "
            "on-policy updates alone"
        )
    if bound < MAX_LOG_RATIO:
        return float(torch.expm1(bound) if name == "high" else -torch.expm1(-bound))
    where = f"at most exp(-{MAX_LOG_RATIO:g})" if name == "low" else f"at least exp({MAX_LOG_RATIO:g})"
    return (
        f"{int((reach >= MAX_LOG_RATIO).sum())} of the {count} {responses} have a ratio of {where}, which usually "
        "means that old_logprobs belong to another policy or to other tokens"
    )


def _quantile(values: Tensor, q: float) -> Tensor:
    """As torch.quantile, which refuses more than 2**24 numbers."""
    position = q * (len(values) - 1)
    below = math.floor(position)
    ordered = values.sort().values
    return torch.lerp(ordered[below], ordered[min(below + 1, len(values) - 1)], position - below)


def _by_noise(name: str, lengths: Tensor, eps: float, noise: float, ratio_of: str) -> float:
    """The share of responses of these lengths that errors of mean -noise**2 / 2 alone put outside of the bound."""
    if noise == 0:
        return 0.0
    if name == "low":
        bound, mean = math.inf if eps >= 1 else -math.log1p(-eps), noise**2 / 2
    else:
        bound, mean = math.log1p(eps), -(noise**2) / 2
    deviation = noise / lengths.sqrt() if ratio_of == "sequence" else torch.full_like(lengths, noise)
    tail = torch.special.erfc((bound - mean) / (deviation * math.sqrt(2))) / 2
    if ratio_of == "token":  # of any token of the response
        tail = -torch.expm1(lengths * torch.log1p(-tail))
    return float(tail.mean())


def _warnings(sides: list[_Side], share: float, noise: float | None) -> Iterator[str]:
    for side in sides:
        if not side.kept and side.responses < 1 / share:
            yield (
                f"advantages: expected at least {math.ceil(1 / share)} {_responses(side.name)} for a share of "
                f"{share:g}; got {side.responses}, so eps_{side.name} depends on one or two of them. Pass the "
                "log-ratios of more updates"
            )
    filled = [side for side in sides if side.noise is not None and side.noise >= share / 2]
    if filled:
        found = " and ".join(f"{side.noise:.0%} at eps_{side.name} = {side.eps:.3g}" for side in filled)
        yield (
            f"noise: expected errors that alone clip less than half of the share of {share:g}; got {noise:.3g} nats "
            f"per token, which clip {found}. Recompute old_logprobs with the trainer, or lower the engine's noise: see "
            "docs/engine-noise.md"
        )


def _responses(name: str) -> str:
    return f"responses with a {'negative' if name == 'low' else 'positive'} advantage"
