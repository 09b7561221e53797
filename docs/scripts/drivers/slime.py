"""slime's custom-loss hook with slime's arguments and batch, over Megatron-Core's groups of one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo_kernels.integrations import slime

from .megatron import one_rank

VERSION = "slime 624b824"  # what its arguments are those of
ARGS = SimpleNamespace(
    advantage_estimator="gspo", eps_clip=3e-4, eps_clip_high=4e-4, eps_clip_c=None, entropy_coef=0.0, use_kl_loss=False,
    rollout_temperature=1.0, rollout_top_p=1.0, use_rollout_logprobs=False, calculate_per_token_loss=False,
    recompute_loss_function=False,
)  # fmt: skip


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    """Each sample has a prompt of one token; its last row predicts nothing."""
    lengths = [int(n) for n in batch.mask.sum(-1)]

    def parts(values: Tensor) -> list[Tensor]:
        return [x[:n] for x, n in zip(values, lengths, strict=True)]

    samples = {
        "unconcat_tokens": [F.pad(x, (1, 0)) for x in parts(batch.token_ids)],
        "total_lengths": [n + 1 for n in lengths],
        "response_lengths": lengths,
        "loss_masks": [torch.ones(n, dtype=torch.int64) for n in lengths],
        "log_probs": parts(batch.old_logprobs),
        "advantages": [a.expand(n) for a, n in zip(batch.advantages, lengths, strict=True)],
    }
    logits = torch.cat([F.pad(x, (0, 0, 0, 1)) for x in parts(batch.logits)])[None]

    def sum_of_sample_mean(values: Tensor) -> Tensor:
        return torch.stack([x.sum() / max(len(x), 1) for x in values.split(lengths)]).sum()

    with one_rank():
        loss, log = slime.policy_loss(ARGS, samples, logits, sum_of_sample_mean)
    # As slime's loss_function and its log divide: by the responses of the optimizer step.
    return loss / len(lengths), {f"train/{name}": x.item() / len(lengths) for name, x in log.items()}
