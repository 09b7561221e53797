"""The three products of a sparse head, of every backend, against dense products in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from checks import check_close
from modes import by_backend, by_combination, on_device
from tolerances import TOLERANCES
from torch import Tensor

from gspo_kernels.linear import torch_sparse
from gspo_kernels.linear.products import sum_dtype
from gspo_kernels.linear.sparse_head import sparse_products
from gspo_kernels.linear.types import Entries
from gspo_kernels.rows.types import ABSENT

COUNTS = [3, 0, 1, 23, 2, 0, 70, 1]  # a row of more entries than a block of some kernel has
WIDTH, VOCAB = 37, 80  # neither is a multiple of a vector


class Sample(NamedTuple):
    """On the CPU."""

    hidden: Tensor  # [8, 37], one row NaN: it is not active
    weight: Tensor
    entries: Entries
    gradient: Tensor  # 0 where there is none
    dense: Tensor  # [8, 80] float64, the gradient where it belongs
    present: Tensor  # [E] bool


def sample(dtype: torch.dtype, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(COUNTS)
    ids = torch.cat([torch.randperm(VOCAB, generator=generator)[:n] for n in COUNTS])
    ids[::6] = ABSENT
    rows = torch.arange(len(COUNTS)).repeat_interleave(counts)
    active = torch.ones(len(COUNTS), dtype=torch.bool)
    active[4] = False
    hidden = torch.randn(len(COUNTS), WIDTH, generator=generator)
    hidden[4] = torch.nan
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    present = (ids != ABSENT) & active[rows]
    gradient = torch.where(present, torch.randn(len(ids), generator=generator), 0.0).to(sum_dtype(dtype))
    gradient[rows == 3] = 0.0  # clipped: a row that is active, without a gradient
    dense = torch.zeros(len(COUNTS), VOCAB, dtype=torch.float64)
    dense[rows[present], ids[present]] = gradient[present].double()
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    entries = Entries(ids.to(torch.int32), offsets, rows, active)
    return Sample(hidden.to(dtype), weight.to(dtype), entries, gradient, dense, present)


def placed(entries: Entries) -> Entries:
    return Entries(*(None if x is None else on_device(x) for x in entries))  # type: ignore[arg-type]


@by_combination
def test_against_dense_products(backend: str, dtype: torch.dtype) -> None:
    """Logits, and both gradients, of operands in this dtype. What is not read may be NaN."""
    s = sample(dtype)
    hidden, weight, gradient, entries = (
        on_device(s.hidden),
        on_device(s.weight),
        on_device(s.gradient),
        placed(s.entries),
    )
    products, ids = sparse_products(backend, hidden, weight), s.entries.ids.clamp(min=0).long()
    clean, tol, sums = torch.where(s.hidden.isnan(), 0.0, s.hidden.double()), TOLERANCES[dtype], sum_dtype(dtype)

    def bound(size: Tensor, expected: Tensor, stored: bool = True) -> Tensor:
        return tol.number * size + (tol.store * expected.abs() if stored else 0.0) + tol.tiny

    expected, size = clean @ s.weight.double().t(), clean.abs() @ s.weight.double().abs().t()
    expected, size = expected[s.entries.rows, ids], size[s.entries.rows, ids]
    assert s.entries.active is not None
    expected = torch.where(s.entries.ids == ABSENT, -torch.inf, expected)
    expected = torch.where(s.entries.active[s.entries.rows], expected, 0.0)
    out = torch.empty(len(ids), dtype=sums, device=hidden.device)
    products.kept_logits(hidden, weight, entries, dtype, out, False)
    check_close("logits", out, expected, bound(size, expected, False))
    products.kept_logits(hidden, weight, entries, dtype, out, True)
    check_close("logits, added", out, 2 * expected, bound(2 * size, expected, False))

    weight = weight.clone()
    weight[5] = torch.nan  # no row has a gradient there
    s.dense[:, 5] = 0.0
    gradient = torch.where(entries.ids == 5, 0.0, gradient)
    expected, size = s.dense @ s.weight.double(), s.dense.abs() @ s.weight.double().abs()
    for out_dtype in {dtype, sums}:
        found = torch.empty_like(hidden, dtype=out_dtype)
        products.hidden_gradient(gradient, weight, entries, dtype, found)
        check_close("gradient of hidden", found, expected, bound(size, expected))

    order, destination = columns_in_order(entries)
    expected, size = s.dense.t() @ clean, s.dense.abs().t() @ clean.abs()
    for out_dtype in {dtype, sums}:
        found = torch.zeros(VOCAB, WIDTH, dtype=out_dtype, device=hidden.device)
        products.weight_gradient(gradient, hidden, entries, order, destination, dtype, found)
        check_close("gradient of weight", found, expected, bound(size, expected))


def columns_in_order(entries: Entries) -> tuple[Tensor, Tensor]:
    ids, order = entries.ids.sort(stable=True)
    return order, ids.long()


@by_backend
def test_operands_are_rounded_first(backend: str) -> None:
    """As autocast asks: float32 operands, products of bf16."""
    s = sample(torch.float32, seed=1)
    entries, dtype = placed(s.entries), torch.bfloat16
    order, destination = columns_in_order(entries)
    found = []
    for cast in (lambda x: x, lambda x: x.to(dtype).float()):
        hidden, weight, gradient = on_device(cast(s.hidden)), on_device(cast(s.weight)), on_device(s.gradient)
        products = sparse_products(backend, hidden, weight)
        logits, of_hidden, of_weight = torch.empty_like(gradient), torch.empty_like(hidden), torch.zeros_like(weight)
        products.kept_logits(hidden, weight, entries, dtype, logits, False)
        products.hidden_gradient(gradient, weight, entries, dtype, of_hidden)
        products.weight_gradient(gradient, hidden, entries, order, destination, dtype, of_weight)
        found.append((logits, of_hidden, of_weight))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@by_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_columns_anywhere(backend: str, dtype: torch.dtype) -> None:
    """Logits do not depend on other rows. The gradient of some columns alone has the bits of a dense one."""
    s = sample(dtype, seed=2)
    hidden, weight, gradient, entries = (
        on_device(s.hidden),
        on_device(s.weight),
        on_device(s.gradient),
        placed(s.entries),
    )
    products = sparse_products(backend, hidden, weight)
    together = torch.empty(len(s.gradient), device=hidden.device)
    products.kept_logits(hidden, weight, entries, dtype, together, False)
    for row in (0, 2, 6):
        first, last = s.entries.offsets[row : row + 2].tolist()
        ids = entries.ids[first:last].contiguous()
        alone = Entries(ids, on_device(torch.tensor([0, last - first])), torch.zeros_like(ids, dtype=torch.int64), None)
        found = torch.empty(last - first, device=hidden.device)
        products.kept_logits(hidden[row : row + 1], weight, alone, dtype, found, False)
        assert torch.equal(found, together[first:last])

    order, destination = columns_in_order(entries)
    dense = torch.zeros_like(weight)
    products.weight_gradient(gradient, hidden, entries, order, destination, dtype, dense)
    ids = entries.ids[order]
    begins = torch.cat([ids.new_ones(1, dtype=torch.bool), ids[1:] != ids[:-1]]) & (ids != ABSENT)
    columns = ids[begins].long()
    compact = weight.new_zeros(len(columns), WIDTH)
    products.weight_gradient(gradient, hidden, entries, order, begins.cumsum(0) - 1, dtype, compact)
    assert torch.equal(compact, dense[columns])


@by_backend
def test_nothing_to_multiply(backend: str) -> None:
    """No entries; and a rank without a column, whose entries are all those of other ranks."""
    hidden, weight = on_device(torch.ones(2, WIDTH)), on_device(torch.ones(0, WIDTH))
    for ids in ([], [ABSENT, ABSENT, ABSENT]):
        rows = on_device(torch.tensor([0, 0, 1])[: len(ids)])
        offsets = on_device(torch.tensor([0, 2, 3] if ids else [0, 0, 0]))
        entries = Entries(on_device(torch.tensor(ids, dtype=torch.int32)), offsets, rows, None)
        products, gradient = sparse_products(backend, hidden, weight), torch.zeros(len(ids), device=hidden.device)
        logits, of_hidden = torch.empty_like(gradient), torch.empty_like(hidden)
        products.kept_logits(hidden, weight, entries, torch.float32, logits, False)
        products.hidden_gradient(gradient, weight, entries, torch.float32, of_hidden)
        order, destination = columns_in_order(entries)
        products.weight_gradient(gradient, hidden, entries, order, destination, torch.float32, torch.zeros_like(weight))
        assert logits.tolist() == [-torch.inf] * len(ids) and not bool(of_hidden.any())


def test_other_strides_and_float64_take_plain_torch() -> None:
    matrix = torch.ones(4, 6)
    for operand in (matrix.t(), matrix.double()):
        assert sparse_products("native", matrix, operand) is torch_sparse


def test_an_id_outside_of_the_head_is_nan_and_nothing_else_is_read() -> None:
    """On a GPU nothing refuses it."""
    s = sample(torch.float32, seed=3)
    s.entries.ids[1], s.entries.ids[2] = VOCAB, -5
    out = torch.empty(len(s.gradient))
    torch_sparse.kept_logits(s.hidden, s.weight, s.entries, torch.float32, out, False)
    assert out.isnan().nonzero().flatten().tolist() == [1, 2]
