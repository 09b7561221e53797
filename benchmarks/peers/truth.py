"""The loss and its gradient in float64, written from the papers, and how far an answer is from them.

At V = 151,936 a distance over all of a gradient is blind: the sampled tokens' column outweighs all others. So the
columns of sampled tokens and all others are measured apart, each relative to its own size; and so are hidden states
and weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..exact import EPSILONS
from .inputs import Inputs, logprobs_of

RIGHT = 1e-4  # of a hard case's gradient and, by the mean advantage, of its loss: fp32 leaves 1e-6
SATURATED = 20.0  # beyond this a log-ratio has no meaning left, nor a gradient


@dataclass(frozen=True)
class Truth:
    loss: float
    gradients: tuple[Tensor, ...]  # float64


@dataclass(frozen=True)
class Distance:
    loss: float  # relative to the mean size of an advantage
    gradient: dict[str, float]  # |g - exact| / |exact|, by part


def solve(inputs: Inputs) -> Truth:
    """GSPO and GSPO-token (arXiv 2507.18071), GRPO (arXiv 2402.03300); a mean over responses that have a token."""
    starts = tuple(values.detach().double().requires_grad_() for values in inputs.pristine)
    mask = inputs.mask
    if not bool(mask.any()):
        return Truth(0.0, tuple(torch.zeros_like(values) for values in starts))
    responses = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
    lengths = mask.sum(1)

    def mean(values: Tensor) -> Tensor:
        """By response, over its unmasked tokens; of those that have one."""
        sums = torch.zeros(len(mask), dtype=torch.float64, device=mask.device).index_add(0, responses, values)
        return sums / lengths.clamp(min=1)

    logprobs = logprobs_of(starts, inputs.token_ids, mask)
    log_ratio = logprobs - inputs.old_logprobs[mask].double()
    advantages = inputs.advantages.double()
    by_token = advantages[mask] if advantages.ndim == 2 else advantages[responses]
    if inputs.objective == "gspo":
        terms = _clipped(mean(log_ratio), advantages, inputs.objective)
    elif inputs.objective == "gspo_token":
        own = logprobs - logprobs.detach()  # 0, with the gradient of the token alone
        terms = mean(_clipped(mean(log_ratio).detach()[responses] + own, by_token, "gspo"))
    else:
        terms = mean(_clipped(log_ratio, by_token, inputs.objective))
    loss = terms[lengths > 0].mean()
    return Truth(float(loss.detach()), torch.autograd.grad(loss, starts))


def _clipped(log_ratio: Tensor, advantages: Tensor, objective: str) -> Tensor:
    """-min(ratio A, clip(ratio) A): what is clipped or saturated has no gradient, whatever stands there."""
    low, high = EPSILONS[objective]
    saturated = log_ratio > SATURATED
    ratio = torch.where(saturated, math.exp(SATURATED), torch.where(saturated, 0.0, log_ratio).exp())
    above, below = (advantages > 0) & (ratio > 1 + high), (advantages < 0) & (ratio < 1 - low)
    return -torch.where(above, 1 + high, torch.where(below, 1 - low, ratio)) * advantages


def distance(inputs: Inputs, truth: Truth, loss: Tensor, gradients: tuple[Tensor, ...]) -> Distance:
    scale = float(inputs.advantages.abs().mean())
    if inputs.from_logits:
        target = torch.zeros_like(truth.gradients[0], dtype=torch.bool).scatter_(2, inputs.token_ids[..., None], True)
        parts = {"sampled tokens": target, "all others": ~target}
        found = {name: _relative(gradients[0], truth.gradients[0], where) for name, where in parts.items()}
    else:
        pairs = zip(("hidden", "weight"), gradients, truth.gradients, strict=True)
        found = {name: _relative(actual, exact) for name, actual, exact in pairs}
    return Distance(abs(float(loss) - truth.loss) / scale, found)


def _relative(actual: Tensor, exact: Tensor, where: Tensor | None = None) -> float:
    error = actual.detach().double() - exact
    if where is not None:
        error, exact = error[where], exact[where]
    size = float(exact.norm())
    error_size = float(error.norm())
    return error_size / size if size else (math.inf if error_size else 0.0)


def in_words(inputs: Inputs, truth: Truth, loss: Tensor, gradients: tuple[Tensor, ...]) -> str:
    """What became of a hard case: right, right but for a factor, wrong by how much, or not finite and where."""
    trouble = [f"loss {_kind(loss)}"] if not bool(loss.isfinite()) else []
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        nan = any(bool(gradient.isnan().any()) for gradient in gradients)
        trouble.append(f"gradient {'NaN' if nan else 'inf'}")
    if trouble:
        return ", ".join(trouble)
    away = distance(inputs, truth, loss, gradients)
    worst = max(away.gradient.values())
    if worst <= RIGHT and (away.loss <= RIGHT or not inputs.loss_counts):
        return "right" if inputs.loss_counts else "finite, no gradient from it"
    product = sum(float((g.double() * e).sum()) for g, e in zip(gradients, truth.gradients, strict=True))
    square = sum(float((e * e).sum()) for e in truth.gradients)
    factor = product / square if square else math.nan
    scaled = Truth(truth.loss * factor, tuple(exact * factor for exact in truth.gradients))
    if factor > 0 and max(distance(inputs, scaled, loss, gradients).gradient.values()) <= RIGHT and worst > RIGHT:
        return f"{factor:.3g} times the gradient"
    if worst > RIGHT:
        return f"gradient off by {worst:.0%}" if worst < 100 else "gradient off by more than 100 times"
    return f"loss off by {away.loss:.0%} of an advantage"


def _kind(value: Tensor) -> str:
    return "NaN" if bool(value.isnan()) else "inf"
