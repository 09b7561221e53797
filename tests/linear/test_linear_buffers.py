"""Where gradients of logits are written: over the logits or, as on a GPU, into a buffer of their own.

The second is forced here on CPU tensors, also with operands in fp16 and with all rows selected as in a CUDA graph.
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
from linear import (
    Separate,
    check_same,
    from_hidden,
    from_logits,
    problem,
    rows_of_work,
    without_synchronization,
)
from modes import DEFAULT_MODE
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels.linear import head, operators, schedule
from gspo_kernels.linear.gradient_rows import CHUNKS_OF_GRADIENTS, ActiveCount, doubling_ranges, order_in_place
from gspo_kernels.linear.products import HalfProducts

pytestmark = DEFAULT_MODE

by_objective = pytest.mark.parametrize("objective", OBJECTIVES)
frozen_or_not = pytest.mark.parametrize(
    "needs_grad", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.booleans(), max_size=40))
def test_the_order_in_place(active: list[bool]) -> None:
    """Every active row once, and no position is overwritten that another row still has to read, in any order of time:
    a row stays where it is, or moves from further behind to the position of an inactive row."""
    count = sum(active)
    order = order_in_place(torch.tensor(active, dtype=torch.bool), count).tolist()
    assert sorted(order) == [i for i, some in enumerate(active) if some]
    rows: list[Any] = list(range(len(active)))
    positions = list(enumerate(order))
    random.Random(count).shuffle(positions)  # threads take them in any order
    for position, row in positions:
        assert rows[row] == row, "read after it was overwritten"
        rows[position] = f"gradient of {row}"
        assert position == row or not active[position]


@by_objective
@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_buffer_of_its_own(
    objective: str, dtype: torch.dtype, needs_grad: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Active rows first, and the products of a chunk queued behind the logits of the next."""
    p = problem(objective, seed=101, bias=True, dtype=dtype)
    for rows in (1, 3, None):
        in_place = from_hidden(p, "packed", objective, rows=rows, needs_grad=needs_grad)
        with monkeypatch.context() as patch:
            patch.setattr(operators, "Head", Separate)
            separate = from_hidden(p, "packed", objective, rows=rows, needs_grad=needs_grad)
        assert torch.equal(in_place.loss, separate.loss)
        assert [int(x) for x in in_place.stats.head] == [int(x) for x in separate.stats.head]
        for name in needs_grad:
            x, y = getattr(separate, name), getattr(in_place, name)
            step = 2 * TOLERANCES[dtype].store  # one number may be rounded to either of two neighbours
            check_close(name, x, y, (step + 1e-6) * y.double().abs() + 1e-6 * float(y.double().abs().max()))
            assert torch.equal(x == 0, y == 0)


class NarrowProducts(HalfProducts):
    """As cuBLAS and MKL multiply: gradients of logits are fp16 (bf16), sums fp32."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        assert a.dtype == b.dtype == self.dtype
        assert self.dtype != torch.float16 or bool(torch.isfinite(a).all()), "beyond the range of fp16"
        torch.addmm(out, a.float(), b.float(), beta=float(add), alpha=factor, out=out)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 9), st.lists(st.booleans(), max_size=40))
def test_half_as_wide_in_place(kept: int, active: list[bool]) -> None:
    """Behind `kept` rows of gradients, in ranges whose rows may be written in any order: none overwrites logits that
    are still to be read, except its own from their beginning on."""
    first = -(-kept // 2)
    order = [i for i, some in enumerate(active) if some]
    unread, written = set(order), 0
    for start, stop in doubling_ranges(len(order)):
        assert start == written
        for i in range(start, stop):
            position, row = kept + i, first + order[i]  # in halves of a row, in rows
            over = position // 2 - first
            assert over not in unread or (over == order[i] and position == 2 * row)
        unread -= set(order[start:stop])
        written = stop
    assert written == len(order)


@by_objective
@frozen_or_not
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 6, 8, 50])
def test_gradients_kept_beside_logits(
    objective: str, rows: int, backend: str, needs_grad: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 gradients over fp32 logits stay there until more chunks have been computed, for any order of active rows."""
    dtype = torch.bfloat16
    lengths = (3, 0, 5, 1, 6, 2, 2, 4, 1, 7, 3)
    p = problem(objective, seed=104, bias=True, dtype=dtype, lengths=lengths)
    truth = from_logits(p, "packed", objective)
    monkeypatch.setattr(head, "products", NarrowProducts)
    monkeypatch.setattr(schedule, "gradients_are_half_width", lambda device, dtype: True)
    products: list[int] = []
    original = NarrowProducts.hidden_gradient

    def counted(self: NarrowProducts, gradient: Tensor, factor: float = 1.0) -> Tensor:
        products.append(gradient.shape[0])
        return original(self, gradient, factor)

    monkeypatch.setattr(NarrowProducts, "hidden_gradient", counted)
    found = from_hidden(p, "packed", objective, rows=rows, needs_grad=needs_grad, backend=backend)
    check_same(found, truth, p, number=2 * TOLERANCES[dtype].store)
    _, _, backward, chunks = rows_of_work(found.stats)
    assert sum(products) == backward
    if rows == 6:
        assert len(products) < chunks, "products of several chunks at once"


