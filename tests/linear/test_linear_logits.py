"""Losses from hidden states against the same losses from logits that were multiplied in float64: any head, any strides.

Masked rows of every problem hold NaN and infinities in their hidden states: were one of them multiplied, all of the
head's gradient would show it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import CLASSES, LAYOUTS, LINEAR, OBJECTIVES, SHORT, Batch, arguments
from linear import Problem, check_same, from_hidden, from_logits, logits_of, problem
from modes import DEVICE, by_backend, on_device, sized
from torch import Tensor

import gspo_kernels

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
LENGTHS = sized((5, 1, 0, 7, 3, 1, 4, 2, 6), SHORT)

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token"},
        {"beta": 0.05, "entropy_coef": 0.01, "dual_clip": 3.0, "normalizer": 7},
    ),
}


@by_objective
@by_layout
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("bias", "rows"), [(False, 3), (True, 1), (True, None)])
def test_the_same_as_from_logits(objective: str, layout: str, option: str, bias: bool, rows: int | None) -> None:
    """With an entropy bonus, -p (log p + H) is what is left of larger parts: a fifth of the digits."""
    build, options = OPTIONS[option]
    p = problem(objective, seed=50, bias=bias, lengths=LENGTHS, **build)
    truth = from_logits(p, layout, objective, upstream=-2.5, **options)
    found = from_hidden(p, layout, objective, rows=rows, upstream=-2.5, **options)
    check_same(found, truth, p, number=1.5e-5 if options.get("entropy_coef") else 3e-6)


@by_objective
@by_backend
@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"])
def test_narrow_operands(objective: str, backend: str, dtype: torch.dtype, number: float) -> None:
    """Statistics as in fp32; gradients to the rounding of the operand that the logits' gradient is."""
    p = problem(objective, seed=51, bias=True, lengths=LENGTHS, dtype=dtype)
    truth = from_logits(p, "packed", objective)
    found = from_hidden(p, "packed", objective, rows=3, backend=backend)
    check_same(found, truth, p, number=number, stats=False)
    assert float(found.loss) == pytest.approx(float(truth.loss), rel=3e-6, abs=3e-6)
    check_same(replace(found, hidden=None, weight=None, bias=None), truth, p)


def test_float64_operands() -> None:
    """Everything in float64: 1e-12 remains."""
    p = problem("gspo", seed=52, bias=True, lengths=LENGTHS, dtype=torch.float64)
    found = from_hidden(p, "packed", "gspo", rows=3, function=partial(LINEAR["gspo"], backend="reference"))
    truth = from_logits(p, "packed", "gspo")
    assert found.loss.dtype == torch.float64
    check_same(found, truth, p, number=1e-12, stats=False)


@pytest.mark.parametrize("rows", [1, None])
def test_a_row_of_huge_logits(rows: int | None) -> None:
    """All logits of a row near 8,192, and a row that spans thousands. Operands are eighths: the products are exact."""
    p = problem("gspo", seed=53, lengths=LENGTHS, width=17)
    with torch.no_grad():
        hidden, weight = (p.hidden.nan_to_num(0, 0, 0) * 8).clamp(-32, 32).round() / 8, (p.weight * 8).round() / 8
        weight[:, -1] = 1.0
        hidden[:, -1] = 0.0
        hidden[0, -1] = 8192.0
        hidden[1] *= 512.0
    logits = logits_of(hidden, weight, None)
    assert float(logits[0].abs().min()) > 8000 and float(logits[1].abs().max()) > 2000
    batch = replace(p.batch, logits=logits, mask=torch.ones_like(p.batch.mask), token_ids=logits.argmax(-1))
    batch.token_ids[2::2] = 3
    batch.old_logprobs = torch.tensor([row.logprob for row in batch.rows]) - 1e-4
    p = Problem(hidden, weight, None, batch)
    check_same(from_hidden(p, "packed", "gspo", rows=rows), from_logits(p, "packed", "gspo"), p)


# --- where operands lie -----------------------------------------------------------------------------------------------


