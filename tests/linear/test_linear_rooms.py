"""Where gradients of logits are written: over the logits, or, as a GPU has it, in memory of their own, waited for late.

The second way is forced here on CPU tensors, down to operands of fp16 and the rows that a CUDA graph has to take along.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from batches import OBJECTIVES
from checks import check_close
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import Separate, check_same, from_hidden, from_logits, problem, rows_of_work
from modes import DEFAULT_MODE
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels.linear import head, walk
from gspo_kernels.linear.products import _OfOperands

pytestmark = DEFAULT_MODE

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
frozen_or_not = pytest.mark.parametrize("wants", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.booleans(), max_size=40))
def test_the_order_in_place(active: list[bool]) -> None:
    """Every row with a gradient once, and each place is written when no other row has to be read from it any more,
    whatever row comes first: that is, a row stays, or comes from behind into the place of one without a gradient."""
    count = sum(active)
    order = head._order_in_place(torch.tensor(active, dtype=torch.bool), count).tolist()
    assert sorted(order) == [i for i, some in enumerate(active) if some]
    rows: list[Any] = list(range(len(active)))
    places = list(enumerate(order))
    random.Random(count).shuffle(places)  # threads take them in any order
    for place, row in places:
        assert rows[row] == row, "read after it was written over"
        rows[place] = f"gradient of {row}"
        assert place == row or not active[place]


@by_objective
@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_buffer_of_its_own(
    objective: str, dtype: torch.dtype, wants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows sorted by whether they have a gradient, and the products of a chunk queued behind the logits of the next."""
    p = problem(objective, seed=101, bias=True, dtype=dtype)
    for rows in (1, 3, None):
        in_place = from_hidden(p, "packed", objective, rows=rows, wants=wants)
        with monkeypatch.context() as patch:
            patch.setattr(walk, "Head", Separate)
            separate = from_hidden(p, "packed", objective, rows=rows, wants=wants)
        assert torch.equal(in_place.loss, separate.loss)
        assert [int(x) for x in in_place.stats.head] == [int(x) for x in separate.stats.head]
        for name in wants:
            x, y = getattr(separate, name), getattr(in_place, name)
            step = 2 * TOLERANCES[dtype].store  # one number may be rounded to either of two neighbours
            check_close(name, x, y, (step + 1e-6) * y.double().abs() + 1e-6 * float(y.double().abs().max()))
            assert torch.equal(x == 0, y == 0)


class NarrowProducts(_OfOperands):
    """As cuBLAS and MKL multiply: gradients of logits are fp16 (bf16), sums fp32."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        assert a.dtype == b.dtype == self.dtype
        assert bool(torch.isfinite(a).all()), "beyond the range of fp16"
        torch.addmm(out, a.float(), b.float(), beta=float(add), alpha=factor, out=out)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 9), st.lists(st.booleans(), max_size=40))
def test_half_as_wide_in_place(kept: int, active: list[bool]) -> None:
    """Behind `kept` rows of gradients, in turns whose rows may be taken in any order: none is written over logits that
    are still to be read but its own, and only from the beginning of those on."""
    first = -(-kept // 2)
    order = [i for i, some in enumerate(active) if some]
    unread, written = set(order), 0
    for start, stop in head._doubling(len(order)):
        assert start == written
        for i in range(start, stop):
            place, row = kept + i, first + order[i]  # in halves of a row, in rows
            over = place // 2 - first
            assert over not in unread or (over == order[i] and place == 2 * row)
        unread -= set(order[start:stop])
        written = stop
    assert written == len(order)


@by_objective
@frozen_or_not
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 6, 8, 50])
def test_gradients_kept_beside_logits(
    objective: str, rows: int, backend: str, wants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 gradients over fp32 logits wait there for those of the next chunks, in whatever order rows become ready."""
    dtype = torch.bfloat16
    lengths = (3, 0, 5, 1, 6, 2, 2, 4, 1, 7, 3)
    p = problem(objective, seed=104, bias=True, dtype=dtype, lengths=lengths)
    truth = from_logits(p, "packed", objective)
    monkeypatch.setattr(head, "products", NarrowProducts)
    monkeypatch.setattr(head, "keeps_gradients", lambda device, dtype: True)
    products: list[int] = []
    original = NarrowProducts.hidden_gradient

    def counted(self: NarrowProducts, gradient: Tensor, factor: float = 1.0) -> Tensor:
        products.append(gradient.shape[0])
        return original(self, gradient, factor)

    monkeypatch.setattr(NarrowProducts, "hidden_gradient", counted)
    found = from_hidden(p, "packed", objective, rows=rows, wants=wants, backend=backend)
    check_same(found, truth, p, number=2 * TOLERANCES[dtype].store)
    _, _, backward, chunks = rows_of_work(found.stats)
    assert sum(products) == backward
    if rows == 6:
        assert len(products) < chunks, "products of several chunks at once"


@by_objective
@frozen_or_not
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e6])
def test_gradients_of_logits_in_fp16(
    objective: str, wants: tuple[str, ...], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are lifted by a power of two while they are multiplied: advantages of any size lose what fp16 rounds, and
    nothing underflows to zero or overflows. Operands are of fp16; gradients are read in fp32, under autocast."""
    dtype = torch.float16
    p = problem(objective, seed=102, bias=True, dtype=dtype)
    p.hidden, p.weight = p.hidden.float(), p.weight.float()
    assert p.bias is not None
    p.bias = p.bias.float()
    p.batch.advantages *= size
    truth = from_logits(p, "packed", objective)
    monkeypatch.setattr(walk, "Head", Separate)
    monkeypatch.setattr(head, "products", NarrowProducts)
    for rows in (3, None):
        with torch.autocast("cpu", dtype=dtype):
            found = from_hidden(p, "packed", objective, rows=rows, wants=wants, backend="reference")
        # of a row's columns the smallest may be a thousandth of the largest, and a subnormal
        check_same(found, truth, p, number=2 * TOLERANCES[dtype].store, stats=False)


@by_objective
@frozen_or_not
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_where_nothing_may_be_waited_for(
    objective: str, wants: tuple[str, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a CUDA graph no count can be read: masked rows and those without a gradient go along, and change nothing.

    Whatever their hidden states hold, NaN here; their gradients are zero, and zero times NaN is not.
    """
    p = problem(objective, seed=103, bias=True)
    truth = from_logits(p, layout, objective)
    monkeypatch.setattr(walk, "Head", Separate)
    monkeypatch.setattr(walk, "may_wait", lambda device: False)
    monkeypatch.setattr(head._News, "wait", lambda self: (self._rows, 0))
    for rows in (3, None):
        found: Any = from_hidden(p, layout, objective, rows=rows, wants=wants)
        check_same(found, truth, p)
