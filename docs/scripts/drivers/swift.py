"""ms-swift: `GRPOTrainer._compute_loss_single` calls `_compute_loss_and_metrics` as `step` does.

ms-swift imports a model hub and a serializer, which are not called here: empty modules take their place. Its PPO needs
a TRL below 1.0, as ms-swift does; with a later one its base class is an empty module, too.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ._stubs import stubs

VERSION = f"ms-swift {version('ms_swift')}"
NOT_CALLED = ("mcore_bridge", "modelscope", "msgspec", "trl.experimental.ppo")

with stubs(*NOT_CALLED):
    from swift.rl_core.data import GRPOBatch

    from gspo_kernels.integrations.swift import GRPOTrainer


class OneProcess:
    """What the loss calls of an accelerator."""

    num_processes = 1
    is_main_process = False

    def gather_for_metrics(self, values: Tensor) -> Tensor:
        return values.reshape(-1) if values.ndim == 0 else values


def make_trainer(cls: Any = GRPOTrainer, **changes: Any) -> Any:
    """A trainer with ms-swift's defaults that has log-probabilities in place of a model; `changes`: its options."""
    options: dict[str, Any] = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": None, "beta": 0.0,
        "delta": None, "tau_pos": 1.0, "tau_neg": 1.05, "top_entropy_quantile": 1.0, "log_entropy": False,
        "overlong_filter": False, "off_policy_sequence_mask_delta": None, "rollout_importance_sampling_mode": None,
        "rollout_importance_sampling_threshold": 2.0, "max_completion_length": 19, "gradient_accumulation_steps": 1,
        "report_to": [], "advantage_reweight": None, "sdar_loss_coef": 0.0, "has_teacher": False,
    } | changes  # fmt: skip
    trainer: Any = object.__new__(cls)
    of_trainer = (
        "loss_type", "importance_sampling_level", "beta", "tau_pos", "tau_neg", "top_entropy_quantile",
        "overlong_filter", "off_policy_sequence_mask_delta", "rollout_importance_sampling_mode",
        "rollout_importance_sampling_threshold", "max_completion_length", "advantage_reweight", "sdar_loss_coef",
    )  # fmt: skip
    high = options["epsilon_high"]
    vars(trainer).update(
        {name: options[name] for name in of_trainer},
        args=SimpleNamespace(**options),
        epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon"] if high is None else high,
        compute_entropy=options["log_entropy"] or options["top_entropy_quantile"] < 1.0,
        model=SimpleNamespace(training=True),
        model_accepts_loss_kwargs=False,
        compute_loss_func=None,
        accelerator=OneProcess(),
        kl_in_reward=False,
        disable_rollout_importance_sampling=False,
        log_rollout_offpolicy_metrics=False,
        chord_sft_iterator=None,
        temperature=1.0,
        _metrics={"train": defaultdict(list)},
    )
    cls_of = type(cls.__name__, (cls,), {"_has_teacher": options["has_teacher"]})
    trainer.__class__ = cls_of
    return trainer


def loss_and_metrics(
    trainer: Any, logprobs: Tensor, entropy: Tensor | None, batch: GRPOBatch
) -> tuple[Tensor, dict[str, Any]]:
    """One micro-batch, whose model has these log-probabilities."""
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, entropy)
    loss, metrics = trainer._compute_loss_and_metrics(trainer.model, {}, batch)
    return loss, metrics


def make_batch(mask: Tensor, advantages: Tensor, **arrays: Any) -> GRPOBatch:
    lengths = mask.sum(1)
    found = {
        "truncated_mask": torch.zeros(len(mask), dtype=torch.bool), "num_items_in_batch": mask.sum(),
        "seq_lengths": lengths,
    }  # fmt: skip
    return GRPOBatch(completion_mask=mask, advantages=advantages, **(found | arrays))


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what ms-swift logs of it."""
    trainer = make_trainer(importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, log_entropy=True)
    trainer._logs = {"entropy": []}
    inputs = make_batch(batch.mask, batch.advantages[:, None] * batch.mask, old_per_token_logps=batch.old_logprobs)
    loss, metrics = loss_and_metrics(trainer, batch.logprobs, batch.entropy, inputs)
    trainer._update_metrics(metrics)
    logged = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy/mean")
    found = {name: float(trainer._metrics["train"][name][-1]) for name in logged}
    return loss, {"loss": float(loss.detach()), **found}
