"""torchtitan's `PolicyTrainer.forward_backward`, on rows of one response each, from logits."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

import stand_ins
import torch
from torch import Tensor

VERSION = f"torchtitan {version('torchtitan')}"
SHOWN = (
    "loss/mean", "loss/ratio_mean", "loss/ratio_clipped_low_frac", "loss/ratio_clipped_high_frac",
    "bit_wise/logprob_diff/max", "trainer/entropy/mean",
)  # fmt: skip


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    with stand_ins.with_torchtitan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gspo_kernels.integrations import torchtitan as losses
    from torchtitan.experiments.rl.components.batcher import BatchConfig
    from torchtitan.experiments.rl.types import TrainingBatch, TrainingMicrobatch

    shape = batch.mask.shape
    part = TrainingMicrobatch(
        token_ids=batch.token_ids, labels=batch.token_ids, positions=torch.arange(shape[1]).expand(shape),
        generator_logprobs=batch.old_logprobs, loss_mask=batch.mask,
        advantages=torch.where(batch.mask, batch.advantages[:, None], 0.0),
    )  # fmt: skip
    config = losses.ResponseBatcher.Config(batch=BatchConfig(local_batch_size=shape[0], seq_len=shape[1]))
    batcher = config.build(num_prompts_per_train_step=1, dp_degree=1, pad_id=0)
    packed = batcher.numbered(
        TrainingBatch(
            microbatches=[[part]], num_global_valid_tokens=batch.global_tokens, metrics=[], min_policy_versions=[]
        )
    )
    ((part,),) = packed.microbatches
    loss, metrics = losses.PolicyLoss.Config(eps_low=3e-4, eps_high=4e-4).build()(
        batch.logits, part.labels, packed.num_global_valid_tokens, generator_logprobs=part.generator_logprobs,
        advantages=part.advantages, loss_mask=part.loss_mask,
    )  # fmt: skip
    return loss, {name: metrics[name].item() for name in SHOWN}
