"""torch.compile of losses of kept columns from hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import arguments
from checks import check_close
from linear import problem
from modes import NOT_INTERPRETED, on_device
from torch._dynamo.testing import CompileCounterWithBackend

from gspo_kernels import linear_gspo_loss

pytestmark = [NOT_INTERPRETED, pytest.mark.plain_memory]  # deterministic fills slow compilers down


def step(function: Any, seed: int, lengths: tuple[int, ...], **options: Any) -> tuple[Any, ...]:
    p = problem("gspo", seed=seed, lengths=lengths, bias=True, kept=True)
    assert p.bias is not None
    args = arguments(p.batch, "packed")
    leaves = [on_device(x).requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    hidden, weight, bias = leaves
    loss, stats = function(hidden, weight, *args.rest, **args.keywords, bias=bias, **options)
    return loss.detach(), stats.logprobs, *torch.autograd.grad(loss, leaves)


def test_one_graph_with_the_same_numbers_for_any_entries() -> None:
    """Rows with entries and without. What the host cannot read in a graph, it does not need."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_gspo_loss, fullgraph=True, backend=counter)
    for seed, lengths in ((40, (5, 1, 7, 3)), (41, (4, 9, 2, 3)), (42, (5, 2, 7, 3))):
        found, expected = step(compiled, seed, lengths), step(linear_gspo_loss, seed, lengths)
        for x, y in zip(found, expected, strict=True):
            check_close("compiled", x, y, torch.full_like(y, 2e-6 * float(y.abs().max())))
    assert counter.frame_count <= 2, "once as it came, once with symbolic lengths"
