"""How many rows the two buffers of a head have: one for the logits of a chunk, one for gradients of logits.

`head.py` allocates what is decided here; `gspo_kernels/planning` counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .gradient_rows import CHUNKS_OF_GRADIENTS
from .products import Products
from .schedule import ChunkSize
from .types import NeedsGrad


class Buffers(NamedTuple):
    rows: int  # the most that are loaded at a time
    logits: int  # rows of the buffer for logits
    gradients: int  # rows of the buffer for gradients; 0: they are written over the logits, or there are none
    in_place: bool  # whether they are written over the logits
    together: bool  # whether gradients of several chunks may enter one product
    logit_bytes: int  # of one logit
    gradient_bytes: int  # of one gradient of a logit

    def take(self, rows: int, pending: int) -> bool:
        """Whether there is memory for the logits of `rows`, and then their gradients, beside `pending` gradients."""
        if self.in_place:
            return self.first_row(pending) + rows <= self.rows
        return pending == 0 or (self.together and pending + rows <= self.gradients)

    def first_row(self, pending: int) -> int:
        """Where logits begin in their buffer: behind the gradients that are in it."""
        return -(-pending * self.gradient_bytes // self.logit_bytes) if self.in_place else 0


def buffers_for(
    rows: int, chunk: ChunkSize, of_logits: Sequence[Products], needs_grad: NeedsGrad, in_place: bool
) -> Buffers:
    """For a pass over so many rows.

    Args:
        of_logits: the products of each term, those of the head first.
    """
    head, most = of_logits[0], min(chunk.max_rows, max(rows, 1))
    gradients = 0
    if needs_grad.any() and not in_place:
        # fp16 gradients are scaled chunk by chunk. float32 products are so slow that their number does not matter.
        several = needs_grad.weight and head.gradient_dtype == torch.bfloat16
        gradients = min(CHUNKS_OF_GRADIENTS * most, max(rows, 1)) if several else most
    return Buffers(
        rows=most,
        logits=max(of.buffer_rows(most) for of in of_logits),
        gradients=gradients,
        in_place=in_place,
        together=head.gradient_dtype != torch.float16,
        logit_bytes=head.sum_dtype.itemsize,
        gradient_bytes=head.gradient_dtype.itemsize,
    )
