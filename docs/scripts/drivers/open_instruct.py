"""A micro-batch of open-instruct's grpo_fast.py, with one response in each of its rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gspo_kernels.integrations.open_instruct import policy_loss

VERSION = "open-instruct e6c3044"
INVALID_LOGPROB = 1.0  # open-instruct's, of tokens that do not count


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    args = SimpleNamespace(
        beta=0.0, kl_estimator=2, loss_denominator=str(batch.global_responses), sequence_parallel_size=1
    )
    mask = batch.mask
    new, old = (torch.where(mask, x, INVALID_LOGPROB) for x in (batch.logprobs, batch.old_logprobs))
    found = policy_loss(
        args, new, old, torch.where(mask, batch.advantages[:, None], 0.0), mask, torch.ones_like(batch.token_ids), None,
        torch.ones_like(old), float(args.loss_denominator), objective="gspo", eps_low=3e-4, eps_high=4e-4,
    )  # fmt: skip

    def masked_mean(values: Tensor) -> float:
        return values[mask].mean().item()

    return found.loss, {
        "loss/total_avg": found.loss.item(),
        "loss/policy_avg": masked_mean(found.pg_loss_BT),
        "policy/clipfrac_avg": masked_mean(found.clipfrac_BT),
        "val/ratio": masked_mean(found.ratio_BT),
    }
