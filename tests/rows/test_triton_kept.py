"""What the Triton kernels of kept rows alone can get wrong: gathered logits, other ranks' columns, and bad numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checks import check_close
from modes import DEVICE, INTERPRETED, TRITON_MODES, on_device
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels.rows import torch_rows, triton_rows
from gspo_kernels.rows.types import ABSENT, Rows, RowStats, Upstream

pytestmark = TRITON_MODES

LANES = 32 if INTERPRETED else 128
COUNTS = [1, 2, LANES, 3, LANES + 1, 0, LANES - 1, 10 * LANES + 3, 5]
VOCAB = 12 * LANES + 7
MASKED = 8

by_form = pytest.mark.parametrize("form", ["some", "every", "gathered"])


def kept_rows(form: str, dtype: torch.dtype, cap: float | None = None, seed: int = 0) -> Rows:
    """Rows of 0 entries to several blocks of them; temperatures, a masked row, some logits of -inf."""
    generator = torch.Generator().manual_seed(seed)
    counts = [count or form == "every" for count in COUNTS]
    ids = [torch.randperm(VOCAB, generator=generator)[:count] for count in counts]
    tokens = torch.stack([of[len(of) // 2] if len(of) else torch.tensor(5) for of in ids])[None]
    entries, offsets = torch.cat(ids).to(torch.int32), torch.tensor([0, *itertools.accumulate(counts)])
    logits = torch.randn(1, len(counts), VOCAB, generator=generator) * 3
    logits[0, :, 1::9] = -math.inf
    logits.scatter_(2, tokens[..., None], torch.linspace(-2, 9, len(counts))[None, :, None])
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if form == "gathered":
        logits = logits[0, rows, entries.long()][None, None]
    mask = (torch.arange(len(counts)) != MASKED)[None]
    temperature = torch.linspace(0.5, 2, len(counts))[None] * (cap or 1.0)
    arrays = map(on_device, (logits.to(dtype), tokens, mask, temperature))
    tanh_scale = None if cap is None else torch.tensor(1 / cap, dtype=torch.float64)
    batch = Rows(*arrays, logits.shape[-1], None, tanh_scale)  # type: ignore[arg-type]
    return batch._replace(kept_ids=on_device(entries), kept_offsets=on_device(offsets), kept_form=form)


def upstream(alone: bool = False) -> Upstream:
    def varied(low: float, high: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return on_device(torch.linspace(low, high, len(COUNTS), dtype=dtype)[None])

    return Upstream(varied(-1, 1.5), *(() if alone else (varied(0.3, -0.2), varied(0.1, 0.2, torch.float64))))


def gradient_of(rows: Rows, stats: RowStats, given: Upstream, backend: Any = triton_rows) -> Tensor:
    gradient = torch.full_like(rows.logits, math.nan)
    backend.backward(rows, stats, given, gradient)
    return gradient


def check_stats(found: RowStats, expected: RowStats) -> None:
    for name, x, y in zip(found._fields, found, expected, strict=True):
        check_close(name, x, y, 2e-6 * (1 + y.abs()))


def check_gradient(found: Tensor, expected: Tensor) -> None:
    tol = TOLERANCES[found.dtype]
    check_close("gradient", found, expected, 4e-6 + tol.store * expected.double().abs())
    assert torch.equal(found == 0, expected == 0)


@by_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cap", [None, 20.0], ids=["plain", "capped"])
def test_every_form_like_the_reference(form: str, dtype: torch.dtype, cap: float | None) -> None:
    """Then over the logits, and in one launch: the gradient of a log-probability alone."""
    rows = kept_rows(form, dtype, cap)
    stats, truth = triton_rows.forward(rows), torch_rows.forward(rows)
    check_stats(stats, truth)
    for given in (upstream(), upstream(alone=True)):
        gradient, expected = gradient_of(rows, stats, given), gradient_of(rows, truth, given, torch_rows)
        check_gradient(gradient, expected)
    over = rows._replace(logits=rows.logits.clone())
    triton_rows.backward(over, stats, given, over.logits)
    assert torch.equal(over.logits, gradient)
    over = rows._replace(logits=rows.logits.clone())
    check_stats(triton_rows.forward_backward(over, given, over.logits), truth)
    check_gradient(over.logits, expected)


@by_form
def test_far_logits(form: str) -> None:
    """So large that only the largest entries have a probability; ties among them."""
    rows = kept_rows(form, torch.float32)
    rows = rows._replace(
        logits=torch.where(rows.logits > 3, 3e9, rows.logits * 1e8), temperature=torch.ones(()).double()
    )
    stats, truth = triton_rows.forward(rows), torch_rows.forward(rows)
    for name, x, y in zip(stats._fields, stats, truth, strict=True):
        check_close(name, x, y, 2e-6 * (1 + y.abs()))
    given = upstream()
    check_gradient(gradient_of(rows, stats, given), gradient_of(rows, truth, given, torch_rows))


@by_form
def test_columns_of_other_ranks(form: str) -> None:
    """Three shards, the last without columns: the entries of each alone, all others ABSENT, like the reference.

    The gradient is that of the whole row's statistics; a rank without the token has no g_logprobs.
    """
    rows = kept_rows(form, torch.float32)
    assert rows.kept_ids is not None
    stats, given = triton_rows.forward(rows), upstream()
    for first, end in ((0, VOCAB // 2), (VOCAB // 2, VOCAB), (VOCAB, VOCAB)):
        ids = torch.where((rows.kept_ids >= first) & (rows.kept_ids < end), rows.kept_ids, ABSENT)
        owns = (rows.token_ids >= first) & (rows.token_ids < end)
        tokens = torch.where(owns | ~rows.has_entries(), rows.token_ids, ABSENT)
        shard = rows._replace(kept_ids=ids, token_ids=tokens)
        found, truth = triton_rows.forward(shard), torch_rows.forward(shard)
        check_close("lse", found.lse, truth.lse, 2e-6 * (1 + truth.lse.abs().nan_to_num(posinf=0.0)))
        entropy = torch.where(truth.lse == -math.inf, 0.0, truth.entropy)
        check_close("entropy", found.entropy, entropy, 2e-6 * (1 + entropy))
        assert torch.equal(found.logprobs.isnan(), truth.lse.isnan()), "NaN of rows without entries, gathered, alone"
        garbage = stats._replace(logprobs=torch.where(tokens == ABSENT, math.nan, stats.logprobs))
        g = given._replace(logprobs=torch.where(tokens == ABSENT, 0.0, given.logprobs))  # type: ignore[arg-type]
        gradient = gradient_of(shard, garbage, g)
        check_gradient(gradient, gradient_of(shard, stats, g, torch_rows))


def bad(rows: Rows, places: Sequence[int], value: int) -> Rows:
    assert rows.kept_ids is not None
    ids = rows.kept_ids.clone()
    ids[list(places)] = value
    return rows._replace(kept_ids=ids)


@pytest.mark.parametrize("value", [VOCAB, -1, 2**31 - 1])
def test_an_id_that_is_no_column_is_nan_in_its_row_alone(value: int) -> None:
    """Nothing beside the entries is written; the logits lie between guards."""
    rows = kept_rows("every", torch.bfloat16)
    memory = torch.full((len(COUNTS) * VOCAB + 64,), 7.0, dtype=torch.bfloat16, device=DEVICE)
    inside = memory[32:-32].view(rows.logits.shape)
    inside.copy_(rows.logits)
    assert rows.kept_offsets is not None
    begin = int(rows.kept_offsets[4])
    wrong = bad(rows._replace(logits=inside), [begin + 2, begin + LANES], value)
    stats, good = triton_rows.forward(wrong), triton_rows.forward(rows)
    for x, y in zip(stats, good, strict=True):
        assert x.isnan()[0].tolist() == [row == 4 for row in range(len(COUNTS))]
        assert torch.equal(x[0, :4], y[0, :4])
    expected = gradient_of(rows, good, upstream())
    triton_rows.backward(wrong, stats, upstream(), inside)
    ids = wrong.kept_ids[begin : begin + LANES + 1].long()  # type: ignore[index]
    expected[0, 4] = 0
    expected[0, 4, ids[(ids >= 0) & (ids < VOCAB)]] = math.nan
    assert torch.equal(inside.nan_to_num(99.0), expected.nan_to_num(99.0))
    assert bool((memory[:32] == 7).all()) and bool((memory[-32:] == 7).all())


def test_a_token_that_is_not_kept_is_nan_in_its_row_alone() -> None:
    rows = kept_rows("every", torch.float32)
    token_ids = rows.token_ids.clone()
    kept = set(rows.kept_ids[:3].tolist())  # type: ignore[index]
    token_ids[0, 1] = next(v for v in range(VOCAB) if v not in kept)
    token_ids[0, 2] = -100
    for found in triton_rows.forward(rows._replace(token_ids=token_ids)):
        assert found.isnan()[0].tolist() == [row in (1, 2) for row in range(len(COUNTS))]


@by_form
def test_bad_offsets_stay_inside(form: str) -> None:
    """They decrease, or leave the entries: numbers are undefined, and nothing else is touched."""
    rows = kept_rows(form, torch.float32)
    entries = rows.kept_ids.shape[0]  # type: ignore[union-attr]
    offsets = torch.tensor([-5, 3, 1, -(2**40), 2**40, entries, entries + 9, 2, entries, 2**62])
    rows = rows._replace(kept_offsets=on_device(offsets))
    stats = triton_rows.forward(rows)
    memory = torch.zeros(rows.logits.numel() + 64, device=DEVICE)
    gradient = memory[32:-32].view(rows.logits.shape)
    triton_rows.backward(rows, stats, upstream(), gradient)
    triton_rows.forward_backward(rows, upstream(alone=True), gradient)
    assert not bool(memory[:32].any()) and not bool(memory[-32:].any())


def test_a_row_has_the_same_bits_in_every_form() -> None:
    """Whether or not other rows keep all columns."""
    rows = kept_rows("some", torch.float32)
    some = triton_rows.forward(rows)
    mask = rows.mask & rows.has_entries()  # type: ignore[operator]
    every = triton_rows.forward(rows._replace(kept_form="every", mask=mask))
    for x, y in zip(some, every, strict=True):
        assert torch.equal(x[mask], y[mask])
