"""The losses that clip an importance ratio or, SAPO, close a smooth gate around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base import checks
from ..base.scalars import run_time
from .objectives import Objective, RowSlope, Terms, TokenBatch, at_most
from .triton_term import TritonHold, TritonTerm

if TYPE_CHECKING:  # what the term calls
    import triton.language as tl  # type: ignore

    from ..rows.triton_math import exp, expm1, quotient


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

    With `dual_clip` c, for A < 0, `-max(min(...), c A)` (arXiv 1912.09729). The decision compares `s - 1`, computed by
    expm1: near 1, `s` itself has too few digits for a clip range of 3e-4. A ratio on a bound is not clipped. The loss
    is computed from `s`: torch's derivative of expm1 is the result plus 1, which has no digits where `s` is small.

    Args:
        log_ratio: [units] float64, differentiable: one per sequence or per token.
        advantages: [units], constant.
        eps_low, eps_high: the clip range of the ratio, from 1 - eps_low to 1 + eps_high.
        dual_clip: the largest ratio that counts for a negative advantage; None: no bound.
        max_log_ratio: 0-d; above it the ratio is constant and has no gradient.

    Returns: `Terms` [units]: the loss, and where it is held at a bound.
    """
    device = log_ratio.device
    lowest, highest = -run_time(eps_low, device), run_time(eps_high, device)
    bounded = at_most(log_ratio, max_log_ratio)
    ratio, deviation = bounded.exp(), torch.expm1(bounded.detach())
    low = (advantages < 0) & (deviation < lowest)
    high = (advantages > 0) & (deviation > highest)
    held = torch.where(high, 1.0 + highest, torch.where(low, 1.0 + lowest, ratio))
    if dual_clip is not None:
        bound = run_time(dual_clip, device)
        above = (advantages < 0) & (deviation > bound - 1.0)
        held, high = torch.where(above, bound, held), high | above
    return Terms(-held * advantages, log_ratio, low, high)


@TritonTerm
def clipped_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, eps_low, eps_high, dual_clip, unused
):
    """`clipped_surrogate` in Triton; dual_clip is NaN for none."""
    saturated = log_ratio > max_log_ratio
    bounded = tl.where(saturated, max_log_ratio, log_ratio)
    deviation, ratio = expm1(bounded), exp(bounded)
    low = (advantage < 0.0) & (deviation < -eps_low)
    high = (advantage > 0.0) & (deviation > eps_high)
    dual = (advantage < 0.0) & (deviation > dual_clip - 1.0)
    held = tl.where(high, 1.0 + eps_high, tl.where(low, 1.0 - eps_low, tl.where(dual, dual_clip, ratio)))
    slope = tl.where(low | high | dual | saturated, 0.0, -ratio * advantage)
    return -held * advantage, slope, low, high | dual


def set_numbers(objective: Objective, found: dict[str, float]) -> None:
    """Writes checked fields back to a frozen objective: Python's own numbers in place of those of numpy."""
    for name, value in found.items():
        if value is not getattr(objective, name):
            object.__setattr__(objective, name, value)


@dataclass(frozen=True)
class _Clipped(Objective):
    eps_low: float  # a ratio is clipped to the range from 1 - eps_low to 1 + eps_high, on the side that the sign of the
    eps_high: float  # advantage penalizes; infinity: no bound on this side
    dual_clip: float | None = None  # the largest ratio that counts for a negative advantage; None: no bound

    def __post_init__(self) -> None:
        found: dict[str, float] = {
            "eps_low": checks.number("eps_low", self.eps_low, "the clip range below 1", at_least=0.0, or_infinite=True),
            "eps_high": checks.number(
                "eps_high", self.eps_high, "the clip range above 1", at_least=0.0, or_infinite=True
            ),
        }
        if self.dual_clip is not None:
            found["dual_clip"] = checks.number(
                "dual_clip", self.dual_clip, "the largest ratio for a negative advantage", above=1.0
            )
        set_numbers(self, found)

    def _clip(self, log_ratio: Tensor, tokens: TokenBatch) -> Terms:
        return clipped_surrogate(
            log_ratio, tokens.advantages, eps_low=self.eps_low, eps_high=self.eps_high, dual_clip=self.dual_clip,
            max_log_ratio=tokens.max_log_ratio,
        )  # fmt: skip


