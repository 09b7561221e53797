"""Losses of trainers that have no package to install, written from their sources; float64, nothing of ours.

    PrimeIntellect-ai/prime-rl 559b44772e47, src/prime_rl/trainer/rl/loss.py
    NVIDIA-NeMo/RL 7ea279abfbeb, nemo_rl/algorithms/loss/loss_functions.py, nemo_rl/algorithms/utils.py
    allenai/open-instruct e6c3044aa620, open_instruct/grpo_utils.py, grpo_fast.py, rl_utils.py

Each was compared once with the source at that commit: the pages of the trainers say with what result. Values at masked
positions have to be finite here, because these trainers multiply by their masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# --- prime-rl: one sample, [tokens]; the sum over its tokens ----------------------------------------------------------


def prime_rl_default(
    logprobs: Tensor,
    sampled: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Tensor:
    """DPPO by probabilities: a token that has moved too far, to the side of its advantage, loses its policy term."""
    total = logprobs.new_zeros(())
    for t in range(len(logprobs)):
        if not mask[t]:
            continue
        moved = float((logprobs[t].exp() - sampled[t].exp()).detach())
        dropped = moved > high if advantages[t] > 0 else moved < -low
        log_ratio = logprobs[t] - sampled[t]
        loss = kl_tau * log_ratio**2
        if not dropped:
            loss = loss - adv_tau * advantages[t] * log_ratio.exp()
        total = total + (loss if weights is None else weights[t] * loss)
    return total


def prime_rl_step(losses: Sequence[Tensor], tokens: int) -> Tensor:
    """`compute_loss` of one micro-batch; `tokens`: of all ranks and micro-batches, at least 1."""
    return sum(losses, torch.zeros((), dtype=torch.float64)) / max(tokens, 1)
