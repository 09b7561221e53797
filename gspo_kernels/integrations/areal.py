"""AReaL's policy losses, and a mix-in for its training engines that uses them. See docs/areal.md.

AReaL has no option for the policy loss. Its actor hands `train_batch` a partial of `grpo_loss_fn`, which looks up
`ppo_actor_loss_fn` and `sapo_loss_fn` in its module. `PolicyLosses` hands on a copy of that function which finds those
of this module; AReaL's own module stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import checks
from ..base.layout import Layout, batch_shape
from ..losses.clipped import GRPO, GSPO, SAPO
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.stats import Stats
from ._arrays import dual_clipped, mask_of_padded, renamed

__all__ = ["PolicyLosses", "gather_logprobs_entropy", "ppo_actor_loss_fn", "sapo_loss_fn"]

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
MAX_LOG_RATIO = 20.0


def ppo_actor_loss_fn(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
    *,
    aggregation: str = "token_mean",
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's function of this name. No host sync, but for those of AReaL's rejection sampling.

    All token arrays are [B, T], or packed [N] with `cu_seqlens` [sequences + 1]. Of log-probabilities and advantages
    float32 and float64 are accepted.

    Args:
        proximal_logprobs: of the policy before the update: the denominator of the ratio.
        old_logprobs: of the policy that sampled, read by `rejection_sampling` alone.
        advantages: one per token; with the level "sequence", their mean over a sequence counts.
        rejection_sampling: AReaL's RejectionSamplingConfig, applied by AReaL's own function: a mask, and weights of the
            policy term. As in AReaL, rejected tokens and sequences stay in the count that the loss is divided by.
        importance_sampling_level: "token": a ratio per token (GRPO); "sequence": one per sequence (GSPO).
        aggregation: "token_mean" is AReaL's; "sequence_mean" is the paper's, a mean over each sequence, then over
            sequences; "sequence_sum" has sums in place of the first mean.

    Returns: the loss of this micro-batch, and AReaL's statistics, of the shape of `logprobs`; 0 where masked.

    Raises: ValueError, TypeError: naming AReaL's argument, what was expected and what came.
    """
    checks.choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    arrays = {"logprobs": logprobs, "proximal_logprobs": proximal_logprobs}
    mask, layout, count = _checked(arrays, advantages, loss_mask, cu_seqlens, aggregation)
    given, weights, rejection = mask, None, {}
    if rejection_sampling is not None:
        from areal.utils.functional.functional import apply_rejection_sampling

        result = apply_rejection_sampling(proximal_logprobs, old_logprobs, mask, cu_seqlens, rejection_sampling)
        mask, weights = result.loss_mask.bool(), result.behave_imp_weight
        layout = batch_shape(mask.shape, mask, cu_seqlens, mask.device).layout()
        behave_mask = mask & (weights > 0)
        rejection = {
            "behave_approx_kl": torch.where(behave_mask, (proximal_logprobs - old_logprobs).detach(), 0.0),
            "behave_imp_weight": weights.detach(),
            "behave_mask": behave_mask,
            "filtered_fraction": result.filtered_fraction,
        }
    by_sequence = importance_sampling_level == "sequence"
    high = eps_clip if eps_clip_higher is None else eps_clip_higher
    with renamed(eps_low="eps_clip", eps_high="eps_clip_higher", dual_clip="c_clip"):
        objective = (GSPO if by_sequence else GRPO)(eps_clip, high, c_clip)
    of_sequences = layout.mean(layout.of_tokens(advantages.detach())) if by_sequence else None
    loss, stats = policy_loss_from_logprobs(
        logprobs, _per_token(advantages, mask) if of_sequences is None else of_sequences[:, None], proximal_logprobs,
        objective=objective, mask=mask, cu_seqlens=cu_seqlens,
        importance_weights=None if weights is None else _per_token(weights, mask), aggregation=aggregation,
        normalizer=count, max_log_ratio=MAX_LOG_RATIO,
    )  # fmt: skip

    if of_sequences is None:
        advantages, low_side, high_side = _select(advantages, mask), stats.clipped_low, stats.clipped_high
    else:
        advantages = layout.spread(of_sequences).view(mask.shape)
        low_side, high_side = (
            layout.spread(x.double()).view(mask.shape) > 0 for x in (stats.clipped_low, stats.clipped_high)
        )
    dual = dual_clipped(objective, high_side, advantages)
    ratio = _ratio(stats, layout, mask)
    held = torch.where(low_side, 1 - eps_clip, torch.where(high_side & ~dual, 1 + high, ratio))
    held = torch.where(dual, c_clip or 0.0, held)
    values = -held * advantages.detach().float() * (1.0 if weights is None else weights)
    return loss, {
        "loss": _select(values, mask),
        "importance_weight": ratio,
        "approx_kl": _select((logprobs - proximal_logprobs).detach(), given),
        "clip_mask": (low_side | high_side) & ~dual,
        "dual_clip_mask": dual,
        **rejection,
    }


