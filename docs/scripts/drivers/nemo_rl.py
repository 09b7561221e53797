"""NeMo-RL's workers: arrays [B, S] with the prompt's last token in front, and counts of all ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import stand_ins
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "NeMo-RL 7ea279a"
OPTIONS = {
    "sequence_level_importance_ratios": True, "token_level_loss": False, "ratio_clip_min": 3e-4, "ratio_clip_max": 4e-4,
    "reference_policy_kl_penalty": 0.0,
}  # fmt: skip


def data_of(batch: Any) -> dict[str, Tensor]:
    arrays = {
        "advantages": batch.advantages[:, None].expand(batch.mask.shape), "prev_logprobs": batch.old_logprobs,
        "generation_logprobs": batch.old_logprobs, "token_mask": batch.mask.float(), "input_ids": batch.token_ids,
    }  # fmt: skip
    return {name: F.pad(x, (1, 0)) for name, x in arrays.items()} | {"sample_mask": torch.ones(len(batch.mask))}


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    loss_fn = stand_ins.nemo_rl_losses().PolicyLossFn(stand_ins.clipped_pg_loss_config(**OPTIONS))
    counts = torch.tensor([batch.global_responses, batch.global_tokens])
    found: tuple[Tensor, dict[str, float]] = loss_fn(
        data=data_of(batch), global_valid_seqs=counts[0], global_valid_toks=counts[1],
        next_token_logprobs=batch.logprobs,
    )  # fmt: skip
    return found
