"""The three products by themselves: odd shapes, transposed operands, added or not."""

from __future__ import annotations

import pytest
import torch
from batches import OBJECTIVES
from checks import check_close
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import from_hidden, problem
from modes import DEFAULT_MODE, DEVICE, NOT_INTERPRETED
from torch import Tensor

from gspo_kernels.logprobs import products
from gspo_kernels.logprobs.products import MklProducts, Products, _mkl_gemm

pytestmark = NOT_INTERPRETED  # no Triton kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
has_units = pytest.mark.skipif(
    DEVICE.type != "cpu" or _mkl_gemm() is None, reason="no bf16 units here, or no MKL in torch"
)

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
    room = torch.full((rows, stride), 7.0, dtype=of.sums, device=DEVICE)
    out = room[:, :vocab]
    of.logits(hidden, None, out)
    check_product("logits", out, hidden, weight.t())
    assert bool((room[:, vocab:] == 7.0).all()), "beyond a row's end"
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).to(hidden.dtype).to(DEVICE)
    of.logits(hidden, bias, out)
    check_product("logits with a bias", out, hidden, weight.t(), bias.expand(rows, vocab))
    narrow = gradient.to(of.gradient)
    wide = torch.zeros(rows, stride, dtype=of.gradient, device=DEVICE)
    wide[:, :vocab] = narrow
    check_product("hidden_gradient", of.hidden_gradient(wide[:, :vocab]), narrow, weight)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)).to(of.sums).to(DEVICE)
    found = torch.empty_like(before)
    of.weight_gradient(wide[:, :vocab], hidden, found, add=False)
    check_product("weight_gradient", found, narrow.t(), hidden)
    found = before.clone()
    of.weight_gradient(wide[:, :vocab], hidden, found, add=True)
    check_product("weight_gradient, added", found, narrow.t(), hidden, before)
    found = before.clone()
    of.weight_gradient(wide[:, :vocab], hidden, found, True, 0.25)
    check_product("weight_gradient with a factor", found, 0.25 * narrow.double().t(), hidden, before)
    check_product(
        "hidden_gradient with a factor", of.hidden_gradient(wide[:, :vocab], 4.0), 4.0 * narrow.double(), weight
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed weight"])
def test_against_float64(dtype: torch.dtype, shape: tuple[int, int, int], transposed: bool) -> None:
    hidden, weight, gradient = made(dtype, *shape)
    if transposed:
        weight = weight.t().contiguous().t()
    check_all(products.products(weight, dtype), hidden, weight, gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_in_blocks_of_the_vocabulary(dtype: torch.dtype, wide: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """61 columns in blocks of 10, one of them short; operands of another dtype than is multiplied are rounded first."""
    hidden, weight, gradient = made(dtype, 5, 33, 61)
    hidden, weight = hidden.to(wide), weight.to(wide)
    of = products.products(weight, dtype)
    monkeypatch.setattr(of, "_step", 10)
    check_all(of, hidden.to(dtype), weight.to(dtype), gradient)
    out = torch.empty(5, 61, dtype=of.sums, device=DEVICE)
    of.logits(hidden, None, out)
    check_product("logits", out, hidden.to(dtype), weight.to(dtype).t())


@has_units
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans(), st.booleans())
def test_mkl_takes_any_shape(m: int, k: int, n: int, a_lies: bool, b_lies: bool, add: bool) -> None:
    """Either operand may lie transposed or inside a wider matrix, and the result inside one."""
    gemm = _mkl_gemm()
    assert gemm is not None
    generator = torch.Generator().manual_seed(m * 4900 + k * 70 + n)

    def operand(rows: int, columns: int, transposed: bool) -> Tensor:
        if transposed:
            return torch.randn(columns, rows + 2, generator=generator).bfloat16()[:, :rows].t()
        return torch.randn(rows, columns + 3, generator=generator).bfloat16()[:, :columns]

    a, b = operand(m, k, a_lies), operand(k, n, b_lies)
    room = torch.randn(m, n + 5, generator=generator)
    before = room.clone()
    gemm(a, b, room[:, :n], add)
    check_product("product", room[:, :n], a, b, before[:, :n] if add else None)
    assert torch.equal(room[:, n:], before[:, n:]), "beyond a row's end"


@has_units
def test_bf16_operands_have_their_own_units() -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    assert type(products.products(weight, torch.bfloat16)) is MklProducts
    assert type(products.products(weight.float(), torch.bfloat16)) is MklProducts, "under autocast"
    assert type(products.products(weight, torch.float32)) is Products


@DEFAULT_MODE
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_bf16_units(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor, or another torch: products of the same numbers in fp32; the same loss."""
    p = problem(objective, seed=100, bias=True, dtype=torch.bfloat16)
    usual = from_hidden(p, "packed", objective, rows=3)
    monkeypatch.setattr(products, "_mkl_gemm", lambda: None)
    assert type(products.products(p.weight, torch.bfloat16)) is Products
    other = from_hidden(p, "packed", objective, rows=3)
    assert float(other.loss) == pytest.approx(float(usual.loss), rel=3e-6)
    for name in ("hidden", "weight", "bias"):
        x, y = getattr(other, name), getattr(usual, name)
        size = y.double().abs().amax(-1, keepdim=True)
        check_close(name, x, y, 2**-6 * size.expand_as(y))
