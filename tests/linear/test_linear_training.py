"""A loss from hidden states inside a training step: autocast, tied heads, accumulation, checkpointing, threads."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import LINEAR, OBJECTIVES, SHORT, arguments
from checks import check_close
from linear import Gradients, Problem, check_same, chunk_of, from_hidden, from_logits, logits_of, problem, unmasked
from modes import DEFAULT_MODE, DEVICE, NOT_INTERPRETED, by_backend, on_device
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspo_kernels import gspo_loss, linear_gspo_loss
from gspo_kernels.linear import types
from gspo_kernels.linear.head import Head
from gspo_kernels.rows import cpu_rows

pytestmark = NOT_INTERPRETED  # what a step does with the operator, and no kernel of its own

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
on_and_off = pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
LENGTHS = (5, 1, 0, 7, 3, 1, 4, 2, 6)


def given(p: Problem) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """hidden, weight, bias as leaves, and a function of them."""
    args = arguments(p.batch, "packed")
    hidden, weight = on_device(p.hidden.clone()).requires_grad_(), on_device(p.weight.clone()).requires_grad_()
    bias = None if p.bias is None else on_device(p.bias.clone()).requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, objective: str = "gspo", **options: Any) -> Tensor:
        chunk = {"chunk_bytes": chunk_of(3, 61), "bias": bias, **options}
        out: Tensor = LINEAR[objective](hidden, weight, *args.rest, **args.keywords, **chunk)[0]
        return out

    return hidden, weight, bias, loss


def equal(found: Gradients, expected: Gradients) -> bool:
    names = ("loss", "hidden", "weight", "bias")
    pairs = [(getattr(found, name), getattr(expected, name)) for name in names]
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in pairs)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@by_objective
@pytest.mark.parametrize("rows", [2, None])
def test_autocast(objective: str, rows: int | None) -> None:
    """Operands are rounded to bf16 and their product is not; gradients of fp32 parameters stay fp32."""
    p = problem(objective, seed=80, lengths=LENGTHS)
    rounded = replace(p, hidden=p.hidden.bfloat16().float(), weight=p.weight.bfloat16().float())
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = from_hidden(p, "packed", objective, rows=rows)
        again = from_hidden(rounded, "packed", objective, rows=rows)
    assert equal(found, again), "operands lose the same"
    logits = torch.where(p.batch.mask[:, None], logits_of(rounded.hidden, rounded.weight, None), 0.0)
    rounded.batch = replace(p.batch, logits=logits)
    truth = from_logits(rounded, "packed", objective)
    check_same(replace(found, hidden=None, weight=None), truth, rounded)
    check_same(found, truth, rounded, number=2**-8, stats=False)
    for gradient in (found.hidden, found.weight):
        assert gradient is not None and gradient.dtype == torch.float32


@pytest.mark.parametrize("narrow", ["hidden", "weight"])
def test_operands_of_two_dtypes(narrow: str) -> None:
    """bf16 hidden states with an fp32 head, or the reverse: the wider one is multiplied, and each gets its own back."""
    p = problem("gspo", seed=81, lengths=LENGTHS, dtype=torch.bfloat16)
    p = replace(p, hidden=p.hidden.float()) if narrow == "weight" else replace(p, weight=p.weight.float())
    found = from_hidden(p, "packed", "gspo", rows=3)
    assert found.hidden is not None and found.weight is not None
    assert (found.hidden.dtype, found.weight.dtype) == (p.hidden.dtype, p.weight.dtype)
    check_same(found, from_logits(p, "packed", "gspo"), p)


@by_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(backend: str, dtype: torch.dtype) -> None:
    p = problem("gspo", seed=82, lengths=LENGTHS, ref=True, weights="token")
    options: dict[str, Any] = {"backend": backend, "beta": 0.1, "entropy_coef": 0.01}
    usual = from_hidden(p, "packed", "gspo", rows=3, **options)
    torch.set_default_dtype(dtype)
    try:
        other = from_hidden(p, "packed", "gspo", rows=3, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(usual, other) and other.loss.dtype == other.stats.ratio_mean.dtype == torch.float32


# --- graphs -----------------------------------------------------------------------------------------------------------


@on_and_off
def test_a_tied_head_gets_both_shares(on_policy: bool) -> None:
    """The same matrix embeds the tokens and is the head."""
    p = unmasked(problem("gspo", seed=83, lengths=LENGTHS))
    words = on_device(torch.arange(len(p.hidden)) * 7 % 61)
    args = arguments(p.batch, "packed")
    args.rest = (*args.rest[:2], None if on_policy else torch.full_like(args.rest[2], -4.0))

    def shares(matrix: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(matrix[words] * 3)
        return hidden, logits_of(hidden, matrix, None)

    found = on_device(p.weight.clone()).requires_grad_()
    linear_gspo_loss(shares(found)[0], found, *args.rest, **args.keywords, chunk_bytes=chunk_of(3, 61))[0].backward()
    truth = on_device(p.weight.double()).requires_grad_()
    gspo_loss(shares(truth)[1], *args.rest, **args.keywords)[0].backward()
    assert found.grad is not None and truth.grad is not None
    size = float(truth.grad.abs().max())
    check_close("gradient", found.grad, truth.grad, torch.full_like(truth.grad, 1e-5 * size))


@on_and_off
def test_gradients_accumulate(on_policy: bool) -> None:
    """Two micro-batches into the same leaves: the second backward adds to the gradients of the first."""
    p = problem("gspo", seed=84, lengths=LENGTHS, bias=True, on_policy=on_policy)
    alone = from_hidden(p, "packed", "gspo", rows=3)
    hidden, weight, bias, loss = given(p)
    for times in (1, 2, 3):
        loss(hidden, weight).backward()
        for x, one in ((hidden, alone.hidden), (weight, alone.weight), (bias, alone.bias)):
            assert x is not None and x.grad is not None and one is not None
            check_close("gradient", x.grad, times * one, 1e-6 * times * one.abs())


@on_and_off
def test_a_second_backward_is_refused_in_words(on_policy: bool) -> None:
    p = problem("gspo", seed=85, lengths=LENGTHS, on_policy=on_policy)
    hidden, weight, _, loss = given(p)
    value = loss(hidden, weight)
    value.backward(retain_graph=False)
    with pytest.raises(RuntimeError):
        value.backward()
    value = loss(hidden, weight)
    first = torch.autograd.grad(value, weight, retain_graph=True)[0].clone()
    try:
        second = torch.autograd.grad(value, weight)[0]
    except RuntimeError as error:
        assert "one backward pass" in str(error)
    else:
        assert torch.equal(first, second), "a second backward may be right or refused"


@on_and_off
def test_a_second_derivative_is_refused_rather_than_wrong(on_policy: bool) -> None:
    hidden, weight, _, loss = given(problem("gspo", seed=86, lengths=SHORT, on_policy=on_policy))
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(loss(hidden, weight), weight, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> list[types.Gradients]:
    """What each pass over a head returns."""
    made: list[types.Gradients] = []
    original = Head.gradients

    def gradients(self: Head) -> types.Gradients:
        made.append(original(self))
        return made[-1]

    monkeypatch.setattr(Head, "gradients", gradients)
    return made


def test_the_gradient_is_handed_over_and_not_copied(buffers: list[types.Gradients]) -> None:
    """That of a head of V = 150,000 is gigabytes: the leaf's `.grad` is the buffer that the head wrote."""
    hidden, weight, bias, loss = given(problem("gspo", seed=87, lengths=LENGTHS, bias=True))
    (loss(hidden, weight) * 0.5).backward()
    assert bias is not None
    for leaf, buffer in ((hidden, buffers[0].hidden), (weight, buffers[0].weight), (bias, buffers[0].bias)):
        assert leaf.grad is not None and leaf.grad.data_ptr() == buffer.data_ptr()


