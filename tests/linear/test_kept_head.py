"""Losses of kept columns from hidden states: the oracle's numbers, every operand's gradient, and what is multiplied."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from batches import KINDS, LINEAR, SHORT, kept_tokens, ragged_batch, run
from checks import allocated, check_close, check_outcome
from linear import Identity, Problem, check_same, from_hidden, from_logits, problem, with_low_rank
from modes import DEFAULT_MODE, DEVICE, NOT_INTERPRETED, by_backend, by_combination, on_device, sized
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspo_kernels import KeptTokens, explain, linear_policy_loss, linear_token_logprobs, token_logprobs

LENGTHS = sized((5, 1, 0, 7, 3, 1, 4, 2, 6), SHORT)
TWO = sized(KINDS, ["gspo"])
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # how a batch is built, and options of the loss
    "defaults": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token", "softcap": 6.0},
        {"beta": 0.1, "entropy_coef": 0.01, "kl_weighting": "ratio"},
    ),
}


def with_entries(p: Problem) -> Problem:
    """Every row keeps some columns: those that kept all keep their token and the first three."""
    assert p.batch.kept is not None
    few = [ids or sorted({0, 1, 2, max(int(t), 0)}) for ids, t in zip(p.batch.kept, p.batch.token_ids, strict=True)]
    return replace(p, batch=replace(p.batch, kept=few))


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", TWO)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_against_the_oracle(objective: str, option: str, layout: str) -> None:
    """With the identity for a head. Rows keep one column, some, all, or all without saying so."""
    build, options = OPTIONS[option]
    batch = ragged_batch(objective, seed=21, lengths=LENGTHS, kept=True, **build)
    function = Identity(objective, rows=3)
    outcome = run(batch, layout, objective, function=function, **options)
    check_outcome(outcome, batch, objective, **options)
    function.check_gradients(outcome, batch)


@by_combination
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    batch = ragged_batch("gspo", seed=22, lengths=LENGTHS, dtype=dtype, kept=True)
    function = Identity("gspo", rows=3)
    outcome = run(batch, "packed", "gspo", function=function, upstream=-2.5, backend=backend)
    check_outcome(outcome, batch, "gspo", upstream=-2.5, roundings=2)
    function.check_gradients(outcome, batch)


# --- any head ---------------------------------------------------------------------------------------------------------


@by_backend
@pytest.mark.parametrize("every", [True, False], ids=["every row has entries", "some"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("rank", [None, 3], ids=["plain", "low rank"])
def test_every_operand(backend: str, every: bool, frozen: bool, rank: int | None) -> None:
    p = problem("ppo", seed=24, lengths=LENGTHS, bias=rank is None, kept=True)
    p = with_entries(p) if every else p
    needs_grad = ["hidden"] if frozen else ["hidden", "weight", "bias"]
    function = LINEAR["ppo"] if rank is None else with_low_rank(LINEAR["ppo"], rank)
    found = from_hidden(p, "padded", "ppo", rows=3, function=function, needs_grad=needs_grad, backend=backend)
    check_same(found, from_logits(p, "padded", "ppo"), p)
    assert (found.weight is None) == frozen
    assert p.batch.kept is not None
    without = [bool(mask) and not ids for mask, ids in zip(p.batch.mask, p.batch.kept, strict=True)]
    assert int(found.stats.head.forward_rows) == sum(without)


def test_all_columns_are_the_full_loss() -> None:
    p = problem("gspo", seed=24, lengths=LENGTHS, bias=True)
    every = replace(p, batch=replace(p.batch, kept=[list(range(61))] * len(p.batch.mask)))
    check_same(from_hidden(every, "packed", "gspo"), from_logits(p, "packed", "gspo"), p)


def test_sequences_of_advantage_zero_may_be_left_out() -> None:
    p = problem("gspo", seed=35, lengths=LENGTHS, kept=True)
    p.batch.advantages[0] = p.batch.advantages[3] = 0.0
    found = from_hidden(p, "packed", "gspo", skip_zero_advantage=True)
    check_same(found, from_logits(p, "packed", "gspo"), p, stats=False)


@NOT_INTERPRETED
@pytest.mark.skipif(DEVICE.type != "cpu", reason="threads of the CPU")
@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_whatever_the_threads_and_the_other_rows(backend: str, dtype: torch.dtype) -> None:
    p = with_entries(problem("gspo", seed=25, width=200, lengths=(9, 40, 3), dtype=dtype, bias=True, kept=True))
    threads = torch.get_num_threads()
    found = {}
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found[count] = from_hidden(p, "packed", "gspo", backend=backend)
    finally:
        torch.set_num_threads(threads)
    for name in ("loss", "hidden", "weight", "bias"):
        assert torch.equal(getattr(found[1], name), getattr(found[2], name)), name

    kept = kept_tokens(p.batch, "packed")
    statistics = partial(linear_token_logprobs, weight=p.weight, full_distribution=False, backend=backend)
    together = statistics(p.hidden, token_ids=p.batch.token_ids, mask=p.batch.mask, kept=kept).kept.logprobs
    for t in (0, 10, 51):
        row = slice(t, t + 1)
        ids, mask = p.batch.token_ids[row], p.batch.mask[row]
        assert torch.equal(
            statistics(p.hidden[row], token_ids=ids, mask=mask, kept=kept[row]).kept.logprobs, together[row]
        )


def test_under_autocast_and_with_tied_embeddings() -> None:
    """bf16 operands, and the gradient of a weight that is an embedding too."""
    p = with_entries(problem("gspo", seed=26, lengths=LENGTHS, kept=True))
    inputs = on_device(torch.arange(len(p.batch.mask)) % 61)

    def gradients(weight: Tensor, autocast: bool) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient of an embedding whose weight this is, too if it is the head's."""
        leaf = weight.detach().requires_grad_()
        hidden = torch.nn.functional.embedding(inputs, leaf)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            loss, _ = loss_of(p, hidden, leaf)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    rounded = on_device(p.weight).bfloat16().float()
    for found, expected in zip(gradients(on_device(p.weight), True), gradients(rounded, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def mixed(*outputs: Any) -> Tensor:
    parts = [2 * x.logprobs.double() - 3 * x.entropy.double() + 0.5 * x.lse for x in outputs]
    return torch.stack([part.sum() for part in parts]).mul(on_device(torch.tensor([1.0, 0.5]))[: len(parts)]).sum()


@pytest.mark.parametrize("full", [True, False], ids=["and full", "kept alone"])
def test_token_logprobs_of_both_distributions(full: bool) -> None:
    p = problem("gspo", seed=27, lengths=LENGTHS, bias=True, kept=True)
    ids, mask, kept = on_device(p.batch.token_ids), on_device(p.batch.mask), kept_tokens(p.batch, "packed")
    hidden, weight, bias = (
        on_device(x.clone()).requires_grad_() for x in (p.hidden, p.weight, p.bias) if x is not None
    )
    found = linear_token_logprobs(hidden, weight, ids, bias=bias, mask=mask, kept=kept, full_distribution=full)
    logits = on_device(p.batch.logits.clone()).requires_grad_()
    truth = token_logprobs(logits, ids, mask=mask, kept=kept, full_distribution=full, backend="reference")
    assert (found.full is None) == (not full)
    of_both = [found.kept, *([found.full] if found.full else [])]
    expected = [truth.kept, *([truth.full] if truth.full else [])]
    for one, other in zip(of_both, expected, strict=True):
        for name, x, y in zip(one._fields, one, other, strict=True):
            check_close(name, x, y, 3e-6 * (1 + y.abs()))
    mixed(*of_both).backward()
    mixed(*expected).backward()
    assert logits.grad is not None and weight.grad is not None and bias.grad is not None and hidden.grad is not None
    g, size = logits.grad.cpu(), logits.grad.abs().cpu()
    h, w = torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0), p.weight.double()
    check_close("gradient of hidden", hidden.grad, g @ w, 1e-5 * (size @ w.abs()))
    check_close("gradient of weight", weight.grad, g.t() @ h, 1e-5 * (size.t() @ h.abs()))
    check_close("gradient of bias", bias.grad, g.sum(0), 1e-5 * size.sum(0))


@NOT_INTERPRETED
def test_gradcheck() -> None:
    """Through both distributions, by every operand; one row keeps its token alone, one all columns."""
    kept = KeptTokens.from_lists([[3, 0], [3], None, [4, 2, 1]], device=DEVICE)
    ids = on_device(torch.tensor([0, 3, 4, 2]))
    generator = torch.Generator().manual_seed(3)
    leaves = [
        on_device(torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in ((4, 3), (5, 3), (5,), (4, 1), (5, 1))
    ]

    def work(hidden: Tensor, weight: Tensor, bias: Tensor, u: Tensor, b: Tensor) -> Any:
        found = linear_token_logprobs(hidden, weight, ids, bias=bias, low_rank=(u, b), kept=kept)
        assert found.full is not None
        return *found.kept, *found.full

    assert torch.autograd.gradcheck(work, leaves, eps=1e-6, atol=1e-7)


# --- a sparse gradient ------------------------------------------------------------------------------------------------


def loss_of(p: Problem, hidden: Tensor, weight: Tensor, **options: Any) -> Any:
    batch = p.batch
    lengths = on_device(torch.tensor([0, *batch.lengths]).cumsum(0))
    assert batch.old_logprobs is not None
    arrays = (on_device(x) for x in (batch.token_ids, batch.advantages, batch.old_logprobs))
    given = {"mask": on_device(batch.mask), "cu_seqlens": lengths, "kept": kept_tokens(batch, "packed"), **options}
    return linear_policy_loss(hidden, weight, *arrays, **given)


@by_backend
def test_a_sparse_gradient_is_the_dense_one(backend: str) -> None:
    p = with_entries(problem("gspo", seed=28, lengths=LENGTHS, kept=True))
    found = {}
    for sparse in (True, False):
        hidden, weight = on_device(p.hidden.clone()).requires_grad_(), on_device(p.weight.clone()).requires_grad_()
        loss_of(p, hidden, weight, sparse_weight_grad=sparse, backend=backend).loss.backward()
        assert weight.grad is not None
        found[sparse] = hidden.grad, weight.grad
    of_sparse = found[True][1]
    assert of_sparse.layout == torch.sparse_coo and of_sparse.sparse_dim() == 1
    columns = of_sparse._indices()[0]
    assert bool((columns[1:] > columns[:-1]).all()), "each column once"
    assert p.batch.kept is not None
    assert columns.tolist() == sorted({v for ids in p.batch.kept if ids for v in ids})
    assert torch.equal(of_sparse.to_dense(), found[False][1])
    assert torch.equal(found[True][0], found[False][0])  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_optimizers_of_sparse_gradients(optimizer: Any) -> None:
    """A step is that of the dense gradient; SparseAdam takes that as a sparse one of all columns with a gradient."""
    p = with_entries(problem("ppo", seed=29, lengths=LENGTHS, kept=True))
    found = []
    for sparse in (True, False):
        weight = torch.nn.Parameter(on_device(p.weight.clone()))
        optimize = optimizer([weight], lr=0.01)
        loss_of(p, on_device(p.hidden), weight, sparse_weight_grad=sparse).loss.backward()
        if not sparse and optimizer is torch.optim.SparseAdam:
            assert weight.grad is not None
            weight.grad = weight.grad.to_sparse(1)
        optimize.step()
        found.append(weight.detach())
    assert torch.equal(*found)
    assert not torch.equal(found[0], on_device(p.weight))


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_backward_twice_and_second_derivatives() -> None:
    p = problem("gspo", seed=30, lengths=SHORT, kept=True)
    hidden, weight = on_device(p.hidden.clone()).requires_grad_(), on_device(p.weight.clone()).requires_grad_()
    loss, _ = loss_of(p, hidden, weight)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (of_hidden,) = torch.autograd.grad(loss, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss or linear_token_logprobs: a second derivative"):
        of_hidden.nan_to_num().sum().backward()


def test_under_checkpointing() -> None:
    p = problem("gspo", seed=31, lengths=SHORT, kept=True)
    gradients = []
    for wrap in (lambda f, *x: f(*x), partial(checkpoint, use_reentrant=False)):
        hidden, weight = on_device(p.hidden.clone()).requires_grad_(), on_device(p.weight.clone()).requires_grad_()
        wrap(lambda h, w: loss_of(p, h, w).loss, hidden, weight).backward()
        gradients.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- what is multiplied, and refused ----------------------------------------------------------------------------------


def test_rows_without_a_gradient_are_not_read() -> None:
    """Hidden states are NaN where the mask is not set, and a row of the head where no gradient comes from it."""
    kept = KeptTokens.from_lists([[0, 1], [1, 2], [3, 4], [5]], device=DEVICE)
    hidden, weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu") for shape in ((4, 1, 6), (7, 6))
    )
    hidden[1], weight[[2, 6]] = torch.nan, torch.nan
    hidden, weight = on_device(hidden).requires_grad_(), on_device(weight).requires_grad_()
    ids, mask = (
        on_device(torch.tensor([[0], [2], [4], [5]])),
        on_device(torch.tensor([[True], [False], [True], [True]])),
    )
    advantages = on_device(torch.tensor([1.0, 1.0, 0.0, 1.0]))  # the last row keeps its token alone
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages, mask=mask, kept=kept)
    loss.backward()
    assert bool(loss.isfinite()) and hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isfinite().all() and hidden.grad.any(-1).flatten().tolist() == [True, False, False, False]
    assert weight.grad.isfinite().all() and weight.grad.any(-1).tolist() == [True, True, *[False] * 5]


@DEFAULT_MODE
@pytest.mark.plain_memory
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_memory_is_that_of_the_kept_columns_and_of_the_gradients(frozen: bool) -> None:
    """Of all that torch hands out, freed or not: no other logits, no second gradient, no copy of the head."""
    rows, width, vocab, columns = 256, 64, 8_000, 4
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (rows, vocab))
    ids = torch.randint(vocab - columns, (rows,), generator=generator)
    kept = KeptTokens((ids[:, None] + torch.arange(columns)).flatten(), torch.arange(rows + 1) * columns)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)

    def work() -> None:
        linear_policy_loss(hidden[None], weight, ids[None], torch.ones(1), kept=kept).loss.backward()

    work()
    hidden.grad = weight.grad = None
    of_gradients = 4 * width * (rows + (0 if frozen else vocab))
    assert allocated(work) < of_gradients + 64 * rows * columns + 512 * rows


