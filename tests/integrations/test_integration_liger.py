"""Calls of Liger-Kernel's GRPO losses, replaced as docs/migrate.md says: loss and gradient against Liger's own.

Its Triton kernels run in Triton's interpreter (`make test-triton`), its chunked loss from hidden states in plain torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from modes import INTERPRETED
from torch import Tensor

from gspo_kernels import GRPO, GSPO, linear_policy_loss, policy_loss

pytestmark = [
    pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs Liger-Kernel: make .venv/peers"),
    pytest.mark.plain_memory,
]

B, T, V, D = 4, 7, 61, 16
LEVELS: dict[str, Any] = {"sequence": GSPO(), "token": GRPO(0.2, 0.4)}
FLOAT32 = 1e-5  # of the largest entry: Liger exponentiates float32 log-ratios of rounded logits
OPTIONS = {"temperature": 0.9, "beta": 0.0}


class Problem(NamedTuple):
    """Ragged responses, off-policy on both sides of the clip ranges, one of advantage 0."""

    hidden: Tensor  # [B, T + 1, D]: the last position predicts nothing
    weight: Tensor  # [V, D]
    token_ids: Tensor  # [B, T]
    advantages: Tensor  # [B]
    old_logprobs: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool


def problem(scale: float) -> Problem:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, T + 1, D, generator=generator), torch.randn(V, D, generator=generator)
    token_ids = torch.randint(V, (B, T), generator=generator)
    logprobs = (hidden[:, :-1] @ weight.T / 0.9).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    change = torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None] + torch.randn(B, T, generator=generator)
    old_logprobs = (logprobs - scale * change).clamp(max=0.0)
    mask = torch.arange(T) < torch.tensor([T, 4, 1, 6])[:, None]
    return Problem(hidden, weight, token_ids, torch.tensor([1.0, -0.7, 0.0, -1.2]), old_logprobs, mask)


def check_gradient(found: Tensor, expected: Tensor, token_ids: Tensor) -> None:
    """Of logits [B, T, V], target and other columns each relative to their own size."""
    target = torch.zeros_like(found, dtype=torch.bool).scatter(-1, token_ids[..., None], True)
    for part in (target, ~target):
        size = torch.where(part, expected, 0.0).abs().amax()
        assert size > 0 and torch.where(part, found - expected, 0.0).abs().amax() < FLOAT32 * size


@pytest.mark.skipif(not INTERPRETED, reason="Liger's Triton kernels need a GPU, or make test-triton")
@pytest.mark.parametrize("level", list(LEVELS))
def test_triton_grpo_loss(level: str) -> None:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    objective = LEVELS[level]
    x = problem(3e-3 if level == "sequence" else 0.5)
    logits = x.hidden @ x.weight.T
    theirs, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected, _ = triton_grpo_loss(
        theirs, x.old_logprobs, None, x.token_ids, x.advantages, completion_mask=x.mask.long(),
        eps_low=objective.eps_low, eps_high=objective.eps_high, loss_type="grpo", importance_sampling_level=level,
        inplace=False, reduce=True, **OPTIONS,
    )  # fmt: skip
    expected.backward()
    loss, stats = policy_loss(
        ours[:, :-1], x.token_ids, x.advantages, x.old_logprobs, objective=objective, mask=x.mask, **OPTIONS
    )
    loss.backward()
    assert 0 < stats.clip_fraction < 1
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)
    assert theirs.grad is not None and ours.grad is not None
    assert not ours.grad[:, -1].any()
    check_gradient(ours.grad[:, :-1], theirs.grad[:, :-1], x.token_ids)


@pytest.mark.skipif(INTERPRETED, reason="plain torch there: make test")
@pytest.mark.parametrize("level", list(LEVELS))
def test_chunked_loss_from_hidden_states(level: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    objective = LEVELS[level]
    x = problem(3e-3 if level == "sequence" else 0.5)
    theirs, ours = ([tensor.clone().requires_grad_() for tensor in (x.hidden, x.weight)] for _ in range(2))
    module = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=False, epsilon_low=objective.eps_low, epsilon_high=objective.eps_high,
        loss_type="grpo", importance_sampling_level=level, **OPTIONS,
    )  # fmt: skip
    expected, _ = module(
        theirs[0][:, :-1], theirs[1], x.token_ids, x.mask.long(), x.advantages, old_per_token_logps=x.old_logprobs
    )
    expected.backward()
    loss, stats = linear_policy_loss(
        ours[0][:, :-1], ours[1], x.token_ids, x.advantages, x.old_logprobs, objective=objective, mask=x.mask, **OPTIONS
    )
    loss.backward()
    assert 0 < stats.clip_fraction < 1
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-7)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.grad is not None and their.grad is not None
        assert (mine.grad - their.grad).abs().amax() < FLOAT32 * their.grad.abs().amax()
