"""Rows that keep some columns, on every backend: the numbers of the distribution over these columns alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from batches import Batch, arguments, kept_sets, kept_tokens, ragged_batch, run
from checks import check_close, check_gradient, check_rows
from modes import BACKENDS, DEFAULT_MODE, by_backend, by_combination, on_device, sized
from row_batches import check_batch, peaked, rows
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels import KeptTokens, gspo_loss, linear_token_logprobs, policy_loss_from_logprobs, token_logprobs

IDS, OFFSETS = torch.tensor([3, 7, 1]), torch.tensor([0, 3, 3])  # of two rows: the second keeps all columns
SIZES = sized([1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 127, 129, 300], [1, 2, 17, 65, 129])  # about widths of vectors


def of_sizes(vocab: int, sizes: Sequence[int | None], dtype: torch.dtype = torch.float32) -> Batch:
    """A row for each size: that many columns, in any order, the row's token among them; None: nothing is said."""
    batch = rows((peaked(len(sizes), vocab) * 1.5).to(dtype))
    rng = random.Random(0)
    batch.kept = []
    for t, size in enumerate(sizes):
        token = int(batch.token_ids[t])
        others = [v for v in rng.sample(range(vocab), vocab) if v != token]
        ids = [token, *others][:size]
        rng.shuffle(ids)
        batch.kept.append(None if size is None else ids)
    return batch


@by_combination
@pytest.mark.parametrize("vocab", [300, 1])
def test_values_and_gradients(backend: str, dtype: torch.dtype, vocab: int) -> None:
    """Every size of a set, whole rows among them; statistics, then the gradient for each kind of upstream."""
    check_batch(of_sizes(vocab, [min(size, vocab) for size in SIZES] + [None], dtype), backend)


@by_combination
def test_options(backend: str, dtype: torch.dtype) -> None:
    """A temperature by row, a cap, a mask; a masked row's token may be anything."""
    batch = of_sizes(97, [4, 1, None, 97, 20], dtype)
    batch.temperature = torch.tensor([0.5, 0.7, 1.0, 2.0, 1.3])
    batch.softcap, batch.logit_scale = 7.0, 0.8
    batch.mask[3] = False
    batch.token_ids[3] = -100
    check_batch(batch, backend)


@by_combination
def test_a_set_of_one(backend: str, dtype: torch.dtype) -> None:
    """Its token is certain: log-probability and entropy 0, no gradient but that of lse."""
    batch = of_sizes(40, [1, 1], dtype)
    leaf = on_device(batch.logits.clone()).requires_grad_()
    ids = on_device(batch.token_ids)
    out, _ = token_logprobs(leaf, ids, kept=kept_tokens(batch, "packed"), full_distribution=False, backend=backend)
    assert out.logprobs.tolist() == [0.0, 0.0] and out.entropy.tolist() == [0.0, 0.0]
    gathered = leaf.detach().gather(1, ids[:, None])[:, 0].double()
    check_close("lse", out.lse, gathered, 1e-6 * (1 + gathered.abs()))
    (gradient,) = torch.autograd.grad(out.logprobs.sum() + 3 * out.entropy.sum(), leaf, retain_graph=True)
    assert bool((gradient == 0).all())
    (gradient,) = torch.autograd.grad(out.lse.sum(), leaf)
    assert torch.equal(gradient, torch.zeros_like(leaf).scatter(1, ids[:, None], 1.0))


@by_combination
def test_all_columns_are_the_whole_row(backend: str, dtype: torch.dtype) -> None:
    """In the order of the columns; C++ and the reference compute the very same bits."""
    batch = rows(peaked(4, 150).to(dtype))
    logits, ids = on_device(batch.logits), on_device(batch.token_ids)
    kept = KeptTokens.from_lists([list(range(150))] * 4, device=logits.device)
    both = token_logprobs(logits, ids, kept=kept, full_distribution=False, backend=backend).kept
    whole = token_logprobs(logits, ids, backend=backend)
    for name, x, y in zip(("logprobs", "entropy", "lse"), both, whole, strict=True):
        check_close(name, x, y, 2e-7 * (1 + y.abs()) if backend == "triton" else torch.zeros_like(y))


@by_combination
def test_columns_outside_are_not_read(backend: str, dtype: torch.dtype) -> None:
    """NaN and infinities there change nothing; a NaN inside is not hidden."""
    batch = of_sizes(97, [4, 1, 30], dtype)
    results = []
    for outside in (0.0, math.nan, math.inf):
        inside = torch.zeros(batch.logits.shape, dtype=torch.bool)
        for t, ids in enumerate(batch.kept or []):
            inside[t, ids] = True
        leaf = on_device(torch.where(inside, batch.logits, outside)).requires_grad_()
        kept = kept_tokens(batch, "packed")
        out = token_logprobs(leaf, on_device(batch.token_ids), kept=kept, full_distribution=False, backend=backend).kept
        (out.logprobs.sum() + out.entropy.sum() + out.lse.sum()).backward()
        assert leaf.grad is not None
        results.append([*out, leaf.grad])
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))
    logits = on_device(batch.logits.clone())
    logits[2, (batch.kept or [])[2][7]] = math.nan  # type: ignore[index]
    out = token_logprobs(logits, on_device(batch.token_ids), kept=kept, full_distribution=False, backend=backend).kept
    assert out.logprobs.isnan().tolist() == [False, False, True]


