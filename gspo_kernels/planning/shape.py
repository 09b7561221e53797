"""What a plan is for: the rows of a batch, the head, and how the loss is called. Numbers alone, no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..linear.types import NeedsGrad
from ..losses.clipped import GSPO
from ..losses.objectives import Objective


class Batch(NamedTuple):
    """Tokens of responses, one response after the other."""

    tokens: int  # rows of hidden states and logits, masked ones included
    lengths: tuple[int, ...]  # unmasked rows of each response
    active: tuple[int, ...]  # of these, the rows with a gradient: neither clipped nor of advantage 0
    mask: bool = True  # whether a mask or padding says which rows count

    @property
    def rows(self) -> int:
        return sum(self.lengths)


def even_batch(
    tokens: int, sequences: int, *, masked: float = 0.0, active: float = 1.0, skip_zero_advantage: bool = False
) -> Batch:
    """Responses of one length, to a token.

    Args:
        masked: share of the rows, the same in every response.
        active: share of the unmasked rows, the same in every response. With `skip_zero_advantage` it is a share of the
            responses: the others have advantage 0, and none of their rows is multiplied.
    """
    ends = _ends(tokens, sequences)
    lengths = [_share(end, 1.0 - masked) - _share(begin, 1.0 - masked) for begin, end in ends]
    if skip_zero_advantage:
        some = [_share(i + 1, active) - _share(i, active) for i in range(sequences)]
        lengths = [length * one for length, one in zip(lengths, some, strict=True)]
        return Batch(tokens, tuple(lengths), tuple(lengths))
    before, of_each = 0, []
    for length in lengths:
        of_each.append(_share(before + length, active) - _share(before, active))
        before += length
    return Batch(tokens, tuple(lengths), tuple(of_each))


def _ends(tokens: int, sequences: int) -> list[tuple[int, int]]:
    return [(tokens * i // sequences, tokens * (i + 1) // sequences) for i in range(sequences)]


def _share(count: int, share: float) -> int:
    return round(count * share)


@dataclass(frozen=True)
class Shape:
    batch: Batch
    vocab: int  # columns of the head; with several ranks those of one
    width: int  # of hidden states
    dtype: torch.dtype  # of hidden states, head and logits
    device: str  # its type: "cuda" or "cpu"; it may be elsewhere
    frozen_head: bool = False
    gradient: bool = True  # False: log-probabilities alone
    on_policy: bool = False
    chunk_bytes: int | None = None
    sharded: bool = False  # whether other ranks have the other columns
    kept: int = 0  # columns of a row that a sampler kept; 0: all
    objective: Objective = field(default_factory=GSPO)

    @property
    def needs_grad(self) -> NeedsGrad:
        return NeedsGrad(self.gradient, self.gradient and not self.frozen_head, False)

    @property
    def operand_bytes(self) -> int:
        """Hidden states and head, which every way begins with."""
        return (self.batch.tokens + self.vocab) * self.width * self.dtype.itemsize