def test_explain_says_what_is_multiplied() -> None:
    p = problem("gspo", seed=32, lengths=(3, 2))
    kept = KeptTokens.from_lists([[0, 1, 2], [4], None, None, [5, 6]], device=DEVICE)
    hidden, weight = on_device(p.hidden), on_device(p.weight).requires_grad_()
    batch = {
        "token_ids": torch.tensor([0, 4, 1, 1, 6]), "mask": torch.tensor([True, True, True, False, True]),
        "cu_seqlens": torch.tensor([0, 3, 5]), "advantages": torch.ones(2),
    }  # fmt: skip
    said = explain(hidden, weight, **{name: on_device(x) for name, x in batch.items()}, kept=kept)
    for line in ("6 kept columns of 3 rows", "1 rows keep the whole vocabulary", "gradient of the weight is dense"):
        assert line in said, said
    assert "7 kept columns" not in explain(hidden, weight, kept=kept)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kept": None}, "because kept= is None"),
        ({}, "because rows keep all columns, "),
    ],
)
def test_a_sparse_gradient_that_is_none_is_refused(options: dict[str, Any], reason: str) -> None:
    p = problem("gspo", seed=33, lengths=LENGTHS, kept=True)
    hidden, weight = on_device(p.hidden), on_device(p.weight).requires_grad_()
    with pytest.raises(ValueError, match=f"^sparse_weight_grad: expected False, {reason}"):
        loss_of(p, hidden, weight, sparse_weight_grad=True, **options)
    ids, kept = on_device(p.batch.token_ids), kept_tokens(with_entries(p).batch, "packed")
    with pytest.raises(ValueError, match=r"^sparse_weight_grad: expected False, because full_distribution=True"):
        linear_token_logprobs(hidden, weight, ids, kept=kept, sparse_weight_grad=True)


