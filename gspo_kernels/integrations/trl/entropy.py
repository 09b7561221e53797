"""TRL's options about entropy: a bonus, its adaptive weight, and a loss on the tokens of highest entropy alone.

With one of them the trainer computes log-probabilities and entropies at the head, and the loss from those: the bonus
has its own mean, and the quantile is that of all ranks, so neither is known while the head's logits are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_entropy_options(trainer: Any) -> bool:
    return bool(trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1.0)


def tokens_that_count(trainer: Any, entropy: Tensor, mask: Tensor) -> Tensor:
    """[B, C] bool: the unmasked tokens, or those of them whose entropy is in the top quantile of all ranks."""
    if trainer.top_entropy_quantile == 1.0:
        return mask != 0
    chosen: Tensor = trainer.get_high_entropy_mask(entropy.detach(), mask, 1 - trainer.top_entropy_quantile)
    return chosen


def add_bonus(trainer: Any, loss: Tensor, entropy: Tensor, counted: Tensor) -> Tensor:
    """The loss minus the micro-batch's share of the bonus: the weight times the mean entropy of the tokens that count.

    The weight is that of the last optimizer step; the new one is computed at the end of this step.
    """
    mode, accumulated = trainer._mode, trainer._accumulated
    total, count = torch.where(counted, entropy, 0.0).sum(), counted.sum()
    per_step = 1.0 if trainer.loss_type == "dapo" else accumulated
    policy_loss = trainer.accelerator.gather(loss.detach() * per_step).nanmean().item()
    trainer._metrics[mode]["policy_loss"].append(policy_loss)
    adaptive = trainer.use_adaptive_entropy
    if not (adaptive and trainer._last_world_entropy > trainer.args.entropy_target):
        loss = loss - trainer.entropy_coef * total / count.clamp(min=1) / accumulated
    if mode == "train":
        if adaptive:
            _adapt(trainer, torch.stack([total.detach(), count]))
        if trainer.accelerator.sync_gradients:
            trainer._metrics[mode]["entropy_coef"].append(trainer.entropy_coef)
    return loss


def _adapt(trainer: Any, sums: Tensor) -> None:
    """At the end of an optimizer step: moves the weight up where the mean entropy of all ranks is below its target.

    Args:
        sums: the micro-batch's entropy and count of tokens. TRL saves the weight and the mean in its checkpoints.
    """
    args, before = trainer.args, trainer._entropy_window_stats
    sums = sums if before is None else before + sums
    trainer._entropy_window_stats = None if trainer.accelerator.sync_gradients else sums
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    entropy = total / max(count, 1.0)
    step = args.entropy_coef_delta if entropy <= args.entropy_target else -args.entropy_coef_delta
    trainer.entropy_coef = min(max(trainer.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
    trainer._last_world_entropy = entropy
