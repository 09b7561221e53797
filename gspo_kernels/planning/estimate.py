"""What a way to compute a loss takes: memory by what it is for, and products with the head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..linear.schedule import ChunkSize
from .shape import Shape

# Statistics of a row, its masks and shares, and the token stage in float64. Torch's profiler counts 70 to 95 on a CPU;
# the stage in Triton takes 20 to 25.
BYTES_A_ROW = 96

Held = Mapping[str, int]  # bytes, by what they are for


class HeadRows(NamedTuple):
    """As in `HeadWork`: how many rows are multiplied by the head."""

    forward: int
    recomputed: int
    backward: int
    chunks: int = 0


@dataclass(frozen=True)
class Estimate:
    """Of a loss and its gradients."""

    name: str
    held: Held  # at the peak, beside hidden states and head; what is returned is included
    head: HeadRows
    multiplied: float  # rows, once for each product with the whole head
    shape: Shape
    chunk: ChunkSize | None = None  # of a way that computes logits in chunks

    @property
    def peak(self) -> int:
        return sum(self.held.values())

    @property
    def products(self) -> float:
        """Multiplications of all N rows by the head, N x D x V."""
        return self.multiplied / max(self.shape.batch.tokens, 1)

    @property
    def operations(self) -> float:
        return 2.0 * self.multiplied * self.shape.width * self.shape.vocab


def largest(moments: Iterable[Held]) -> Held:
    return max(moments, key=lambda held: sum(held.values()))
