"""prime-rl's `compute_loss` of one micro-batch: a loss for each sample, summed, divided by the tokens of the step."""

from __future__ import annotations

from typing import Any

import stand_ins
import torch
from torch import Tensor

VERSION = "prime-rl 559b447"
KWARGS = {"objective": "gspo", "eps_low": 3e-4, "eps_high": 4e-4, "tokens_per_response": 7}  # 7: about the mean length


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    from gspo_kernels.integrations.prime_rl import policy_loss

    samples = [
        stand_ins.LossInputs(logprobs, old, None, advantage.expand(len(mask)), mask)
        for logprobs, old, advantage, mask in zip(
            batch.logprobs, batch.old_logprobs, batch.advantages, batch.mask, strict=True
        )
    ]
    with stand_ins.with_prime_rl():
        found = [policy_loss(inputs, **KWARGS) for inputs in samples]
    loss = torch.stack([sample.loss for sample in found]).sum() / batch.global_tokens
    means = {name: torch.stack([x.metrics[name] for x in found]).mean().item() for name in found[0].metrics}
    return loss, {"loss/mean": loss.item(), **{f"{name}/mean": x for name, x in means.items()}}