def sapo_loss_fn(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    tau_pos: float,
    tau_neg: float,
    loss_mask: Tensor,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
    *,
    aggregation: str = "token_mean",
) -> tuple[Tensor, dict[str, Any]]:
    """AReaL's function of this name, for the level "token". Shapes, dtypes and errors as in `ppo_actor_loss_fn`."""
    checks.choice("importance_sampling_level", importance_sampling_level, ("token",))
    arrays = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    mask, layout, count = _checked(arrays, advantages, loss_mask, cu_seqlens, aggregation)
    loss, stats = policy_loss_from_logprobs(
        logprobs, _per_token(advantages, mask), old_logprobs, objective=SAPO(tau_pos, tau_neg), mask=mask,
        cu_seqlens=cu_seqlens, aggregation=aggregation, normalizer=count, max_log_ratio=MAX_LOG_RATIO,
    )  # fmt: skip
    ratio, advantages = _ratio(stats, layout, mask), _select(advantages.detach(), mask)
    positive, negative = (torch.sigmoid(tau * (ratio - 1)) * (4 / tau) for tau in (tau_pos, tau_neg))
    gate = torch.where(advantages > 0, positive, negative)
    return loss, {
        "loss": _select(-gate * advantages, mask),
        "importance_weight": ratio,
        "approx_kl": _select((logprobs - old_logprobs).detach(), mask),
        "clip_mask": torch.zeros_like(mask),
        "dual_clip_mask": torch.zeros_like(mask),
        "sapo_soft_gate": gate,
        "sapo_scaled_gate_pos": positive,
        "sapo_scaled_gate_neg": negative,
    }


def _checked(
    logprobs: dict[str, Any], advantages: Any, loss_mask: Any, cu_seqlens: Any, aggregation: str
) -> tuple[Tensor, Layout, Tensor]:
    """The mask as bool, the layout, and what the loss is divided by."""
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    checks.tensor("loss_mask", loss_mask, "True or 1 where a token counts")
    mask = mask_of_padded(logprobs, {"advantages": advantages}, ("loss_mask", loss_mask), or_packed=True)
    layout = batch_shape(mask.shape, mask, cu_seqlens, mask.device).layout()
    return mask, layout, layout.num_tokens if aggregation == "token_mean" else layout.num_sequences


def _select(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0)


def _per_token(values: Tensor, mask: Tensor) -> Tensor:
    """One number per token, in the shape that says so: packed [1, N]."""
    return values[None] if mask.ndim == 1 else values


def _ratio(stats: Stats, layout: Layout, mask: Tensor) -> Tensor:
    """The ratios per token, 0 where masked."""
    log_ratio = stats.log_ratio
    if stats.ratio_of == "sequence":
        log_ratio = layout.spread(log_ratio).view(mask.shape)
    return _select(log_ratio.clamp(max=MAX_LOG_RATIO).exp(), mask)


# --- the engine -------------------------------------------------------------------------------------------------------


class PolicyLosses:
    """To be mixed into a training engine of AReaL's: `class Actor(PolicyLosses, FSDPPPOActor)`.

    Attributes:
        aggregation: of `ppo_actor_loss_fn`. "sequence_mean" is the paper's; "token_mean" is AReaL's.
    """

    aggregation: ClassVar[str] = "sequence_mean"

    def train_batch(self, input_: Any, loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
        """AReaL's, with the losses of this module; micro-batches and ranks are weighted by what the loss counts."""
        first = input_[0] if isinstance(input_, list) else input_
        if self.aggregation != "token_mean":
            if first.get("teacher_logp") is not None:
                raise NotImplementedError(
                    "teacher_logp: expected none with a mean over responses, because AReaL's distillation term is a "
                    "mean over tokens; set aggregation = 'token_mean'"
                )
            loss_weight_fn = num_responses
        found: dict[str, float] = super().train_batch(  # type: ignore[misc]
            input_, with_our_losses(loss_fn, self.aggregation), loss_weight_fn
        )
        return found

    def _compute_logprobs_entropy(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """AReaL's, with one read of the logits for both."""
        theirs = super()._compute_logprobs_entropy.__func__  # type: ignore[misc]
        found: tuple[Tensor, Tensor] = rebound(theirs, gather_logprobs_entropy=gather_logprobs_entropy)(
            self, *args, **kwargs
        )
        return found


def with_our_losses(loss_fn: Any, aggregation: str) -> functools.partial[Tensor]:
    """The actor's partial of `grpo_loss_fn`, of a copy that calls the losses of this module."""
    if not (isinstance(loss_fn, functools.partial) and loss_fn.func.__name__ == "grpo_loss_fn"):
        raise TypeError(f"loss_fn: expected the partial of grpo_loss_fn that AReaL's PPOActor makes; got {loss_fn!r}")
    losses = {
        name: functools.partial(function, aggregation=aggregation)
        for name, function in (("ppo_actor_loss_fn", ppo_actor_loss_fn), ("sapo_loss_fn", sapo_loss_fn))
    }
    return functools.partial(rebound(loss_fn.func, **losses), *loss_fn.args, **loss_fn.keywords)


def rebound(function: Any, **names: Any) -> Callable[..., Any]:
    """A copy of a function that finds `names` in place of what its module has by those names."""
    missing = [name for name in names if name not in function.__globals__]
    if missing:
        raise RuntimeError(f"{function.__module__}: expected it to import {missing}, as AReaL 1.0.4 does; it does not")
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    return copy


def num_responses(batch: dict[str, Any]) -> Tensor:
    """AReaL's `loss_weight_fn` for a mean over responses: how many of a micro-batch have a token that counts, 0-d."""
    mask = batch["loss_mask"]
    return batch_shape(mask.shape, mask, batch.get("cu_seqlens"), mask.device).layout().num_sequences


def gather_logprobs_entropy(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, tp_group: Any = None, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """AReaL's function of this name: [N, V], or [N, V / tp] with `tp_group`, to two float32 arrays [N].

    One read of the logits, of any dtype, for both numbers, and one for the gradient, which overwrites them.

    Args:
        chunk_size: has no effect: nothing of the size of the logits is allocated.
    """
    found = token_logprobs(logits, labels, temperature=temperature, tp_group=tp_group, overwrite_logits=True)
    return found.logprobs, found.entropy
