"""Kept rows in the C++ kernels: the bits of whole rows that have these columns alone, in every form."""

from __future__ import annotations

import math

import pytest
import torch
from modes import DTYPES, needs
from row_batches import peaked
from torch import Tensor

from gspo_kernels.rows import cpu_rows, torch_rows
from gspo_kernels.rows.types import ABSENT, Rows, RowStats, Upstream

pytestmark = needs("native")

VOCAB = 1100
SIZES = [1, 2, 15, 16, 17, 33, 1000, VOCAB]  # about widths of vectors of every instruction set; more than a block
ONE = torch.tensor(1.0, dtype=torch.float64)


def sets(sizes: list[int], vocab: int = VOCAB) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(vocab, generator=generator)[:size] for size in sizes]


def rows_of(logits: Tensor, kept: list[Tensor], token_ids: Tensor, form: str, cap: float | None = None) -> Rows:
    """[N, V] logits; "gathered": those of the entries alone."""
    ids = torch.cat([x.new_empty(0) for x in kept[:1]] + kept)
    offsets = torch.tensor([0, *(len(x) for x in kept)]).cumsum(0)
    if form == "gathered":
        logits = torch.cat([row[x.clamp(min=0)] for row, x in zip(logits, kept, strict=True)])[None]
    scale = None if cap is None else torch.tensor(1.0 / cap, dtype=torch.float64)
    temperature = torch.tensor(0.7 / (cap or 1.0), dtype=torch.float64)
    return Rows(
        logits[None], token_ids[None], None, temperature, logits.shape[-1], tanh_scale=scale,
        kept_ids=ids.int(), kept_offsets=offsets, kept_form=form,
    )  # fmt: skip


def upstream_of(n: int) -> Upstream:
    g = torch.linspace(0.5, -1.5, n)[None]
    return Upstream(g, 0.3 - g, (2 * g).double())


def gradient_of(
    rows: Rows, stats: RowStats, upstream: Upstream, dtype: torch.dtype | None = None, over: bool = False
) -> Tensor:
    logits = rows.logits.clone()
    gradient = logits if over else torch.full(logits.shape, math.nan, dtype=dtype or logits.dtype)
    cpu_rows.backward(rows._replace(logits=logits), stats, upstream, gradient)
    return gradient[0]