@pytest.mark.skipif(DEVICE.type != "cpu" or bool(cpu_rows.unavailable_reason()), reason="C++ kernels sum in 24 bits")
def test_the_gradient_of_a_bf16_head_is_rounded_in_place(buffers: list[types.Gradients]) -> None:
    hidden, weight, _, loss = given(problem("gspo", seed=87, lengths=LENGTHS, dtype=torch.bfloat16))
    (loss(hidden, weight) * 0.5).backward()
    assert weight.grad is not None and weight.grad.data_ptr() == buffers[0].weight.data_ptr()


@on_and_off
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(on_policy: bool, use_reentrant: bool) -> None:
    p = problem("gspo", seed=88, lengths=LENGTHS, on_policy=on_policy)
    hidden, weight, _, loss = given(p)
    plain = torch.autograd.grad(loss(hidden * 1, weight), [hidden, weight])
    value = checkpoint(lambda h, w: loss(h * 1, w), hidden, weight, use_reentrant=use_reentrant)
    assert isinstance(value, Tensor)
    value.backward()
    assert all(x.grad is not None and torch.equal(x.grad, g) for x, g in zip((hidden, weight), plain, strict=True))


def test_two_losses_on_the_same_hidden_states() -> None:
    p = problem("gspo", seed=89, lengths=LENGTHS)
    hidden, weight, _, loss = given(p)
    one, two = (torch.autograd.grad(loss(hidden, weight, name), [hidden, weight]) for name in ("gspo", "grpo"))
    both = torch.autograd.grad(loss(hidden, weight) + 2 * loss(hidden, weight, "grpo"), [hidden, weight])
    for x, y, z in zip(one, two, both, strict=True):
        check_close("gradient", z, x + 2 * y, 1e-6 * (x.abs() + 2 * y.abs()))


