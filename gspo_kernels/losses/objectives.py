"""The losses. An objective turns log-ratios and advantages into one number per token; everything else is shared.

Write your own by subclassing `Objective`: one method, `terms`. Gradients come from autograd, so keep values that should
not be differentiated detached, and guard before an unsafe operation (`at_most` before exp): then so is the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..layout import Layout
from ..scalars import run_time
from .reduction import AGGREGATIONS


@dataclass(frozen=True)
class Terms:
    """What an objective says of a batch. A unit is what has a ratio: a sequence or a token."""

    loss: Tensor  # per unit, to be minimised; before weights, KL, entropy and aggregation. A sequence's: for each token
    log_ratio: Tensor  # per unit: log of its importance ratio
    clipped_low: Tensor | None = None  # bool per unit: held at the lower bound, no gradient
    clipped_high: Tensor | None = None  # bool per unit: held at an upper bound, no gradient


class Objective:
    """Base of all objectives.

    NaN in a log-probability (old, current, or reference with `beta`) makes its log-ratio NaN. Which gradients become
    NaN is what `terms` makes of that; torch.clamp would hide it from them.

    Attributes:
        ratio_of: what has a ratio, "sequence" or "token": the unit that `stats` counts.
        advantages_per_token: whether an advantage per token makes sense; `terms` then always gets [tokens].
        aggregation: the default of `aggregation=`.
        together: what `terms` of a token depends on: that "token" alone, its "sequence", or the whole "batch", which
            is always right. From hidden states a loss is computed in parts, and the less is needed together, the less
            is computed twice; with less than `terms` depends on, gradients are wrong.
        by_sequence_alone: whether `terms` come from sums over each sequence and nothing else, and `ratio_of` is
            "sequence". Under context parallelism the gradient through a sum then crosses no ranks.
    """

    ratio_of: ClassVar[str] = "token"
    advantages_per_token: ClassVar[bool] = True
    aggregation: ClassVar[str] = "sequence_mean"
    together: ClassVar[str] = "batch"
    by_sequence_alone: ClassVar[bool] = False

    def terms(self, log_ratio: Tensor, advantages: Tensor, layout: Layout, max_log_ratio: Tensor) -> Terms:
        """
        Args:
            log_ratio: [tokens] float64, `log pi(y_t) - log pi_old(y_t)`, finite; 0 where masked.
            advantages: [tokens] float64 if `advantages_per_token`, else [sequences].
            layout: sums, means and spreads over sequences; `layout.mask` is [tokens].
            max_log_ratio: above it a ratio saturates: constant, without gradient. A 0-d tensor.
        """
        raise NotImplementedError


_CHOICES = {
    "ratio_of": ("sequence", "token"),
    "together": ("token", "sequence", "batch"),
    "aggregation": AGGREGATIONS,
}  # fmt: skip


def check_objective(objective: Any) -> None:
    """Refuses what is no objective, and one whose attributes are misspelt: it would be computed as something else."""
    if not isinstance(objective, Objective):
        got = f"the class {objective.__name__}" if isinstance(objective, type) else checks.describe(objective)
        raise TypeError(f"objective: expected an Objective such as GSPO(); got {got}")
    if type(objective) in NAMED:
        return
    name = type(objective).__name__
    for attribute, allowed in _CHOICES.items():
        checks.choice(f"{name}.{attribute}", getattr(objective, attribute), allowed)
    for attribute in ("advantages_per_token", "by_sequence_alone"):
        value = getattr(objective, attribute)
        if not isinstance(value, bool):
            raise TypeError(f"{name}.{attribute}: expected True or False; got {checks.describe(value)}")
    if objective.by_sequence_alone and objective.ratio_of != "sequence":
        raise ValueError(f"{name}.by_sequence_alone: expected False, because ratio_of is 'token'; got True")


def check_terms(objective: Objective, terms: Any, *, tokens: int, sequences: int) -> None:
    """Refuses what `terms` returned if it is not as `Terms` says: shapes that broadcast would give another loss."""
    if type(objective) in NAMED:
        return
    name = f"{type(objective).__name__}.terms"
    if not isinstance(terms, Terms):
        raise TypeError(f"{name}: expected it to return Terms; got {checks.describe(terms)}")
    by_sequence = objective.ratio_of == "sequence"
    shape = (sequences if by_sequence else tokens,)
    meaning = f"one per {objective.ratio_of}, because ratio_of is {objective.ratio_of!r}"
    for field, dtype in (
        ("loss", torch.float64), ("log_ratio", torch.float64), ("clipped_low", torch.bool), ("clipped_high", torch.bool)
    ):  # fmt: skip
        value = getattr(terms, field)
        if value is None and dtype == torch.bool:
            continue
        checks.tensor(f"{name}: {field}", value, meaning)
        checks.shape(f"{name}: {field}", value, shape, meaning)
        if value.dtype != dtype:
            raise TypeError(f"{name}: {field}: expected {dtype}, {meaning}; got {value.dtype}")


def at_most(values: Tensor, bound: Tensor | float) -> Tensor:
    """`values`, held at `bound` above it: no gradient there. On the bound the gradient flows, and NaN stays NaN.

    torch.clamp hides NaN from the gradient, and halves it on the bound since torch 2.14.
    """
    return torch.where(values > bound, bound, values)


def within(values: Tensor, bound: Tensor | float) -> Tensor:
    """`at_most` on both sides: from `-bound` to `bound`."""
    return torch.where(values < -bound, -bound, at_most(values, bound))


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    max_log_ratio: Tensor,
) -> Terms:
    """`-min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)` with `s = exp log_ratio` (PPO, arXiv 1707.06347, equation 7).

    With `dual_clip` c, for A < 0, `-max(min(...), c A)` (arXiv 1912.09729). Decided on the deviation `s - 1`, taken by
    expm1, which near 1 is exact where `s` itself has lost the digits the clip range lives in. On a bound is unclipped.

    Returns: the loss and where it is held at a bound, one number per log-ratio.
    """
    device = log_ratio.device
    lowest, highest = -run_time(eps_low, device), run_time(eps_high, device)
    deviation = torch.expm1(at_most(log_ratio, max_log_ratio))
    low = (advantages < 0) & (deviation < lowest)
    high = (advantages > 0) & (deviation > highest)
    held = torch.where(high, highest, torch.where(low, lowest, deviation))
    if dual_clip is not None:
        bound = run_time(dual_clip, device) - 1.0
        above = (advantages < 0) & (deviation > bound)
        held, high = torch.where(above, bound, held), high | above
    return Terms(-(1.0 + held) * advantages, log_ratio, low, high)


@dataclass(frozen=True)
class _Clipped(Objective):
    eps_low: float
    eps_high: float
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        found: dict[str, float] = {
            "eps_low": checks.number("eps_low", self.eps_low, "the clip range below 1", at_least=0.0),
            "eps_high": checks.number("eps_high", self.eps_high, "the clip range above 1", at_least=0.0),
        }
        if self.dual_clip is not None:
            found["dual_clip"] = checks.number(
                "dual_clip", self.dual_clip, "the largest ratio for a negative advantage", above=1.0
            )
        for name, value in found.items():
            if value is not getattr(self, name):  # a number of numpy
                object.__setattr__(self, name, value)

    def _clip(self, log_ratio: Tensor, advantages: Tensor, max_log_ratio: Tensor) -> Terms:
        return clipped_surrogate(
            log_ratio, advantages, eps_low=self.eps_low, eps_high=self.eps_high, dual_clip=self.dual_clip,
            max_log_ratio=max_log_ratio,
        )  # fmt: skip


@dataclass(frozen=True)
class GSPO(_Clipped):
    """Group Sequence Policy Optimization (arXiv 2507.18071, equations 5 to 7).

    One ratio per sequence, `s_i = exp( (1/|y_i|) sum_t m_t (l_t - o_t) )`, and

        L = -(1/S) sum_i min( s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i ).

    Its gradient, `dL/dl_t = -(1/S) s_i A_i / |y_i|` where unclipped, weighs all tokens of a response alike. One
    advantage per sequence. The default clip range is the paper's.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    ratio_of: ClassVar[str] = "sequence"
    advantages_per_token: ClassVar[bool] = False
    together: ClassVar[str] = "sequence"
    by_sequence_alone: ClassVar[bool] = True

    def terms(self, log_ratio: Tensor, advantages: Tensor, layout: Layout, max_log_ratio: Tensor) -> Terms:
        return self._clip(layout.mean(log_ratio), advantages, max_log_ratio)


