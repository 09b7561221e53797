"""The longest batch of which a loss fits into memory, by the estimates that the table shows."""

from __future__ import annotations

from collections.abc import Callable

from .estimate import Estimate


def longest(memory: int, estimate_of: Callable[[int], Estimate]) -> int:
    """How many responses fit, hidden states and head included; 0 if not one does.

    Args:
        estimate_of: of so many responses. More of them never take less memory.
    """

    def fits(responses: int) -> bool:
        found = estimate_of(responses)
        return found.peak + found.shape.operand_bytes <= memory

    most = 1
    while fits(most):
        most *= 2
    least = most // 2  # fits, or is 0; `most` does not
    while most - least > 1:
        middle = (least + most) // 2
        if fits(middle):
            least = middle
        else:
            most = middle
    return least