@dataclass(frozen=True)
class GSPO(_Clipped):
    """Group Sequence Policy Optimization: the ratio of a response is clipped (arXiv 2507.18071, equations 5 to 7).

    One ratio per sequence, `s_i = exp( (1/|y_i|) sum_t m_t (l_t - o_t) )`, and

        L = -(1/S) sum_i min( s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i ).

    Its gradient, `dL/dl_t = -(1/S) s_i A_i / |y_i|` where unclipped, weighs all tokens of a response alike. One
    advantage per sequence. The default clip range is the paper's.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    ratio_of: ClassVar[str] = "sequence"
    advantages_per_token: ClassVar[bool] = False
    depends_on: ClassVar[str] = "sequence"
    by_sequence_alone: ClassVar[bool] = True
    triton_term = clipped_term

    def terms(self, tokens: TokenBatch) -> Terms:
        return self._clip(tokens.layout.mean(tokens.log_ratio), tokens)


@dataclass(frozen=True)
class GSPOToken(_Clipped):
    """GSPO-token: GSPO with an advantage for every token (arXiv 2507.18071, equations 13 and 14).

    `s_it = sg[s_i] pi(y_t) / sg[pi(y_t)]` has the value of the sequence's ratio and the gradient of the token's, and

        L = -(1/S) sum_i (1/|y_i|) sum_t m_t min( s_it A_it, clip(s_it, 1 - eps_low, 1 + eps_high) A_it ).

    With the same advantage at every token, value, clipping and gradient equal GSPO's.
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    depends_on: ClassVar[str] = "sequence"
    triton_term = clipped_term
    sequence_value: ClassVar[str] = "mean"

    def terms(self, tokens: TokenBatch) -> Terms:
        r, layout = tokens.log_ratio, tokens.layout
        return self._clip(layout.spread(layout.mean(r.detach())) + (r - r.detach()), tokens)


@dataclass(frozen=True)
class GRPO(_Clipped):
    """Group Relative Policy Optimization: the ratio of each token is clipped (arXiv 2402.03300, equation 3).

    The ratio is `w_t = exp(l_t - o_t)`. Without the paper's KL term (pass `beta` for that), the loss is

        L = -(1/S) sum_i (1/|y_i|) sum_t m_t min( w_t A_t, clip(w_t, 1 - eps_low, 1 + eps_high) A_t ).

    The default clip range is that of the GSPO paper's baseline, 0.2 and 0.27.
    """

    eps_low: float = 0.2
    eps_high: float = 0.27

    depends_on: ClassVar[str] = "token"
    triton_term = clipped_term

    def terms(self, tokens: TokenBatch) -> Terms:
        return self._clip(tokens.log_ratio, tokens)

    def row_slope(self) -> RowSlope:
        highest = math.inf if self.dual_clip is None else self.dual_clip - 1.0
        return RowSlope((-math.inf, self.eps_high), (-self.eps_low, highest), "drop")


@dataclass(frozen=True)
class PPO(GRPO):
    """Proximal Policy Optimization: GRPO with the mean over all tokens (arXiv 1707.06347, equation 7).

        L = -(1/sum_t m_t) sum_t m_t min( w_t A_t, clip(w_t, 1 - eps_low, 1 + eps_high) A_t ),   w_t = exp(l_t - o_t)

    The clip range is 0.2 on both sides.
    """

    eps_high: float = 0.2

    aggregation: ClassVar[str] = "token_mean"


# ---- a geometric mean of clipped ratios


@TritonTerm
def unclipped_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, unused0, unused1, unused2, unused3
):
    """`-ratio * advantage`."""
    saturated = log_ratio > max_log_ratio
    ratio = exp(tl.where(saturated, max_log_ratio, log_ratio))
    never = ratio < 0.0
    return -ratio * advantage, tl.where(saturated, 0.0, -ratio * advantage), never, never


@TritonHold
def held_log_ratio(log_ratio, advantage, eps_low, eps_high, unused2, unused3):  # type: ignore[no-untyped-def]
    """GMPO's clip of a log-ratio."""
    low = (advantage < 0.0) & (log_ratio < -eps_low)
    high = (advantage > 0.0) & (log_ratio > eps_high)
    return tl.where(high, eps_high, -eps_low), low, high


