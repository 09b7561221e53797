"""verl's `ppo_loss`, as a worker calls it for one micro-batch, with the settings of docs/verl.md."""

from __future__ import annotations

from typing import Any

import torch
import verl
from tensordict import NonTensorData, TensorDict
from torch import Tensor
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import gspo_kernels.integrations.verl  # noqa: F401

VERSION = f"verl {verl.__version__}"
SHOWN = (
    "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/gspo_kernels/clip_fraction",
    "actor/gspo_kernels/ratio_min", "actor/gspo_kernels/ratio_max",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "loss_agg_mode": "seq-mean-token-mean", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "clip_ratio_c": 10.0,
}  # fmt: skip


def step(batch: Any, loss_mode: str = "gspo_kernels", **changes: Any) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of a `Batch` of first_steps.py: prompts of one token, then the responses."""
    rows, lengths = len(batch.mask), batch.mask.sum(1)
    mask = batch.mask.long()
    data = TensorDict(
        {
            "prompts": mask.new_zeros(rows, 1), "responses": batch.token_ids,
            "attention_mask": torch.cat([mask.new_ones(rows, 1), mask], 1), "response_mask": mask,
            "old_log_probs": batch.old_logprobs, "advantages": batch.advantages[:, None] * mask,
        },
        batch_size=[rows],
    )  # fmt: skip
    counts = {"dp_size": 1, "batch_num_tokens": batch.global_tokens, "global_batch_size": batch.global_responses}
    for name, value in counts.items():
        data[name] = NonTensorData(value)
    # Of a model: the row of a token predicts the next, so a prompt's last row has the first token of the response.
    of_rows = [torch.cat([x[:n], x.new_zeros(1)]) for x, n in zip(batch.logprobs, lengths.tolist(), strict=True)]
    offsets = torch.cat([lengths.new_zeros(1), (lengths + 1).cumsum(0)])
    log_probs = torch.nested.nested_tensor_from_jagged(torch.cat(of_rows), offsets)
    config = ActorConfig(
        strategy="fsdp", rollout_n=batch.group_size, ppo_micro_batch_size_per_gpu=rows,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode), **CONFIG | changes,
    )  # fmt: skip
    loss, metrics = ppo_loss(config, {"log_probs": log_probs}, data)
    return loss, {name: float(x.aggregate()) for name, x in metrics.items()}
