"""Why the head is part of the loss: logits in fp32, and a head gradient that loses no digits over many chunks."""

from __future__ import annotations

import pytest
import torch
from linear import Random, chunk_of, logits_of, random_problem
from modes import DEVICE, NOT_INTERPRETED, ON_GPU
from torch import Tensor

from gspo_kernels import grpo_loss, gspo_loss, linear_grpo_loss, linear_gspo_loss, linear_token_logprobs

pytestmark = NOT_INTERPRETED  # thousands of rows

TARGETS = 64  # of the vocabulary, the others are never a token
# Tensor cores cut off the last bits where a CPU rounds: 256 products err by 5e-6 (on an H200) instead of 2e-6.
EXACT = 8e-6 if ON_GPU else 4e-6


def relative(found: Tensor, truth: Tensor, rows: slice) -> float:
    return float((found.double() - truth)[rows].norm() / truth[rows].norm())


def gradient_in_chunks(r: Random, old: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The head's, fp32; operands are multiplied in `dtype`."""
    hidden, weight = r.hidden.float().requires_grad_(), r.weight.float().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, stats = linear_grpo_loss(
            hidden, weight, r.token_ids, r.advantages, old, cu_seqlens=r.cu_seqlens,
            chunk_bytes=chunk_of(rows, len(weight)),
        )  # fmt: skip
    assert int(stats.head.chunks) >= len(hidden) // rows
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heads_gradient_is_no_worse_in_64_chunks(dtype: torch.dtype) -> None:
    """Rows of targets and the tail each against their own size. Summed in bf16, as a head in bf16 accumulates the
    gradients of micro-batches, the error is many times larger."""
    r = random_problem(64, 16, 32, 512, torch.bfloat16, targets=TARGETS)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(r.hidden), generator=generator).to(DEVICE) * 0.1
    old = r.old(noise)
    logits = logits_of(r.hidden, r.weight, None).requires_grad_()
    loss, _ = grpo_loss(logits, r.token_ids, r.advantages, old, cu_seqlens=r.cu_seqlens)
    (of_logits,) = torch.autograd.grad(loss, logits)
    hidden = r.hidden.double()
    truth = of_logits.t() @ hidden

    narrow = torch.zeros_like(truth, dtype=torch.bfloat16)
    for part in range(0, len(hidden), 16):
        narrow += (of_logits[part : part + 16].t() @ hidden[part : part + 16]).bfloat16()

    one, many = (gradient_in_chunks(r, old, rows, dtype) for rows in (1024, 16))
    for name, rows in (("targets", slice(TARGETS)), ("tail", slice(TARGETS, None))):
        at_once, in_chunks, in_bf16 = (relative(x, truth, rows) for x in (one, many, narrow))
        assert at_once < (1e-6 if dtype == torch.float32 else 2**-8), (name, at_once)
        assert in_chunks < 1.1 * at_once + 2e-7, (name, in_chunks, at_once)
        assert 3 * in_chunks < in_bf16, (name, in_chunks, in_bf16)


def test_bf16_operands_cost_the_log_probabilities_nothing() -> None:
    """Of the very same numbers in float64; with the logits rounded to bf16 on their way, a thousand times as much."""
    r = random_problem(8, 16, 256, 2048, torch.bfloat16)
    found = linear_token_logprobs(r.hidden, r.weight, r.token_ids)
    logits = logits_of(r.hidden, r.weight, None)
    distribution = logits.log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    assert float((found.logprobs.double() - r.logprobs).abs().max()) < EXACT
    assert float((found.entropy.double() - entropy).abs().max()) < EXACT
    assert float((found.lse - logits.logsumexp(-1)).abs().max()) < EXACT
    rounded = (r.hidden @ r.weight.t()).double().log_softmax(-1).gather(-1, r.token_ids[:, None])[:, 0]
    assert float((rounded - r.logprobs).abs().max()) > 1e-3


def test_no_sequence_clips_by_rounding() -> None:
    """64 sequences with a ratio 15% of the window off its edges: the very sequences clip that ought to. Rounded logits
    clip several that ought not, and leave several that ought to."""
    r = random_problem(64, 16, 256, 2048, torch.bfloat16)
    edge = torch.tensor([3.4e-4, 4.6e-4], device=DEVICE).repeat(32)  # inside and outside 1 + 4e-4
    advantages = torch.ones(64, device=DEVICE)
    old = r.logprobs - edge.double().repeat_interleave(16)

    def clipped(loss: Tensor, hidden: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, hidden)
        return (gradient.view(64, -1) == 0).all(-1)

    ought = edge > 4e-4
    hidden = r.hidden.clone().requires_grad_()
    loss, stats = linear_gspo_loss(hidden, r.weight, r.token_ids, advantages, old, cu_seqlens=r.cu_seqlens)
    assert torch.equal(clipped(loss, hidden), ought) and float(stats.clip_fraction) == 0.5
    rounded = hidden @ r.weight.t()
    loss, _ = gspo_loss(rounded, r.token_ids, advantages, old, cu_seqlens=r.cu_seqlens)
    wrong = clipped(loss, hidden) != ought
    assert int((wrong & ought).sum()) >= 3 and int((wrong & ~ought).sum()) >= 3
