"""The longest batch of which a loss fits into memory, by the estimates that the table shows."""

from __future__ import annotations

from collections.abc import Callable

from .estimate import Estimate

_FARTHEST = 512  # times `most_estimated`: one estimate so far away takes seconds


def longest(memory: int, estimate_of: Callable[[int], Estimate], most_estimated: int) -> int:
    """How many responses fit, hidden states and head included, while one more does not; 0 if not one fits.

    A long batch takes memory in proportion: every other guess interpolates, the others halve the range.

    Args:
        estimate_of: of so many responses. More of them take more memory, but for up to 1% on a CPU, where a chunk is
            full.
        most_estimated: an estimate of more responses would take long. Where more fit, the result is on the line
            through the last two estimates.
    """

    def total(responses: int) -> int:
        found = estimate_of(responses)
        return found.peak + found.shape.operand_bytes

    least, most, below, above = 0, 1, 0, total(1)  # `least` fits
    while above <= memory:
        if least and 2 * most > most_estimated:
            found = most + (memory - above) * (most - least) // (above - below)
            if found <= _FARTHEST * most and (taken := total(found)) > memory:
                # Beyond some length memory grows faster, where the rounding of gradients takes the most of it.
                found = most + (memory - above) * (found - most) // (taken - above)
            return found
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
