"""A batch for comparisons with other trainers' objectives, in float64.

It has ratios on both sides of every bound, advantages of both signs and of 0, ragged responses, and tokens in the
middle of a response that do not count. test_integration_objectives.py checks that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from checks import check_close, check_number
from torch import Tensor

from gspo_kernels import Objective, policy_loss_from_logprobs

ROUNDING = 1e-13  # of float64, relative to the largest gradient of a token

Result = tuple[Tensor, Tensor]  # the loss, and its gradient by the log-probabilities


# --- the batch --------------------------------------------------------------------------------------------------------

# Beside the clip ranges 0.2, 0.28 and 4 of ratios, 0.4 of log-ratios, and the bounds 2.5, 3 and 5 of ratios.
LOG_RATIOS = (
    -3.0, -1.7, -0.9, -0.5, -0.41, -0.39, -0.23, -0.22, -0.1, -0.01, 0.0, 0.01, 0.1, 0.18, 0.19, 0.24, 0.25, 0.39, 0.41,
    0.9, 0.92, 1.09, 1.11, 1.6, 1.62, 3.0,
)  # fmt: skip
LENGTHS = (16, 1, 9, 16, 13, 3, 15, 7, 16, 12, 8, 16)
ADVANTAGES = (1.3, -0.7, 0.0, 2.1, -1.6, 0.4, -0.2, 0.9, -1.1, 0.6, -0.5, -2.3)
DRIFTS = (-0.2, 0.3, 0.0, 0.2, 0.1, 0.5, -0.8, 0.2, 0.4, 0.1, -0.3, -0.4)  # of a response's log-ratios


class Batch(NamedTuple):
    """[responses, width] but for `advantages`; finite garbage where the mask is False."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    mask: Tensor
    advantages: Tensor  # [responses]
    token_advantages: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old_logprobs

    def spread_advantages(self) -> Tensor:
        return self.advantages[:, None].expand(self.mask.shape)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(21)
    rows, width = len(LENGTHS), max(LENGTHS)

    def random() -> Tensor:
        return torch.rand(rows, width, generator=generator, dtype=torch.float64)

    each = torch.tensor(LOG_RATIOS, dtype=torch.float64)
    order = torch.randperm(rows * width, generator=generator)
    log_ratio = each[order % len(each)].view(rows, width) + torch.tensor(DRIFTS, dtype=torch.float64)[:, None]
    higher = (0.02 + 0.97 * random()).log()  # the larger of the two probabilities of a token
    logprobs = higher + log_ratio.clamp(max=0)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[4, 1] = mask[9, 0] = False  # what a tool returned
    signs = torch.randint(-1, 2, (rows, width), generator=generator)
    return Batch(
        logprobs=logprobs,
        old_logprobs=logprobs - log_ratio,
        ref_logprobs=(logprobs + 0.3 * (random() - 0.5)).clamp(max=0),
        entropy=(random() * 200).round() / 64,  # exact in float32
        mask=mask,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        token_advantages=signs * (0.1 + random()),
    )


BATCH = make_batch()
TOKENS, RESPONSES, WIDTH = int(BATCH.mask.sum()), len(LENGTHS), max(LENGTHS)


def ours(objective: Objective, batch: Batch = BATCH, *, by_token: bool = False, **options: Any) -> Result:
    logprobs = batch.logprobs.clone().requires_grad_()
    advantages = batch.token_advantages if by_token else batch.advantages
    loss, _ = policy_loss_from_logprobs(
        logprobs, advantages, batch.old_logprobs, objective=objective, mask=batch.mask, **options
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


def check(actual: Result, expected: Result, error: float = ROUNDING) -> None:
    """Each token's gradient relative to its own size, but for what cancels; the loss relative to the gradients."""
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    largest = float(expected_gradient.abs().max())
    assert largest > 1e-4
    check_close("gradient", gradient, expected_gradient, error * (expected_gradient.abs() + largest))
    check_number("loss", float(loss), float(expected_loss), error * TOKENS * largest)


def changed_token(**values: float) -> Batch:
    """The batch, but for one token in the middle of a response of advantage 2.1."""
    fields = {name: getattr(BATCH, name).clone() for name in values}
    for name, value in values.items():
        fields[name][3, 5] = value
    return BATCH._replace(**fields)


def with_row(batch: Batch, row: int, **values: Any) -> Batch:
    """The batch with other numbers in one response."""
    changed = {}
    for name, value in values.items():
        changed[name] = getattr(batch, name).clone()
        changed[name][row] = value
    return batch._replace(**changed)


def clipped_share(objective: Objective, *, by_token: bool = True) -> float:
    advantages = BATCH.token_advantages if by_token else BATCH.advantages
    _, stats = policy_loss_from_logprobs(
        BATCH.logprobs, advantages, BATCH.old_logprobs, objective=objective, mask=BATCH.mask
    )
    return float(stats.clip_fraction)


NO_TOKENS = with_row(BATCH, 6, mask=False)
