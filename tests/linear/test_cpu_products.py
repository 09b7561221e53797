"""Which products a CPU takes, and those of the C++ extension: every edge of their tiles, and the bits of a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from batches import ragged_batch
from checks import check_close
from linear import check_same, force_products, from_hidden, from_logits, problem
from modes import DEFAULT_MODE, DEVICE
from test_linear import run_and_check
from torch import Tensor

import gspo_kernels
from gspo_kernels.linear import cpu_products
from gspo_kernels.linear.cpu_products import VARIABLE, left_dtype, multiply, native_is_right
from gspo_kernels.linear.products import MklProducts, NativeProducts, Products, products
from gspo_kernels.rows import cpu_rows

pytestmark = [DEFAULT_MODE, pytest.mark.skipif(DEVICE.type != "cpu", reason="products of a CPU")]
needs_extension = pytest.mark.skipif(bool(cpu_rows.unavailable_reason()), reason="needs the C++ extension")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # of the right operand


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the extension's products -----------------------------------------------------------------------------------------


def random(rows: int, columns: int, dtype: torch.dtype, transposed: bool, seed: int) -> Tensor:
    """Inside a wider matrix, so that rows begin anywhere."""
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        return torch.randn(columns, rows + 3, generator=generator).to(dtype)[:, 1 : rows + 1].t()
    return torch.randn(rows, columns + 5, generator=generator).to(dtype)[:, 1 : columns + 1]


# Tiles have 6 rows and 8, 16 or 64 columns. 1,026 floats or bf16 numbers are more than one block of the depth; odd
# depths end in half a word of bf16; 35,001 is packed in more than one range.
PRODUCTS = [
    (1, 1, 1), (1, 1, 70), (6, 8, 64), (7, 3, 65), (5, 2, 63), (13, 33, 17), (70, 130, 66), (12, 1026, 128),
    (3, 1029, 9), (200, 77, 20), (260, 35001, 250),
]  # fmt: skip


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_any_shape_and_stride(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Either operand transposed; written, with a bias, or added; and nothing beyond a row's end."""
    m, k, n = shape
    for left, right, add in itertools.product([False, True], repeat=3):
        if k > 2000 and not left == right == add:
            continue  # a second
        a, b = random(m, k, left_dtype(dtype), left, 1), random(k, n, dtype, right, 2)
        buffer = torch.randn(m, n + 7, generator=torch.Generator().manual_seed(3))
        before, out = buffer.clone(), buffer[:, 2 : n + 2]
        bias = None if add else torch.randn(n, generator=torch.Generator().manual_seed(4))
        multiply(a, b, out, add, 0.25, bias)
        start = before[:, 2 : n + 2] if bias is None else bias.expand(m, n)
        expected = 0.25 * (a.double() @ b.double()) + start.double()
        size = 0.25 * (a.double().abs() @ b.double().abs()) + start.double().abs()
        check_close("product", out, expected, 4 * k**0.5 * 2**-24 * size)
        untouched = torch.ones(n + 7, dtype=torch.bool)
        untouched[2 : n + 2] = False
        assert torch.equal(buffer[:, untouched], before[:, untouched]), "outside of `out`"


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_anything_to_sum(dtype: torch.dtype) -> None:
    left = left_dtype(dtype)
    a, b, bias = torch.empty(3, 0, dtype=left), torch.empty(0, 4, dtype=dtype), torch.arange(4.0)
    out = torch.full((3, 4), 7.0)
    multiply(a, b, out, add=True)
    assert bool((out == 7.0).all())
    multiply(a, b, out, bias=bias)
    assert torch.equal(out, bias.expand(3, 4))
    multiply(a, b, out)
    assert bool((out == 0.0).all())
    multiply(torch.empty(0, 5, dtype=left), torch.empty(5, 4, dtype=dtype), out[:0])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "strided depth"])
