"""TopEntropy: which tokens keep their loss, from every entry, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import chunk_of
from modes import NOT_INTERPRETED, on_device
from torch import Tensor

from gspo_kernels import (
    CISPO,
    GRPO,
    GSPO,
    Objective,
    TopEntropy,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logprobs,
)

pytestmark = NOT_INTERPRETED  # its terms are torch's

B, T, V = 3, 6, 17
LOGITS = on_device(2.0 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)))
IDS = on_device(torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1)))
MASK = on_device(torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool))
ADVANTAGES = on_device(torch.tensor([1.0, -0.5, 2.0]))
REF = on_device(-3.0 * torch.rand(B, T, generator=torch.Generator().manual_seed(2)))


def truth(share: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient by the logits, which tokens count) of GRPO without a clip, in plain torch."""
    leaf = LOGITS.double().requires_grad_()
    logp = leaf.log_softmax(-1)
    logprobs, entropy = logp.gather(-1, IDS[..., None])[..., 0], -(logp.exp() * logp).sum(-1).detach()
    counts = MASK & (entropy >= torch.quantile(entropy[MASK], 1.0 - share))
    term = torch.where(counts, -(logprobs - logprobs.detach()).exp() * ADVANTAGES[:, None], 0.0)
    d = REF.double() - logprobs
    per_token = torch.where(MASK, term + beta * (d.exp() - d - 1.0), 0.0)
    loss = (per_token.sum(1) / MASK.sum(1)).mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], counts


def from_logits(**options: Any) -> tuple[Tensor, Tensor]:
    leaf = LOGITS.clone().requires_grad_()
    loss, _ = policy_loss(leaf, IDS, ADVANTAGES, mask=MASK, ref_logprobs=REF, **options)
    return loss, torch.autograd.grad(loss, leaf)[0]


def from_hidden(**options: Any) -> tuple[Tensor, Tensor]:
    """In chunks: the quantile is that of all tokens."""
    leaf, head = LOGITS.clone().requires_grad_(), on_device(torch.eye(V))
    loss, _ = linear_policy_loss(
        leaf, head, IDS, ADVANTAGES, mask=MASK, ref_logprobs=REF, chunk_bytes=chunk_of(2, V), **options
    )
    return loss, torch.autograd.grad(loss, leaf)[0]


def from_logprobs(**options: Any) -> tuple[Tensor, Tensor]:
    leaf = LOGITS.double().requires_grad_()
    logp = leaf.log_softmax(-1)
    logprobs, entropy = logp.gather(-1, IDS[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    loss, _ = policy_loss_from_logprobs(
        logprobs, ADVANTAGES, entropy=entropy, mask=MASK, ref_logprobs=REF.double(), **options
    )
    return loss, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("path", [from_logits, from_hidden, from_logprobs])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 1e-9])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_only_tokens_of_high_entropy_have_a_policy_term(path: Any, share: float, beta: float) -> None:
    loss, gradient = path(objective=TopEntropy(GRPO(), share), beta=beta)
    expected, of_logits, counts = truth(share, beta)
    assert {0.2: 3, 0.5: 7, 1.0: 13, 1e-9: 1}[share] == int(counts.sum())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), of_logits, rtol=2e-5, atol=1e-8)
    if beta == 0.0:
        assert torch.equal((gradient != 0).any(-1), counts)


def test_a_quantile_that_is_a_token_keeps_it() -> None:
    """0.7 * 10 is a little more than 7 in float64: rounding must not leave out the token that is the quantile."""
    entropy = torch.arange(11.0)[None].requires_grad_()
    logprobs = torch.full((1, 11), -1.0, requires_grad=True)
    objective = TopEntropy(GRPO(), share=0.3)
    loss, _ = policy_loss_from_logprobs(
        logprobs, torch.ones(1), entropy=entropy, objective=objective, aggregation="token_mean"
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (gradient[0] != 0).tolist() == [False] * 7 + [True] * 4


def test_it_is_as_the_objective_that_it_wraps() -> None:
    assert TopEntropy(CISPO()).aggregation == "token_mean" and TopEntropy(GRPO()).aggregation == "sequence_mean"
    loss, _ = policy_loss_from_logprobs(
        on_device(torch.zeros(0, 3)), on_device(torch.zeros(0)), entropy=on_device(torch.zeros(0, 3)),
        objective=TopEntropy(GRPO()),
    )  # fmt: skip
    assert float(loss) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GSPO(),), "objective: expected one with a ratio per token, .* got GSPO. GSPOToken has"),
        ((GRPO, 0.2), "objective: expected an Objective such as .* got the class GRPO"),
        ((GRPO(), 0.0), "share: expected the share of tokens that count, a finite number above 0 and at most 1; got 0"),
        ((GRPO(), 20), "share: expected .* at most 1; got 20"),
    ],
)
def test_what_it_refuses(arguments: tuple[Objective, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        TopEntropy(*arguments)


def test_sequences_without_an_advantage_are_part_of_the_quantile() -> None:
    with pytest.raises(ValueError, match=r"^skip_zero_advantage: .* got TopEntropy, whose needs_advantage is False"):
        linear_policy_loss(
            LOGITS, on_device(torch.eye(V)), IDS, ADVANTAGES, mask=MASK, objective=TopEntropy(GRPO()),
            skip_zero_advantage=True,
        )  # fmt: skip


def test_it_needs_the_entropy() -> None:
    with pytest.raises(ValueError, match=r"^entropy: expected one per token, because TopEntropy compares tokens by it"):
        policy_loss_from_logprobs(REF, ADVANTAGES, objective=TopEntropy(GRPO()))
