"""The three matrix products between hidden states and a head: logits, and the gradients of both operands.

On every device operands are multiplied in their own dtype, and sums are kept and returned in float32. Logits rounded
to bf16 would move GSPO's ratio by as much as its clip range.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..base.torch_internals import mkl_gemm
from .cpu_products import cpu_products, left_dtype, multiply
from .weight_sums import WeightSums

# The head is multiplied in blocks of this many bytes, in the dtype of the sums. On a CPU a block stays near the cache;
# everywhere it is large enough for a fast product.
_BLOCK_BYTES = {"cpu": 16 << 20}
_BLOCK_BYTES_ELSEWHERE = 512 << 20

# CPU libraries multiply the last few rows by another kernel, which sums in another order. MKL does so for fewer than 4
# rows, and for fewer than 4 rows of a thread. So rows are multiplied in blocks of 16, and at least 4 a thread: the bits
# of a row's logits then depend neither on the other rows nor on the number of threads.
_ROWS = 16
_ROWS_PER_THREAD = 4
_COLUMNS = 16  # blocks of the vocabulary are multiples of it,
_COLUMNS_PER_THREAD = 64  # and no narrower, for the same reason: a narrower head is padded with zeros
_MIN_COLUMNS = {torch.float64: 1024}  # below it, MKL's kernel for float64 depends on the number of columns as well
_ALIGNMENT = 64  # bytes; every row of an operand begins at a multiple of it

# cuBLAS chooses a kernel by the shape of a product, and two kernels may add in different orders. So logits on a GPU
# come from products of exactly this many rows; zeros fill up the last one. 512 is the smallest number at full speed.
# At V = 151,936 and D = 4,096 an H100 (3.0 TB/s, 750 TFLOP/s) reads the head in 0.41 ms. It multiplies 256 rows in
# 0.42 ms and 512 rows in 0.85 ms: only 512 hide the reads. Measured, the log-probabilities of 8,192 rows took 19.1 ms
# in chunks of 256 rows, and 15.5 to 15.6 ms in chunks of 512, 1,024 and 2,048. In tiles of 128 x 256, 512 rows are
# 2,376 tiles, 18 for each of the 132 multiprocessors.
PRODUCT_ROWS = {"cuda": 512}


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over products of `dtype`: of logits, log-probabilities and gradients before rounding."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """Products of hidden states [n, D] and a head `weight` [V, D]; operands of another dtype are rounded to `dtype`.

    This base class runs everywhere: float32 products (float64 for float64) of operands converted to it, a block of the
    vocabulary at a time. A product of two bf16 or fp16 numbers is exact in float32.
    """

    # `device`: the type of device to decide for; that of a weight on "meta" alone, which has no memory.

    def __init__(self, weight: Tensor, dtype: torch.dtype, device: str | None = None) -> None:
        device = device or weight.device.type
        self.weight, self.dtype = weight, dtype
        self.sum_dtype = sum_dtype(dtype)  # of every result
        self.gradient_dtype = self.sum_dtype  # of the logits' gradient, which is an operand too
        block = _BLOCK_BYTES.get(device, _BLOCK_BYTES_ELSEWHERE)
        self._vocab = weight.shape[0]
        self._step = max(1, block // (weight.shape[1] * self.sum_dtype.itemsize))
        self._converts = not weight.dtype == dtype == self.sum_dtype
        self._converted: Tensor | None = None  # a block of the weight
        self._min_rows = self._min_columns = 1
        self._product_rows = PRODUCT_ROWS.get(device)  # None: all rows in one product
        self._in_blocks = device == "cpu"
        if self._in_blocks:
            threads = torch.get_num_threads()
            self._min_rows = _round_up(_ROWS_PER_THREAD * threads, _ROWS)
            self._min_columns = max(_COLUMNS_PER_THREAD * threads, _MIN_COLUMNS.get(dtype, 1))
            self._step = max(self._step, 2 * self._min_columns)  # even blocks are at least half as wide

    def padded_rows(self, rows: int) -> int:
        """How many rows are multiplied for `rows` of them."""
        if self._product_rows is not None:
            return _round_up(rows, self._product_rows)
        return max(_round_up(rows, _ROWS), self._min_rows) if self._in_blocks and rows else rows

    def buffer_rows(self, rows: int) -> int:
        """Rows of a buffer for the logits of at most `rows`. On a CPU they may begin at any of its rows, else at 0."""
        return rows + self.max_padding if self._product_rows is None else self.padded_rows(rows)

    @property
    def max_padding(self) -> int:
        """The largest `padded_rows(rows) - rows`."""
        return max(_ROWS, self._min_rows) - 1 if self._in_blocks else 0

    @property
    def converted_bytes(self) -> int:
        """Memory for the converted block of the weight; 0 where the weight is multiplied as it is."""
        rows = min(max(self._step, _COLUMNS), self._vocab) if self._converts else 0
        return rows * self.weight.shape[1] * self.sum_dtype.itemsize

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor, add: bool = False) -> None:
        """[n, D] -> the first n rows of `out` [at least padded_rows(n), V]; the other rows of `out` are padding.

        `add`: to what is there, without a bias.
        """
        self._logits(self._operand(hidden), None if bias is None else bias.to(self.sum_dtype), out, add)

    def _logits(self, operand: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
        if bias is not None:
            out.copy_(bias.expand_as(out))
        if self._in_blocks:
            operand = _aligned(operand, out.shape[0])
        blocks = list(self._row_blocks(operand))
        for columns, weight in self._weight_blocks(self._step):
            multiply = self._multiply_narrow if len(weight) < self._min_columns else self._multiply
            for rows, of_rows in blocks:
                multiply(of_rows, weight.t(), out[rows, columns], add or bias is not None)

    def hidden_gradient(self, gradient: Tensor, factor: float = 1.0) -> Tensor:
        """[n, V] -> [n, D] times a factor."""
        out = torch.empty(gradient.shape[0], self.weight.shape[1], dtype=self.sum_dtype, device=gradient.device)
        for columns, weight in self._weight_blocks(self._step if self._converts else self._vocab):
            self._multiply(gradient[:, columns], weight, out, columns.start > 0, factor)
        return out

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, sums: WeightSums, factor: float = 1.0) -> None:
        """[n, V], [n, D] -> adds the product [V, D] times a factor to the sums."""
        operand = self._operand(hidden)
        for columns, out, add in sums.blocks():
            self._multiply(gradient[:, columns].t(), operand, out, add, factor)

    def _multiply_narrow(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """`_multiply` for a head with fewer columns than `_min_columns`: columns of zeros are added."""
        columns = b.shape[1]
        padded = b.new_zeros(self._min_columns, b.shape[0])
        padded[:columns].copy_(b.t())
        product = out.new_zeros(out.shape[0], self._min_columns)
        if add:
            product[:, :columns].copy_(out)
        self._multiply(a, padded.t(), product, add)
        out.copy_(product[:, :columns])

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype).to(self.sum_dtype)

    def _row_blocks(self, operand: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of `PRODUCT_ROWS` rows, all of one shape and alignment; on a CPU all rows."""
        size = self._product_rows
        if size is None:
            yield slice(None), operand
            return
        for start in range(0, len(operand), size):
            yield slice(start, start + size), _aligned(operand[start : start + size], size)

    def _weight_blocks(self, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the weight as operands, at most `step` rows each."""
        blocks = _even_blocks(self._vocab, step)
        if not self._converts:
            yield from ((block, self.weight[block]) for block in blocks)
            return
        if self._converted is None:
            most = max(block.stop - block.start for block in blocks)
            self._converted = self.weight.new_empty(most, self.weight.shape[1], dtype=self.sum_dtype)
        for block in blocks:
            converted = self._converted[: block.stop - block.start]
            converted.copy_(self.weight[block].to(self.dtype))
            yield block, converted

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        """`out` = a b times a factor, added to `out` if `add`."""
        torch.addmm(out, a, b, beta=float(add), alpha=factor, out=out)


class HalfProducts(Products):
    """Products of bf16 or fp16 operands by hardware units made for them; the logits' gradient is such an operand."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(weight.to(dtype).contiguous(), dtype, device)
        self.gradient_dtype = dtype
        self._step, self._converts = self._vocab, False

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype).contiguous()


