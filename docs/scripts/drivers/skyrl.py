"""SkyRL: the trainer scales the advantages, and a worker calls a loss of its registry, as `step` does."""

from __future__ import annotations

import sys
import typing
from importlib.metadata import version
from typing import Any

import typing_extensions
from torch import Tensor

VERSION = f"SkyRL {version('skyrl')}"
if sys.version_info < (3, 12):  # where pydantic refuses the TypedDict that SkyRL imports from typing
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]

from skyrl.backends.skyrl_train.utils.ppo_utils import (  # noqa: E402
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
)
from skyrl.backends.skyrl_train.utils.torch_utils import masked_mean  # noqa: E402
from skyrl.train.config import AlgorithmConfig  # noqa: E402

import gspo_kernels.integrations.skyrl  # noqa: E402, F401

SHOWN = (
    "policy_loss", "policy_entropy", "loss_metrics/clip_ratio", "loss_metrics/gspo_kernels/ratio_min",
    "loss_metrics/gspo_kernels/ratio_max",
)  # fmt: skip
CONFIG = AlgorithmConfig(
    policy_loss_type="gspo_kernels", loss_reduction="sequence_mean", eps_clip_low=3e-4, eps_clip_high=4e-4,
    use_kl_loss=False,
)  # fmt: skip


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what SkyRL logs of it."""
    loss_mask = batch.mask.long()
    advantages = apply_loss_reduction_to_advantages_minibatch(
        batch.advantages[:, None] * loss_mask, loss_mask, CONFIG.loss_reduction, micro_batch_size=len(loss_mask),
        max_seq_len=loss_mask.shape[1],
    )  # fmt: skip
    loss, metrics = PolicyLossRegistry.get(CONFIG.policy_loss_type)(
        batch.logprobs, batch.old_logprobs, advantages, config=CONFIG, loss_mask=loss_mask, rollout_logprobs=None
    )
    found = {"policy_loss": loss.item(), "policy_entropy": masked_mean(batch.entropy, loss_mask).item()}
    return loss, found | {f"loss_metrics/{name}": x for name, x in metrics.items()}