def test_bits_depend_on_the_depth_alone(dtype: torch.dtype, transposed: bool, threads: None) -> None:
    """Not on how many rows or columns there are, where they lie, their strides, or the threads."""
    a, b = random(70, 1101, left_dtype(dtype), transposed, 5), random(1101, 333, dtype, not transposed, 6)
    torch.set_num_threads(1)
    expected = torch.empty(70, 333)
    multiply(a, b, expected)
    for rows in range(1, 71):
        torch.set_num_threads(1 + rows // 2 % 3)
        start = (17 * rows) % (71 - rows)
        columns = slice((13 * rows) % 300, 333)
        some = a[start : start + rows] if rows % 2 else a[start : start + rows].clone()
        found = torch.empty(rows, 333)[:, columns]
        multiply(some, b[:, columns], found)
        assert torch.equal(found, expected[start : start + rows, columns]), rows


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    """Not even NaN and infinity: the zeros that fill up a tile are multiplied by other rows' numbers alone."""
    a, b = random(9, 35, left_dtype(dtype), False, 7), random(35, 70, dtype, True, 8)
    expected, found = torch.empty(9, 70), torch.empty(9, 70)
    multiply(a, b, expected)
    a[2], b[:, 5] = float("nan"), float("inf")
    multiply(a, b, found)
    rows, columns = torch.arange(9) != 2, torch.arange(70) != 5
    assert torch.equal(found[rows][:, columns], expected[rows][:, columns])
    assert bool(found[2].isnan().all()) and not bool(found[:, 5].isfinite().any())


# --- the choice -------------------------------------------------------------------------------------------------------


def pretend(
    monkeypatch: pytest.MonkeyPatch, amx: bool = False, avx512: bool = False, intel: bool = True, mkl: bool = True
) -> None:
    monkeypatch.setattr(cpu_products, "has_amx", lambda: amx)
    monkeypatch.setattr(cpu_products, "has_avx512_bf16", lambda: avx512)
    monkeypatch.setattr(cpu_products, "beats_mkl", lambda: not intel)
    monkeypatch.setattr(cpu_products, "mkl_gemm", (lambda: object()) if mkl else lambda: None)
    monkeypatch.delenv(VARIABLE, raising=False)


@needs_extension
@pytest.mark.parametrize(
    ("processor", "kind", "why"),
    [
        ({"amx": True, "avx512": True}, MklProducts, "AMX"),
        ({"amx": True, "avx512": True, "mkl": False}, NativeProducts, "AVX512-BF16"),
        ({"avx512": True}, NativeProducts, "AVX512-BF16"),
        ({}, Products, "bf16 operands are converted to float32"),
        ({"amx": True, "mkl": False}, Products, "bf16 operands are converted to float32"),
        ({"avx512": True, "intel": False}, NativeProducts, "AVX512-BF16"),
        ({"intel": False}, NativeProducts, "this processor is not Intel's"),
    ],
)
def test_the_units_of_the_processor(
    processor: dict[str, bool], kind: type[Products], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **processor)
    hidden, weight = torch.zeros(5, 8, dtype=torch.bfloat16), torch.zeros(3, 8, dtype=torch.bfloat16)
    assert type(products(weight, torch.bfloat16)) is kind
    assert type(products(weight.float(), torch.bfloat16)) is kind, "under autocast"
    other = Products if processor.get("intel", True) else NativeProducts
    assert type(products(weight.float(), torch.float32)) is type(products(weight.half(), torch.float16)) is other
    assert type(products(weight.double(), torch.float64)) is Products
    (line,) = (line for line in gspo_kernels.explain(hidden, weight).splitlines() if line.startswith("products: "))
    assert why in line


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_copy_of_a_narrow_head(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states in float32 beside a 16-bit head: it is widened in registers or else a block at a time."""
    force_products("native", monkeypatch)
    generator = torch.Generator().manual_seed(31)
    hidden, weight, gradient = (torch.randn(shape, generator=generator) for shape in ((5, 33), (61, 33), (5, 61)))
    weight = weight.to(dtype)
    of, of_copy = products(weight, torch.float32), NativeProducts(weight.float(), torch.float32)
    assert of.weight is weight
    assert type(of) is (NativeProducts if left_dtype(dtype) == torch.float32 else Products)
    found, expected = torch.empty(of.padded_rows(5), 61), torch.empty(5, 61)
    of.logits(hidden, None, found)
    of_copy.logits(hidden, None, expected)
    tolerance = 0.0 if type(of) is NativeProducts else 1e-5
    for one, other in (
        (found[:5], expected),
        (of.hidden_gradient(gradient), of_copy.hidden_gradient(gradient)),
    ):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@needs_extension
def test_the_instructions_of_this_processor() -> None:
    """Pairs of bf16 by AVX512-BF16, and in the baseline, which tests them everywhere. Only wide vectors beat MKL."""
    instructions = cpu_products._native.product_instructions()
    assert (left_dtype(torch.bfloat16) == torch.bfloat16) == (instructions in ("avx512bf16", "baseline"))
    assert left_dtype(torch.float16) == left_dtype(torch.float32) == torch.float32
    assert cpu_products.beats_mkl() == (not cpu_products._native.is_intel() and instructions != "baseline")
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "vendor_id" in known:
        assert cpu_products._native.is_intel() == ("GenuineIntel" in known)


@needs_extension
def test_a_wrong_product_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension's is tried once on small integers."""
    assert all(native_is_right.__wrapped__(dtype) for dtype in DTYPES)
    monkeypatch.setattr(cpu_products, "multiply", lambda a, b, out, add=False, factor=1.0, bias=None: out.zero_())
    assert not any(native_is_right.__wrapped__(dtype) for dtype in DTYPES)
    for processor in ({"avx512": True}, {"intel": False}):
        pretend(monkeypatch, **processor)
        monkeypatch.setattr(cpu_products, "native_is_right", lambda dtype: False)
        assert all(type(products(torch.zeros(3, 2), dtype)) is Products for dtype in DTYPES)


@needs_extension
@pytest.mark.parametrize(("intel", "dtype", "words"), [
    (True, torch.float16, "fp16 operands are converted to float32"),
    (True, torch.float32, "torch multiplies float32"),
    (True, torch.float64, "torch multiplies float64"),
    (False, torch.float16, "the C++ extension multiplies fp16 as float32 (this processor is not Intel's)"),
    (False, torch.float64, "torch multiplies float64"),
])  # fmt: skip
def test_other_dtypes_are_explained(
    intel: bool, dtype: torch.dtype, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, intel=intel)
    assert f"products: {words}" in gspo_kernels.explain(torch.zeros(5, 8, dtype=dtype), torch.zeros(3, 8, dtype=dtype))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    pretend(monkeypatch, mkl=False)
    monkeypatch.setattr(cpu_rows, "unavailable_reason", lambda: "the C++ extension is not there")
    for name, expected in (
        ("fast", f"{VARIABLE}: expected one of mkl, native, float32; got 'fast'"),
        ("mkl", f"{VARIABLE}: expected native or float32, because this torch has no bf16 product of MKL; got 'mkl'"),
        ("native", f"{VARIABLE}: expected mkl or float32, because the C++ extension is not there; got 'native'"),
    ):
        monkeypatch.setenv(VARIABLE, name)
        with pytest.raises(ValueError) as caught:
            products(weight, torch.bfloat16)
        assert str(caught.value) == expected
    monkeypatch.setenv(VARIABLE, "float32")
    assert type(products(weight, torch.bfloat16)) is Products


# --- losses -----------------------------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_losses_of_the_native_path(objective: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the oracle, in chunks, trained and frozen; and against logits that are multiplied in float64."""
    monkeypatch.setenv(VARIABLE, "native")
    for rows, frozen in ((None, False), (3, False), (1, True)):
        batch = ragged_batch(objective, seed=2, lengths=(3, 1, 0, 4, 2), dtype=dtype)
        run_and_check(batch, "packed", objective, rows, frozen, upstream=-2.5)
    p = problem(objective, seed=101, width=33, bias=True, dtype=dtype)
    if dtype == torch.float32:
        check_same(from_hidden(p, "padded", objective, rows=4), from_logits(p, "padded", objective), p)