def test_kept_tokens_are_checked() -> None:
    p = problem("gspo", seed=34, lengths=LENGTHS, kept=True)
    hidden, weight = on_device(p.hidden), on_device(p.weight)
    kept = kept_tokens(p.batch, "packed")
    for wrong, error, said in (
        ([[0]], TypeError, "kept: expected KeptTokens"),
        (kept[:-1], ValueError, f"kept: expected {len(kept)} rows"),
        (KeptTokens.from_lists([[61 + 5]] * len(kept), device=DEVICE), ValueError, "kept: expected ids from 0 to 60"),
    ):
        with pytest.raises(error, match=f"^{said}"):
            loss_of(p, hidden, weight, kept=wrong)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_id_that_is_no_column_is_nan_and_nothing_is_written_for_it(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where ids are not read: an index out of range would end the process there, or the optimizer's."""
    monkeypatch.setattr("gspo_kernels.rows.operators.may_read", lambda tensor: False)
    hidden = on_device(torch.randn(3, 8)).requires_grad_()
    weight = on_device(torch.randn(20, 8)).requires_grad_()
    ids = [[1, 500], [2, 3], [4, 2] if sparse else None]
    kept, token_ids = KeptTokens.from_lists(ids, device=DEVICE), on_device(torch.tensor([1, 2, 4]))
    options: dict[str, Any] = {"kept": kept, "full_distribution": False, "sparse_weight_grad": sparse}
    found = linear_token_logprobs(hidden, weight, token_ids, **options).kept
    assert found.logprobs.isnan().tolist() == [True, False, False]
    found.logprobs.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.isnan().any(1).tolist() == [True, False, False]
    gradient = weight.grad
    if sparse:
        gradient = gradient.coalesce()
        assert gradient.indices()[0].tolist() == [1, 2, 3, 4]
        gradient = gradient.to_dense()
    assert gradient.isnan().any(1).nonzero()[:, 0].tolist() == [1]
