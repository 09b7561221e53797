"""The sparse head's products in Triton against float64, over ragged rows, and what they may not read."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from modes import TRITON_MODES, on_device
from torch import Tensor

from gspo_kernels.linear import triton_sparse
from gspo_kernels.linear.types import Entries
from gspo_kernels.rows.types import ABSENT

pytestmark = TRITON_MODES

COUNTS = [1, 0, 3, 9, 1, 20, 2]  # about how many entries a program takes at a time
ROWS, VOCAB = len(COUNTS), 40
INACTIVE = 3
# The depth, a stride, an offset: whole accesses, and rows that start at any address. More columns than one block has.
SHAPES = {"aligned": (272, 272, 0), "any address": (261, 265, 3)}


def matrix(rows: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, depth] between NaN."""
    depth, stride, offset = shape
    memory = torch.full((offset + rows * stride + 16,), math.nan, dtype=dtype)
    values = torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed))
    found = on_device(memory)[offset:].as_strided((rows, depth), (stride, 1))
    return found.copy_(on_device(values.to(dtype)))


def entries_of(inactive: bool = True) -> Entries:
    """Ids in any order, many of them in several rows; two of other ranks; a row that is not active."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randperm(VOCAB // 2, generator=generator)[:count] for count in COUNTS]).to(torch.int32)
    ids[5], ids[-1] = ABSENT, ABSENT
    offsets = torch.tensor([0, *itertools.accumulate(COUNTS)])
    rows = torch.arange(ROWS).repeat_interleave(torch.tensor(COUNTS))
    active = torch.arange(ROWS) != INACTIVE if inactive else None
    return Entries(*map(on_device, (ids, offsets, rows)), None if active is None else on_device(active))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.cpu().to(dtype).double()


def check(found: Tensor, expected: Tensor, size: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """`size`: the sum of the terms' absolute values, to which errors are relative."""
    allowed = 2e-6 * size + torch.finfo(dtype).eps * expected.abs()
    wrong = (found.cpu().double() - expected).abs() > allowed
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} are wrong"


OPERANDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
by_operands = pytest.mark.parametrize(("stored", "dtype"), OPERANDS, ids=["fp32", "bf16", "autocast"])
by_shape = pytest.mark.parametrize("shape", list(SHAPES))


@by_operands
@by_shape
def test_kept_logits(stored: torch.dtype, dtype: torch.dtype, shape: str) -> None:
    """Rows that are not active are not read; other ranks' columns have -inf; a second product is added."""
    entries, hidden = entries_of(), matrix(ROWS, SHAPES[shape], torch.bfloat16, 1)
    weight = matrix(VOCAB, SHAPES[shape], stored, 2)
    hidden[INACTIVE] = math.nan
    out = on_device(torch.full((len(entries.ids),), math.nan))
    triton_sparse.kept_logits(hidden, weight, entries, dtype, out, False)
    ids, rows = entries.ids.cpu().long(), entries.rows.cpu()
    here, active = ids != ABSENT, rows != INACTIVE
    terms = rounded(hidden, dtype)[rows] * rounded(weight, dtype)[ids.clamp(min=0)]
    expected = torch.where(active, torch.where(here, terms.sum(1), -math.inf), 0.0)
    assert torch.equal(out.cpu().isinf(), expected.isinf()) and torch.equal(out.cpu() == 0, expected == 0)
    finite = here & active
    check(out.cpu()[finite], expected[finite], terms.abs().sum(1)[finite])
    twice = out.clone()
    triton_sparse.kept_logits(hidden, weight, entries, dtype, twice, True)
    assert torch.equal(twice, 2 * out)


def test_one_16_bit_dtype_is_rounded_to_the_other() -> None:
    """fp16 operands under a bf16 autocast: both dtypes have 16 bits, and the operands are not those of the product."""
    entries, shape = entries_of(inactive=False), SHAPES["aligned"]
    hidden, weight = matrix(ROWS, shape, torch.float16, 1), matrix(VOCAB, shape, torch.float16, 2)
    out = on_device(torch.empty(len(entries.ids)))
    triton_sparse.kept_logits(hidden, weight, entries, torch.bfloat16, out, False)
    ids, rows = entries.ids.cpu().long(), entries.rows.cpu()
    here = ids != ABSENT
    terms = rounded(hidden, torch.bfloat16)[rows][here] * rounded(weight, torch.bfloat16)[ids[here]]
    check(out.cpu()[here], terms.sum(1), terms.abs().sum(1))