# --- which operands need a gradient -----------------------------------------------------------------------------------


@on_and_off
@pytest.mark.parametrize("rows", [2, None])
def test_only_some_operands_need_a_gradient(on_policy: bool, rows: int | None) -> None:
    """All eight combinations; an operand that needs none changes no gradient of another."""
    p = problem("gspo", seed=90, lengths=LENGTHS, bias=True, on_policy=on_policy)
    names = ("hidden", "weight", "bias")
    every = from_hidden(p, "packed", "gspo", rows=rows)
    for count in range(3):
        for needs_grad in itertools.combinations(names, count):
            found = from_hidden(p, "packed", "gspo", rows=rows, needs_grad=needs_grad)
            assert torch.equal(found.loss, every.loss)
            for name in names:
                gradient, expected = getattr(found, name), getattr(every, name)
                assert (gradient is not None) == (name in needs_grad)
                if gradient is not None:  # with deferred_scale the coefficient comes last
                    check_close(name, gradient, expected, 3e-6 * expected.abs() + 1e-7 * expected.abs().max())


@by_objective
@pytest.mark.parametrize("grad", ["no_grad", "inference_mode"])
def test_without_a_graph(objective: str, grad: str) -> None:
    hidden, weight, _, loss = given(problem(objective, seed=91, lengths=LENGTHS))
    with torch.no_grad() if grad == "no_grad" else torch.inference_mode():
        value = loss(hidden, weight, objective)
    assert not value.requires_grad and torch.equal(value, loss(hidden, weight, objective).detach())


def test_the_constants_are_never_differentiated() -> None:
    p = problem("grpo", seed=92, lengths=LENGTHS, ref=True, weights="token")
    args = arguments(p.batch, "packed")
    constants = [*args.rest[1:], args.keywords["ref_logprobs"], args.keywords["importance_weights"]]
    for x in constants:
        x.requires_grad_()
    hidden = on_device(p.hidden).requires_grad_()
    loss, stats = LINEAR["grpo"](hidden, on_device(p.weight), *args.rest, **args.keywords, beta=0.1)
    loss.backward()
    assert all(x.grad is None for x in constants)
    assert not any(x.requires_grad for x in stats.as_dict().values())


