"""One padded batch in float64 for the trainers' own functions: ratios on both sides of every clip range.

Responses have ragged lengths and holes, one has no token, and one group has no advantage. `with_garbage` puts NaN and
infinities where the mask is False: the losses here must not read them, most trainers' would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from checks import check_close, check_number
from torch import Tensor

LENGTHS = (16, 1, 9, 16, 13, 3, 15, 7, 0, 12, 8, 16)
ADVANTAGES = (1.3, -0.7, 0.0, 2.1, -1.6, 0.4, -0.2, 0.9, -1.1, 0.0, 0.0, -2.3)
DRIFTS = (-0.2, 0.3, 0.0, 0.5, 0.4, 0.1, -0.8, 0.2, 0.4, 0.1, -0.3, -0.4)  # of a response's log-ratios
PROMPTS = ((0, 4), (4, 5), (5, 9), (9, 12))  # the responses of each
RESPONSES, WIDTH = len(LENGTHS), max(LENGTHS)


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
        found = [torch.where(self.mask, x, garbage) for x in self[:3]]
        return PaddedBatch(*found, *self[3:])

    def with_row(self, row: int, **values: Any) -> PaddedBatch:
        """Other numbers in one response; 0 where it has no token."""
        changed = {}
        for name, value in values.items():
            changed[name] = getattr(self, name).clone()
            changed[name][row] = torch.where(self.mask[row], value, 0.0) if changed[name].ndim == 2 else value
        return self._replace(**changed)


def make_batch() -> PaddedBatch:
    generator = torch.Generator().manual_seed(5)

    def random() -> Tensor:
        return torch.rand(RESPONSES, WIDTH, generator=generator, dtype=torch.float64)

    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[4, 1] = mask[9, 0] = False  # what a tool returned
    log_ratio = (
        4 * (random() - 0.5).pow(3) + 0.6 * (random() - 0.5) + torch.tensor(DRIFTS, dtype=torch.float64)[:, None]
    )
    logprobs = (0.02 + 0.97 * random()).log() + log_ratio.clamp(max=0)
    old_logprobs = logprobs - log_ratio
    rollout_logprobs = (old_logprobs + 2 * (random() - 0.5).pow(3)).clamp(max=0)
    signs = torch.randint(-1, 2, (RESPONSES, WIDTH), generator=generator)
    found = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, rollout_logprobs))
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    return PaddedBatch(*found, mask, advantages, torch.where(mask, signs * (0.1 + random()), 0.0))


BATCH = make_batch()
TOKENS = int(BATCH.mask.sum())


def check_result(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: float = 1e-13) -> None:
    """(loss, gradient by the log-probabilities): each token's gradient relative to its own size, but for what cancels;
    the loss relative to the gradients."""
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    largest = float(expected_gradient.abs().max())
    assert largest > 1e-4
    check_close("gradient", gradient, expected_gradient, error * (expected_gradient.abs() + largest))
    check_number("loss", float(loss), float(expected_loss), error * TOKENS * largest)
