"""Columns from `vocab_size` on are padding: not read, no part of the softmax, and exactly zero in the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import KINDS, LAYOUTS, OBJECTIVES, PUBLIC, SHORT, Batch, arguments, flat, ragged_batch, run
from modes import by_backend, by_combination, on_device, sized
from row_batches import peaked
from torch import Tensor

import gspo_kernels
from gspo_kernels import token_logprobs

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
on_and_off = pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])

# (vocabulary, columns): nothing to leave out; one column; rows whose padding starts within a vector; a block boundary
# inside the padding; more padding than vocabulary.
SIZES = [(64, 64), (63, 64), (1, 8), (130, 144), sized((4090, 4224), (250, 264)), (9, 300)]


def widened(logits: Tensor, columns: int) -> Tensor:
    """`columns` of them: what is added is what uninitialised weights may leave there."""
    junk = torch.tensor([math.nan, math.inf, 3e4, -math.inf, 0.0], dtype=logits.dtype)
    extra = columns - logits.shape[-1]
    return torch.cat([logits, junk.repeat(extra // 5 + 1)[:extra].expand(*logits.shape[:-1], extra)], -1)


def rows_of(logits: Tensor, ids: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """l, H, lse and the gradient of a mix of them."""
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, backend=backend, **options)
    mix = 0.7 * out.logprobs.sum() - 0.3 * out.entropy.sum() + 0.2 * out.lse.sum()
    return [*(x.detach() for x in out), torch.autograd.grad(mix, leaf)[0]]


@by_combination
@pytest.mark.parametrize(("vocab", "columns"), SIZES)
def test_rows_have_the_bits_of_the_sliced_logits(backend: str, dtype: torch.dtype, vocab: int, columns: int) -> None:
    narrow = peaked(5, vocab).to(dtype)
    ids = on_device(torch.tensor([0, vocab - 1, vocab // 2, 7 % vocab, vocab - 1]))
    wide = on_device(widened(narrow, columns))
    expected = rows_of(on_device(narrow), ids, backend)
    *stats, gradient = rows_of(wide, ids, backend, vocab_size=vocab)
    assert gradient.shape == wide.shape
    for x, y in zip([*stats, gradient[:, :vocab]], expected, strict=True):
        assert torch.equal(x, y)
    assert bool((gradient[:, vocab:] == 0).all()), "the padding has a gradient"


@by_combination
def test_a_strided_view(backend: str, dtype: torch.dtype) -> None:
    """logits[:, :-1] of a padded vocabulary, each row at another address modulo 16."""
    base = on_device(widened(peaked(8, 50).to(dtype), 57)).view(2, 4, 57)
    ids = on_device(torch.arange(6).view(2, 3))
    got = rows_of(base[:, :-1], ids, backend, vocab_size=50)
    expected = rows_of(base[:, :-1, :50].contiguous(), ids, backend)
    for x, y in zip([*got[:3], got[3][..., :50]], expected, strict=True):
        assert torch.equal(x, y)
    assert bool((got[3][..., 50:] == 0).all())


def wide_batch(batch: Batch, columns: int) -> Batch:
    return replace(batch, logits=widened(batch.logits, columns))


OPTIONS = {"beta": 0.1, "entropy_coef": 0.01}


@by_objective
@by_layout
@by_backend
@on_and_off
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "all"])
def test_losses_are_those_of_the_sliced_logits(
    objective: str, layout: str, backend: str, on_policy: bool, options: dict[str, Any]
) -> None:
    batch = ragged_batch(objective, seed=40, lengths=SHORT, dtype=torch.bfloat16, on_policy=on_policy, ref=True)
    narrow = run(batch, layout, objective, backend=backend, **options)
    wide = run(wide_batch(batch, 64), layout, objective, backend=backend, vocab_size=61, **options)
    assert torch.equal(wide.loss, narrow.loss)
    assert torch.equal(wide.gradient[:, :61], narrow.gradient)
    assert bool((wide.gradient[:, 61:] == 0).all()) and bool((wide.padding_gradient == 0).all())
    for name, value in narrow.stats.as_dict().items():
        assert torch.equal(wide.stats.as_dict()[name], value), name
    assert torch.equal(wide.logprobs, narrow.logprobs)


def test_policy_loss_takes_it_too() -> None:
    batch = ragged_batch("gspo", seed=41)
    function = partial(gspo_kernels.policy_loss, objective=gspo_kernels.GSPO())
    wide = run(wide_batch(batch, 70), "packed", "gspo", function=function, vocab_size=61)
    assert torch.equal(wide.gradient[:, :61], run(batch, "packed", "gspo").gradient)


@by_backend
@by_layout
@on_and_off
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_overwritten_logits(backend: str, layout: str, on_policy: bool, dtype: torch.dtype) -> None:
    """The gradient is written over all columns: zeros over the garbage."""
    batch = ragged_batch("gspo", seed=42, lengths=SHORT, dtype=dtype, on_policy=on_policy)
    args = arguments(wide_batch(batch, 66), layout)
    options = {**args.keywords, "vocab_size": 61, "backend": backend}
    gradients = []
    for overwrite in (False, True):
        logits = args.logits * 1
        loss, _ = gspo_kernels.gspo_loss(logits, *args.rest, **options, overwrite_logits=overwrite)
        gradients.append(torch.autograd.grad(loss * 2, args.logits)[0])
        if overwrite:
            assert torch.equal(logits, gradients[1]), "the gradient went elsewhere"
    assert torch.equal(*gradients)
    assert bool((gradients[1][..., 61:] == 0).all())


@by_backend
def test_all_columns_are_the_default(backend: str) -> None:
    logits, ids = on_device(peaked(3, 40)), on_device(torch.arange(3))
    for x, y in zip(rows_of(logits, ids, backend), rows_of(logits, ids, backend, vocab_size=40), strict=True):
        assert torch.equal(x, y)


@pytest.mark.plain_memory
@by_layout
def test_under_compile(layout: str) -> None:
    batch = ragged_batch("gspo", seed=43, lengths=SHORT)
    args = arguments(wide_batch(batch, 64), layout)
    torch._dynamo.reset()
    compiled = torch.compile(gspo_kernels.gspo_loss, fullgraph=True, backend="aot_eager")
    loss, _ = compiled(args.logits, *args.rest, **args.keywords, vocab_size=61)
    loss.backward()
    assert args.logits.grad is not None
    gradient = flat(args.logits.grad.cpu(), batch, layout)
    assert bool((gradient[:, 61:] == 0).all())
    expected = run(batch, layout, "gspo")
    assert float(loss.detach()) == pytest.approx(float(expected.loss), rel=1e-6)
    torch.testing.assert_close(gradient[:, :61], expected.gradient, rtol=1e-6, atol=2.0**-126)


# --- what is refused ------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{objective: PUBLIC[objective] for objective in KINDS},
    "policy": gspo_kernels.policy_loss,
    "token_logprobs": token_logprobs,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("value", "kind", "came"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (9, ValueError, "9"),
        (5.0, TypeError, "5.0"),
        (True, TypeError, "True"),
        ("5", TypeError, "'5'"),
        (torch.tensor(5), TypeError, "tensor"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(function: str, value: Any, kind: type[Exception], came: str) -> None:
    logits = on_device(torch.zeros(2, 3, 8)).requires_grad_() * 1
    given = [] if function == "token_logprobs" else [on_device(torch.ones(2))]
    ids = on_device(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(kind, match="vocab_size: expected") as error:
        FUNCTIONS[function](logits, ids, *given, vocab_size=value, overwrite_logits=True)
    assert type(error.value) is kind and came in str(error.value)
    assert bool((logits == 0).all()), "the logits were written to before the error"


@pytest.mark.parametrize("function", FUNCTIONS)
@by_backend
def test_a_padding_token_is_refused(function: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that has a column, but not of the vocabulary; where the mask is False it may be anything."""
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")
    logits = on_device(torch.zeros(2, 3, 8))
    ids = on_device(torch.tensor([[0, 4, 7], [4, 4, 0]]))
    mask = on_device(torch.tensor([[True, True, False], [True, True, True]]))
    given = [] if function == "token_logprobs" else [on_device(torch.ones(2))]
    call = partial(FUNCTIONS[function], logits, ids, *given, backend=backend)
    call(vocab_size=5, mask=mask)
    call(vocab_size=8)
    with pytest.raises(ValueError, match=r"token_ids: expected ids from 0 to 4.*got 7"):
        call(vocab_size=5)
    with pytest.raises(ValueError, match=r"token_ids: expected ids from 0 to 3.*got 4"):
        call(vocab_size=4, mask=mask)