@pytest.mark.parametrize("objective", ["gspo", "grpo"])
@frozen_or_not
@pytest.mark.parametrize("synchronizes", [True, False], ids=["", "graph"])
@pytest.mark.parametrize("rows", [2, 6])
def test_gradients_of_two_chunks_in_one_product(
    objective: str, rows: int, synchronizes: bool, needs_grad: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where the gradient of a frozen head is never computed."""
    p = problem(objective, seed=105, bias=True, dtype=torch.bfloat16, lengths=(3, 0, 5, 1, 6, 2, 2, 4, 1, 7, 3))
    truth = from_logits(p, "packed", objective)
    monkeypatch.setattr(head, "products", NarrowProducts)
    monkeypatch.setattr(operators, "Head", Separate)
    if not synchronizes:
        without_synchronization(monkeypatch)
        monkeypatch.setattr(ActiveCount, "wait", lambda self: (self._rows, 0))
    of_head: list[int] = []  # rows of each product
    original = NarrowProducts.weight_gradient

    def counted(self: NarrowProducts, gradient: Tensor, *rest: Any) -> None:
        of_head.append(gradient.shape[0])
        original(self, gradient, *rest)

    monkeypatch.setattr(NarrowProducts, "weight_gradient", counted)
    found = from_hidden(p, "packed", objective, rows=rows, needs_grad=needs_grad, backend="reference")
    check_same(found, truth, p, number=2 * TOLERANCES[torch.bfloat16].store)
    _, _, backward, chunks = rows_of_work(found.stats)
    if "weight" not in needs_grad:
        assert of_head == []
        return
    assert sum(of_head) == backward and max(of_head) <= CHUNKS_OF_GRADIENTS * rows
    assert len(of_head) <= -(-chunks // CHUNKS_OF_GRADIENTS)


@frozen_or_not
@pytest.mark.parametrize("rows", [3, 50])
def test_products_of_one_shape(rows: int, needs_grad: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: logits in products of 8 rows, in a buffer of no more rows than that takes."""
    p = problem("gspo", seed=106, bias=True, dtype=torch.bfloat16)
    truth = from_logits(p, "packed", "gspo")
    buffers: list[tuple[int, int]] = []

    class OneShape(NarrowProducts):
        def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
            super().__init__(weight, dtype)
            self._in_blocks, self._min_columns, self._product_rows = False, 1, 8

        def buffer_rows(self, rows: int) -> int:
            buffers.append((rows, super().buffer_rows(rows)))
            return buffers[-1][1]

    monkeypatch.setattr(head, "products", OneShape)
    monkeypatch.setattr(operators, "Head", Separate)
    found = from_hidden(p, "packed", "gspo", rows=rows, needs_grad=needs_grad, backend="reference")
    check_same(found, truth, p, number=2 * TOLERANCES[torch.bfloat16].store)
    assert buffers and all(of_buffer == -(-chunk // 8) * 8 for chunk, of_buffer in buffers)


@by_objective
@frozen_or_not
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e6])
def test_gradients_of_logits_in_fp16(
    objective: str, needs_grad: tuple[str, ...], size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are scaled by a power of two while they are multiplied: with advantages of any size nothing underflows to 0
    or overflows. Operands are in fp16; gradients are returned in fp32, under autocast."""
    dtype = torch.float16
    p = problem(objective, seed=102, bias=True, dtype=dtype)
    p.hidden, p.weight = p.hidden.float(), p.weight.float()
    assert p.bias is not None
    p.bias = p.bias.float()
    p.batch.advantages *= size
    truth = from_logits(p, "packed", objective)
    monkeypatch.setattr(operators, "Head", Separate)
    monkeypatch.setattr(head, "products", NarrowProducts)
    for rows in (3, None):
        with torch.autocast("cpu", dtype=dtype):
            found = from_hidden(p, "packed", objective, rows=rows, needs_grad=needs_grad, backend="reference")
        # of a row's columns the smallest may be a thousandth of the largest, and a subnormal
        check_same(found, truth, p, number=2 * TOLERANCES[dtype].store, stats=False)


@frozen_or_not
@pytest.mark.parametrize("options", [{"logit_scale": 20.0}, {"logit_scale": 20.0, "softcap": 1.0}, {}], ids=str)
def test_gradients_of_steep_logits_in_fp16(
    options: dict[str, float], needs_grad: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale multiplies gradients, and a temperature below 1 (here per token) divides them."""
    dtype = torch.float16
    p = problem("gspo", seed=107, bias=True, dtype=dtype, temperature=1.0 if options else "token", on_policy=True)
    assert p.bias is not None
    p.hidden, p.bias = p.hidden / 50, p.bias / 50  # where tanh is steep
    if not options:
        p.batch.temperature /= 40
    found = []
    for narrow in (False, True):
        with monkeypatch.context() as patch:
            if narrow:
                patch.setattr(operators, "Head", Separate)
                patch.setattr(head, "products", NarrowProducts)
            found.append(
                from_hidden(p, "packed", "gspo", rows=3, needs_grad=needs_grad, backend="reference", **options)
            )
    assert torch.isfinite(found[0].loss)
    for name in needs_grad:
        wide, half = (getattr(x, name) for x in found)
        assert wide.abs().max() > 1e-3
        check_close(name, half, wide, 2 * TOLERANCES[dtype].store * wide.abs().max().expand(wide.shape))


@by_objective
@frozen_or_not
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_where_the_host_may_not_wait(
    objective: str, needs_grad: tuple[str, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a CUDA graph no count can be read: masked and inactive rows are multiplied too, and change nothing.

    Their hidden states are NaN here. Their gradients are 0, but 0 times NaN is NaN.
    """
    p = problem(objective, seed=103, bias=True)
    truth = from_logits(p, layout, objective)
    monkeypatch.setattr(operators, "Head", Separate)
    without_synchronization(monkeypatch)
    monkeypatch.setattr(ActiveCount, "wait", lambda self: (self._rows, 0))
    for rows in (3, None):
        found: Any = from_hidden(p, layout, objective, rows=rows, needs_grad=needs_grad)
        check_same(found, truth, p)
