"""The sparse head in C++: mixed dtypes, widths about vectors, long sums. test_sparse_products has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from modes import DTYPES, needs
from torch import Tensor

from gspo_kernels.linear.types import Entries
from gspo_kernels.rows.types import ABSENT

cpu_sparse = pytest.importorskip("gspo_kernels.linear.cpu_sparse", reason="the C++ extension is not built")
pytestmark = needs("native")

# Less than, exactly and just over one vector, all vectors of a step, and a few steps, on every instruction set.
WIDTHS = [1, 4, 15, 16, 17, 63, 64, 65, 200]
VOCAB = 40


def entries_of(counts: list[int], seed: int = 0) -> Entries:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (sum(counts),), generator=generator, dtype=torch.int32)
    return Entries(
        ids,
        torch.tensor([0, *counts]).cumsum(0),
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        None,
    )


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows that are not neighbours; NaN between them."""
    memory = torch.full((rows, columns + 3), torch.nan)
    memory[:, 1 : columns + 1] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return memory.to(dtype)[:, 1 : columns + 1]


def three_products(
    hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, gradient of the hidden states, gradient of the head."""
    (count,), width = entries.ids.shape, hidden.shape[1]
    gradient = torch.linspace(-1.0, 1.3, count)
    gradient[::5] = 0.0
    ids, order = entries.ids.sort(stable=True)
    logits = torch.empty(count)
    cpu_sparse.kept_logits(hidden, weight, entries, dtype, logits, False)
    wide = torch.full((len(hidden), width + 2), 7.0, dtype=out_dtype)
    cpu_sparse.hidden_gradient(gradient, weight, entries, dtype, wide[:, :width])
    assert bool((wide[:, width:] == 7.0).all())
    of_weight = torch.zeros(VOCAB, width, dtype=out_dtype)
    cpu_sparse.weight_gradient(gradient, hidden, entries, order, ids.long(), dtype, of_weight)
    return logits, wide[:, :width], of_weight


def of_gathered(
    hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in float64, and the sums of the sizes of their terms."""
    hidden, weight = (x.to(dtype).double() for x in (hidden, weight))
    gradient = torch.linspace(-1.0, 1.3, len(entries.ids)).double()
    gradient[::5] = 0.0
    ids, rows = entries.ids.long(), entries.rows
    dense = torch.zeros(len(hidden), VOCAB, dtype=torch.float64).index_put((rows, ids), gradient, accumulate=True)
    sizes = dense.new_zeros(dense.shape).index_put((rows, ids), gradient.abs(), accumulate=True)
    yield (hidden @ weight.t())[rows, ids], (hidden.abs() @ weight.abs().t())[rows, ids]
    yield dense @ weight, sizes @ weight.abs()
    yield dense.t() @ hidden, sizes.t() @ hidden.abs()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_pair_of_dtypes(width: int) -> None:
    """Those of the operands, and the one they are rounded to."""
    entries = entries_of([3, 1, 0, 20, 7])
    for i, j in itertools.product(range(3), range(3)):
        of_hidden, of_weight, rounded_to = DTYPES[i], DTYPES[j], DTYPES[(i + j + width) % 3]
        hidden, weight = matrix(5, width, of_hidden, 1), matrix(VOCAB, width, of_weight, 2)
        for found, (expected, size) in zip(
            three_products(hidden, weight, entries, rounded_to),
            of_gathered(hidden, weight, entries, rounded_to),
            strict=True,
        ):
            assert bool(((found.double() - expected).abs() <= 1e-6 * size).all()), (of_hidden, of_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    entries, hidden, weight = entries_of([5, 9, 30]), matrix(3, 70, dtype, 1), matrix(VOCAB, 70, dtype, 2)
    wide = three_products(hidden, weight, entries, dtype)
    narrow = three_products(hidden, weight, entries, dtype, dtype)
    assert all(torch.equal(x.to(dtype), y) for x, y in zip(wide[1:], narrow[1:], strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """A row, and a column, that are in most entries: their sums are split."""
    entries = entries_of([1, 5, 900, 2, 0, 3, 300])
    entries.ids[::2] = 3
    hidden, weight = matrix(7, 1030, torch.bfloat16, 1), matrix(VOCAB, 1030, torch.bfloat16, 2)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(three_products(hidden, weight, entries, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


def test_what_has_no_gradient_is_not_read() -> None:
    """Absent entries, rows that are not active, entries with a gradient of 0: their operands are NaN."""
    counts = [4, 70, 2]
    entries = entries_of(counts)._replace(active=torch.tensor([True, True, False]))
    entries.ids[:] = torch.arange(76) % 20
    entries.ids[6:70:9] = ABSENT
    hidden, weight = matrix(3, 33, torch.float32, 1), matrix(VOCAB, 33, torch.float32, 2)
    hidden[2], weight[20:] = torch.nan, torch.nan
    logits, of_hidden, of_weight = three_products(hidden, weight, entries, torch.float32)
    assert torch.equal(logits == -torch.inf, entries.ids == ABSENT) and bool((logits[74:] == 0).all())
    assert bool((of_hidden[2] == 0).all()) and bool((of_hidden[:2] != 0).any(1).all())
    assert bool(of_weight.isfinite().all()) and bool((of_weight[20:] == 0).all())
    added = logits.clone()
    cpu_sparse.kept_logits(hidden, weight, entries, torch.float32, added, True)
    assert torch.equal(added, 2 * logits)


def test_no_gradient_is_subnormal() -> None:
    """It would slow the next matrix product."""
    entries = Entries(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2]), torch.tensor([0, 0]), None)
    operand, gradient = torch.full((2, 20), 1e-20), torch.full((2,), 1e-20)
    out = torch.empty(1, 20)
    cpu_sparse.hidden_gradient(gradient, operand, entries, torch.float32, out)
    assert bool((out == 0).all())