def test_a_bad_id_is_nan_and_reads_nothing() -> None:
    entries, hidden, weight = entries_of(), *(matrix(n, (16, 16, 0), torch.float32, n) for n in (ROWS, VOCAB))
    ids, rows = entries.ids.clone(), entries.rows.clone()
    ids[0], ids[1], ids[2], rows[-2] = VOCAB, -1, 2**31 - 1, 2**40
    found, good = (on_device(torch.zeros(len(ids))) for _ in range(2))
    triton_sparse.kept_logits(hidden, weight, entries, torch.float32, good, False)
    triton_sparse.kept_logits(hidden, weight, entries._replace(ids=ids), torch.float32, found, False)
    assert found[:3].isnan().all() and torch.equal(found[3:], good[3:])
    found.zero_()
    bad = entries._replace(ids=ids, rows=rows, offsets=entries.offsets - 1)
    triton_sparse.kept_logits(hidden, weight, bad, torch.float32, found, False)
    ones, out = torch.ones_like(found), torch.empty_like(hidden)
    triton_sparse.hidden_gradient(ones, weight, bad, torch.float32, out)
    order = torch.argsort(ids.long(), stable=True)
    for destination in (-1, 2**40, VOCAB):
        to = torch.full_like(order, destination)
        out = torch.zeros_like(weight)
        triton_sparse.weight_gradient(ones, hidden, bad, order, to, torch.float32, out)
        assert not bool(out.any())


@by_operands
@by_shape
def test_hidden_gradient(stored: torch.dtype, dtype: torch.dtype, shape: str) -> None:
    """A gradient of 0 reads nothing: column 7 of the head is NaN."""
    entries, weight = entries_of(), matrix(VOCAB, SHAPES[shape], stored, 3)
    weight[7] = math.nan
    ids, rows = entries.ids.cpu().long(), entries.rows.cpu()
    gradient = torch.randn(len(ids), generator=torch.Generator().manual_seed(4))
    gradient[(ids == 7) | (rows == 4)] = 0.0
    used = (ids != ABSENT) & (rows != INACTIVE) & (gradient != 0)
    terms = torch.where(used[:, None], gradient.double()[:, None] * rounded(weight, dtype)[ids.clamp(min=0)], 0.0)
    for out_dtype in {torch.float32, stored}:
        out = torch.full_like(matrix(ROWS, SHAPES[shape], out_dtype, 0), math.nan)
        triton_sparse.hidden_gradient(on_device(gradient), weight, entries, dtype, out)
        zeros = torch.zeros(ROWS, terms.shape[1], dtype=torch.float64)
        expected, size = (zeros.index_add(0, rows, x) for x in (terms, terms.abs()))
        check(out, expected, size, out_dtype)
        assert not bool(out[[1, INACTIVE, 4]].any())


@by_operands
@by_shape
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "row-indexed"])
def test_weight_gradient(stored: torch.dtype, dtype: torch.dtype, shape: str, dense: bool) -> None:
    """Runs of equal ids, longer than a program's step too. The hidden states of a gradient of 0 are NaN."""
    entries, hidden = entries_of(), matrix(ROWS, SHAPES[shape], stored, 5)
    hidden[4] = math.nan
    ids = entries.ids.clone()
    ids[13:24] = 11  # not of KeptTokens, but a longer run
    entries = entries._replace(ids=ids)
    on_cpu, rows = ids.cpu().long(), entries.rows.cpu()
    gradient = torch.randn(len(ids), generator=torch.Generator().manual_seed(6))
    gradient[rows == 4] = 0.0
    used = (on_cpu != ABSENT) & (rows != INACTIVE) & (gradient != 0)
    columns, order = torch.unique(on_cpu), torch.argsort(ids, stable=True)
    sorted_ids = ids[order].long()
    destination = sorted_ids if dense else torch.searchsorted(on_device(columns), sorted_ids)
    of_entry = on_cpu.clamp(min=0) if dense else torch.searchsorted(columns, on_cpu)
    terms = torch.where(used[:, None], gradient.double()[:, None] * rounded(hidden, dtype)[rows], 0.0)
    out = torch.zeros_like(matrix(VOCAB if dense else len(columns), SHAPES[shape], stored, 0))
    triton_sparse.weight_gradient(on_device(gradient), hidden, entries, order, destination, dtype, out)
    expected, size = (torch.zeros(out.shape).double().index_add(0, of_entry, x) for x in (terms, terms.abs()))
    check(out, expected, size, stored)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    entries = entries_of(inactive=False)
    hidden, weight = (matrix(n, SHAPES["aligned"], torch.bfloat16, n) for n in (ROWS, VOCAB))
    out = on_device(torch.zeros(len(entries.ids)))
    triton_sparse.kept_logits(hidden, weight, entries, torch.bfloat16, out, False)
    gradient, together = out.clamp(min=-1.0), torch.empty_like(hidden)
    triton_sparse.hidden_gradient(gradient, weight, entries, torch.bfloat16, together)
    for row in (2, 5):
        begin, end = entries.offsets[row : row + 2].tolist()
        of_row: Any = [entries.ids[begin:end], entries.offsets[row : row + 2] - begin, entries.rows[begin:end] - row]
        one = Entries(*of_row, None)
        alone, of_hidden = torch.zeros_like(out[begin:end]), torch.empty_like(hidden[:1])
        triton_sparse.kept_logits(hidden[row : row + 1], weight, one, torch.bfloat16, alone, False)
        triton_sparse.hidden_gradient(gradient[begin:end], weight, one, torch.bfloat16, of_hidden)
        assert torch.equal(alone, out[begin:end]) and torch.equal(of_hidden[0], together[row])
