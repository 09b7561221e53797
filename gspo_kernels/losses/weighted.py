"""The losses that weigh a token's log-probability by a constant: CISPO, TOPR, DPPO and DRO.

Their gradient by the log-probability is `-weight * advantage`. Where GRPO's clip takes the gradient away, CISPO and
TOPR hold the weight at the bound. DPPO takes it away too, but by how far a probability has moved; DRO adds a penalty.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..base import checks
from ..base.scalars import run_time
from .clipped import set_numbers
from .objectives import Objective, RowSlope, Terms, TokenBatch, at_most, within
from .triton_term import TritonTerm

if TYPE_CHECKING:  # what the terms call
    import triton.language as tl  # type: ignore

    from ..rows.triton_math import bernoulli_kl, exp, expm1


def _held(tokens: TokenBatch, log_ratio: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ratio between 1 + lowest and 1 + highest, whether it is held at the lower one, at the upper); constants."""
    bounded = at_most(log_ratio.detach(), tokens.max_log_ratio)
    deviation = torch.expm1(bounded)
    low, high = deviation < lowest, deviation > highest
    return torch.where(high, 1.0 + highest, torch.where(low, 1.0 + lowest, bounded.exp())), low, high


# ---- CISPO


@TritonTerm
def cispo_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, eps_low, eps_high, unused2, unused3
):
    """CISPO in Triton."""
    bounded = tl.where(log_ratio > max_log_ratio, max_log_ratio, log_ratio)
    deviation = expm1(bounded)
    low, high = deviation < -eps_low, deviation > eps_high
    weight = tl.where(high, 1.0 + eps_high, tl.where(low, 1.0 - eps_low, exp(bounded)))
    some = advantage != 0.0
    return -weight * advantage * logprob, -weight * advantage, low & some, high & some


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped Importance-Sampling Policy Optimization: the clipped ratio is a constant weight (arXiv 2506.13585).

        L = -(1/sum_t m_t) sum_t m_t sg[ clip(w_t, 1 - eps_low, 1 + eps_high) ] A_t l_t,   w_t = exp(l_t - o_t)

    A clipped token keeps a gradient, that of the bound. The paper (MiniMax-M1, section 3.1) has no lower bound and
    gives no number for the upper one; by default the weight lies between 0 and 5, as in ScaleRL (arXiv 2510.13786).
    """

    eps_low: float = 1.0  # the weight is at least 1 - eps_low; infinity: no bound
    eps_high: float = 4.0  # and at most 1 + eps_high

    aggregation: ClassVar[str] = "token_mean"
    depends_on: ClassVar[str] = "token"
    uses_logprobs: ClassVar[bool] = True
    known_on_policy: ClassVar[bool] = True
    triton_term = cispo_term

    def __post_init__(self) -> None:
        meaning = "the clip range of the weight"
        names = ("eps_low", "eps_high")
        set_numbers(
            self, {x: checks.number(x, getattr(self, x), meaning, at_least=0.0, or_infinite=True) for x in names}
        )

    def terms(self, tokens: TokenBatch) -> Terms:
        device, some = tokens.log_ratio.device, tokens.advantages != 0
        lowest, highest = -run_time(self.eps_low, device), run_time(self.eps_high, device)
        weight, low, high = _held(tokens, tokens.log_ratio, lowest, highest)
        return Terms(-weight * tokens.advantages * tokens.logprobs, tokens.log_ratio, low & some, high & some)

    def row_slope(self) -> RowSlope:
        bounds = (-self.eps_low, self.eps_high)
        return RowSlope(positive=bounds, negative=bounds, outside="hold")


# ---- TOPR


@TritonTerm
def topr_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, unused0, unused1, unused2, unused3
):
    """TOPR in Triton."""
    bounded = tl.where(log_ratio > max_log_ratio, max_log_ratio, log_ratio)
    above = (bounded > 0.0) | ((bounded < 0.0) & (advantage > 0.0))  # a NaN stays
    weight = tl.where(above, 1.0, exp(bounded))
    high = (advantage < 0.0) & (bounded > 0.0)
    return -weight * advantage * logprob, -weight * advantage, advantage != advantage, high


class _Tapered(Objective):
    uses_logprobs: ClassVar[bool] = True

    @staticmethod
    def _tapered(tokens: TokenBatch, log_ratio: Tensor) -> Terms:
        zero = run_time(0.0, log_ratio.device)
        lowest = torch.where(tokens.advantages > 0, zero, -torch.inf)
        weight, _, high = _held(tokens, log_ratio, lowest, zero)
        high = high & (tokens.advantages < 0)
        return Terms(-weight * tokens.advantages * tokens.logprobs, log_ratio, clipped_high=high)


@dataclass(frozen=True)
class TOPR(_Tapered):
    """Tapered Off-Policy REINFORCE: a bad response counts less as it becomes unlikely (arXiv 2503.14286, equation 8).

        L = -(1/S) sum_i c_i A_i sum_t m_t l_t,   c_i = 1 for A_i > 0,  sg[ min(1, exp(sum_t m_t (l_t - o_t))) ] else

    The ratio is that of the whole response. ROLL and Trinity taper each token by its own ratio: `TOPRToken`. Advantages
    per token are those of the tokens' own terms.
    """

    aggregation: ClassVar[str] = "sequence_sum"
    depends_on: ClassVar[str] = "sequence"
    known_on_policy: ClassVar[bool] = True
    triton_term = topr_term
    sequence_value: ClassVar[str | None] = "sum"

    def terms(self, tokens: TokenBatch) -> Terms:
        own, layout = tokens.log_ratio, tokens.layout
        return self._tapered(tokens, layout.spread(layout.sum(own.detach())) + (own - own.detach()))


@dataclass(frozen=True)
class TOPRToken(_Tapered):
    """TOPR by token: each token counts by its own ratio, as in ROLL and Trinity (arXiv 2503.14286).

    L = -(1/sum_t m_t) sum_t m_t c_t A_t l_t,   c_t = 1 for A_t > 0,  sg[ min(1, exp(l_t - o_t)) ] else
    """

    aggregation: ClassVar[str] = "token_mean"
    depends_on: ClassVar[str] = "token"
    known_on_policy: ClassVar[bool] = True
    triton_term = topr_term

    def terms(self, tokens: TokenBatch) -> Terms:
        return self._tapered(tokens, tokens.log_ratio)

    def row_slope(self) -> RowSlope:
        return RowSlope(positive=(0.0, 0.0), negative=(-math.inf, 0.0), outside="hold")


# ---- DPPO


def _total_variation(old_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """How far the probability of the token has moved."""
    return (logprobs.exp() - old_logprobs.exp()).abs()


def _bernoulli_kl(old_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """KL(q || p) of the distributions "this token or another": q log(q/p) + (1-q) log((1-q)/(1-p)), from logarithms.

    0 where both are equal; infinity where p is 1 (or 0) and q is not.
    """
    log_others, old_log_others = (torch.log(-torch.expm1(x)) for x in (logprobs, old_logprobs))
    others = -torch.expm1(old_logprobs) * (old_log_others - log_others)
    same = old_logprobs.exp() * (old_logprobs - logprobs)
    found = same + torch.where(old_logprobs == 0.0, 0.0, others)  # 0 * infinity, where q is 1
    return torch.where(old_logprobs == logprobs, 0.0, found)


_DIVERGENCES = ("tv", "kl")
_DELTA = {"tv": 0.15, "kl": 0.05}


@TritonTerm
def dppo_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, delta_low, delta_high, max_ratio,
    divergence,
):  # fmt: skip
    """DPPO in Triton; divergence is 0 for TV, 1 for KL. A delta that is not given is NaN."""
    usual = tl.where(divergence == 0.0, 0.15, 0.05)
    delta_low = tl.where(delta_low == delta_low, delta_low, usual)
    delta_high = tl.where(delta_high == delta_high, delta_high, usual)
    bounded = tl.where(log_ratio > max_log_ratio, max_log_ratio, log_ratio)
    ratio = exp(bounded)
    ratio = tl.where(ratio > max_ratio, max_ratio, ratio)
    ratio = tl.where(rollout_logprob != rollout_logprob, rollout_logprob, ratio)  # NaN is not hidden
    now = tl.where(logprob > 0.0, 0.0, logprob)  # rounded up
    sampled = tl.where(rollout_logprob > 0.0, 0.0, rollout_logprob)
    distance = tl.where(divergence == 0.0, tl.abs(exp(now) - exp(sampled)), bernoulli_kl(sampled, now))
    low = (advantage < 0.0) & (now < sampled) & (distance > delta_low)
    high = (advantage > 0.0) & (now > sampled) & (distance > delta_high)
    weight = tl.where(low | high, 0.0, ratio)
    return tl.where(low | high, 0.0, -ratio * advantage * logprob), -weight * advantage, low, high


@dataclass(frozen=True)
class DPPO(Objective):
    """Divergence PPO: a token is dropped by how far its probability has moved, not by its ratio (arXiv 2602.04879).

        L = -(1/sum_t m_t) sum_t m_t M_t sg[ min(w_t, max_ratio) ] A_t l_t,   w_t = exp(l_t - o_t)

    M_t is 0 where the divergence D_t from the policy that sampled exceeds delta and A_t pushes it further: for A_t > 0
    where the probability p_t has risen (delta_high), for A_t < 0 where it has fallen (delta_low). q_t is the
    probability that the engine sampled with, exp(rollout_logprobs), or exp(old_logprobs) without them:

        "tv":  D_t = |p_t - q_t|,     "kl":  D_t = q_t log(q_t / p_t) + (1 - q_t) log((1 - q_t) / (1 - p_t)).

    The paper's ratio is that to the engine as well: pass the engine's log-probabilities as `old_logprobs`. Defaults:
    the deltas that TRL says the paper recommends, as in verl's examples; the truncation `max_ratio` of the authors'
    code, which is to be large.
    """

    delta_low: float | None = None  # None: 0.15 for "tv", 0.05 for "kl"; infinity: no bound
    delta_high: float | None = None
    max_ratio: float | None = 10.0  # None: no truncation
    divergence: Literal["tv", "kl"] = "tv"

    aggregation: ClassVar[str] = "token_mean"
    depends_on: ClassVar[str] = "token"
    uses_logprobs: ClassVar[bool] = True
    known_on_policy: ClassVar[bool] = True
    uses_rollout_logprobs: ClassVar[bool] = True
    triton_term = dppo_term

    def __post_init__(self) -> None:
        checks.choice("divergence", self.divergence, _DIVERGENCES)
        found: dict[str, float] = {}
        for name in ("delta_low", "delta_high"):
            given = getattr(self, name)
            if given is not None:
                found[name] = checks.number(name, given, "the largest divergence", at_least=0.0, or_infinite=True)
        if self.max_ratio is not None:
            found["max_ratio"] = checks.number("max_ratio", self.max_ratio, "the largest ratio that counts", above=0.0)
        set_numbers(self, found)

    def deltas(self) -> tuple[float, float]:
        """delta_low and delta_high, or their defaults."""
        usual = _DELTA[self.divergence]
        low, high = self.delta_low, self.delta_high
        return usual if low is None else low, usual if high is None else high

    def terms(self, tokens: TokenBatch) -> Terms:
        delta_low, delta_high = self.deltas()
        device, now = tokens.log_ratio.device, tokens.logprobs.detach().clamp(max=0.0)  # rounded up
        sampled = tokens.old_logprobs if tokens.rollout_logprobs is None else tokens.rollout_logprobs
        sampled = sampled.clamp(max=0.0)
        ratio = at_most(tokens.log_ratio.detach(), tokens.max_log_ratio).exp()
        if self.max_ratio is not None:
            ratio = at_most(ratio, run_time(self.max_ratio, device))
        ratio = torch.where(sampled.isnan(), torch.nan, ratio)  # of which no comparison below is true
        moved = _bernoulli_kl if self.divergence == "kl" else _total_variation
        distance = moved(sampled, now)
        low = (tokens.advantages < 0) & (now < sampled) & (distance > run_time(delta_low, device))
        high = (tokens.advantages > 0) & (now > sampled) & (distance > run_time(delta_high, device))
        loss = torch.where(low | high, 0.0, -ratio * tokens.advantages * tokens.logprobs)
        return Terms(loss, tokens.log_ratio, low, high)

    def row_slope(self) -> RowSlope:
        delta_low, delta_high = self.deltas()
        return RowSlope(
            positive=(-math.inf, delta_high),
            negative=(-delta_low, math.inf),
            outside="drop",
            measure=self.divergence,
            max_weight=sys.float_info.max if self.max_ratio is None else self.max_ratio,  # finite: held, not dropped
        )


# ---- DRO


@TritonTerm
def dro_term(  # type: ignore[no-untyped-def]
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, penalty, unused1, unused2, unused3
):
    """DRO in Triton."""
    high, low = log_ratio > max_log_ratio, log_ratio < -max_log_ratio
    bounded = tl.where(high, max_log_ratio, tl.where(low, -max_log_ratio, log_ratio))
    slope = tl.where(high | low, 0.0, penalty * bounded) - advantage
    never = advantage != advantage
    return 0.5 * penalty * bounded * bounded - advantage * logprob, slope, never, never


@dataclass(frozen=True)
class DRO(Objective):
    """Direct Reward Optimization by token: a penalty on the squared log-ratio, and no ratio (arXiv 2405.19107).

        L = -(1/sum_t m_t) sum_t m_t ( A_t l_t - (penalty / 2) (l_t - o_t)^2 )

    There is no ratio in the gradient, `-A_t + penalty (l_t - o_t)`, and nothing is clipped. The paper fits whole
    responses and learns a baseline; this is the token form that trainers use (Tinker's and verl's `dro`), with the
    penalty of Tinker's example. Beyond +-max_log_ratio the penalty is constant.
    """

    penalty: float = 0.05  # called beta there

    aggregation: ClassVar[str] = "token_mean"
    depends_on: ClassVar[str] = "token"
    uses_logprobs: ClassVar[bool] = True
    known_on_policy: ClassVar[bool] = True
    needs_advantage: ClassVar[bool] = False
    triton_term = dro_term

    def __post_init__(self) -> None:
        set_numbers(
            self,
            {"penalty": checks.number("penalty", self.penalty, "the weight of the squared log-ratio", at_least=0.0)},
        )

    def terms(self, tokens: TokenBatch) -> Terms:
        squared = within(tokens.log_ratio, tokens.max_log_ratio).square()
        penalty = 0.5 * run_time(self.penalty, squared.device) * squared
        return Terms(penalty - tokens.advantages * tokens.logprobs, tokens.log_ratio)

    def row_slope(self) -> RowSlope:
        return RowSlope(positive=(0.0, 0.0), negative=(0.0, 0.0), outside="hold", penalty=self.penalty)