class CudaProducts(HalfProducts):
    """cuBLAS, which adds bf16 or fp16 products to a float32 matrix (torch 2.10 and later)."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=float(add), alpha=factor, out=out)


class CudaProductsThenSum(HalfProducts):
    """For torch 2.8 and 2.9, whose `addmm` refuses to add to a float32 matrix; their `mm` returns float32 products.

    A product that is added passes through a buffer, a block of rows at a time.
    """

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        if not add:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
            if factor != 1.0:
                out.mul_(factor)
            return
        rows = max(1, _BLOCK_BYTES_ELSEWHERE // (out.shape[1] * out.itemsize))
        for start in range(0, out.shape[0], rows):
            product = torch.mm(a[start : start + rows], b, out_dtype=torch.float32)
            out[start : start + rows].add_(product, alpha=factor)


class MklProducts(HalfProducts):
    """MKL's product of bf16 matrices into float32, which torch contains but does not expose."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        gemm = mkl_gemm()
        assert gemm is not None
        gemm(a, b, out, add, factor)


class NativeProducts(Products):
    """Products of the C++ extension. They take any number of rows, and no row is padded.

    Pairs of bf16 are multiplied where the processor has instructions for them. Elsewhere the left operand is float32,
    so is the logits' gradient, and the right one becomes float32 while the extension packs it. So does a 16-bit head
    beside float32 hidden states, without a copy of it.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(weight if self.widens(weight, dtype) else weight.to(dtype), dtype, device)
        self.gradient_dtype = left_dtype(self.weight.dtype)
        self._in_blocks = self._converts = False
        self._step = self._vocab

    @staticmethod
    def widens(weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether a head that is narrower than `dtype` is multiplied as it is."""
        return dtype == torch.float32 and weight.dtype != dtype and left_dtype(weight.dtype) == dtype

    def _logits(self, operand: Tensor, bias: Tensor | None, out: Tensor, add: bool) -> None:
        bias = None if bias is None else bias.contiguous()
        multiply(operand.to(self.gradient_dtype), self.weight.t(), out, add, bias=bias)

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        multiply(a, b, out, add, factor)


