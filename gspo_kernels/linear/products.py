"""The three matrix products between hidden states and a head: logits, and the gradients of both operands.

What they have in common on every device: operands are multiplied in their own dtype, sums are kept and delivered in
float32. Logits rounded to bf16 on their way out move GSPO's ratio by as much as its clip range.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..rows import cpu_rows
from ..torch_internals import MklGemm, mkl_gemm

# Of the head, in the dtype of the sums, where it is taken in parts: on a CPU those stay near the cache, and everywhere
# they are large enough for a product.
_BLOCK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES_ELSEWHERE = 512 << 20

# Libraries on a CPU multiply the last few rows by another kernel, which sums in another order. MKL does so for fewer
# than 4 rows, and for fewer than 4 rows of a thread. So rows are multiplied in blocks of 16, and at least 4 a thread:
# a row's logits then have the same bits whatever the other rows and the number of threads.
_ROWS = 16
_ROWS_PER_THREAD = 4
_COLUMNS = 16  # blocks of the vocabulary are multiples of it,
_COLUMNS_PER_THREAD = 64  # and no narrower, for the same reason: a head that is narrower itself is padded with zeros
_LEAST_COLUMNS = {torch.float64: 1024}  # below it, MKL's kernel for float64 depends on the number of columns as well
_ALIGNMENT = 64  # bytes; where every row of an operand begins


class Products:
    """Of hidden states [n, D] and a head `weight` [V, D], both in `dtype` or to be rounded to it.

    This base runs everywhere: float32 products (float64 for float64) of operands that are converted to it, a block of
    the vocabulary at a time. A product of two bf16 or fp16 numbers is exact in float32.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.sums = torch.float64 if dtype == torch.float64 else torch.float32  # of logits and every result
        self.gradient = self.sums  # of the logits' gradient, an operand too
        block = _BLOCK_BYTES.get(weight.device.type, _BLOCK_BYTES_ELSEWHERE)
        self._vocab = weight.shape[0]
        self._step = max(1, block // (weight.shape[1] * self.sums.itemsize))
        self._converts = not weight.dtype == dtype == self.sums
        self._least_rows = self._least_columns = 1
        self._in_blocks = weight.device.type == "cpu"
        if self._in_blocks:
            threads = torch.get_num_threads()
            self._least_rows = _round_up(_ROWS_PER_THREAD * threads, _ROWS)
            self._least_columns = max(_COLUMNS_PER_THREAD * threads, _LEAST_COLUMNS.get(dtype, 1))
            self._step = max(self._step, 2 * self._least_columns)  # halved at most where blocks are even

    def padded(self, rows: int) -> int:
        """How many rows are multiplied for `rows` of them."""
        return max(_round_up(rows, _ROWS), self._least_rows) if self._in_blocks and rows else rows

    @property
    def most_padding(self) -> int:
        """The largest `padded(rows) - rows`."""
        return max(_ROWS, self._least_rows) - 1 if self._in_blocks else 0

    @property
    def converted_bytes(self) -> int:
        """Memory for the block of the weight that is converted at a time; 0 where the weight is multiplied as it is."""
        rows = min(max(self._step, _COLUMNS), self._vocab) if self._converts else 0
        return rows * self.weight.shape[1] * self.sums.itemsize

    def logits(self, hidden: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """[n, D] -> the first n rows of `out` [padded(n), V]; what the others hold afterwards means nothing."""
        if bias is not None:
            out.copy_(bias.to(self.sums).expand_as(out))
        operand = self._operand(hidden)
        if self._in_blocks:
            operand = _aligned(operand, out.shape[0])
        for columns, weight in self._weights(self._step):
            multiply = self._multiply_narrow if len(weight) < self._least_columns else self._multiply
            multiply(operand, weight.t(), out[:, columns], bias is not None)

    def hidden_gradient(self, gradient: Tensor, factor: float = 1.0) -> Tensor:
        """[n, V] -> [n, D] times a factor."""
        out = torch.empty(gradient.shape[0], self.weight.shape[1], dtype=self.sums, device=gradient.device)
        for columns, weight in self._weights(self._step if self._converts else self._vocab):
            self._multiply(gradient[:, columns], weight, out, columns.start > 0, factor)
        return out

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        """[n, V], [n, D] -> [V, D] times a factor, added to what is there or in its place."""
        self._multiply(gradient.t(), self._operand(hidden), out, add, factor)

    def _multiply_narrow(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """`_multiply` of a head with fewer columns than every thread should have: with columns of zeros beside them."""
        columns = b.shape[1]
        padded = b.new_zeros(self._least_columns, b.shape[0])
        padded[:columns].copy_(b.t())
        product = out.new_zeros(out.shape[0], self._least_columns)
        if add:
            product[:, :columns].copy_(out)
        self._multiply(a, padded.t(), product, add)
        out.copy_(product[:, :columns])

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype).to(self.sums)

    def _weights(self, step: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the weight as operands."""
        blocks = _even_blocks(self._vocab, step)
        if not self._converts:
            yield from ((block, self.weight[block]) for block in blocks)
            return
        most = max(block.stop - block.start for block in blocks)
        room = self.weight.new_empty(most, self.weight.shape[1], dtype=self.sums)
        for block in blocks:
            converted = room[: block.stop - block.start]
            converted.copy_(self.weight[block].to(self.dtype))
            yield block, converted

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        """a b times a factor, added to `out` or in its place."""
        torch.addmm(out, a, b, beta=float(add), alpha=factor, out=out)


class _OfOperands(Products):
    """Products of bf16 or fp16 operands by units made for them; the logits' gradient is such an operand."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__(weight.to(dtype).contiguous(), dtype)
        self.gradient = dtype
        self._step, self._converts = self._vocab, False

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype).contiguous()


class CudaProducts(_OfOperands):
    """cuBLAS, which adds bf16 or fp16 products to a float32 matrix (torch 2.10 and later)."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=float(add), alpha=factor, out=out)


class CudaProductsThenSum(_OfOperands):
    """For torch 2.8 and 2.9, whose `addmm` refuses a float32 matrix to add to; their `mm` returns float32 products.

    What is added passes through a buffer, a block of rows at a time.
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


class MklProducts(_OfOperands):
    """MKL's product of bf16 matrices into float32, which torch has in it but offers to no one."""

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        gemm = _mkl_gemm()
        assert gemm is not None
        gemm(a, b, out, add, factor)


def products(weight: Tensor, dtype: torch.dtype) -> Products:
    """The fastest there is on this device."""
    if weight.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _cuda_products(weight.device, dtype)(weight, dtype)
    if _by_mkl(weight.device.type, dtype):
        return MklProducts(weight, dtype)
    return Products(weight, dtype)


def _even_blocks(columns: int, most: int) -> list[slice]:
    """Of almost equal size, multiples of 16 columns: no last block is so narrow that another kernel multiplies it."""
    if columns <= most:
        return [slice(0, columns)]
    units = -(-columns // _COLUMNS)
    count = -(-units // max(1, most // _COLUMNS))
    ends = [min(units * i // count * _COLUMNS, columns) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _aligned(matrix: Tensor, rows: int) -> Tensor:
    """The matrix with zeros for more rows, each row aligned alike; a copy only where it is not so already."""
    count, width = matrix.shape
    multiple = _ALIGNMENT // matrix.dtype.itemsize
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % multiple == 0 and matrix.data_ptr() % _ALIGNMENT == 0
    if count == rows and aligned:
        return matrix
    copy = matrix.new_empty(rows, _round_up(width, multiple))[:, :width]
    copy[:count].copy_(matrix)
    copy[count:].zero_()
    return copy


def usual_chunk_bytes(device: str, dtype: torch.dtype, gradient: bool) -> int:
    """Memory for a chunk's logits, if nobody says how much: enough rows for products to run at their full speed.

    Every chunk adds to the whole gradient of the head. The faster the products, the more rows it takes until that is
    not what they wait for: of V = 151,936 some 2,000 on a GPU; on a CPU 512 in float32, 768 where a head is converted
    for each chunk, and by bf16 units 1,024, the gradients of two chunks.
    """
    if device == "cuda":
        return 1280 << 20
    return (448 if gradient and dtype.itemsize == 2 else 300) << 20


def keeps_gradients(device: str, dtype: torch.dtype) -> bool:
    """Whether gradients of logits are half as wide as logits: kept in their memory, more rows go into a product."""
    return _by_mkl(device, dtype)


def _by_mkl(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and dtype == torch.bfloat16 and _mkl_gemm() is not None


@functools.cache
def _cuda_products(device: torch.device, dtype: torch.dtype) -> type[Products]:
    """The fastest that this release of torch accepts, found by a product of 16 x 16. No result is read."""
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


@functools.cache
def _mkl_gemm() -> MklGemm | None:
    """None where the processor has no units for it, or torch offers none that works."""
    return mkl_gemm() if cpu_rows.multiplies_bfloat16() else None
