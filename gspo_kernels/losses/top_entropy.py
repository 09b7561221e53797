"""The policy term on the tokens of highest entropy alone: an objective around another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import checks
from ..base.scalars import run_time
from .objectives import Objective, Terms, TokenBatch, check_objective


@dataclass(frozen=True)
class TopEntropy(Objective):
    """Another objective, of which only the tokens of highest entropy have a loss (arXiv 2506.01939).

        policy_loss(..., objective=TopEntropy(GRPO(), share=0.2))

    A token counts if its entropy is at least the `1 - share` quantile of the batch's unmasked tokens, interpolated as
    by torch.quantile. All other tokens have no policy term and no gradient from it; they still count in the mean, and
    have their KL term and entropy bonus, as with TRL's `top_entropy_quantile`. The entropies are those of the pass that
    computes the log-probabilities: `policy_loss` reads the logits no more often than without.

    The quantile is that of the call's own batch: of one rank and one micro-batch. `cp_group` is refused.
    """

    objective: Objective  # with a ratio per token
    share: float = 0.2  # of the tokens, above 0 and at most 1

    depends_on: ClassVar[str] = "batch"
    uses_logprobs: ClassVar[bool] = True
    needs_advantage: ClassVar[bool] = False  # a token of advantage 0 is part of the quantile

    def __post_init__(self) -> None:
        inner = self.objective
        check_objective(inner)
        if inner.ratio_of != "token":
            raise ValueError(
                f"objective: expected one with a ratio per token, because tokens are left out one by one; got "
                f"{type(inner).__name__}. GSPOToken has GSPO's ratio, per token"
            )
        share = checks.number("share", self.share, "the share of tokens that count", above=0.0, at_most=1.0)
        own: dict[str, Any] = {name: getattr(inner, name) for name in _AS_INNER}
        for name, value in {**own, "share": share}.items():
            object.__setattr__(self, name, value)

    def terms(self, tokens: TokenBatch) -> Terms:
        if tokens.layout.ranks is not None:
            raise ValueError("cp_group: expected None with TopEntropy, whose quantile is that of one rank; got a group")
        if tokens.entropy is None:
            raise ValueError("entropy: expected one per token, because TopEntropy compares tokens by it; got None")
        inner = self.objective.terms(tokens)
        lowest = _quantile(tokens.entropy, tokens.layout.mask, 1.0 - run_time(self.share, tokens.entropy.device))
        left_out = (tokens.entropy < lowest) & ~inner.loss.isnan()  # NaN is not hidden
        of_nan = torch.where(tokens.entropy.isnan(), torch.nan, 0.0)
        return replace(inner, loss=torch.where(left_out, 0.0, inner.loss + of_nan))


_AS_INNER = ("advantages_per_token", "aggregation", "uses_rollout_logprobs")


def _quantile(values: Tensor, mask: Tensor, q: Tensor) -> Tensor:
    """The q quantile of the unmasked values that are not NaN, between its two neighbours; if there are none, no number
    to compare with."""
    if not values.numel():
        return values.new_full((), torch.nan)
    counted = mask & ~values.isnan()
    in_order = torch.where(counted, values, torch.inf).sort().values
    at = q * (counted.sum() - 1).clamp(min=0)
    at = torch.where((at - at.round()).abs() < 1e-9, at.round(), at)  # 0.7 * 10 is a little more than 7
    below, above = (in_order[i.long().reshape(1)].squeeze(0) for i in (at.floor(), at.ceil()))
    return below + torch.where(below < above, (at - at.floor()) * (above - below), 0.0)
