"""All that happens to numbers per token, between the vocabulary-sized work and the scalar loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aggregation as aggregate
from . import checks
from .layout import Layout
from .objectives import Objective, Terms
from .scalars import run_time
from .stats import Stats, collect

KL_ESTIMATORS = ("k1", "k2", "k3")
_FINITE = 1e30  # stands for an infinite log-probability, so that no inf - inf can arise


class LossOutput(NamedTuple):
    loss: Tensor  # 0-d, differentiable; float32 (float64 for float64 inputs)
    stats: Stats


@dataclass(frozen=True)
class TokenStage:
    """A checked batch but for its log-probabilities. Arrays are [tokens] in float64, 0 where masked."""

    layout: Layout
    objective: Objective
    advantages: Tensor  # [tokens] or [sequences], as the objective asks
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor | None
    token_weights: Tensor
    beta: float
    kl_estimator: str
    entropy_coef: float
    max_log_ratio: Tensor

    def depends_on_log_ratio_alone(self) -> bool:
        return self.old_logprobs is None and self.beta == 0.0 and self.entropy_coef == 0.0

    def gradient_on_policy(self) -> Tensor:
        """dL/dlogprob per token where the policy is the old policy: no logit needed."""
        with torch.enable_grad():
            log_ratio = torch.zeros_like(self.token_weights, requires_grad=True)
            loss = self._aggregate(self._terms(log_ratio), None, None)
            return torch.autograd.grad(loss, log_ratio)[0] if loss.requires_grad else log_ratio.detach()

    def loss(self, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
        """logprobs, entropy: [tokens] as the kernels return them."""
        new = self.layout.select(logprobs.double()).clamp(-_FINITE, _FINITE)
        old = new.detach() if self.old_logprobs is None else self.old_logprobs.clamp(-_FINITE, _FINITE)
        log_ratio = new - old
        terms = self._terms(log_ratio)
        kl = None if self.ref_logprobs is None else self._kl(new)
        loss = self._aggregate(terms, kl, entropy)
        per_sequence = self.objective.ratio_of == "sequence"
        stats = collect(self.layout, terms, per_sequence, log_ratio, kl, logprobs, entropy, self.max_log_ratio)
        return LossOutput(loss.to(logprobs.dtype), stats)

    def _terms(self, log_ratio: Tensor) -> Terms:
        return self.objective.terms(log_ratio, self.advantages, self.layout, self.max_log_ratio)

    def _kl(self, logprobs: Tensor) -> Tensor:
        """KL(pi || ref) per token, estimated from the sampled token (http://joschu.net/blog/kl-approx.html)."""
        assert self.ref_logprobs is not None
        d = (self.ref_logprobs.clamp(-_FINITE, _FINITE) - logprobs).clamp(-self.max_log_ratio, self.max_log_ratio)
        if self.kl_estimator == "k1":
            return -d
        return d.square() / 2 if self.kl_estimator == "k2" else torch.expm1(d) - d

    def _aggregate(self, terms: Terms, kl: Tensor | None, entropy: Tensor | None) -> Tensor:
        per_token = terms.loss if self.weights is None else terms.loss * self.weights
        if kl is not None and self.beta != 0.0:
            per_token = per_token + self.beta * kl
        if entropy is not None and self.entropy_coef != 0.0:
            per_token = per_token - self.entropy_coef * entropy.double()
        return (self.layout.select(per_token) * self.token_weights).sum()


def token_stage(
    layout: Layout,
    objective: Objective,
    advantages: Any,
    old_logprobs: Any,
    *,
    ref_logprobs: Any,
    beta: float,
    kl_estimator: str,
    entropy_coef: float,
    weights: Any,
    aggregation: str | None,
    normalizer: float | Tensor | None,
    max_log_ratio: float,
) -> TokenStage:
    """Checks everything that has one number per token or sequence."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an Objective such as GSPO(); got {checks.describe(objective)}")
    aggregation = objective.aggregation if aggregation is None else aggregation
    aggregate.check(aggregation, normalizer)
    checks.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.number("beta", beta, "the weight of the KL term", at_least=0.0)
    checks.number("entropy_coef", entropy_coef, "the weight of the entropy bonus")
    # e^80 still fits fp32, in which the ratios are reported.
    checks.number("max_log_ratio", max_log_ratio, "where a log-ratio saturates", above=0.0, at_most=80.0)
    if ref_logprobs is None and beta != 0.0:
        raise ValueError(
            f"ref_logprobs: expected the reference policy's log-probabilities, because beta is {beta}; got None"
        )
    if old_logprobs is not None:
        old_logprobs = layout.tokens("old_logprobs", old_logprobs, "old policy's log-probabilities")
    if ref_logprobs is not None:
        ref_logprobs = layout.tokens("ref_logprobs", ref_logprobs, "reference policy's log-probabilities")
    return TokenStage(
        layout=layout,
        objective=objective,
        advantages=_advantages(layout, objective, advantages),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        weights=None if weights is None else _per_token(layout, "weights", weights, "correction weights"),
        token_weights=aggregate.token_weights(layout, aggregation, normalizer),
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        max_log_ratio=run_time(max_log_ratio, layout.mask.device),
    )


def _per_token(layout: Layout, name: str, values: Any, meaning: str) -> Tensor:
    """[tokens], from one number per sequence or one per token."""
    checks.tensor(name, values, meaning)
    if layout.is_per_token(values):
        return layout.tokens(name, values, meaning)
    if values.ndim != 1 or values.shape[0] != layout.sequences:
        raise ValueError(
            f"{name}: expected shape {[layout.sequences]} ({meaning}, one per sequence) or {list(layout.shape)} "
            f"(one per token); got {list(values.shape)}"
        )
    return layout.spread(layout.per_sequence(name, values, meaning))


def _advantages(layout: Layout, objective: Objective, advantages: Any) -> Tensor:
    checks.tensor("advantages", advantages, "one advantage per sequence")
    if objective.advantages_per_token:
        return _per_token(layout, "advantages", advantages, "advantages")
    if layout.is_per_token(advantages):
        raise ValueError(
            f"advantages: expected shape {[layout.sequences]}, one per sequence, as {type(objective).__name__} has one "
            f"ratio for a response; got {list(advantages.shape)}, one per token. For those, use gspo_token_loss"
        )
    return layout.per_sequence("advantages", advantages, "advantages")
