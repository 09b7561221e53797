"""Kept sets from logits, against the rules of vLLM's filters in plain Python, on the cases that vLLM tests its own on.

The cases are those of vLLM 0.32, `tests/v1/sample/test_topk_topp_sampler.py` and `test_min_p_kernel.py`: random rows
with filters on and off, extreme values, rows that are mostly -inf, ties, views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modes import NOT_INTERPRETED, on_device
from test_errors import check_message
from torch import Tensor

from gspo_kernels import KeptTokens
from gspo_kernels.rows import kept_filter

pytestmark = NOT_INTERPRETED

INF = math.inf
Sets = list[list[int] | None]


def plain(row: Tensor, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, temperature: float = 1.0) -> list[int]:
    """The columns that remain of one row, by the rules, in float64 but for the roundings that decide ties."""
    z = (row.float().cpu().numpy() / np.float32(temperature)).astype(np.float32).tolist()
    there = [v for v in range(len(z)) if z[v] > -INF]
    if not there:
        return []
    largest = max(z)
    if min_p > 0:
        edge = np.float32(largest) + np.log(np.float32(min_p))
        there = [v for v in there if z[v] >= edge]
    if 0 < top_k < len(there):
        edge = sorted((z[v] for v in there), reverse=True)[top_k - 1]
        there = [v for v in there if z[v] >= edge]
    if top_p < 1:
        ascending = sorted(there, key=lambda v: (z[v], -v))
        weights = [math.exp(z[v] - largest) for v in ascending]
        whole, so_far = math.fsum(weights), 0.0
        there = ascending[-1:]
        for v, weight in zip(ascending[:-1], weights, strict=False):
            so_far += weight
            if np.float32(so_far / whole) > np.float32(1) - np.float32(top_p):
                there.append(v)
    return sorted(there)


def check(logits: Tensor, **filters: Any) -> Sets:
    """What is kept of each row is what the rules say; returned as lists."""
    given = {name: on_device(x) if isinstance(x, Tensor) else x for name, x in filters.items()}
    found = KeptTokens.from_logits(on_device(logits), **given)
    assert found.token_ids.dtype == torch.int32 and found.offsets.dtype == torch.int64
    sets = found.to_lists()
    rows = logits.reshape(-1, logits.shape[-1])
    for i, row in enumerate(rows):
        mine = {k: x.reshape(-1)[i].item() if isinstance(x, Tensor) else x for k, x in filters.items()}
        expected = plain(row, **mine)
        whole = len(expected) == int((row > -INF).sum())
        assert sets[i] == (None if whole else expected), f"row {i}"
    return sets


def some_off(values: Tensor, off: float, generator: torch.Generator) -> Tensor:
    """A quarter of the rows without the filter, as vLLM's tests have them."""
    return values.masked_fill(torch.rand(values.shape, generator=generator) < 0.25, off)


