"""The three products by themselves: odd shapes, transposed operands, added or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import OBJECTIVES
from checks import check_close
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import force_products, from_hidden, problem
from modes import DEFAULT_MODE, DEVICE, NOT_INTERPRETED
from torch import Tensor

from gspo_kernels.base.torch_internals import mkl_gemm
from gspo_kernels.linear import products
from gspo_kernels.linear.cpu_products import VARIABLE
from gspo_kernels.linear.products import (
    CudaProducts,
    CudaProductsThenSum,
    MklProducts,
    NativeProducts,
    Products,
    _cuda_products,
    _even_blocks,
)
from gspo_kernels.linear.weight_sums import WeightSums

pytestmark = NOT_INTERPRETED  # no Triton kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def with_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    force_products("mkl", monkeypatch)


PATHS = {
    "mkl, bf16": torch.bfloat16,
    "native, bf16": torch.bfloat16,
    "native, fp16": torch.float16,
    "native, fp32": torch.float32,
    "float32, bf16": torch.bfloat16,
    "float32, fp16": torch.float16,
    "float32, fp32": torch.float32,
    "float32, fp64": torch.float64,
}
KINDS = {"mkl": MklProducts, "native": NativeProducts, "float32": Products}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of operands that are multiplied in this way whatever the processor."""
    name, dtype = request.param.split(", ")[0], PATHS[request.param]
    force_products(name, monkeypatch)
    assert type(products.products(torch.zeros(3, 2, dtype=dtype), dtype)) is KINDS[name]
    return dtype


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# rows, width, vocabulary: one of each; odd ones; a power of two; more rows than columns; a long inner dimension.
SHAPES = [(1, 1, 1), (1, 7, 13), (3, 1, 5), (5, 33, 61), (64, 32, 128), (130, 5, 9), (7, 515, 11)]


def made(dtype: torch.dtype, rows: int, width: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (vocab, width), (rows, vocab)
    found = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes)
    return tuple(found)  # type: ignore[return-value]


