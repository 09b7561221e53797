"""The plan of a batch: every way to compute its loss, with the longest batch that each has memory for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .estimate import Estimate
from .from_hidden import from_hidden, from_kept
from .from_logits import compiled_torch, from_logits, plain_torch
from .longest import longest
from .shape import Batch, Shape


@dataclass(frozen=True)
class Way:
    estimate: Estimate
    responses: int  # of the longest batch that fits


@dataclass(frozen=True)
class Plan:
    """`memory` is what the loss may take, hidden states and head included."""

    shape: Shape
    length: int  # tokens of a response
    memory: int
    plain: Way
    compiled: Way
    logits: Way
    overwritten: Way
    hidden: Way
    kept: Way | None

    def ways(self) -> list[Way]:
        ways = (self.plain, self.compiled, self.logits, self.overwritten, self.hidden, self.kept)
        return [way for way in ways if way is not None]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes, and numbers of tokens and rows."""
        shape = self.shape
        return {
            "tokens": shape.batch.tokens,
            "responses": len(shape.batch.lengths),
            "vocab": shape.vocab,
            "hidden": shape.width,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "device": shape.device,
            "memory": self.memory,
            "hidden_states_and_head": shape.operand_bytes,
            "ways": [
                {
                    "name": way.estimate.name,
                    "peak": way.estimate.peak,
                    "held": {name: size for name, size in way.estimate.held.items() if size},
                    "products": way.estimate.products,
                    "operations": way.estimate.operations,
                    "head": way.estimate.head._asdict(),
                    "longest_batch": way.responses * self.length,
                }
                for way in self.ways()
            ],
        }


def plan_of(shape: Shape, length: int, memory: int, batch_of: Callable[[int], Batch]) -> Plan:
    """
    Args:
        length: tokens of a response.
        batch_of: the batch of so many responses.
    """

    def way(estimate: Callable[[Shape], Estimate]) -> Way:
        fitting = longest(memory, lambda responses: estimate(replace(shape, batch=batch_of(responses))))
        return Way(estimate(shape), fitting)

    return Plan(
        shape,
        length,
        memory,
        plain=way(plain_torch),
        compiled=way(compiled_torch),
        logits=way(partial(from_logits, overwrite=False)),
        overwritten=way(partial(from_logits, overwrite=True)),
        hidden=way(from_hidden),
        kept=way(from_kept) if shape.kept else None,
    )
