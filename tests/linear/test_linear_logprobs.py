"""Log-probabilities, entropies and logsumexps from hidden states, and their gradients by all three operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import SHORT
from checks import check_close
from linear import chunk_of, problem, unmasked
from modes import by_backend, on_device, sized
from torch import Tensor

from gspo_kernels import linear_token_logprobs, token_logprobs

LENGTHS = sized((5, 1, 0, 7, 3, 1, 4, 2, 6), SHORT)


def test_token_logprobs_against_finite_differences() -> None:
    """All three outputs, all three operands, in float64; chunks of two rows."""
    p = unmasked(problem("gspo", seed=95, lengths=(5,), width=4, vocab=7, bias=True, dtype=torch.float64))
    hidden, weight, bias = (on_device(x).requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None)
    ids = on_device(torch.tensor([0, 3, 6, 2, 1]))
    mask = on_device(torch.tensor([True, True, False, True, True]))
    temperature = on_device(torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0]))

    def work(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(
            linear_token_logprobs(
                hidden, weight, ids, bias=bias, mask=mask, temperature=temperature,
                chunk_bytes=chunk_of(2, 7, torch.float64),
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(work, (hidden, weight, bias), eps=1e-6, atol=1e-7)


@by_backend
@pytest.mark.parametrize("rows", [2, None])
def test_token_logprobs_against_those_of_logits(backend: str, rows: int | None) -> None:
    p = problem("gspo", seed=96, lengths=LENGTHS, bias=True)
    ids, mask = on_device(p.batch.token_ids), on_device(p.batch.mask)
    leaves = [on_device(x.clone()).requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None]
    hidden, weight, bias = leaves
    found = linear_token_logprobs(
        hidden, weight, ids, bias=bias, mask=mask, chunk_bytes=chunk_of(rows, 61), backend=backend
    )
    logits = on_device(p.batch.logits.clone()).requires_grad_()
    truth = token_logprobs(logits, ids, mask=mask, backend="reference")
    for name, x, y in zip(("logprobs", "entropy", "lse"), found, truth, strict=True):
        check_close(name, x, y, 3e-6 * (1 + y.abs()))
        assert bool((x[~mask] == 0).all())

    def mix(out: Any) -> Tensor:
        total: Tensor = (2 * out.logprobs.double() - 3 * out.entropy.double() + 0.5 * out.lse).sum()
        return total

    mix(found).backward()
    mix(truth).backward()
    assert logits.grad is not None
    g, h = logits.grad.cpu(), torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0)
    for leaf, expected in zip(leaves, (g @ p.weight.double(), g.t() @ h, g.sum(0)), strict=True):
        assert leaf.grad is not None
        check_close("gradient", leaf.grad, expected, torch.full_like(expected, 1e-5 * float(expected.abs().max())))