def check_product(name: str, found: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    """a b against float64, relative to the absolute parts; fp32 whatever the operands are."""
    a, b = a.double(), b.double()
    exact, size = a @ b, a.abs() @ b.abs()
    if before is not None:
        exact, size = exact + before.double(), size + before.double().abs()
    assert found.dtype == (torch.float64 if found.dtype == torch.float64 else torch.float32)
    step = 2**-53 if found.dtype == torch.float64 else 2**-24
    check_close(name, found, exact, 4 * a.shape[1] ** 0.5 * step * size)


def check_all(of: Products, hidden: Tensor, weight: Tensor, gradient: Tensor) -> None:
    rows, vocab = hidden.shape[0], weight.shape[0]
    stride = vocab + 3  # of a row of logits, which begins on a boundary
    buffer = torch.full((of.padded_rows(rows), stride), 7.0, dtype=of.sum_dtype, device=DEVICE)
    padded, out = buffer[:, :vocab], buffer[:rows, :vocab]
    of.logits(hidden, None, padded)
    check_product("logits", out, hidden, weight.t())
    assert bool((buffer[:, vocab:] == 7.0).all()), "beyond a row's end"
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).to(hidden.dtype).to(DEVICE)
    of.logits(hidden, bias, padded)
    check_product("logits with a bias", out, hidden, weight.t(), bias.expand(rows, vocab))
    narrow = gradient.to(of.gradient_dtype)
    wide = torch.zeros(rows, stride, dtype=of.gradient_dtype, device=DEVICE)
    wide[:, :vocab] = narrow
    check_product("hidden_gradient", of.hidden_gradient(wide[:, :vocab]), narrow, weight)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).to(of.sum_dtype).to(DEVICE)
    sums = WeightSums(before, vocab, of.sum_dtype)  # not in 24 bits, which a bf16 head has
    of.weight_gradient(wide[:, :vocab], hidden, sums)
    found = sums.finished().high
    check_product("weight_gradient", found, narrow.t(), hidden)
    found.copy_(before)
    of.weight_gradient(wide[:, :vocab], hidden, sums)
    check_product("weight_gradient, added", found, narrow.t(), hidden, before)
    found.copy_(before)
    of.weight_gradient(wide[:, :vocab], hidden, sums, 0.25)
    check_product("weight_gradient with a factor", found, 0.25 * narrow.double().t(), hidden, before)
    check_product(
        "hidden_gradient with a factor", of.hidden_gradient(wide[:, :vocab], 4.0), 4.0 * narrow.double(), weight
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed weight"])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool) -> None:
    """The products that this device takes by itself."""
    check_shape(dtype, shape, transposed)


@DEFAULT_MODE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_against_float64(path: torch.dtype, shape: tuple[int, int, int]) -> None:
    for transposed in (False, True):
        check_shape(path, shape, transposed)


def check_shape(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool) -> None:
    hidden, weight, gradient = made(dtype, *shape)
    if transposed:
        weight = weight.t().contiguous().t()
    check_all(products.products(weight, dtype), hidden, weight, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_in_blocks_of_the_vocabulary(dtype: torch.dtype, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """61 columns in blocks of 16, one of them short; operands of another dtype than is multiplied are rounded first."""
    hidden, weight, gradient = made(dtype, 5, 33, 61)
    hidden, weight = hidden.to(wide), weight.to(wide)
    of = products.products(weight, dtype)
    monkeypatch.setattr(of, "_step", 16)
    check_all(of, hidden.to(dtype), weight.to(dtype), gradient)
    out = torch.empty(of.padded_rows(5), 61, dtype=of.sum_dtype, device=DEVICE)
    of.logits(hidden, None, out)
    check_product("logits", out[:5], hidden.to(dtype), weight.to(dtype).t())


@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (3, 70, 2), (17, 5, 33), (70, 31, 64), (16, 64, 70)])
@pytest.mark.parametrize("lies", list(itertools.product([False, True], repeat=3)))
def test_mkl_takes_any_shape(m: int, k: int, n: int, lies: tuple[bool, bool, bool], with_mkl: None) -> None:
    """Either operand may lie transposed or inside a wider matrix, and the result inside one."""
    a_lies, b_lies, add = lies
    gemm = mkl_gemm()
    assert gemm is not None
    generator = torch.Generator().manual_seed(m * 4900 + k * 70 + n)

    def operand(rows: int, columns: int, transposed: bool) -> Tensor:
        if transposed:
            return torch.randn(columns, rows + 2, generator=generator).bfloat16()[:, :rows].t()
        return torch.randn(rows, columns + 3, generator=generator).bfloat16()[:, :columns]

    a, b = operand(m, k, a_lies), operand(k, n, b_lies)
    buffer = torch.randn(m, n + 5, generator=generator)
    before = buffer.clone()
    gemm(a, b, buffer[:, :n], add)
    check_product("product", buffer[:, :n], a, b, before[:, :n] if add else None)
    assert torch.equal(buffer[:, n:], before[:, n:]), "beyond a row's end"


def test_bf16_operands_have_their_own_units(with_mkl: None) -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    assert type(products.products(weight, torch.bfloat16)) is MklProducts
    assert type(products.products(weight.float(), torch.bfloat16)) is MklProducts, "under autocast"
    assert type(products.products(weight, torch.float32)) is Products


# --- a row's bits -----------------------------------------------------------------------------------------------------


def logits_of_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    of = products.products(weight, hidden.dtype)
    out = torch.empty(of.padded_rows(len(hidden)), len(weight), dtype=of.sum_dtype)
    of.logits(hidden, bias, out)
    return out[: len(hidden)]


@DEFAULT_MODE
@pytest.mark.parametrize(("width", "vocab"), [(33, 1003), (64, 1003), (33, 4001), (64, 4001), (64, 17), (257, 61)])
def test_logits_of_a_row_do_not_depend_on_other_rows_or_threads(
    width: int, vocab: int, path: torch.dtype, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: alone, among few or many, at the beginning and at the end, by any number of threads.

    1,003 columns are one block, 4,001 are several (1,408 are as narrow as a block gets at 11 threads), and 17 and 61
    are fewer than a block must have.
    """
    if vocab > 1408:
        monkeypatch.setitem(products._BLOCK_BYTES, "cpu", width * 4 * 1408)
    hidden, weight, _ = made(path, 100, width, vocab)
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).to(path)
    torch.set_num_threads(1)
    expected = logits_of_rows(hidden, weight, bias)
    for count in (1, 2, 3, 5, 7, 11):
        torch.set_num_threads(count)
        for rows in (1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 48, 99):
            for start in (0, 1, 100 - rows):
                found = logits_of_rows(hidden[start : start + rows], weight, bias)
                assert torch.equal(found, expected[start : start + rows]), (count, rows, start)


@DEFAULT_MODE
def test_few_rows_fill_up_a_block(path: torch.dtype, threads: None) -> None:
    """Fewer than 16 more, unless threads outnumber the rows; and the buffer for logits grows by no more."""
    for count in (1, 2, 4, 7):
        torch.set_num_threads(count)
        of = products.products(torch.zeros(5, 3, dtype=path), path)
        if isinstance(of, NativeProducts):
            assert of.max_padding == 0 and [of.padded_rows(rows) for rows in range(70)] == list(range(70))
            continue
        for rows in range(1, 70):
            padding = of.padded_rows(rows) - rows
            assert 0 <= padding <= of.max_padding and of.padded_rows(rows) % 16 == 0
            assert of.padded_rows(rows) >= 4 * count and (padding < 16 or of.padded_rows(rows) < 4 * count + 16)
        assert of.padded_rows(0) == 0


@DEFAULT_MODE
def test_whole_blocks_are_not_copied() -> None:
    hidden = torch.randn(64, 32)
    assert products._aligned(hidden, 64).data_ptr() == hidden.data_ptr()
    for other, rows in ((hidden[:60], 64), (hidden[:, 1:], 64), (hidden.t(), 32)):
        copy = products._aligned(other, rows)
        assert copy.data_ptr() % 64 == 0 and copy.stride(0) * 4 % 64 == 0 and copy.stride(1) == 1
        assert torch.equal(copy[: len(other)], other) and bool((copy[len(other) :] == 0).all())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 500))
def test_blocks_of_the_vocabulary_are_even(columns: int, most: int) -> None:
    blocks = _even_blocks(columns, most)
    assert [i for block in blocks for i in range(columns)[block]] == list(range(columns))
    sizes = [block.stop - block.start for block in blocks]
    assert max(sizes) <= max(most, 16) and min(sizes) > max(sizes) - 32
    assert all(block.start % 16 == 0 for block in blocks)


# --- what releases of torch offer on a GPU ----------------------------------------------------------------------------


def refuse_other_self(self: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any = None, **rest: Any) -> Tensor:
    """`torch.addmm` on a GPU in torch 2.8 and 2.9."""
    if self.dtype != b.dtype:
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
    raise AssertionError("no product here adds to a matrix in its operands' dtype")


def without_out_dtype(self: Tensor, *operands: Tensor, out: Tensor, **named: Any) -> Tensor:
    """`torch.addmm` and `torch.mm` before 2.8."""
    raise TypeError("got an unexpected keyword argument 'out_dtype'")


def wide_addmm(self: Tensor, a: Tensor, b: Tensor, *, out_dtype: Any, beta: float, alpha: float, out: Tensor) -> Tensor:
    """`torch.addmm` on a GPU from 2.10 on."""
    product = alpha * (a.float() @ b.float())
    return out.copy_(product + beta * self if beta else product)


def wide_mm(a: Tensor, b: Tensor, *, out_dtype: Any, out: Tensor | None = None) -> Tensor:
    """`torch.mm` on a GPU from 2.8 on."""
    product = a.float() @ b.float()
    return product if out is None else out.copy_(product)


@DEFAULT_MODE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("addmm", "mm", "kind"),
    [
        (wide_addmm, wide_mm, CudaProducts),
        (refuse_other_self, wide_mm, CudaProductsThenSum),
        (without_out_dtype, without_out_dtype, Products),
    ],
    ids=["2.10", "2.8", "2.7"],
)
def test_the_products_that_a_release_accepts(
    dtype: torch.dtype, addmm: Any, mm: Any, kind: type[Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are chosen by a product that runs, and give the same results."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "addmm", addmm)
        patch.setattr(torch, "mm", mm)
        chosen = _cuda_products.__wrapped__(torch.device("cpu"), dtype)
        assert chosen is kind
        if chosen is not Products:
            patch.setattr(products, "_BLOCK_BYTES_ELSEWHERE", 4 * 61 * 3)  # so that a sum takes several blocks
            hidden, weight, gradient = made(dtype, 5, 33, 61)
            check_all(chosen(weight, dtype), hidden, weight, gradient)


@DEFAULT_MODE
@pytest.mark.parametrize("width", [64, 33])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_logits_on_a_gpu_are_products_of_one_shape(
    width: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch: cuBLAS sees the same rows, strides and alignment, and so chooses the same kernel."""
    seen = set()

    def recorded(self: Tensor, a: Tensor, b: Tensor, *, beta: float, **rest: Any) -> Tensor:
        operands = [(x.shape, x.stride(), x.data_ptr() % 64) for x in (a, b, self)]
        seen.add((tuple(operands), beta))
        return wide_addmm(self, a, b, beta=beta, **rest)

    monkeypatch.setattr(torch, "addmm", recorded)
    monkeypatch.setitem(products.PRODUCT_ROWS, "cpu", 32)
    hidden, weight, _ = made(torch.bfloat16, 100, width, 61)
    bias = weight[:, 0].contiguous() if with_bias else None
    of = CudaProducts(weight, torch.bfloat16)
    monkeypatch.setattr(of, "_in_blocks", False)  # a GPU's products need no blocks of a CPU
    monkeypatch.setattr(of, "_min_columns", 1)
    for start, stop in ((0, 1), (3, 10), (0, 31), (1, 33), (0, 64), (5, 70), (0, 100)):
        rows = stop - start
        out = torch.empty(of.padded_rows(rows), 64)[:, :61]
        of.logits(hidden[start:stop], bias, out)
        before = None if bias is None else bias.expand(rows, 61)
        check_product("logits", out[:rows], hidden[start:stop], weight.t(), before)
        assert of.padded_rows(rows) - rows < 32 and of.padded_rows(rows) % 32 == 0
    assert len(seen) == 1


@DEFAULT_MODE
def test_cublas_adds_to_the_gradient_of_the_head_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(self: Tensor, *operands: Tensor, beta: float, out: Tensor, **rest: Any) -> Tensor:
        calls.append((beta, self.data_ptr(), out.data_ptr()))
        return wide_addmm(self, *operands, beta=beta, out=out, **rest)

    monkeypatch.setattr(torch, "addmm", recorded)
    hidden, weight, gradient = made(torch.bfloat16, 5, 33, 61)
    sums = WeightSums(torch.empty(61, 33), 61, torch.float32)  # a GPU's sums are float32 for a bf16 head too
    for _ in range(2):
        CudaProducts(weight, torch.bfloat16).weight_gradient(gradient, hidden, sums)
    found, _ = sums.finished()
    address = found.data_ptr()
    assert calls == [(0.0, address, address), (1.0, address, address)]
    check_product("weight_gradient, twice", found, 2 * gradient.double().t(), hidden)


@DEFAULT_MODE
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_bf16_units(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor, or another torch: products of the same numbers in fp32; the same loss."""
    p = problem(objective, seed=100, bias=True, dtype=torch.bfloat16)
    usual = from_hidden(p, "packed", objective, rows=3)
    monkeypatch.setenv(VARIABLE, "float32")
    assert type(products.products(p.weight, torch.bfloat16)) is Products
    other = from_hidden(p, "packed", objective, rows=3)
    assert float(other.loss) == pytest.approx(float(usual.loss), rel=3e-6)
    for name in ("hidden", "weight", "bias"):
        x, y = getattr(other, name), getattr(usual, name)
        size = y.double().abs().amax(-1, keepdim=True)
        check_close(name, x, y, 2**-6 * size.expand_as(y))
