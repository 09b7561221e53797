"""The batch of objective_batch.py as trainers pass theirs: with a response that has no token, responses without an
advantage, and the engine's log-probabilities.

`with_garbage` puts NaN and infinities where the mask is False: our losses must not read them; most trainers' do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import objective_batch
import torch
from torch import Tensor

PROMPTS = ((0, 4), (4, 5), (5, 9), (9, 12))  # the responses of each
EMPTY = 8


class PaddedBatch(NamedTuple):
    """[responses, width] but for `advantages`; zeros where the mask is False."""

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    mask: Tensor
    advantages: Tensor  # [responses]
    token_advantages: Tensor

    @property
    def spread_advantages(self) -> Tensor:
        return self.advantages[:, None] * self.mask

    def rows(self, start: int, end: int) -> PaddedBatch:
        return PaddedBatch(*(x[start:end] for x in self))

    def with_garbage(self) -> PaddedBatch:
        """NaN and infinities in all log-probabilities where the mask is False."""
        numbers = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
        garbage = numbers[torch.arange(self.mask.numel()) % 3].view(self.mask.shape)
        return PaddedBatch(*(torch.where(self.mask, x, garbage) for x in self[:3]), *self[3:])

    def with_row(self, row: int, **values: Any) -> PaddedBatch:
        """Other numbers in one response; 0 where it has no token."""
        changed = {}
        for name, value in values.items():
            changed[name] = getattr(self, name).clone()
            changed[name][row] = torch.where(self.mask[row], value, 0.0) if changed[name].ndim == 2 else value
        return self._replace(**changed)


def make_batch() -> PaddedBatch:
    batch, generator = objective_batch.BATCH, torch.Generator().manual_seed(5)
    mask, advantages = batch.mask.clone(), batch.advantages.clone()
    mask[EMPTY] = False
    advantages[PROMPTS[-1][0] : -1] = 0
    noise = torch.rand(mask.shape, generator=generator, dtype=torch.float64) - 0.5
    rollout_logprobs = (batch.old_logprobs + 2 * noise**3).clamp(max=0)
    arrays = (batch.logprobs, batch.old_logprobs, rollout_logprobs, batch.token_advantages)
    logprobs, old, rollout, by_token = (torch.where(mask, x, 0.0) for x in arrays)
    return PaddedBatch(logprobs, old, rollout, mask, advantages, by_token)


BATCH = make_batch()
RESPONSES, WIDTH = BATCH.mask.shape
TOKENS = int(BATCH.mask.sum())
