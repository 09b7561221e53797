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
from ._arrays import renamed
from .reductions import Reduction, reduction_of

__all__ = ["GRPOTrainer", "LinearLoss", "MegatronLosses"]


class GRPOTrainer(theirs.GRPOTrainer):
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
        corrects = self.rollout_importance_sampling_mode is not None and not self.disable_rollout_importance_sampling
        corrects = corrects and all(theirs.gather_object([grpo_batch.rollout_per_token_logps is not None]))
        mask = grpo_batch.completion_mask.bool()
        chosen = high_entropy(self, entropy, mask)
        step_tokens = None
        if grpo_batch.num_items_in_batch is not None:
            step_tokens = grpo_batch.num_items_in_batch / self.accelerator.num_processes
        loss = loss_of(
            self, objective, logprobs, grpo_batch, mask=counted(self, grpo_batch), chosen=chosen, corrects=corrects,
            reduction=reduction_of("ms-swift", self.loss_type), step_tokens=step_tokens,
        )  # fmt: skip
        return self._undo_gradient_accumulation_scaling(loss), metrics

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


class MegatronLosses:
    """To be mixed into ms-swift's trainer for Megatron: `class Trainer(MegatronLosses, MegatronGRPOTrainer)`."""

    def loss_func(self: Any, output_tensor: Tensor, data: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, from log-probabilities [B, T], and ms-swift's own metrics, by its own function."""
        from megatron.core import mpu

        objective = objective_of(self)
        batch = data["grpo_batch"]
        with torch.no_grad():
            _, metrics = super().loss_func(output_tensor.detach(), data)  # type: ignore[misc]
        mask = counted(self, batch)
        corrects = self.rollout_importance_sampling_mode is not None and not self.disable_rollout_importance_sampling
        if corrects:
            found = torch.tensor(batch.rollout_per_token_logps is not None, device=mask.device).int()
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN, group=group)
            corrects = bool(found)
        reduction = reduction_of("ms-swift", self.loss_type)
        if self.loss_type == "bnpo":  # there of the optimizer step
            reduction = reduction._replace(normalizer="tokens")
        step_tokens = None
        if reduction.normalizer == "tokens":
            step_tokens = (batch.num_items_in_batch / mpu.get_data_parallel_world_size()).clamp(min=1.0)
        loss = loss_of(
            self, objective, output_tensor, batch, mask=mask, corrects=corrects, reduction=reduction,
            chosen=high_entropy(self, data.get("per_token_entropy"), mask), step_tokens=step_tokens,
        )  # fmt: skip
        # Megatron divides by the number of micro-batches what counts the tokens of all of them.
        return loss if step_tokens is None else loss * self.args.num_microbatches, metrics


def counted(trainer: Any, batch: Any) -> Tensor:
    """Bool [B, T]: the tokens that count; with `overlong_filter`, not those of truncated responses."""
    mask: Tensor = batch.completion_mask.bool()
    return mask & ~batch.truncated_mask.bool()[:, None] if trainer.overlong_filter else mask


def high_entropy(trainer: Any, entropy: Tensor | None, mask: Tensor) -> Tensor | None:
    """[B, T]: 1 for the tokens that `top_entropy_quantile` selects among those of this micro-batch, 0 for others."""
    if trainer.top_entropy_quantile >= 1.0 or entropy is None:
        return None
    entropy = entropy.detach().float()
    threshold = torch.nanquantile(entropy.masked_fill(~mask, torch.nan), 1 - trainer.top_entropy_quantile)
    return (entropy >= threshold).float()


def loss_of(
    trainer: Any,
    objective: Objective,
    logprobs: Tensor,
    batch: Any,
    *,
    mask: Tensor,
    chosen: Tensor | None,
    corrects: bool,
    reduction: Reduction,
    step_tokens: Tensor | None,
) -> Tensor:
    """The loss of a micro-batch as ms-swift's options define it.

    Args:
        logprobs: [B, T] float32 or float64, differentiable.
        batch: ms-swift's GRPOBatch.
        chosen: factors of the policy term, or None.
        corrects: whether `rollout_importance_sampling_mode` weighs the policy term.
        step_tokens: the tokens of the optimizer step, over the number of ranks.
    """
    rollout, old = batch.rollout_per_token_logps, batch.old_per_token_logps
    compared = logprobs.detach() if old is None else old
    weights = chosen
    if corrects:
        weights = trainer._apply_rollout_importance_sampling(torch.where(mask, compared - rollout, 0.0), mask)
        weights = weights if chosen is None else weights * chosen
    of_responses = response_mean(batch.advantages, mask)
    if trainer.off_policy_sequence_mask_delta is not None:
        new, before = (torch.where(mask, x, 0.0) for x in (logprobs.detach(), compared if rollout is None else rollout))
        mask = mask & trainer._compute_off_policy_sequence_mask(new, before, mask, of_responses)[:, None]
    counts: dict[str, float | Tensor | None] = {
        "local responses": len(mask),
        "local tokens": None,
        "responses x length": len(mask) * trainer.max_completion_length,
        "tokens": step_tokens,
    }
    with_kl = trainer.beta != 0.0 and not trainer.kl_in_reward
    loss, _ = policy_loss_from_logprobs(
        logprobs, of_responses if isinstance(objective, GSPO) else batch.advantages, old, objective=objective,
        mask=mask, ref_logprobs=batch.ref_per_token_logps if with_kl else None, beta=trainer.beta if with_kl else 0.0,
        importance_weights=weights, aggregation=reduction.aggregation, normalizer=counts[reduction.normalizer],
    )  # fmt: skip
    return loss


def objective_of(trainer: Any) -> Objective:
    """The objective that ms-swift's options select; refuses those that have none here, by name."""
    level, low, high = trainer.importance_sampling_level, trainer.epsilon_low, trainer.epsilon_high
    reduction_of("ms-swift", trainer.loss_type)
    checks.choice("importance_sampling_level", level, ("token", "sequence", "sequence_token"))
    if trainer.loss_type in ("sapo", "cispo") and level != "token":
        raise NotImplementedError(
            f"importance_sampling_level: expected 'token' with loss_type {trainer.loss_type!r}; got {level!r}"
        )
    reweighted = getattr(trainer, "advantage_reweight", None) is not None  # Megatron's trainer has none of these three
    if level == "sequence" and (trainer._has_teacher or reweighted):
        raise NotImplementedError(
            "importance_sampling_level: expected 'sequence_token', because a teacher or advantage_reweight gives every "
            "token an advantage of its own; got 'sequence'"
        )
    if (coefficient := getattr(trainer, "sdar_loss_coef", 0.0)) > 0:
        raise NotImplementedError(f"sdar_loss_coef: expected 0 with this trainer; got {coefficient}")
    if getattr(trainer, "chord_sft_iterator", None) is not None:
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
    with renamed(eps_low="epsilon", eps_high="epsilon_high", dual_clip="delta"):
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
