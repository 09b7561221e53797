"""The ragged array of kept token ids: built, taken apart, cut, joined; and what it refuses."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import DEFAULT_MODE
from test_errors import check_message

from gspo_kernels import KeptTokens

pytestmark = DEFAULT_MODE

Lists = list[list[int] | None]

ids = st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1))
ragged = st.lists(st.none() | st.lists(ids, min_size=1, max_size=6, unique=True), max_size=8)
tries = settings(max_examples=25)


@given(ragged)
@tries
def test_lists_and_back(rows: Lists) -> None:
    made = KeptTokens.from_lists([[] if row is None and i % 2 else row for i, row in enumerate(rows)])
    assert made.to_lists() == rows and len(made) == len(rows)
    assert made.counts.tolist() == [len(row or []) for row in rows]
    assert made.every_row == all(row is not None for row in rows)
    assert made.token_ids.dtype == torch.int32 and made.offsets.dtype == made.counts.dtype == torch.int64
    wide = torch.tensor([x for row in rows for x in row or []], dtype=torch.int64)
    offsets = torch.tensor([0, *itertools.accumulate(len(row or []) for row in rows)], dtype=torch.int32)
    strided = torch.stack([wide, wide - 1], -1)[:, 0]
    for other in (KeptTokens(strided, offsets), made.to("cpu"), pickle.loads(pickle.dumps(made))):
        assert other.to_lists() == rows and other.every_row == made.every_row and other.token_ids.is_contiguous()


@given(ragged, st.data())
@tries
def test_some_rows(rows: Lists, data: st.DataObject) -> None:
    made, count = KeptTokens.from_lists(rows), len(rows)
    bound = st.none() | st.integers(-count - 2, count + 2)
    cut = slice(data.draw(bound), data.draw(bound))
    assert made[cut].to_lists() == rows[cut]
    numbers = data.draw(st.lists(st.integers(-count, count - 1), max_size=9)) if count else []
    assert made[torch.tensor(numbers, dtype=torch.int64)].to_lists() == [rows[i] for i in numbers]
    which = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    chosen = list(itertools.compress(rows, which))
    assert made[torch.tensor(which, dtype=torch.bool)].to_lists() == chosen
    if made.every_row:
        assert made[cut].every_row, "the rows that are left have entries, too"


@given(st.lists(ragged, min_size=1, max_size=4))
@tries
def test_parts_one_after_the_other(parts: list[Lists]) -> None:
    found = KeptTokens.cat([KeptTokens.from_lists(part) for part in parts])
    whole = list(itertools.chain.from_iterable(parts))
    assert found.to_lists() == whole
    assert found.every_row in (None, all(row is not None for row in whole))


def test_any_integers() -> None:
    """Offsets and numbers of rows of every width: uint8 is no mask here, and torch subtracts no uint16."""
    rows: Lists = [[3], None, [1, 2]]
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.int64):
        made = KeptTokens(torch.tensor([3, 1, 2]).to(dtype), torch.tensor([0, 1, 1, 3]).to(dtype))
        assert made.to_lists() == rows and made.every_row is False
        assert made[torch.tensor([2, 0, 0]).to(dtype)].to_lists() == [[1, 2], [3], [3]]
    assert KeptTokens.cat(made[i : i + 1] for i in range(3)).to_lists() == rows


@given(ragged, st.lists(st.integers(0, 2), min_size=9, max_size=9))
@tries
def test_rows_among_others(rows: Lists, gaps: list[int]) -> None:
    """As `with_prompts` places the rows of responses among those of prompts."""
    expected, numbers = Lists(), list[int]()
    for row, gap in zip(rows, gaps, strict=False):
        expected += [None] * gap
        numbers.append(len(expected))
        expected.append(row)
    expected += [None] * gaps[-1]
    at = torch.tensor(numbers, dtype=torch.int64)
    found = KeptTokens.from_lists(rows).scatter(at, len(expected))
    assert found.to_lists() == expected and found[at].to_lists() == rows


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=6))
@tries
def test_dense_masks(rows: list[list[bool]]) -> None:
    found = KeptTokens.from_mask(torch.tensor(rows))
    expected = [[v for v, keep in enumerate(row) if keep] if 0 < sum(row) < 7 else None for row in rows]
    assert found.to_lists() == expected


def of(token_ids: Any, offsets: Any) -> Callable[[], object]:
    return lambda: KeptTokens(torch.tensor(token_ids), torch.tensor(offsets))


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str, str]] = {
    "negative": (of([3, -1], [0, 2]), ValueError, "token_ids", "-1 in row 0"),
    "too large": (of([3, 2**31], [0, 1, 2]), ValueError, "token_ids", "2147483648 in row 1"),
    "twice": (of([5, 3, 4, 3], [0, 1, 1, 4]), ValueError, "token_ids", "id 3 twice in row 2"),
    "floats": (of([3.0], [0, 1]), TypeError, "token_ids", "float32"),
    "lists": (lambda: KeptTokens([[3]], torch.tensor([0, 1])), TypeError, "token_ids", "list"),  # type: ignore[arg-type]
    "two dimensions": (of([[3]], [0, 1]), ValueError, "token_ids", "[1, 1]"),
    "offsets that fall": (of([3, 4], [0, 2, 1, 2]), ValueError, "offsets", "after row 1"),
    "offsets from 1": (of([3, 4], [1, 2]), ValueError, "offsets", "1 first"),
    "offsets short of the end": (of([3, 4], [0, 1]), ValueError, "offsets", "1 last"),
    "no offsets": (of([3], torch.zeros(0, dtype=torch.int64).tolist()), TypeError, "offsets", "float32"),
    "a row as text": (lambda: KeptTokens.from_lists([[1], "23"]), TypeError, "rows[1]", "'23'"),
    "a row of floats": (lambda: KeptTokens.from_lists([[1], [2.0]]), TypeError, "rows[1]", "2.0"),
    "rows as a number": (lambda: KeptTokens.from_lists(3), TypeError, "rows", "3"),  # type: ignore[arg-type]
    "a step": (lambda: KeptTokens.from_lists([[1], [2]])[::2], ValueError, "rows", "slice"),
    "a mask of another length": (
        lambda: KeptTokens.from_lists([[1], [2]])[torch.tensor([True])], ValueError, "rows", "[1]",
    ),
    "numbers as a list": (lambda: KeptTokens.from_lists([[1], [2]])[[0]], TypeError, "rows", "[0]"),
    "numbers in two dimensions": (
        lambda: KeptTokens.from_lists([[1], [2]])[torch.tensor([[0], [1]])], ValueError, "rows", "[2, 1]",
    ),
    "a single number": (lambda: KeptTokens.from_lists([[1], [2]])[torch.tensor(1)], ValueError, "rows", "[]"),
    "no parts": (lambda: KeptTokens.cat([]), TypeError, "parts", "[]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    call, kind, argument, came = REFUSED[case]
    with pytest.raises(kind) as error:
        call()
    check_message(error.value, argument, came)