@pytest.mark.parametrize("which", ["top_k", "top_p", "top_k top_p", "min_p", "min_p top_k top_p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_rows(which: str, dtype: torch.dtype) -> None:
    """bfloat16 has many ties: at the k-th largest all are kept, and at the edge of top-p those of lower id."""
    g = torch.Generator().manual_seed(42)
    rows, columns = 24, 1024
    logits = (torch.randn(rows, columns, generator=g) * torch.linspace(0.2, 4, rows)[:, None]).to(dtype)
    filters: dict[str, Any] = {
        "top_k": some_off(torch.randint(1, 100, (rows,), generator=g), columns, g),
        "top_p": some_off(torch.rand(rows, generator=g) * 0.9 + 0.1, 1.0, g),
        "min_p": some_off(torch.rand(rows, generator=g) ** 4, 0.0, g),
        "temperature": torch.rand(rows, generator=g) + 0.5,
    }
    check(logits, **{name: x for name, x in filters.items() if name in (*which.split(), "temperature")})


def test_a_large_nucleus(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns than are sorted at first, and rows in several blocks: the same sets."""
    logits = torch.randn(6, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = torch.tensor([0.01, 0.3, 0.9, 0.97, 0.999, 1.0])
    expected = check(logits, top_p=p)
    monkeypatch.setattr(kept_filter, "LARGEST", 8)
    monkeypatch.setattr(kept_filter, "BLOCK", 2048)
    assert check(logits, top_p=p) == expected == check(logits.view(2, 3, -1), top_p=p.view(2, 3))


def test_extreme_values() -> None:
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    assert [len(kept or []) for kept in check(logits, top_k=1)] == [1] * 4
    assert [len(kept or []) for kept in check(logits, top_k=torch.tensor([1, 256, 2, 255]))] == [1, 0, 2, 255]
    assert [len(kept or []) for kept in check(logits, top_p=1e-30)] == [1] * 4
    check(logits, top_p=torch.tensor([0.1, 0.5, 0.9, 1.0]))
    assert [len(kept or []) for kept in check(logits, min_p=1.0)] == [1] * 4
    assert check(logits, top_p=0.5, temperature=1e-6) == check(logits, top_k=1)
    for off in ({}, {"top_p": 1.0}, {"top_k": 0}, {"top_k": -1}, {"min_p": 0.0}, {"top_k": 256, "min_p": 0}):
        assert check(logits, **off) == [None] * 4  # type: ignore[arg-type]


def test_rows_that_are_mostly_minus_infinity() -> None:
    """As a grammar leaves them; a column that was forbidden before is not lost to a filter."""
    g = torch.Generator().manual_seed(2)
    logits = torch.full((6, 4096), -INF)
    for i in range(5):
        logits[i, torch.randperm(4096, generator=g)[:5]] = torch.randn(5, generator=g)
    logits[4] = torch.randn(4096, generator=g)
    assert check(logits, top_k=50)[:4] == [None] * 4, "five are there, fifty may stay"
    assert [len(kept or []) for kept in check(logits, top_k=3)] == [3] * 5 + [0]
    check(logits, top_p=0.9)
    kept = check(logits, top_k=50, top_p=0.5, min_p=0.01)
    assert all(0 < len(x or []) < 5 for x in kept[:4]) and kept[5] is None, "a row without a finite logit"


def test_ties() -> None:
    """All that equal the k-th largest stay; of those at the edge of top-p, as many as p needs, of lower id."""
    tied = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0, -1.0]])
    assert check(tied, top_k=2) == [[0, 1, 2, 4]]
    equal = torch.zeros(1, 10)
    assert check(equal, top_p=0.5) == [[0, 1, 2, 3, 4]]
    assert check(equal, top_p=0.3) == [[0, 1, 2]] and check(equal, top_p=0.31) == [[0, 1, 2, 3]]
    assert check(equal, min_p=0.5) == check(equal, top_k=3) == [None]
    rows = torch.full((2, 5000), -INF)
    rows[:, :1000], rows[:, 1000:2000] = 1.0, 0.0
    kept = check(rows, top_p=0.5)
    assert kept[0] == kept[1] == list(range(len(kept[0] or [])))


def test_the_order_of_filters() -> None:
    """min-p before top-k before top-p, each of what the one before it left."""
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log()
    assert check(probabilities, top_p=0.75) == [[0, 1, 2]]
    assert check(probabilities, top_p=0.75, top_k=3) == [[0, 1]], "0.4 and 0.3 of 0.9 are 0.78"
    assert check(probabilities, top_p=0.75, min_p=0.2) == [[0, 1]], "the same three are left to top-p"
    assert check(probabilities, top_p=0.55, top_k=2) == [[0]], "0.4 of 0.7 is 0.57"


def test_masked_rows_padding_and_views() -> None:
    g = torch.Generator().manual_seed(3)
    whole = torch.randn(3, 5, 300, generator=g)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    whole[:, :-1][~mask] = math.nan
    whole[..., 256:] = 1e4  # padding columns
    found = KeptTokens.from_logits(
        on_device(whole)[:, :-1],
        top_p=0.8,
        mask=on_device(mask),
        vocab_size=256,
        temperature=on_device(torch.ones(3, 1)),
    )
    expected = [
        plain(row[:256], top_p=0.8) if here else None
        for row, here in zip(whole[:, :-1].flatten(0, 1), mask.flatten(), strict=True)
    ]
    assert found.to_lists() == expected and found.every_row
    none = KeptTokens.from_logits(on_device(torch.randn(0, 5)), top_k=1)
    assert len(none) == 0 and none.token_ids.numel() == 0


def test_rows_with_nan_keep_all() -> None:
    """What is wrong with them is for the loss to show."""
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    logits[0, 3], logits[1, 4], logits[2] = math.nan, INF, math.nan
    found = KeptTokens.from_logits(on_device(logits), top_k=3, top_p=0.9, min_p=0.01)
    assert found.to_lists()[:3] == [None] * 3 and found.to_lists()[3] is not None and found.every_row is False


def test_a_row_does_not_depend_on_others() -> None:
    logits = on_device(torch.randn(9, 2000, generator=torch.Generator().manual_seed(5)))
    filters: dict[str, Any] = {"top_p": 0.9, "top_k": 700, "min_p": 1e-3}
    alone = KeptTokens.cat([KeptTokens.from_logits(logits[i : i + 1], **filters) for i in range(9)])
    assert alone.to_lists() == KeptTokens.from_logits(logits, **filters).to_lists()


def test_dense_masks() -> None:
    keep = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    expected: Sets = [[1, 2], None, None, [0]]
    for given in (keep, keep.bool(), keep.to(torch.int8), keep.bool()[None]):
        assert KeptTokens.from_mask(on_device(given)).to_lists() == expected
    with pytest.raises(ValueError) as error:
        KeptTokens.from_mask(on_device(keep[0]))
    check_message(error.value, "keep", "[4]")


LOGITS = torch.zeros(2, 3, 8)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "top_p 0": ({"top_p": 0.0}, ValueError, "top_p", "0.0"),
    "top_p above 1": ({"top_p": 1.5}, ValueError, "top_p", "1.5"),
    "top_p of a row": ({"top_p": torch.tensor([[1, 1, 1], [1, 2, 1.0]])}, ValueError, "top_p", "2"),
    "top_p per column": ({"top_p": torch.ones(8)}, ValueError, "top_p", "[8]"),
    "top_p as text": ({"top_p": "0.9"}, TypeError, "top_p", "'0.9'"),
    "top_k": ({"top_k": -2}, ValueError, "top_k", "-2"),
    "top_k of a row": ({"top_k": torch.tensor([[5, 5, 5], [5, -3, 5]])}, ValueError, "top_k", "-3"),
    "top_k as float": ({"top_k": 5.0}, TypeError, "top_k", "5.0"),
    "min_p": ({"min_p": -0.1}, ValueError, "min_p", "-0.1"),
    "min_p in bfloat16": ({"min_p": torch.zeros(2, 3).bfloat16()}, TypeError, "min_p", "bfloat16"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature", "0.0"),
    "mask": ({"mask": torch.ones(3, 2)}, ValueError, "mask", "[3, 2]"),
    "vocab_size": ({"vocab_size": 9}, ValueError, "vocab_size", "9"),
    "logits": ({"logits": torch.zeros(8)}, ValueError, "logits", "[8]"),
    "integers": ({"logits": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "logits", "int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")  # or a GPU's numbers per row are not read
    options, kind, argument, came = REFUSED[case]
    given = {name: on_device(x) if isinstance(x, Tensor) else x for name, x in ({"logits": LOGITS} | options).items()}
    from_logits: Callable[..., object] = KeptTokens.from_logits
    with pytest.raises(kind) as error:
        from_logits(given.pop("logits"), **given)
    check_message(error.value, argument, came)
