"""One padded batch for the tests of trainers' losses, in float64: log-ratios on both sides of the usual bounds,
advantages of both signs and of 0, ragged responses of which one is empty, and tokens in the middle that do not count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (12, 1, 9, 0, 12, 5, 7, 10)
ADVANTAGES = (1.3, -0.7, 0.0, 1.1, -1.6, 0.4, -0.2, 0.9)
# Means of the responses' log-ratios: beyond the paper's clip range on both sides, within it, and far away.
DRIFTS = (2e-3, -2e-3, 1e-4, 0.0, 6e-4, -5e-4, -0.3, 2e-4)
WIDTH = max(LENGTHS)


class Responses(NamedTuple):
    """[responses, width] but for `advantages`; NaN and infinities where the mask is False."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor  # [responses]
    mask: Tensor

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages[:, None].expand(self.mask.shape)

    def without_garbage(self) -> Responses:
        """Finite numbers where the mask is False, for functions that multiply by it."""
        fields = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        return self._replace(**{name: torch.where(self.mask, getattr(self, name), -1.0) for name in fields})


def make_responses(*, spread: float = 0.5, seed: int = 25) -> Responses:
    """`spread`: of the tokens' log-ratios around their response's mean."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), WIDTH)

    def random() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[4, 1] = mask[7, 0] = False  # what a tool returned
    count = mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = spread * 2 * (random() - 0.5)
    log_ratio = log_ratio - torch.where(mask, log_ratio, 0.0).sum(1, keepdim=True) / count
    log_ratio = log_ratio + torch.tensor(DRIFTS, dtype=torch.float64)[:, None]
    logprobs = -0.02 - 2 * random() - log_ratio.clamp(max=0).abs() - spread
    old = logprobs - log_ratio
    found = Responses(
        logprobs, old, logprobs + 0.6 * (random() - 0.5), old + 0.4 * (random() - 0.5),
        torch.tensor(ADVANTAGES, dtype=torch.float64), mask,
    )  # fmt: skip
    assert bool((found.old_logprobs < 0).all())
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    garbage = garbage[torch.randint(3, shape, generator=generator)]
    fields = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    return found._replace(**{name: torch.where(mask, getattr(found, name), garbage) for name in fields})