def products(weight: Tensor, dtype: torch.dtype) -> Products:
    """The fastest products for this device and dtype."""
    return _products_on(weight.device, weight, dtype)(weight, dtype)


def planned_products(weight: Tensor, dtype: torch.dtype, device: str) -> Products:
    """What would multiply this weight on a type of device; it multiplies nothing. A GPU may be elsewhere.

    Args:
        weight: on "meta".
    """
    if device == "cuda" and not torch.cuda.is_available():
        kind = CudaProducts if dtype in (torch.bfloat16, torch.float16) else Products
    else:
        kind = _products_on(torch.device(device), weight, dtype)
    return kind(weight, dtype, device)


def _products_on(device: torch.device, weight: Tensor, dtype: torch.dtype) -> type[Products]:
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _cuda_products(device, dtype)
    if device.type == "cpu":
        name = cpu_products(dtype).name
        if name == "native" and weight.dtype.itemsize < dtype.itemsize and not NativeProducts.widens(weight, dtype):
            name = "float32"  # which converts a block of the head at a time
        return _CPU_PRODUCTS[name]
    return Products


_CPU_PRODUCTS: dict[str, type[Products]] = {"mkl": MklProducts, "native": NativeProducts, "float32": Products}


def explain_products(device: torch.device, dtype: torch.dtype) -> str:
    """Which products multiply and why, in a line."""
    if device.type == "cpu":
        return f"products: {cpu_products(dtype).reason}"
    name = str(dtype).removeprefix("torch.")
    if dtype.itemsize > 2:
        return f"products: torch multiplies {name}"
    if device.type == "cuda" and _cuda_products(device, dtype) is not Products:
        return f"products: cuBLAS multiplies {name} with float32 sums"
    return f"products: {name} operands are converted to float32 (this torch has no product of them with float32 sums)"


def gradients_are_half_width(device: str, dtype: torch.dtype) -> bool:
    """Whether a CPU multiplies bf16 gradients of logits: they are then half as wide as logits.

    They stay in the memory of the logits over several chunks, so that one gradient product takes more rows.
    """
    if device != "cpu" or dtype != torch.bfloat16:
        return False
    name = cpu_products(dtype).name
    return name == "mkl" or (name == "native" and left_dtype(dtype) == dtype)


def default_chunk_bytes(device: str, dtype: torch.dtype, gradient: bool) -> int:
    """Memory for a chunk's logits where the caller sets none: enough rows for products to run at full speed.

    Each chunk adds to the whole gradient of the head. The faster the products, the more rows a chunk needs until these
    additions no longer limit the speed. At V = 151,936 that takes about 2,000 rows on a GPU, and 512 on a CPU. Where a
    16-bit head is multiplied as float32 it is 448, because a converted block and the low bits of its gradient take
    memory as well.
    """
    if device == "cuda":
        return 1280 << 20
    widened = dtype.itemsize == 2 and not gradients_are_half_width(device, dtype)
    return (264 if gradient and widened else 300) << 20


def _even_blocks(columns: int, most: int) -> list[slice]:
    """Blocks of almost equal size, multiples of 16 columns: no last block is so narrow that another kernel runs."""
    if columns <= most:
        return [slice(0, columns)]
    units = -(-columns // _COLUMNS)
    count = -(-units // max(1, most // _COLUMNS))
    ends = [min(units * i // count * _COLUMNS, columns) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _aligned(matrix: Tensor, rows: int) -> Tensor:
    """The matrix with aligned rows, and rows of zeros added up to `rows`. Copies only if needed."""
    count, width = matrix.shape
    multiple = _ALIGNMENT // matrix.dtype.itemsize
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % multiple == 0 and matrix.data_ptr() % _ALIGNMENT == 0
    if count == rows and aligned:
        return matrix
    copy = matrix.new_empty(rows, _round_up(width, multiple))[:, :width]
    copy[:count].copy_(matrix)
    copy[count:].zero_()
    return copy


@functools.cache
def _cuda_products(device: torch.device, dtype: torch.dtype) -> type[Products]:
    """The fastest class that this release of torch accepts, found by a 16 x 16 product. No result is read."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    for kind in (CudaProducts, CudaProductsThenSum):
        try:
            kind(a, dtype)._multiply(a, a, out, add=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError):  # TypeError: before torch 2.8 there is no `out_dtype`
            continue
        return kind
    return Products
