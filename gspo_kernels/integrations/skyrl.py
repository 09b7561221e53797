"""SkyRL's policy losses `gspo_kernels` and others: importing this module registers them.

    trainer.override_entrypoint=gspo_kernels.integrations.skyrl trainer.algorithm.policy_loss_type=gspo_kernels

SkyRL looks a loss up by name in every worker. A worker imports this module when it unpickles the loss. See
docs/skyrl.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
    compute_off_policy_correction,
    off_policy_correction_enabled,
)
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
from torch import Tensor

from ..base import checks
from ..losses.clipped import GMPO, PPO, SAPO, GSPOToken
from ..losses.from_logits import policy_loss_from_logprobs
from ..losses.objectives import Objective
from ..losses.weighted import CISPO, DPPO, TOPR, TOPRToken
from ._arrays import dual_clipped, mask_of_padded, masked_mean, renamed

__all__ = ["main", "policy_loss"]

DIVERGENCES = {"binary_tv": "tv", "binary_kl": "kl"}  # by SkyRL's dppo_type
LOGGED = (
    "clip_fraction_low", "clip_fraction_high", "ratio_mean", "ratio_min", "ratio_max", "saturated_fraction",
    "approx_kl",
)  # fmt: skip


def dppo(config: Any) -> DPPO:
    checks.choice("dppo.dppo_type", config.dppo.dppo_type, tuple(DIVERGENCES))
    divergence: Any = DIVERGENCES[config.dppo.dppo_type]
    return DPPO(config.dppo.delta_low, config.dppo.delta_high, None, divergence)


# By policy_loss_type: the objective, from SkyRL's AlgorithmConfig.
OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "gspo_kernels": lambda c: GSPOToken(c.eps_clip_low, c.eps_clip_high),
    "gspo_dual_clip_kernels": lambda c: GSPOToken(c.eps_clip_low, c.eps_clip_high, c.clip_ratio_c),
    "regular_kernels": lambda c: PPO(c.eps_clip_low, c.eps_clip_high),
    "dual_clip_kernels": lambda c: PPO(c.eps_clip_low, c.eps_clip_high, c.clip_ratio_c),
    "cispo_kernels": lambda c: CISPO(c.cispo.cispo_eps_clip_low, c.cispo.cispo_eps_clip_high),
    "sapo_kernels": lambda c: SAPO(c.sapo.tau_pos, c.sapo.tau_neg),
    "dppo_kernels": dppo,
    "gmpo_kernels": lambda c: GMPO(c.eps_clip_low, c.eps_clip_high),
    "topr_kernels": lambda c: TOPR(),
    "topr_token_kernels": lambda c: TOPRToken(),
}

CLIP_RANGE = {"eps_low": "eps_clip_low", "eps_high": "eps_clip_high", "dual_clip": "clip_ratio_c"}
NAMES = {  # in errors: of SkyRL's options by our parameters
    "cispo_kernels": {"eps_low": "cispo.cispo_eps_clip_low", "eps_high": "cispo.cispo_eps_clip_high"},
    "sapo_kernels": {"tau_pos": "sapo.tau_pos", "tau_neg": "sapo.tau_neg"},
    "dppo_kernels": {"delta_low": "dppo.delta_low", "delta_high": "dppo.delta_high"},
}


def policy_loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch, as SkyRL's workers for FSDP and Megatron call it. One host sync, for the metrics; one
    for each metric of SkyRL's off-policy correction, if that is on.

    Args:
        name: a key of `OBJECTIVES`.
        log_probs: [B, T], differentiable; float32 or float64, like the other log-probabilities.
        old_log_probs: [B, T]. `dppo_kernels` reads `rollout_logprobs` in their place, if there are any.
        advantages: [B, T], multiplied by SkyRL's reduction already (`apply_loss_reduction_to_advantages_minibatch`).
        config: SkyRL's AlgorithmConfig: the fields that `OBJECTIVES` reads, and `off_policy_correction`.
        loss_mask: [B, T], 1 where a token counts. None: all count.
        rollout_logprobs: [B, T], of the engine. None: no off-policy correction, as in SkyRL.

    Returns: the sum over the tokens, and metrics for `loss_metrics/`: SkyRL's own names, and stats of the package.

    Raises: ValueError, TypeError: naming SkyRL's argument, what was expected and what came.
    """
    mask = mask_of_padded(
        {"log_probs": log_probs, "old_log_probs": old_log_probs}, {"advantages": advantages}, ("loss_mask", loss_mask),
        optional_logprobs={"rollout_logprobs": rollout_logprobs},
    )  # fmt: skip
    with renamed(**NAMES.get(name, CLIP_RANGE)):
        objective = OBJECTIVES[name](config)
    weights, metrics = correction(old_log_probs, rollout_logprobs, mask, config.off_policy_correction)
    sampled = rollout_logprobs if isinstance(objective, DPPO) and rollout_logprobs is not None else old_log_probs
    loss, stats = policy_loss_from_logprobs(
        log_probs, advantages.detach(), sampled, objective=objective, mask=mask, importance_weights=weights,
        aggregation="sequence_sum", normalizer=1.0,
    )  # fmt: skip
    dual = dual_clipped(objective, stats.clipped_high, advantages)  # not counted by SkyRL
    found = {"clip_ratio": masked_mean(stats.clipped_low | (stats.clipped_high & ~dual), mask)}
    found |= {f"gspo_kernels/{key}": getattr(stats, key) for key in LOGGED}
    values = torch.stack([x.float() for x in found.values()]).tolist()
    return loss, dict(zip(found, values, strict=True)) | metrics


@torch.no_grad()
def correction(
    old_log_probs: Tensor, rollout_logprobs: Tensor | None, mask: Tensor, options: Any
) -> tuple[Tensor | None, dict[str, float]]:
    """Factors of the tokens' losses [B, T] by SkyRL's own `compute_off_policy_correction`, and its metrics.

    A token that it masks keeps its part in the ratio of its response, as in SkyRL: the factor is 0.
    """
    if rollout_logprobs is None or not off_policy_correction_enabled(options):
        return None, {}
    old, rollout = (torch.where(mask, x, 0.0) for x in (old_log_probs, rollout_logprobs))
    ratio, metrics, kept = compute_off_policy_correction(old, rollout, mask.to(old.dtype), options)
    return kept if ratio is None else kept * ratio, metrics


def main() -> None:
    """SkyRL's entry point, with these losses registered: what `trainer.override_entrypoint` calls."""
    from skyrl.train.entrypoints import main_base

    sys.argv = [x for x in sys.argv if not x.startswith("trainer.override_entrypoint=")]
    main_base.main()


for _name in OBJECTIVES:
    PolicyLossRegistry.register(_name, partial(policy_loss, _name))
