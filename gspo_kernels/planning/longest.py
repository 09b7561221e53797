"""The longest batch of which a loss fits into memory, by the estimates that the table shows."""

from __future__ import annotations

from collections.abc import Callable

from .estimate import Estimate


def longest(memory: int, estimate_of: Callable[[int], Estimate]) -> int:
    """How many responses fit, hidden states and head included, while one more does not; 0 if not one fits.

    A long batch takes memory in proportion: every other guess interpolates, the others halve the range.

    Args:
        estimate_of: of so many responses. More of them take more memory, but for up to 1% on a CPU, where a chunk is
            full.
    """

    def total(responses: int) -> int:
        found = estimate_of(responses)
        return found.peak + found.shape.operand_bytes

    least, most, below, above = 0, 1, 0, total(1)  # `least` fits
    while above <= memory:
        least, most, below, above = most, 2 * most, above, total(2 * most)
    interpolates = True
    while most - least > 1:
        share = (memory - below) / (above - below) if interpolates else 0.5
        middle = min(max(least + int(share * (most - least)), least + 1), most - 1)
        found = total(middle)
        if found <= memory:
            least, below = middle, found
        else:
            most, above = middle, found
        interpolates = not interpolates
    return least
