"""The gradient of a head, summed over chunks, and its rounding to the head's dtype.

A head in bf16 on a CPU has its gradient summed in 24 bits: a float32 without its last 8. `high` are the upper 16 bits
and become the returned gradient, rounded in place; `low` are the 8 bits after them. A float32 sum would hold one more
full-size copy of the head until it is rounded. The C++ kernels round each addition up or down such that errors do not
accumulate in one direction (csrc/cpu/sums.inc), so thousands of chunks are no problem either.

Everywhere else the sum is a float32 tensor, or a float64 one where products are float64. fp16 has three more bits than
bf16, which 24 bits would not serve as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows import cpu_rows

# Before a product is added it passes through a block that stays in the cache.
_BLOCK_BYTES_PER_THREAD, _MAX_BLOCK_BYTES = 4 << 20, 16 << 20


class Sums(NamedTuple):
    high: Tensor  # [V, D]: the whole sum or, in bf16, its upper 16 bits
    low: Tensor  # uint8 [V, D]; empty where `high` is the whole sum


def empty_sums(weight: Tensor, sum_dtype: torch.dtype) -> Sums:
    """Uninitialized sums for the gradient of a head [V, D]."""
    if not in_24_bits(weight.device.type, weight.dtype, sum_dtype):
        return Sums(weight.new_empty(weight.shape, dtype=sum_dtype), weight.new_empty(0, dtype=torch.uint8))
    return Sums(weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=torch.uint8))


def in_24_bits(device: str, dtype: torch.dtype, sum_dtype: torch.dtype) -> bool:
    """Whether the gradient of a head of this dtype is summed in 24 bits."""
    cpu_kernels = device == "cpu" and not cpu_rows.unavailable_reason()
    return cpu_kernels and dtype == torch.bfloat16 and sum_dtype == torch.float32


def block_rows(vocab: int, width: int) -> int:
    """Rows of the head's gradient in the float32 block that a product passes through, where sums are in 24 bits."""
    bytes = min(_BLOCK_BYTES_PER_THREAD * torch.get_num_threads(), _MAX_BLOCK_BYTES)
    return min(max(1, bytes // (4 * width)), vocab)


class WeightSums:
    """Sums of the first `vocab` rows of a head's gradient; the other rows of the head are padding."""

    def __init__(self, weight: Tensor, vocab: int, sum_dtype: torch.dtype) -> None:
        self._sums, self._vocab, self._products = empty_sums(weight, sum_dtype), vocab, 0

    def blocks(self) -> Iterator[tuple[slice, Tensor, bool]]:
        """Where to write the next product: (columns of the vocabulary, `out` for them, whether `out` is added to)."""
        high, low = self._sums
        if not low.numel():
            yield slice(0, self._vocab), high[: self._vocab], self._products > 0
        else:
            width = high.shape[1]
            rows = block_rows(self._vocab, width)
            buffer = high.new_empty(rows, width, dtype=torch.float32)
            for start in range(0, self._vocab, rows):
                columns = slice(start, min(start + rows, self._vocab))
                product = buffer[: columns.stop - start]
                yield columns, product, False
                cpu_rows.add_to_sums(high, low, product, start * width, self._products)
        self._products += 1

    def finished(self) -> Sums:
        """The sums; 0 in padding."""
        first = self._vocab if self._products else 0
        for part in self._sums:
            part[first:].zero_()
        return self._sums


def rounded(sums: Sums, factor: Tensor | None = None) -> Tensor:
    """The sums in 24 bits, times a factor (None: 1), in bf16 and in place of `high`."""
    high, low = sums
    if type(high) is not Tensor:  # traced by a compiler, which decides itself what is done in place
        values = to_float32(sums)
        return (values if factor is None else values * factor).to(high.dtype)
    cpu_rows.round_sums(high, low, 1.0 if factor is None else float(factor))  # a CPU tensor: it waits for nothing
    return high.detach()


def to_float32(sums: Sums) -> Tensor:
    """The value of sums in 24 bits."""
    high, low = sums
    return (high.view(torch.int16).to(torch.int32) << 16 | low.to(torch.int32) << 8).view(torch.float32)