@dataclass(frozen=True)
class GSPOToken(_Clipped):
    """GSPO-token (arXiv 2507.18071, equations 13 and 14): GSPO with an advantage for every token.

    `s_it = sg[s_i] pi(y_t) / sg[pi(y_t)]` has the value of the sequence's ratio and the gradient of the token's, and

        L = -(1/S) sum_i (1/|y_i|) sum_t m_t min( s_it A_it, clip(s_it, 1 - eps_low, 1 + eps_high) A_it ).

    With the same advantage at every token, value, clipping and gradient equal GSPO's.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    together: ClassVar[str] = "sequence"

    def terms(self, log_ratio: Tensor, advantages: Tensor, layout: Layout, max_log_ratio: Tensor) -> Terms:
        log_s = layout.spread(layout.mean(log_ratio.detach())) + (log_ratio - log_ratio.detach())
        return self._clip(log_s, advantages, max_log_ratio)


@dataclass(frozen=True)
class GRPO(_Clipped):
    """Group Relative Policy Optimization (arXiv 2402.03300, equation 3), without its KL term: pass `beta` for that.

    One ratio per token, `w_t = exp(l_t - o_t)`, and

        L = -(1/S) sum_i (1/|y_i|) sum_t m_t min( w_t A_t, clip(w_t, 1 - eps_low, 1 + eps_high) A_t ).

    The default clip range is that of the GSPO paper's baseline, 0.2 and 0.27.
    """

    eps_low: float = 0.2
    eps_high: float = 0.27

    together: ClassVar[str] = "token"

    def terms(self, log_ratio: Tensor, advantages: Tensor, layout: Layout, max_log_ratio: Tensor) -> Terms:
        return self._clip(log_ratio, advantages, max_log_ratio)


@dataclass(frozen=True)
class PPO(GRPO):
    """Proximal Policy Optimization, clipped (arXiv 1707.06347, equation 7): token ratios, mean over all tokens.

        L = -(1/sum_t m_t) sum_t m_t min( w_t A_t, clip(w_t, 1 - eps_low, 1 + eps_high) A_t ),   w_t = exp(l_t - o_t)

    GRPO with another range (0.2 on both sides) and another mean.
    """

    eps_high: float = 0.2

    aggregation: ClassVar[str] = "token_mean"


NAMED: tuple[type[Objective], ...] = (GSPO, GSPOToken, GRPO, PPO)
