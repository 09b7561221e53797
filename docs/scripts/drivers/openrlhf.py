"""OpenRLHF: `ActorPPOTrainer.training_step` calls `PolicyLoss` as `step` does.

OpenRLHF imports flash-attn and vLLM, which need a GPU and are not called here: empty modules take their place.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from torch import Tensor

from ._stubs import stubs

VERSION = f"OpenRLHF {version('openrlhf')}"
GPU_MODULES = ("flash_attn.bert_padding", "flash_attn.utils.distributed", "vllm.inputs", "vllm.utils")

with stubs(*GPU_MODULES):
    from openrlhf.models import aggregate_loss
    from openrlhf.utils.loss_utils import get_loss_batch_info

    from gspo_kernels.integrations.openrlhf import PolicyLoss

LOSS = PolicyLoss(clip_eps_low=3e-4, clip_eps_high=4e-4, policy_loss_type="gspo")


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what OpenRLHF logs of it, with `--actor.entropy_coef 0`."""
    counts = get_loss_batch_info(None, batch.mask)
    loss, clip_ratio, ppo_kl, _, _ = LOSS(
        batch.logprobs, batch.old_logprobs, batch.advantages[:, None] * batch.mask, action_mask=batch.mask,
        rollout_log_probs=None, **counts,
    )  # fmt: skip
    entropy = aggregate_loss(batch.entropy.detach(), batch.mask, **counts)
    found = {"policy_loss": loss.detach(), "ppo_clip_ratio": clip_ratio, "ppo_kl": ppo_kl, "entropy_loss": entropy}
    return loss, {name: float(x) for name, x in found.items()}