@pytest.mark.parametrize("cap", [None, 9.0], ids=["", "capped"])
@pytest.mark.parametrize("form", ["every", "some", "gathered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_whole_rows(dtype: torch.dtype, form: str, cap: float | None) -> None:
    """Of rows that have the kept columns alone, in their order; zeros elsewhere."""
    kept = sets(SIZES)
    logits = peaked(len(kept), VOCAB).to(dtype)
    positions = [len(x) // 2 for x in kept]
    token_ids = torch.stack([x[i] for x, i in zip(kept, positions, strict=True)])
    if form == "some":  # a row in the middle keeps all columns
        kept[3], positions[3] = kept[3][:0], int(token_ids[3])
    rows, upstream = rows_of(logits, kept, token_ids, form, cap), upstream_of(len(kept))
    stats = cpu_rows.forward(rows)
    assert stats.logprobs.shape == token_ids[None].shape
    gradients = {
        "fresh": gradient_of(rows, stats, upstream),
        "over the logits": gradient_of(rows, stats, upstream, over=True),
        "bf16": gradient_of(rows, stats, upstream, torch.bfloat16),
    }
    for t, (ids, position) in enumerate(zip(kept, positions, strict=True)):
        columns = ids if len(ids) else torch.arange(VOCAB)
        of_row = rows._replace(
            logits=logits[t, columns][None, None], token_ids=torch.tensor([[position]]), vocab_size=len(columns),
        ).whole()  # fmt: skip
        expected = cpu_rows.forward(of_row)
        assert [float(x[0, t]) for x in stats] == [float(x) for x in expected]
        g = Upstream(*(x[:, t : t + 1].contiguous() for x in upstream[:3] if x is not None))
        for name, gradient in gradients.items():
            numbers = gradient_of(of_row, expected, g, gradient.dtype)[0]
            assert rows.kept_offsets is not None
            if form == "gathered":
                found = gradient[0, int(rows.kept_offsets[t]) : int(rows.kept_offsets[t + 1])]
            else:
                found, numbers = gradient[t], torch.zeros(VOCAB, dtype=gradient.dtype).index_copy(0, columns, numbers)
            assert torch.equal(found, numbers), (name, t)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_strides_masks_and_rows_without_upstream(dtype: torch.dtype) -> None:
    """The logits and the gradient are parts of larger memory, whose other numbers stay."""
    kept = sets([3, 1, 40, 7, 0, 5], 97)
    token_ids = torch.stack([x[0] if len(x) else torch.tensor(5) for x in kept])
    memory = torch.full((6, 100), math.nan, dtype=dtype)
    memory[:, 1:98] = peaked(6, 97).to(dtype)
    rows = rows_of(memory[:, 1:98], kept, token_ids, "some")._replace(vocab_size=97)
    rows = rows._replace(mask=torch.tensor([[True, True, True, False, True, True]]))
    upstream = Upstream(torch.tensor([[0.5, 1.0, -1.0, 2.0, 0.1, 0.0]]))
    stats = cpu_rows.forward(rows)
    expected = gradient_of(rows, stats, upstream)
    out = torch.full((6, 100), 7.0, dtype=dtype)
    found = cpu_rows.forward_backward(rows, upstream, out[None, :, 2:99])
    assert all(torch.equal(x, y) for x, y in zip(stats, found, strict=True))
    assert torch.equal(out[:, 2:99], expected)
    assert bool((out[:, [0, 1, 99]] == 7.0).all())
    assert bool((expected[[1, 3, 5]] == 0).all()) and bool((expected[[0, 2, 4]] != 0).any(1).all())


@pytest.mark.parametrize("form", ["every", "gathered"])
@pytest.mark.parametrize("cap", [None, 9.0], ids=["", "capped"])
def test_columns_and_tokens_of_other_ranks(form: str, cap: float | None) -> None:
    """Absent columns count as -inf, also under a cap, whatever their numbers are; an absent token has no column."""
    kept = sets([9, 9, 4, 3], 50)
    token_ids = torch.stack([kept[0][2], torch.tensor(ABSENT), torch.tensor(ABSENT), kept[3][1]])
    here = [torch.ones(len(x), dtype=torch.bool) for x in kept]
    here[0][[0, 5]], here[1][[3, 8]], here[2][:], here[3][[0, 2]] = False, False, False, False
    marked = [torch.where(present, x, ABSENT) for x, present in zip(kept, here, strict=True)]
    logits = peaked(4, 50)
    rows, upstream = rows_of(logits, marked, token_ids, form, cap), upstream_of(4)
    assert upstream.logprobs is not None
    upstream.logprobs[0, 1:3] = 0.0  # of tokens on other ranks
    if form == "gathered":
        rows.logits[0, 0, rows.kept_ids == ABSENT] = math.nan
    stats = cpu_rows.forward(rows)
    saved = stats._replace(logprobs=torch.where(rows.token_ids == ABSENT, math.nan, stats.logprobs))
    found = gradient_of(rows, saved, upstream)
    assert stats.entropy[0, 2:].tolist() == [0.0, 0.0] and float(stats.lse[0, 2]) == -math.inf
    for t, present in enumerate(here):
        columns = kept[t][present]
        if form == "gathered":
            assert rows.kept_offsets is not None
            numbers = found[0, int(rows.kept_offsets[t]) : int(rows.kept_offsets[t + 1])]
            assert bool((numbers[~present] == 0).all())
            numbers = numbers[present]
        else:
            numbers = found[t]
            assert bool((numbers[~torch.isin(torch.arange(50), columns)] == 0).all())
            numbers = numbers[columns]
        if not len(columns):
            continue
        x = logits[t, columns].double()
        z = (cap * torch.tanh(x / cap) if cap else x) / 0.7
        slope = (1 - torch.tanh(x / cap) ** 2 if cap else torch.ones_like(x)) / 0.7
        p, logp = z.softmax(0), z.log_softmax(0)
        entropy = -(p * logp).sum()
        torch.testing.assert_close(stats.lse[0, t], z.logsumexp(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.entropy[0, t].double(), entropy, rtol=1e-5, atol=1e-5)
        g_l, g_h, g_lse = (float(g[0, t]) for g in upstream[:3] if g is not None)
        target = (columns == token_ids[t]).double()
        by_z = g_l * target + p * (g_lse - g_l - g_h * (logp + entropy))
        torch.testing.assert_close(numbers.double(), by_z * slope, rtol=1e-5, atol=2e-6)


def test_what_is_wrong_is_nan_and_touches_nothing_else() -> None:
    """A CPU refuses such rows before; the kernel does not trust that."""
    kept = sets([5, 5, 5, 5, 5], 50)
    token_ids = torch.stack([x[0] for x in kept])
    token_ids[0] = next(v for v in range(50) if v not in kept[0])  # is not kept
    kept[1][3], kept[2][4], kept[3][1] = 50, -7, 2**31 - 1  # do not exist
    logits = peaked(5, 50)
    rows, upstream = rows_of(logits, kept, token_ids, "every"), upstream_of(5)
    stats = cpu_rows.forward(rows)
    assert all(x.isnan().tolist() == [[True] * 4 + [False]] for x in stats)
    found = gradient_of(rows, stats, upstream)
    for t in range(4):
        inside = torch.isin(torch.arange(50), kept[t])
        assert bool(found[t, inside].isnan().all()) and bool((found[t, ~inside] == 0).all())
    assert rows.kept_offsets is not None
    broken = rows._replace(kept_offsets=torch.tensor([-(2**40), 3, 1, 10, 2**40, 7]))
    found = gradient_of(broken, cpu_rows.forward(broken), upstream)
    assert found.shape == (5, 50)
    empty = rows._replace(kept_ids=rows.kept_ids[:0], kept_offsets=torch.zeros(6, dtype=torch.int64))  # type: ignore[index]
    assert all(bool(x.isnan().all()) for x in cpu_rows.forward(empty))
    whole = [cpu_rows.forward(x) for x in (empty._replace(kept_form="some"), rows.whole())]
    assert all(torch.equal(x, y) for x, y in zip(*whole, strict=True))


def test_gathered_rows_without_entries() -> None:
    """NaN where the mask is set, and no gradient, for there is nothing to write it to."""
    kept = [torch.tensor([4, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    rows = rows_of(peaked(3, 9), kept, torch.tensor([7, 0, 3]), "gathered")
    stats, expected = cpu_rows.forward(rows), torch_rows.forward(rows)
    assert all(math.isnan(float(x[0, 1])) for x in stats)
    for x, y in zip(stats, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    masked = cpu_rows.forward(rows._replace(mask=torch.tensor([[True, False, True]])))
    assert [float(x[0, 1]) for x in masked] == [0.0] * 3
    assert bool(gradient_of(rows, stats, upstream_of(3)).isfinite().all())
    none = rows_of(peaked(2, 9), [kept[1]] * 2, torch.tensor([0, 0]), "gathered")
    assert none.vocab_size == 0
    assert bool(cpu_rows.forward(none).lse.isnan().all())


def test_a_row_of_a_whole_vocabulary_among_short_ones() -> None:
    """Threads keep their memory, which grows for it; bits do not depend on the threads."""
    vocab, n = 151_936, 10
    kept = [*(torch.tensor([t, 7 * t + 1]) for t in range(n - 1)), *sets([vocab], vocab)]
    token_ids = torch.stack([x[1] for x in kept])
    logits = torch.zeros(n, vocab)
    logits[-1] = peaked(1, vocab)[0]
    rows, upstream, threads = rows_of(logits, kept, token_ids, "every"), upstream_of(n), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            stats = cpu_rows.forward(rows)
            results.append([*stats, gradient_of(rows, stats, upstream)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    permuted = rows._replace(logits=logits[-1:, kept[-1]][None], token_ids=torch.tensor([[1]])).whole()
    assert float(results[0][0][0, -1]) == float(cpu_rows.forward(permuted).logprobs)