# --- sequences of advantage zero --------------------------------------------------------------------------------------


@by_objective
@pytest.mark.parametrize("option", [{}, {"aggregation": "token_mean"}, {"normalizer": 11.0}], ids=str)
@pytest.mark.parametrize("rows", [2, None])
def test_skip_zero_advantage(objective: str, option: dict[str, Any], rows: int | None) -> None:
    """The same loss and gradients, sequences of it still counted in the mean; but none of their tokens in the stats."""
    p = problem(objective, seed=93, lengths=LENGTHS)
    p.batch.advantages[0] = p.batch.advantages[3] = 0.0
    whole = from_hidden(p, "packed", objective, rows=rows, **option)
    found = from_hidden(p, "packed", objective, rows=rows, skip_zero_advantage=True, **option)
    assert float(found.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert found.hidden is not None and whole.hidden is not None
    assert found.weight is not None and whole.weight is not None
    check_close("hidden", found.hidden, whole.hidden, (1e-6 * whole.hidden.abs().amax(-1, True)).expand(-1, 24))
    check_close("weight", found.weight, whole.weight, 1e-6 * float(whole.weight.abs().max()) * torch.ones(61, 24))
    kept = [p.batch.advantages[i] != 0 and any(p.batch.mask[t] for t in s) for i, s in enumerate(p.batch.sequences)]
    tokens = sum(int(p.batch.mask[t]) for k, s in zip(kept, p.batch.sequences, strict=True) if k for t in s)
    assert int(found.stats.num_sequences) == sum(kept) and int(found.stats.num_tokens) == tokens
    assert int(found.stats.head.forward_rows) == tokens < int(whole.stats.head.forward_rows)


def test_skip_zero_advantage_by_token() -> None:
    """A sequence is left out if all of its tokens have none; one with some is not."""
    p = unmasked(problem("grpo", seed=94, lengths=(3, 4, 2)))
    p.batch.by_token, p.batch.advantages = True, torch.tensor([0.0, 0, 0, 0, 1, 0, -1, 0, 2])
    found = from_hidden(p, "packed", "grpo", rows=2, skip_zero_advantage=True)
    assert int(found.stats.num_tokens) == 6 and int(found.stats.num_sequences) == 2


# --- again and again --------------------------------------------------------------------------------------------------


@by_objective
@pytest.mark.plain_memory
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_have_the_same_bits(objective: str, dtype: torch.dtype) -> None:
    p = problem(objective, seed=97, lengths=LENGTHS, bias=True, dtype=dtype)
    first, second = (from_hidden(p, "packed", objective, rows=3) for _ in range(2))
    assert equal(first, second)
    for name, value in first.stats.as_dict().items():
        assert torch.equal(value, second.stats.as_dict()[name]), name


@DEFAULT_MODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_statistic(dtype: torch.dtype, threads: None) -> None:
    p = problem("gspo", seed=98, width=64, vocab=301, dtype=dtype)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(from_hidden(p, "packed", "gspo", rows=6))
    for other in found[1:]:
        assert torch.equal(other.stats.logprobs, found[0].stats.logprobs) and torch.equal(other.loss, found[0].loss)
        for name, value in found[0].stats.as_dict().items():
            assert torch.equal(value, other.stats.as_dict()[name]), name


def test_many_threads_at_once() -> None:
    """A trainer's threads may call at the same time; nothing is shared."""
    problems = [problem("gspo", seed=seed, lengths=LENGTHS) for seed in range(6)]

    def work(p: Problem) -> Gradients:
        return from_hidden(p, "packed", "gspo", rows=3)

    alone = [work(p) for p in problems]
    with ThreadPoolExecutor(6) as pool:
        for in_pool, by_itself in zip(pool.map(work, problems), alone, strict=True):
            assert equal(in_pool, by_itself)