@by_combination
def test_forbidden_columns_inside(backend: str, dtype: torch.dtype) -> None:
    """Logits of -inf in the set count as outside."""
    batch = of_sizes(97, [30, 30, 97, 2], dtype)
    for t, ids in enumerate(batch.kept or []):
        others = [v for v in ids or [] if v != int(batch.token_ids[t])]
        batch.logits[t, others[: len(others) // 2 + 1]] = -math.inf
    check_batch(batch, backend)


@by_combination
def test_both_distributions(backend: str, dtype: torch.dtype) -> None:
    """From one call, each against its own truth, and one gradient through both."""
    tol = TOLERANCES[dtype]
    batch = of_sizes(120, [5, 1, None, 120, 40], dtype)
    batch.mask[1] = False
    whole = Batch(batch.logits, batch.token_ids, batch.mask, batch.lengths, batch.advantages)
    leaf = on_device(batch.logits.clone()).requires_grad_()
    out = token_logprobs(
        leaf, on_device(batch.token_ids), mask=on_device(batch.mask), kept=kept_tokens(batch, "packed"), backend=backend
    )
    assert out.full is not None
    check_rows(*out.kept, batch.rows, tol)
    check_rows(*out.full, whole.rows, tol)
    g_kept, g_full = [[0.7, 1.0, -1.0, 0.3, 2.0], [0.0] * 5], [[-0.2, 0.5, 0.4, 1.0, -1.5], [0.1, 0.2, -0.3, 0.2, 0.1]]
    parts = []
    for part, given in ((out.kept, g_kept), (out.full, g_full)):
        g = [torch.tensor(x, dtype=torch.float64).to(part.logprobs) for x in given]
        parts.append((part.logprobs * g[0]).sum() + (part.entropy * g[1]).sum())
    gradients = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (*parts, parts[0] + parts[1])]
    check_gradient(gradients[0], batch, *g_kept)
    check_gradient(gradients[1], whole, *g_full)
    exact = [x.double() for x in gradients]
    bound = (2 * tol.store + 1e-6) * (exact[0].abs() + exact[1].abs()) + 2 * tol.tiny
    check_close("gradient of both", gradients[2], exact[0] + exact[1], bound)


@by_backend
def test_a_ratio_over_kept_columns_and_a_kl_over_all(backend: str) -> None:
    """One forward, where a loss from logits would need two."""
    batch = ragged_batch("grpo", seed=3, kept=True, ref=True)
    whole = Batch(batch.logits, batch.token_ids, batch.mask, batch.lengths, batch.advantages)
    args = arguments(batch, "packed")
    mask = args.keywords["mask"]
    out = token_logprobs(args.logits, args.rest[0], mask=mask, kept=args.keywords["kept"], backend=backend)
    assert out.full is not None
    of_tokens = {"mask": mask, "cu_seqlens": args.keywords["cu_seqlens"]}
    policy = policy_loss_from_logprobs(out.kept.logprobs, *args.rest[1:], **of_tokens).loss
    (gradient,) = torch.autograd.grad(policy + 0.1 * out.full.entropy.sum(), args.logits)
    alone = args.logits.detach().clone().requires_grad_()
    gspo_loss(alone, *args.rest, **of_tokens, kept=args.keywords["kept"], backend=backend).loss.backward()
    entropy = token_logprobs(alone, args.rest[0], mask=mask, backend=backend).entropy
    (0.1 * entropy.sum()).backward()
    assert alone.grad is not None
    check_close("gradient", gradient, alone.grad, 2e-6 * alone.grad.abs() + 1e-8)
    assert whole.kept is None


@by_backend
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
def test_over_the_logits(backend: str, on_policy: bool) -> None:
    """The entries of a row are read before it is zeroed; padded columns, and rows of a view."""
    batch = ragged_batch("gspo", seed=5, kept=True, on_policy=on_policy)
    args = arguments(batch, "padded")
    gradients = []
    for overwrite in (False, True):
        leaf = torch.nn.functional.pad(args.logits.detach(), (0, 3), value=math.nan).requires_grad_()
        given = leaf * 1
        options: dict[str, Any] = {**args.keywords, "overwrite_logits": overwrite, "vocab_size": args.logits.shape[-1]}
        loss, _ = gspo_loss(given[:, :], *args.rest, **options, backend=backend)
        loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert bool((gradients[0][..., -3:] == 0).all())


@DEFAULT_MODE
def test_a_claim_about_rows_is_not_believed_where_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """That every row has entries, where one has none: on the CPU it keeps all columns, elsewhere it is NaN."""
    batch, head = of_sizes(30, [4, None]), torch.eye(30)
    batch.token_ids[:] = 3
    kept, claimed = (KeptTokens(*given) for given in ((IDS, OFFSETS), (IDS, OFFSETS, True)))

    def found(kept: KeptTokens) -> list[Tensor]:
        ids, alone = batch.token_ids, {"kept": kept, "full_distribution": False}
        from_hidden = linear_token_logprobs(batch.logits, head, ids, **alone)  # type: ignore[call-overload]
        from_logits = token_logprobs(batch.logits, ids, **alone)  # type: ignore[call-overload]
        return [*from_hidden.kept, *from_logits.kept]

    for x, y in zip(found(kept), found(claimed), strict=True):
        assert torch.equal(x, y) and bool(x.isfinite().all())
    monkeypatch.setattr("gspo_kernels.base.checks.may_read", lambda tensor: False)
    for x in found(claimed):
        assert x.isnan().tolist() == [False, True]


@DEFAULT_MODE
def test_gradcheck() -> None:
    batch = of_sizes(11, [4, 1, None, 11, 2], torch.float64)
    kept, ids = kept_tokens(batch, "packed"), batch.token_ids

    def function(logits: Tensor) -> tuple[Tensor, ...]:
        out = token_logprobs(logits, ids, kept=kept, temperature=0.7, softcap=9.0, backend="reference")
        assert out.full is not None
        return (*out.kept, *out.full)

    assert torch.autograd.gradcheck(function, (batch.logits.clone().requires_grad_(),))


@by_backend
def test_rows_do_not_depend_on_each_other(backend: str) -> None:
    """One row alone has the bits that it has in a batch."""
    batch = of_sizes(97, [4, 1, 30, None, 97, 2])
    kept, logits, ids = kept_tokens(batch, "packed"), on_device(batch.logits), on_device(batch.token_ids)
    together = token_logprobs(logits, ids, kept=kept, full_distribution=False, backend=backend).kept
    for t in range(len(ids)):
        alone = token_logprobs(
            logits[t : t + 1], ids[t : t + 1], kept=kept[t : t + 1], full_distribution=False, backend=backend
        )
        assert all(torch.equal(x[t : t + 1], y) for x, y in zip(together, alone.kept, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(match: str, kept: Any, **options: Any) -> None:
    ids = on_device(torch.tensor([1, 2, 3]))
    with pytest.raises((ValueError, TypeError), match=match):
        token_logprobs(on_device(torch.randn(3, 7)), ids, kept=kept, **options)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")
    device = on_device(torch.empty(0)).device

    def of(*lists: Any) -> KeptTokens:
        return KeptTokens.from_lists(lists, device=device)

    refused("^kept: expected 3 rows, one for each row of .*; got 2", of([1], [2]))
    missing = "^kept: expected the sampled token among the ids .* got token 3 in row 2, which keeps 2"
    refused(missing, of([1], None, [2, 5]))
    refused("^kept: expected ids from 0 to 6 .*; got 7 in row 1", of(None, [2, 7], None))
    refused(r"^kept: expected KeptTokens, .*\. KeptTokens.from_lists", [[1], [2], [3]])
    refused("^full_distribution: expected True without kept=", None, full_distribution=False)
    masked = on_device(torch.tensor([True, True, False]))
    ids = on_device(torch.tensor([1, 2, 3]))
    token_logprobs(
        on_device(torch.randn(3, 7)), ids, kept=of([1], None, [2]), mask=masked
    )  # the last is not looked for


@pytest.mark.skipif("triton" in BACKENDS, reason="the Triton kernels' own tests have it")
def test_the_cuda_kernels_refuse_kept_rows() -> None:
    batch = of_sizes(9, [2, 3])
    with pytest.raises(ValueError, match=r"backend: .*'cuda'.* does not support kept; .*'reference'"):
        token_logprobs(batch.logits, batch.token_ids, kept=kept_tokens(batch, "packed"), backend="cuda")


def test_the_batches_have_what_is_tried() -> None:
    """Sets of one, of all columns, and rows of which nothing is said."""
    batch = ragged_batch("gspo", kept=True)
    sizes = [0 if ids is None else len(ids) for ids in batch.kept or []]
    assert {0, 1, batch.logits.shape[1]} < set(sizes) and any(1 < size < 13 for size in sizes)
    assert kept_sets(batch, random.Random(0)) != kept_sets(batch, random.Random(1))
    outcome = run(batch, "packed", "gspo", backend=BACKENDS[-1])
    assert bool(outcome.loss.isfinite())
