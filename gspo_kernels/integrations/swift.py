"""ms-swift's GRPO trainer with the losses of this package, from logits or, without logits, from hidden states.

A plugin of two lines, given to `swift rlhf --external_plugins plugin.py`, selects it:

    from swift.trainers import TrainerFactory
    TrainerFactory.TRAINER_MAPPING["grpo"] = "gspo_kernels.integrations.swift.GRPOTrainer"

See docs/swift.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from swift.rlhf_trainers import grpo_trainer as theirs
from torch import Tensor

from ..base import checks
from ..linear.from_hidden import linear_policy_loss
from ..losses.clipped import GRPO, GSPO, SAPO, GSPOToken
from ..losses.from_logits import policy_loss_from_logprobs, token_logprobs
from ..losses.objectives import Objective
from ..losses.reduction import global_count
from ..losses.weighted import CISPO
from .reductions import reduction_of

__all__ = ["GRPOTrainer", "LinearLoss"]


class GRPOTrainer(theirs.GRPOTrainer):  # type: ignore[misc]
    """ms-swift's, with its options, its batches and its metrics.

    Log-probabilities and entropies take one read of the logits, and the gradient is written over them. With
    `--use_liger_kernel` there are no logits: `liger_grpo_loss` is a `LinearLoss`.
    """

    def _prepare_liger_loss(self) -> None:
        super()._prepare_liger_loss()
        if self.use_liger_loss:
            self.liger_grpo_loss = LinearLoss(
                objective_of(self), self.loss_type, self.temperature, self.beta, self.max_completion_length
            )

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> tuple[Tensor, Any]:
        """The loss of a micro-batch, and ms-swift's own metrics, by its own function; host syncs as there."""
        objective = objective_of(self)
        logprobs, entropy = self._get_per_token_logps_and_entropies(
            model, model_inputs, grpo_batch, compute_entropy=self.compute_entropy
        )
        measured = copy.copy(self)  # whose log-probabilities are these, without a gradient
        found = logprobs.detach(), None if entropy is None else entropy.detach()
        measured._get_per_token_logps_and_entropies = lambda *_, **__: found
        _, metrics = super(GRPOTrainer, measured)._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        return self._policy_loss(objective, logprobs, entropy, grpo_batch), metrics

    def _policy_loss(self, objective: Objective, logprobs: Tensor, entropy: Tensor | None, batch: Any) -> Tensor:
        mask = batch.completion_mask.bool()
        if self.top_entropy_quantile < 1.0:
            assert entropy is not None
            threshold = torch.nanquantile(
                entropy.detach().float().masked_fill(~mask, torch.nan), 1 - self.top_entropy_quantile
            )
            weights = (entropy >= threshold).float()
        else:
            weights = None
        if self.overlong_filter:
            mask = mask & ~batch.truncated_mask.bool()[:, None]
        rollout, old = batch.rollout_per_token_logps, batch.old_per_token_logps
        compared = logprobs.detach() if old is None else old
        corrects = self.rollout_importance_sampling_mode is not None and not self.disable_rollout_importance_sampling
        if corrects and all(theirs.gather_object([rollout is not None])):
            _, correction = self._get_rollout_is_correction(compared, rollout, mask)
            weights = correction if weights is None else weights * correction
        advantages = batch.advantages
        by_sequence = response_mean(advantages, mask)
        if self.off_policy_sequence_mask_delta is not None:
            keep = self._compute_off_policy_sequence_mask(
                torch.where(mask, logprobs.detach(), 0.0),
                torch.where(mask, compared if rollout is None else rollout, 0.0),
                mask,
                by_sequence,
            )
            mask = mask & keep[:, None]
        with_kl = self.beta != 0.0 and not self.kl_in_reward
        reduction = reduction_of("ms-swift", self.loss_type)
        counts = {
            "local responses": len(mask),
            "local tokens": None,
            "responses x length": len(mask) * self.max_completion_length,
            "tokens": None if batch.num_items_in_batch is None else batch.num_items_in_batch / self._processes(),
        }
        loss, _ = policy_loss_from_logprobs(
            logprobs, by_sequence if isinstance(objective, GSPO) else advantages, old, objective=objective, mask=mask,
            ref_logprobs=batch.ref_per_token_logps if with_kl else None, beta=self.beta if with_kl else 0.0,
            importance_weights=weights, aggregation=reduction.aggregation, normalizer=counts[reduction.normalizer],
        )  # fmt: skip
        scaled: Tensor = self._undo_gradient_accumulation_scaling(loss)
        return scaled

    def _processes(self) -> int:
        return int(self.accelerator.num_processes)

    def _get_logps_via_local_forward(
        self, model: Any, model_inputs: Any, logits_to_keep: int, input_ids: Tensor, compute_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities, and entropies if asked for, of the last tokens: [B, T], without padding [1, N]."""
        known = {"use_cache": False, "logits_to_keep": logits_to_keep + 1}
        inputs = model_inputs | {name: value for name, value in known.items() if name in self.model_kwarg_keys}
        logits = model(**inputs).logits[:, -(logits_to_keep + 1) : -1]
        found = token_logprobs(
            logits, input_ids[:, -logits_to_keep:], temperature=self.temperature, overwrite_logits=True
        )
        return found.logprobs, found.entropy if compute_entropy else None


def objective_of(trainer: Any) -> Objective:
    """The objective that ms-swift's options select; refuses those that have none here, by name."""
    level, low, high = trainer.importance_sampling_level, trainer.epsilon_low, trainer.epsilon_high
    reduction_of("ms-swift", trainer.loss_type)
    checks.choice("importance_sampling_level", level, ("token", "sequence", "sequence_token"))
    if trainer.loss_type in ("sapo", "cispo") and level != "token":
        raise NotImplementedError(
            f"importance_sampling_level: expected 'token' with loss_type {trainer.loss_type!r}; got {level!r}"
        )
    if level == "sequence" and (trainer._has_teacher or trainer.advantage_reweight is not None):
        raise NotImplementedError(
            "importance_sampling_level: expected 'sequence_token', because a teacher or advantage_reweight gives every "
            "token an advantage of its own; got 'sequence'"
        )
    if trainer.sdar_loss_coef > 0:
        raise NotImplementedError(f"sdar_loss_coef: expected 0 with this trainer; got {trainer.sdar_loss_coef}")
    if trainer.chord_sft_iterator is not None:
        raise NotImplementedError("chord_sft_dataset: expected none with this trainer")
    if trainer.loss_type == "sapo":
        return SAPO(trainer.tau_pos, trainer.tau_neg)
    if trainer.loss_type == "cispo":
        if high < 1.0:
            raise ValueError(
                "epsilon_high: expected the largest ratio that counts, at least 1, because loss_type is 'cispo' (5 is "
                f"recommended); got {high}"
            )
        return CISPO(1.0, high - 1.0)
    delta = trainer.args.delta
    if delta is not None and delta < 1 + high:
        raise ValueError(f"delta: expected at least 1 + epsilon_high, {1 + high}; got {delta}")
    return {"token": GRPO, "sequence": GSPO, "sequence_token": GSPOToken}[level](low, high, delta)


def response_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] -> [B], over unmasked tokens; 0 for a response without any."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class LinearLoss:
    """Called as Liger's `LigerFusedLinearGRPOLoss` is, for the trainer's attribute `liger_grpo_loss`.

    Logits exist one chunk at a time, in float32 (see `linear_policy_loss`).

    Attributes:
        loss_type: as of ms-swift, with Liger's normalizers: "dapo" and "cispo" count the tokens of this micro-batch on
            all ranks.
    """

    objective: Objective
    loss_type: str
    temperature: float = 1.0
    beta: float = 0.0
    max_completion_length: int | None = None

    def __call__(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a micro-batch, and (mean KL if `beta` is not 0, clip fraction), both by token, as Liger has them.

        Args:
            _input: hidden states [B, T, D]; those at t predict token t.
            lin_weight: of the LM head, [V, D]; `bias`: [V].
            attention_mask: [B, T], 1 where a token counts.
            advantages: [B].
            vllm_is_ratio: factors of the policy term, [B, T] or [B, 1].
        """
        reduction = reduction_of("ms-swift", self.loss_type)
        mask = attention_mask.bool()
        rows = len(mask)
        normalizer: float | Tensor | None = None
        if reduction.normalizer == "tokens":
            everyone = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
            normalizer = global_count(mask, aggregation="token_mean", group=everyone, averaged=everyone is not None)
        elif reduction.normalizer == "local responses":
            normalizer = rows
        elif reduction.normalizer == "responses x length":
            assert self.max_completion_length is not None
            normalizer = rows * self.max_completion_length
        loss, stats = linear_policy_loss(
            _input, lin_weight, selected_token_ids, advantages, old_per_token_logps, objective=self.objective,
            bias=bias, mask=mask, temperature=self.temperature, ref_logprobs=ref_per_token_logps if self.beta else None,
            beta=self.beta, importance_weights=vllm_is_ratio, aggregation=reduction.aggregation, normalizer=normalizer,
        )  # fmt: skip
        clipped = stats.clipped_low | stats.clipped_high
        tokens = (mask & (clipped[:, None] if stats.ratio_of == "sequence" else clipped)).sum()
        share = tokens / mask.sum().clamp(min=1)
        return loss, ((stats.ref_kl, share) if self.beta else (share,))
