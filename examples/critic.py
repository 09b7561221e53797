"""A value model for the training of train_arithmetic.py: PPO with an advantage for each token.

The critic is the policy's body as it is after the warm-up, and a value head that starts at 0. The reward is given at a
response's last token; what the critic expects at each token before it says which tokens made the difference. A response
that the length limit cuts off is wrong, and so terminal like the others: nothing is expected after it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from arithmetic import Batch, Rollout, Settings, build_optimizer, update
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from gspo_kernels import gae, linear_value_loss, linear_values, whiten_advantages

LEARNING_RATE = 1e-3


@dataclass
class Targets:
    """What the critic learns from a rollout."""

    values: Tensor  # [B, T], before the updates
    returns: Tensor  # [B, T]

    def chunk(self, count: int) -> Iterator[Targets]:
        return (Targets(*part) for part in zip(self.values.chunk(count), self.returns.chunk(count), strict=True))


class Critic(nn.Module):
    def __init__(self, policy: Qwen3ForCausalLM, lam: float) -> None:
        super().__init__()
        self.lam = lam
        self.body = copy.deepcopy(policy.model)
        self.head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = build_optimizer(self)

    def hidden(self, batch: Batch) -> Tensor:
        """[B, T, D]; row t is the state in which token t + 1 is chosen, as for the logits."""
        found = self.body(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return found.last_hidden_state

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Rollout, Targets]:
        """The rollout with an advantage for each token, and what there is to learn from it."""
        _, mask = rollout.batch.targets()
        values = linear_values(self.hidden(rollout.batch), self.head.weight, bias=self.head.bias, mask=mask)
        advantages, returns = gae(rollout.rewards, values, lam=self.lam, mask=mask)
        return replace(rollout, advantages=whiten_advantages(advantages, mask=mask)), Targets(values, returns)

    def learn(self, rollout: Rollout, targets: Targets, settings: Settings) -> Tensor:
        """One update for each mini-batch -> the share of the returns' variance that the values explain, before each."""
        explained = []
        for part, target in zip(
            rollout.chunk(settings.mini_batches), targets.chunk(settings.mini_batches), strict=True
        ):
            _, mask = part.batch.targets()
            loss, stats = linear_value_loss(
                self.hidden(part.batch), self.head.weight, target.returns, target.values, bias=self.head.bias, mask=mask
            )
            update(self, self.optimizer, loss, LEARNING_RATE, settings.max_grad_norm)
            explained.append(stats.explained_variance)
        return torch.stack(explained).mean()
