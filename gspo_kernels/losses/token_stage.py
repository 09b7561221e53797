"""The token stage: from log-probabilities and entropies per token to the scalar loss, its gradient and the stats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import BatchShape, Layout
from ..base.scalars import FINITE, run_time
from . import reduction
from .objectives import Objective, Terms, TokenBatch, TokenValues, at_most, check_objective, check_terms, within
from .stats import Stats, collect

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_WEIGHTINGS = ("none", "ratio")


class LossOutput(NamedTuple):
    """What every loss returns; it unpacks as `loss, stats = ...`."""

    loss: Tensor  # 0-d, differentiable; float32 (float64 for float64 inputs)
    stats: Stats


class TokenInputs(NamedTuple):
    """The caller's arguments that have one number per token, per sequence or per batch; checked."""

    batch: BatchShape
    objective: Objective
    advantages: Tensor  # per token where `advantages_per_token`, else [sequences]
    advantages_per_token: bool
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    importance_weights: Tensor | None  # per token where `importance_weights_per_token`, else [sequences]
    importance_weights_per_token: bool
    aggregation: str
    group_tokens: Tensor | None  # [sequences], for the aggregation "group_mean"
    normalizer: float | Tensor | None
    beta: float
    kl_estimator: str
    kl_weighting: str
    entropy_coef: float
    entropy_bonus: bool  # whether the coefficient is not 0; known where run-time numbers are not
    max_log_ratio: float

    def versions(self) -> list[int]:
        """Version counters of the arrays: writing to an array changes its own."""
        batch = self.batch
        arrays = (
            batch.mask, batch.cu_seqlens, self.advantages, self.old_logprobs, self.ref_logprobs,
            self.rollout_logprobs, self.importance_weights, self.group_tokens, self.normalizer,
        )  # fmt: skip
        return [x._version for x in arrays if isinstance(x, Tensor) and not x.is_inference()]

    def gradient_is_known(self) -> bool:
        """Whether the loss is on-policy and its gradient by the log-probabilities is known before a logit is read."""
        objective = self.objective
        by_ratio = not objective.uses_logprobs or (objective.known_on_policy and self.rollout_logprobs is None)
        return self.old_logprobs is None and self.beta == 0.0 and not self.entropy_bonus and by_ratio

    def crosses(self) -> bool:
        """Whether context-parallel ranks have to exchange gradients, because they depend on tokens of other ranks."""
        weighted_kl = self.beta != 0.0 and self.kl_weighting == "ratio"
        return not self.objective.by_sequence_alone or weighted_kl

    def counted(self, layout: Layout) -> Tensor:
        """0-d float64, the count that the loss is divided by without a `normalizer`."""
        return reduction.count(layout, self.aggregation, self.group_tokens)

    def stage(self) -> TokenStage:
        """The stage in torch, for any objective."""
        layout = self.batch.layout(crosses=self.crosses())

        def numbers(values: Tensor | None, per_token: bool) -> Tensor | None:
            if values is None:
                return None
            return layout.of_tokens(values) if per_token else layout.of_sequences(values)

        advantages = numbers(self.advantages, self.advantages_per_token)
        importance_weights = numbers(self.importance_weights, self.importance_weights_per_token)
        assert advantages is not None
        if self.objective.advantages_per_token and not self.advantages_per_token:
            advantages = layout.spread(advantages)
        if importance_weights is not None and not self.importance_weights_per_token:
            importance_weights = layout.spread(importance_weights)
        return TokenStage(
            layout=layout,
            objective=self.objective,
            advantages=advantages,
            old_logprobs=numbers(self.old_logprobs, True),
            ref_logprobs=numbers(self.ref_logprobs, True),
            rollout_logprobs=numbers(self.rollout_logprobs, True),
            importance_weights=importance_weights,
            aggregation=self.aggregation,
            group_tokens=self.group_tokens,
            normalizer=self.normalizer,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_weighting=self.kl_weighting,
            crosses=self.crosses(),
            entropy_coef=self.entropy_coef,
            max_log_ratio=run_time(self.max_log_ratio, self.batch.device),
        )


