"""Policy losses for reinforcement learning of language models, fused over vocabulary-sized logits."""

from .advantages import group_advantages
from .logprobs.backends import explain
from .objectives import GRPO, GSPO, PPO, GSPOToken, Objective, Terms, clipped_surrogate
from .policy_loss import (
    TokenLogprobs,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    next_token_targets,
    policy_loss,
    policy_loss_from_logprobs,
    ppo_loss,
    token_logprobs,
)
from .stats import Stats
from .token_stage import LossOutput

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "GSPO",
    "PPO",
    "GSPOToken",
    "LossOutput",
    "Objective",
    "Stats",
    "Terms",
    "TokenLogprobs",
    "clipped_surrogate",
    "explain",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "gspo_token_loss",
    "next_token_targets",
    "policy_loss",
    "policy_loss_from_logprobs",
    "ppo_loss",
    "token_logprobs",
]
