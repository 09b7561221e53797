"""Which rows of a chunk have a gradient, and where each row's gradient is written.

Only active rows, those with a gradient, take part in the gradient products. Where gradients overwrite logits, the
orders here guarantee that no row of logits is overwritten before it has been read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.types import Upstream

_ROUND_ON_GPU = 128  # rows of a gradient product: few different shapes, which the library's kernels fill


# Beside float32 logits, a GPU has memory for the 16-bit gradients of this many chunks. They enter one product for the
# head's gradient, because each product reads and writes all float32 sums. At V = 151,936 and D = 4,096, 8,192 rows took
# 1.0 ms more on an H100 (0.8 on an H200) for every further chunk. Two chunks of 2,048 rows in a product save half of
# that for 0.62 GB; chunks of 4,096 rows would do the same for 1.87 GB.
CHUNKS_OF_GRADIENTS = 2


class PendingProducts(NamedTuple):
    """Gradients of logits that have been written and not yet multiplied."""

    gradient: Tensor  # [n, V], of one chunk or several; in each, active rows first
    hidden_indices: Tensor  # [n], which rows of the hidden states they belong to
    active: Tensor | None  # [n] bool, which rows have a gradient; None: all
    active_count: ActiveCount | None = None  # of the last chunk; None: all rows are multiplied
    first: int = 0  # where the rows of the last chunk begin
    exponent: int = 0  # gradients were scaled by 2 to this power

    def counted(self) -> PendingProducts:
        """Without the inactive rows at the end of the last chunk; the host waits for their number."""
        if self.active_count is None:
            return self
        count, exponent = self.active_count.wait()
        rows = self.first + count
        active = None if self.active is None else self.active[:rows]
        return PendingProducts(self.gradient[:rows], self.hidden_indices[:rows], active, exponent=exponent)


class ActiveCount:
    """How many rows are active, and the exponent of the power of two that scaled their gradients.

    A GPU copies both to the host while it runs other work; `wait` is called once more work is queued. In a CUDA graph
    the host may not wait: all rows are then taken, and nothing is scaled.
    """

    def __init__(self, active: Tensor, exponent: Tensor | None) -> None:
        self._rows, self._event = active.shape[0], None
        self._numbers: Tensor | None = None
        if active.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.exponent = None
            return
        self.exponent = exponent  # 0-d int64; None: not scaled
        count = active.sum()
        numbers = torch.stack([count, torch.zeros_like(count) if exponent is None else exponent])
        if active.device.type == "cuda":
            self._numbers = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers

    def wait(self) -> tuple[int, int]:
        """(rows, exponent); rows are rounded up on a GPU."""
        if self._numbers is None:
            return self._rows, 0
        if self._event is not None:
            self._event.synchronize()
        count, exponent = self._numbers.tolist()
        return multiplied_rows(count, self._rows, "cpu" if self._event is None else "cuda"), exponent


def multiplied_rows(active: int, rows: int, device: str) -> int:
    """Rows of a chunk that enter the gradient products: the active ones, and on a GPU some more."""
    return active if device != "cuda" else min(-(-active // _ROUND_ON_GPU) * _ROUND_ON_GPU, rows)


def fp16_exponent(upstream: Upstream, temperature: Tensor, tanh_scale: Tensor | None) -> Tensor:
    """0-d: the power of two that brings the largest gradient that a logit may have to between 2^13 and 2^14.

    That is an upstream gradient times the steepest slope of its row: of z = logit / temperature, or of a capped logit.
    The range of fp16 is 6e-8 to 65,504. Unscaled, the gradients of most logits would be 0 in it, because they are
    smaller by the factor p.

    Args:
        temperature: [rows] or 0-d, as in `Rows`, like `tanh_scale`.
    """
    arrays = Upstream(*upstream.by_statistic())
    steepest = 1.0 / temperature if tanh_scale is None else tanh_scale / temperature
    sizes = [(x.abs() * steepest).nan_to_num(0.0).amax().float() for x in arrays[:3] if x is not None and x.numel()]
    if not sizes:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    largest = torch.stack(sizes).amax()
    valid = torch.isfinite(largest) & (largest > 0.0)
    return (13 - torch.floor(torch.log2(torch.where(valid, largest, 1.0)))).clamp(-60, 60).to(torch.int64)


def doubling_ranges(count: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ...: ranges of rows to write one after the other.

    For gradients at half the width of logits, written in the order of the logits: each range then overwrites only
    logits that an earlier range has read, or the row's own.
    """
    start, stop = 0, 1
    while start < count:
        yield start, min(stop, count)
        start, stop = stop, 2 * stop


def order_in_place(active: Tensor, count: int) -> Tensor:
    """[count]: which row's gradient is written to each of the first `count` rows, in any order of time.

    An active row stays where it is, or moves from further behind to the position of an inactive one. No position is
    overwritten that another row still has to read.
    """
    order = torch.arange(count, device=active.device)
    order[~active[:count]] = active[count:].nonzero()[:, 0] + count
    return order