def roomy(x: Tensor) -> Tensor:
    """A copy of `x` inside something larger, that has a token more and a wider row: `hidden[:, :-1]`, and a slice."""
    around = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), math.nan)
    view = around[..., :-1, 2:-1]
    view.copy_(x)
    return view


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_hidden_states(layout: str, dtype: torch.dtype) -> None:
    p = problem("gspo", seed=54, lengths=LENGTHS, dtype=dtype)
    plain, strided = (from_hidden(p, layout, "gspo", rows=3, change=change) for change in (None, roomy))
    assert torch.equal(plain.loss, strided.loss) and torch.equal(plain.stats.logprobs, strided.stats.logprobs)
    for name in ("hidden", "weight"):
        torch.testing.assert_close(getattr(strided, name), getattr(plain, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lies", ["transposed", "a slice", "every other row"])
def test_strided_weights(dtype: torch.dtype, lies: str) -> None:
    """A head that was made as [D, V], one that lies in a larger matrix, and one that skips rows."""
    p = problem("gspo", seed=55, lengths=LENGTHS, dtype=dtype)
    plain = from_hidden(p, "packed", "gspo", rows=3)
    strided = {
        "transposed": p.weight.t().contiguous().t(),
        "a slice": roomy(p.weight),
        "every other row": p.weight.repeat_interleave(2, 0)[::2],
    }[lies]
    assert not strided.is_contiguous()
    found = from_hidden(replace(p, weight=strided), "packed", "gspo", rows=3)
    assert float(found.loss) == pytest.approx(float(plain.loss), rel=1e-6)
    for name in ("hidden", "weight"):
        actual, expected = getattr(found, name), getattr(plain, name)
        close = {"rtol": 2**-7, "atol": 1e-4} if dtype != torch.float32 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(actual, expected, **close)


@by_objective
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_rows_of_the_weight(objective: str, bias: bool, dtype: torch.dtype) -> None:
    """Rows from `vocab_size` on are NaN: not multiplied, and exactly zero in the gradient."""
    p = problem(objective, seed=56, bias=bias, lengths=LENGTHS, dtype=dtype)
    plain = from_hidden(p, "packed", objective, rows=3)
    junk = torch.full((5, p.weight.shape[1]), math.nan, dtype=dtype)
    of_vocab = None if p.bias is None else torch.cat([p.bias, junk[:, 0]])
    wide = replace(p, weight=torch.cat([p.weight, junk]), bias=of_vocab)
    found = from_hidden(wide, "packed", objective, rows=3, vocab_size=61)
    assert torch.equal(found.loss, plain.loss) and found.weight is not None and plain.weight is not None
    assert bool((found.weight[61:] == 0).all()) and torch.equal(found.weight[:61], plain.weight)
    assert found.hidden is not None and plain.hidden is not None and torch.equal(found.hidden, plain.hidden)
    if bias:
        assert found.bias is not None and plain.bias is not None
        assert bool((found.bias[61:] == 0).all()) and torch.equal(found.bias[:61], plain.bias)


# --- nothing to do ----------------------------------------------------------------------------------------------------


@by_objective
@pytest.mark.parametrize(
    "lengths", [(3, 2), (0, 4, 0, 0, 2, 0), (0, 0)], ids=["all masked", "empty ones", "only empty"]
)
@by_layout
def test_batches_with_little_in_them(objective: str, lengths: tuple[int, ...], layout: str) -> None:
    p = problem(objective, seed=57, bias=True, lengths=lengths)
    if lengths == (3, 2):
        p.batch.mask[:] = False
        p.hidden[:] = math.nan
        p = replace(p, batch=replace(p.batch))  # the oracle's rows are not the old ones
    truth = from_logits(p, layout, objective)
    found = from_hidden(p, layout, objective, rows=2)
    check_same(found, truth, p)
    if not bool(p.batch.mask.any()):
        assert float(found.loss) == 0 and not any(bool(x.any()) for x in (found.hidden, found.weight, found.bias))  # type: ignore[union-attr]


@by_objective
@by_layout
def test_no_rows_at_all(objective: str, layout: str) -> None:
    empty = Batch(torch.zeros(0, 61), torch.zeros(0).long(), torch.zeros(0).bool(), [], torch.zeros(0))
    args = arguments(empty, layout)
    hidden = torch.zeros(*args.logits.shape[:-1], 7, device=DEVICE, requires_grad=True)
    weight = torch.randn(61, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    loss, stats = LINEAR[objective](hidden, weight, *args.rest, **args.keywords)
    loss.backward()
    assert float(loss.detach()) == 0 and [int(x) for x in stats.head[:3]] == [0, 0, 0]
    assert weight.grad is not None and hidden.grad is not None and not bool(weight.grad.any())
    assert hidden.grad.shape == hidden.shape


# --- the other doors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if hasattr(gspo_kernels, f"linear_{name}_loss")])
def test_linear_policy_loss_is_what_the_named_losses_call(objective: str) -> None:
    p = problem(objective, seed=58, bias=True, lengths=LENGTHS)
    named = from_hidden(p, "packed", objective, rows=3, eps_low=0.1, eps_high=0.15, dual_clip=3.0)
    function = partial(gspo_kernels.linear_policy_loss, objective=CLASSES[objective](0.1, 0.15, 3.0))
    general = from_hidden(p, "packed", objective, rows=3, function=function)
    assert torch.equal(named.loss, general.loss)
    assert named.weight is not None and general.weight is not None and torch.equal(named.weight, general.weight)


def test_old_logprobs_of_the_same_walk_give_a_ratio_of_exactly_one() -> None:
    """Computed in the same chunk, at least: no noise of its own enters the clip window."""
    p = problem("gspo", seed=59, lengths=LENGTHS, dtype=torch.bfloat16)
    hidden, weight, ids, mask = (on_device(x) for x in (p.hidden, p.weight, p.batch.token_ids, p.batch.mask))
    with torch.no_grad():
        old = gspo_kernels.linear_token_logprobs(hidden, weight, ids, mask=mask)
    p.batch.old_logprobs = old.logprobs.cpu()
    stats = from_hidden(p, "packed", "gspo").stats
    assert [float(x) for x in (stats.ratio_min, stats.ratio_max)] == [1.0, 1.0]