@dataclass(frozen=True)
class GMPO(Objective):
    """Geometric-Mean Policy Optimization: token ratios are clipped before their geometric mean (arXiv 2507.20673).

    A response has the geometric mean of its tokens' ratios, each clipped before the mean is taken:

        S_i = exp( (1/|y_i|) sum_t m_t h_it ),   L = -(1/S) sum_i S_i A_i,   r_it = l_t - o_t,
        h_it = min(r_it, eps_high) for A_i > 0,  max(r_it, -eps_low) for A_i < 0.

    The range is one of the log-ratio, as in the paper: (e^-0.4, e^0.4) by default. A clipped token has no gradient; the
    others have `-(1/S) S_i A_i / |y_i|`. With advantages per token it is computed as GSPO-token is: each token has the
    value S_i and its own advantage.
    """

    eps_low: float = 0.4  # of the log-ratio
    eps_high: float = 0.4

    depends_on: ClassVar[str] = "sequence"
    triton_term = unclipped_term
    triton_hold = held_log_ratio
    sequence_value: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        meaning = "the clip range of the log-ratio"
        names = ("eps_low", "eps_high")
        set_numbers(
            self,
            {x: checks.number(x, getattr(self, x), meaning, at_least=0.0, or_infinite=True) for x in names},
        )

    def terms(self, tokens: TokenBatch) -> Terms:
        r, layout, device = tokens.log_ratio, tokens.layout, tokens.log_ratio.device
        lowest, highest = -run_time(self.eps_low, device), run_time(self.eps_high, device)
        low, high = (tokens.advantages < 0) & (r < lowest), (tokens.advantages > 0) & (r > highest)
        held = torch.where(high, highest, torch.where(low, lowest, r))
        log_ratio = layout.spread(layout.mean(held.detach())) + (held - held.detach())
        ratio = at_most(log_ratio, tokens.max_log_ratio).exp()
        return Terms(-ratio * tokens.advantages, log_ratio, low, high)


# ---- a smooth gate


@TritonTerm
def gate_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, tau_pos, tau_neg, unused2,
    unused3,
):  # fmt: skip
    """SAPO's gate in Triton."""
    saturated = log_ratio > max_log_ratio
    bounded = tl.where(saturated, max_log_ratio, log_ratio)
    tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
    x = tau * expm1(bounded)
    away = exp(-tl.abs(x))  # from the gate's middle: sigmoid(x) is 1 / (1 + away), or away / (1 + away)
    open_part = quotient(tl.where(x > 0.0, 1.0, away), 1.0 + away)
    closing = quotient(away, (1.0 + away) * (1.0 + away))
    slope = tl.where(saturated, 0.0, -4.0 * closing * exp(bounded) * advantage)
    never = away < 0.0
    return -quotient(4.0 * open_part, tau) * advantage, slope, never, never


@dataclass(frozen=True)
class SAPO(Objective):
    """Soft Adaptive Policy Optimization: a smooth gate in place of a clip (arXiv 2511.20347).

        L = -(1/S) sum_i (1/|y_i|) sum_t m_t (4 / tau) sigmoid( tau (w_t - 1) ) A_t,   w_t = exp(l_t - o_t)

    with tau_pos for A > 0 and tau_neg for all others. At a ratio of 1 the gradient is that of `w_t A_t`; it
    fades out smoothly as the ratio moves away, faster for a larger tau. Nothing is clipped.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    depends_on: ClassVar[str] = "token"
    triton_term = gate_term

    def __post_init__(self) -> None:
        names = ("tau_pos", "tau_neg")
        set_numbers(self, {x: checks.number(x, getattr(self, x), "how fast the gate closes", above=0.0) for x in names})

    def terms(self, tokens: TokenBatch) -> Terms:
        device = tokens.log_ratio.device
        ratio = at_most(tokens.log_ratio, tokens.max_log_ratio).exp()
        tau = torch.where(tokens.advantages > 0, run_time(self.tau_pos, device), run_time(self.tau_neg, device))
        x = tau * (ratio - 1.0)
        # Of an open gate by its closed side: torch's derivative, s (1 - s), has no digits where s is close to 1.
        gate = torch.where(x > 0, 1.0 - torch.sigmoid(-x), torch.sigmoid(x)) * (4.0 / tau)
        return Terms(-gate * tokens.advantages, tokens.log_ratio)