@dataclass(frozen=True)
class TokenStage:
    """The stage in torch, for any objective. Arrays are [tokens] in float64, 0 where masked."""

    layout: Layout
    objective: Objective
    advantages: Tensor  # [tokens] if the objective's `advantages_per_token`, else [sequences]
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    importance_weights: Tensor | None
    aggregation: str
    group_tokens: Tensor | None  # [sequences]
    normalizer: float | Tensor | None
    beta: float
    kl_estimator: str
    kl_weighting: str
    crosses: bool  # as in `Layout`
    entropy_coef: float
    max_log_ratio: Tensor
    shares: Tensor | None = None  # [sequences], of a part of a batch: the weights in the whole batch

    def gradient_on_policy(self) -> Tensor:
        """dL/dlogprob per token where the policy is the old policy: no logit needed."""
        with torch.enable_grad():
            mask = self.layout.mask
            unknown = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device, requires_grad=True)
            logprobs = reduction.nan_gradient_if_no_count(unknown, self.normalizer)
            log_ratio = logprobs - logprobs.detach()
            loss = self._aggregate(self._terms(log_ratio, self._token_values(logprobs, None)), None, None)
            return torch.autograd.grad(loss, unknown)[0] if loss.requires_grad else unknown.detach()

    def gradient(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dL/dlogprob and, with an entropy bonus, dL/dentropy per token."""
        with torch.enable_grad():
            inputs = [logprobs.detach().requires_grad_()]
            if self.entropy_coef != 0.0:
                inputs.append(entropy.detach().requires_grad_())
            loss, *_ = self._value(inputs[0], entropy if len(inputs) == 1 else inputs[1])
            if not loss.requires_grad:
                return torch.zeros_like(logprobs), None
            found = torch.autograd.grad(loss, inputs, materialize_grads=True)
        return found[0], found[1] if len(found) > 1 else None

    def differentiable_gradient(
        self, logprobs: Tensor, entropy: Tensor | None, factor: Tensor
    ) -> dict[str, Tensor | None]:
        """The gradient of factor times the loss, in the shapes of the arguments; itself differentiable."""
        with torch.enable_grad():
            operands = {"logprobs": logprobs}
            if entropy is not None and self.entropy_coef != 0.0:
                operands["entropy"] = entropy
            operands = {name: x for name, x in operands.items() if x.requires_grad}
            loss, *_ = self._value(logprobs.reshape(-1), None if entropy is None else entropy.reshape(-1))
            found = torch.autograd.grad(
                loss, list(operands.values()), factor.double(), create_graph=True, materialize_grads=True
            )
        return dict(zip(operands, found, strict=True))

    def part(self, batch: BatchShape, tokens: Tensor | slice, sequences: slice) -> TokenStage:
        """The stage of some of the tokens. Each token keeps its full-batch weight."""

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[tokens]

        return replace(
            self,
            layout=batch.layout(crosses=self.crosses),
            advantages=self.advantages[tokens if self.objective.advantages_per_token else sequences],
            old_logprobs=of(self.old_logprobs),
            ref_logprobs=of(self.ref_logprobs),
            rollout_logprobs=of(self.rollout_logprobs),
            importance_weights=of(self.importance_weights),
            group_tokens=None,
            shares=self.token_shares()[sequences],
        )

    def token_shares(self) -> Tensor:
        """[sequences], the weight of each of its tokens' numbers in the loss."""
        if self.shares is not None:
            return self.shares
        return reduction.token_shares(self.layout, self.aggregation, self.normalizer, self.group_tokens)

    def loss(self, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
        """logprobs, entropy: [tokens] as the kernels return them."""
        loss, terms, log_ratio, kl = self._value(logprobs, entropy)
        per_sequence = self.objective.ratio_of == "sequence"
        stats = collect(self.layout, terms, per_sequence, log_ratio, kl, logprobs, entropy, self.max_log_ratio)
        return LossOutput(loss.to(logprobs.dtype), stats)

    def _value(self, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, Terms, Tensor, Tensor | None]:
        """The loss in float64, the objective's terms, log-ratios and KL per token."""
        logprobs = reduction.nan_gradient_if_no_count(logprobs, self.normalizer)
        entropy = None if entropy is None else reduction.nan_gradient_if_no_count(entropy, self.normalizer)
        new = self._finite(self.layout.select(logprobs.double()))
        old = new.detach() if self.old_logprobs is None else within(self.old_logprobs, FINITE)
        log_ratio = new - old
        if self.ref_logprobs is not None and self.beta != 0.0:  # NaN propagates to all tokens of its ratio
            log_ratio = log_ratio + torch.where(self.ref_logprobs.isnan(), torch.nan, 0.0)
        terms = self._terms(log_ratio, self._token_values(new, entropy))
        kl = None if self.ref_logprobs is None else self._kl(new)
        if kl is not None and self.kl_weighting == "ratio":
            ratio = at_most(terms.log_ratio, self.max_log_ratio).exp()
            kl = kl * (self.layout.spread(ratio) if self.objective.ratio_of == "sequence" else ratio)
        return self._aggregate(terms, kl, entropy), terms, log_ratio, kl

    @staticmethod
    def _finite(logprobs: Tensor) -> Tensor:
        """Within +-FINITE, with the identity's gradient: on-policy, an infinite log-probability has a ratio of 1."""
        slope = torch.where(logprobs.isinf(), 0.0, logprobs)
        return within(logprobs.detach(), FINITE) + (slope - slope.detach())

    def _token_values(self, new: Tensor, entropy: Tensor | None) -> TokenValues | None:
        """For objectives that declare it."""
        if not self.objective.uses_logprobs:
            return None
        old = new.detach() if self.old_logprobs is None else within(self.old_logprobs, FINITE)
        rollout = None if self.rollout_logprobs is None else within(self.rollout_logprobs, FINITE)
        of_rows = None if entropy is None else self.layout.select(entropy.detach().double())
        return TokenValues(new, old, of_rows, rollout)

    def _terms(self, log_ratio: Tensor, values: TokenValues | None) -> Terms:
        if self.importance_weights is not None and self.layout.ranks is not None:
            self.layout.add_weights(self.importance_weights)
        tokens = TokenBatch(log_ratio, self.advantages, self.layout, self.max_log_ratio, values)
        terms = self.objective.terms(tokens)
        check_terms(self.objective, terms, tokens=log_ratio.shape[0], sequences=self.layout.sequences)
        return terms

    def _kl(self, logprobs: Tensor) -> Tensor:
        """KL(pi || ref) per token, estimated from the sampled token (http://joschu.net/blog/kl-approx.html)."""
        assert self.ref_logprobs is not None
        d = within(within(self.ref_logprobs, FINITE) - logprobs, self.max_log_ratio)
        if self.kl_estimator == "k1":
            return -d
        return d.square() / 2 if self.kl_estimator == "k2" else torch.expm1(d) - d

    def _aggregate(self, terms: Terms, kl: Tensor | None, entropy: Tensor | None) -> Tensor:
        layout, shares = self.layout, self.token_shares()
        per_token: list[Tensor] = []
        if self.objective.ratio_of == "token":
            per_token.append(terms.loss if self.importance_weights is None else terms.loss * self.importance_weights)
        if kl is not None and self.beta != 0.0:
            per_token.append(self.beta * kl)
        if entropy is not None and self.entropy_coef != 0.0:
            # Not `-self.entropy_coef`: of a number's negative torch 2.11 compiles every value.
            per_token.append(-(entropy.double() * self.entropy_coef))
        loss = shares.new_zeros(())
        if per_token:
            loss = (layout.select(sum(per_token[1:], per_token[0])) * layout.spread(shares)).sum()
        if self.objective.ratio_of == "sequence":
            loss = loss + self._of_sequences(terms.loss, shares)
        return reduction.nan_if_no_count(loss, layout, self.normalizer)

    def _of_sequences(self, of_each: Tensor, shares: Tensor) -> Tensor:
        """The value is weighted by this rank's token count, the gradient by the global count."""
        layout = self.layout
        local = layout.local_lengths if self.importance_weights is None else layout.local_sum(self.importance_weights)
        if layout.ranks is None or self.crosses:
            return (of_each * shares * local).sum()
        everywhere = layout.lengths if self.importance_weights is None else layout.weight_sums
        value, slope = of_each.detach(), of_each - of_each.detach()
        return (value * shares * local).sum() + (slope * shares * everywhere).sum()


def token_inputs(
    batch: BatchShape,
    objective: Objective,
    advantages: Any,
    old_logprobs: Any,
    *,
    ref_logprobs: Any,
    beta: float,
    kl_estimator: str,
    kl_weighting: str,
    entropy_coef: float,
    importance_weights: Any,
    rollout_logprobs: Any,
    aggregation: str | None,
    group_tokens: Any,
    normalizer: float | Tensor | None,
    max_log_ratio: float,
) -> TokenInputs:
    """The arguments as `TokenInputs`, checked."""
    check_objective(objective)
    aggregation = objective.aggregation if aggregation is None else aggregation
    normalizer = reduction.check(aggregation, normalizer, batch.device)
    group_tokens = reduction.check_group_tokens(aggregation, group_tokens, batch)
    reduction.check_count(normalizer, batch)
    checks.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.choice("kl_weighting", kl_weighting, KL_WEIGHTINGS)
    beta = checks.number("beta", beta, "the weight of the KL term", at_least=0.0)
    entropy_coef = checks.number("entropy_coef", entropy_coef, "the weight of the entropy bonus")
    # e^80 still fits fp32, in which the ratios are reported.
    max_log_ratio = checks.number(
        "max_log_ratio", max_log_ratio, "where a log-ratio saturates", above=0.0, at_most=80.0
    )
    if ref_logprobs is None and beta != 0.0:
        raise ValueError(
            f"ref_logprobs: expected the reference policy's log-probabilities, because beta is {beta}; got None"
        )
    if old_logprobs is not None:
        old_logprobs = batch.log_probabilities("old_logprobs", old_logprobs, "old policy's log-probabilities")
    if ref_logprobs is not None:
        ref_logprobs = batch.log_probabilities("ref_logprobs", ref_logprobs, "reference policy's log-probabilities")
    if rollout_logprobs is not None:
        if not objective.uses_rollout_logprobs:
            raise ValueError(
                f"rollout_logprobs: expected None, because {type(objective).__name__} does not read them; got a "
                "tensor. Pass them as old_logprobs, or weigh tokens: importance_weights=rollout_weights(...).weights"
            )
        rollout_logprobs = batch.log_probabilities("rollout_logprobs", rollout_logprobs, "engine's log-probabilities")
    advantages, advantages_per_token = _advantages(batch, objective, advantages)
    importance_weights_per_token = False
    if importance_weights is not None:
        importance_weights, importance_weights_per_token = batch.per_either(
            "importance_weights", importance_weights, "correction weights"
        )
    return TokenInputs(
        batch=batch,
        objective=objective,
        advantages=advantages,
        advantages_per_token=advantages_per_token,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        importance_weights=importance_weights,
        importance_weights_per_token=importance_weights_per_token,
        aggregation=aggregation,
        group_tokens=group_tokens,
        normalizer=normalizer,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_weighting=kl_weighting,
        entropy_coef=entropy_coef,
        entropy_bonus=entropy_coef != 0.0,
        max_log_ratio=max_log_ratio,
    )


def _advantages(batch: BatchShape, objective: Objective, advantages: Any) -> tuple[Tensor, bool]:
    """The advantages, and whether they are per token."""
    checks.tensor("advantages", advantages, "one advantage per sequence")
    if objective.advantages_per_token:
        return batch.per_either("advantages", advantages, "advantages")
    if batch.is_per_token(advantages) and advantages.shape != (batch.sequences, 1):
        raise ValueError(
            f"advantages: expected shape {[batch.sequences]}, one per sequence, as {type(objective).__name__} has one "
            f"ratio for a response; got {list(advantages.shape)}, one per token. For those, use gspo_token_loss"
        )
    return batch.per_sequence("advantages", advantages, "advantages"), False
