"""OpenRLHF's `PolicyLoss` with the objectives of this package, and an actor that trains with it.

OpenRLHF has no option for a loss of one's own. In a copy of openrlhf/cli/train_ppo_ray.py, replace the import of
`PolicyModelActor` by

    from gspo_kernels.integrations.openrlhf import policy_model_actor

    PolicyModelActor = policy_model_actor()

See docs/openrlhf.md.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from openrlhf.models import PolicyLoss as TheirPolicyLoss
from torch import Tensor

from ..base import checks
from ..losses.clipped import PPO, GSPOToken
from ..losses.from_logits import policy_loss_from_logprobs
from ..losses.objectives import Objective, check_objective
from ._arrays import checked_count, dual_clipped, mask_of_padded, masked_mean, renamed
from .reductions import reduction_of

__all__ = ["PolicyLoss", "policy_model_actor"]

Results = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]


class PolicyLoss(TheirPolicyLoss):
    """OpenRLHF's `PolicyLoss`: the same arguments, the same five results.

    Args:
        options: those of OpenRLHF's class. `policy_loss_type` "gspo" selects GSPO-token, which equals GSPO where all
            tokens of a response have one advantage, and the mean over responses; "ppo" a ratio per token.
        objective: in place of what `policy_loss_type` and the clip options select: one with a ratio per token.
            `policy_loss_type` still says what a correction for the rollout engine does: "gspo" takes the engine's
            log-probabilities as the old ones, "ppo" weighs the loss.
    """

    def __init__(self, *options: Any, objective: Objective | None = None, **named: Any) -> None:
        super().__init__(*options, **named)
        if self.policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type: expected 'ppo' or 'gspo'; got {self.policy_loss_type!r}")
        if objective is None:
            kind = GSPOToken if self.policy_loss_type == "gspo" else PPO
            with renamed(eps_low="clip_eps_low", eps_high="clip_eps_high"):
                objective = kind(self.clip_eps_low, self.clip_eps_high, self.dual_clip)
        check_objective(objective)
        if objective.ratio_of != "token" or not objective.advantages_per_token:
            raise ValueError(
                "objective: expected one with a ratio and an advantage per token, as OpenRLHF has them, such as "
                f"GSPOToken(); got {objective}"
            )
        self.objective = objective

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Results:
        """The loss of a micro-batch; no host sync.

        Args:
            log_probs, old_log_probs, rollout_log_probs: [B, T], float32 or float64. The engine's are needed for a
                correction (`is_correction_level`).
            advantages: [B, T].
            action_mask: [B, T], True where a token counts; None: all count.
            dp_size, batch_num_tokens, global_batch_size: OpenRLHF's counts of the optimizer step over all ranks, each
                divided by the number of micro-batches. None: this micro-batch's own, and dp_size is not read.

        Returns:
            (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), 0-d; the last two are None without a correction that
            weighs the loss.

        Raises: ValueError, TypeError: naming OpenRLHF's argument, what was expected and what came.
        """
        mask = mask_of_padded(
            {"log_probs": log_probs, "old_log_probs": old_log_probs}, {"advantages": advantages},
            ("action_mask", action_mask), optional_logprobs={"rollout_log_probs": rollout_log_probs},
        )  # fmt: skip
        sampled, weights, vllm_kl, filtered = old_log_probs, None, None, None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(
                    "rollout_log_probs: expected the engine's, because is_correction_level is "
                    f"{self.is_correction_level!r}; got None"
                )
            if self.policy_loss_type == "gspo":
                sampled = rollout_log_probs
            else:
                weights, filtered = self.correction(old_log_probs, rollout_log_probs, mask)
                vllm_kl = masked_mean(rollout_log_probs - old_log_probs, mask)
        reduction = reduction_of("OpenRLHF", "token-mean" if self.token_level_loss else "seq-mean-token-mean")
        count, name = global_batch_size, "global_batch_size"
        if self.token_level_loss:
            count, name = batch_num_tokens, "batch_num_tokens"
        if count is not None:
            ranks = checks.whole("dp_size", dp_size, "how many ranks average their gradients", at_least=1)
            count = checked_count(name, count, mask) / ranks
        loss, stats = policy_loss_from_logprobs(
            log_probs, advantages.detach(), sampled, objective=self.objective, mask=mask, importance_weights=weights,
            aggregation=reduction.aggregation, normalizer=count,
            rollout_logprobs=rollout_log_probs if self.objective.uses_rollout_logprobs else None,
        )  # fmt: skip
        with torch.no_grad():
            dual = dual_clipped(self.objective, stats.clipped_high, advantages)  # not counted by OpenRLHF
            clipped = masked_mean(stats.clipped_low | (stats.clipped_high & ~dual), mask)
            return loss, clipped, masked_mean(old_log_probs - log_probs, mask), vllm_kl, filtered

    @torch.no_grad()
    def correction(self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(factor of each token's loss [B, T], share of the tokens or responses outside of the threshold).

        OpenRLHF's formulas of `is_correction_*`. A weight is at most exp(20).
        """
        low, high = self.is_correction_threshold
        log_weight = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
        values, by_ratio = log_weight, self.is_correction_gating == "ratio"
        if not by_ratio:
            p, q = (torch.where(mask, x, 0.0).exp().clamp(1e-6, 1 - 1e-6) for x in (rollout_log_probs, old_log_probs))
            if self.is_correction_gating == "binary_kl":
                values = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            else:
                values = (p - q).abs()
        units = mask
        if self.is_correction_level == "seq":
            units = mask.any(1, keepdim=True)
            values = torch.where(mask, values, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        if by_ratio:
            values = values.exp()
        inside = (values >= low) & (values <= high)
        if self.is_correction_mode == "clip":
            factors = values.clamp(low, high)
        else:
            factors = torch.where(inside, log_weight.clamp(max=20.0).exp(), 0.0)
        return factors, masked_mean(~inside, units)


def policy_model_actor(objective: Objective | None = None) -> Any:
    """OpenRLHF's Ray actor `PolicyModelActor`, whose trainer has this `PolicyLoss` with OpenRLHF's own options.

    Args:
        objective: as in `PolicyLoss`.
    """
    import ray
    from openrlhf.trainer.ray.ppo_actor import PolicyModelActor as Theirs

    class PolicyModelActor(Theirs.__ray_metadata__.modified_class):  # Ray's own class allows no subclass
        def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
            super().init_model_from_pretrained(*args, **kwargs)
            theirs = self.trainer.actor_loss_fn
            options = {name: getattr(theirs, name) for name in inspect.signature(type(theirs)).parameters}
            self.trainer.actor_loss_fn = PolicyLoss(**options, objective=objective)

    return ray.remote(num_gpus=1)(PolicyModelActor)
