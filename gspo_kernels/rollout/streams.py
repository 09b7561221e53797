"""Parts of vLLM's streams: the last one looks like a whole response, but has only the newest tokens.

A `RequestOutput` of kind DELTA says `finished=True`; its `cumulative_logprob` is still that of all tokens. A server's
last chunk has a finish reason; its `usage` is missing, or counts more tokens than the chunk has.
"""

from __future__ import annotations

import math
import numbers as abstract
from collections.abc import Mapping
from typing import Any

from ..base.checks import HIGHEST_LOGPROB
from .parsing import LAST_PART, LOWEST, get

ROUNDING = 2.0**-23  # of each addition, relative to the sum, where a version or a reader sums in float32


def refuse_part(where: str, cumulative: Any, logprobs: list[float]) -> None:
    """Raises where `cumulative_logprob` is not the sum. Not every version and request has it."""
    if not isinstance(cumulative, abstract.Real) or not math.isfinite(cumulative):
        return
    cumulative = float(cumulative)
    total = sum(logprobs)
    if abs(cumulative - total) <= ROUNDING * (1 + len(logprobs)) * max(1.0, abs(cumulative)):
        return
    if all(LOWEST < x <= HIGHEST_LOGPROB for x in logprobs):  # others are refused for what they are, or masked
        raise ValueError(
            f"{where}.cumulative_logprob: expected the sum of the {len(logprobs)} log-probabilities, {total:g}; got "
            f"{cumulative:g}: {LAST_PART}"
        )


def refuse_chunk(where: str, response: Any) -> None:
    """Raises for what shows before its tokens are counted."""
    kind, usage = str(get(response, "object")), get(response, "usage")
    if kind.endswith("chunk"):
        raise ValueError(f"{where}.object: expected that of a whole response; got {kind!r}: {LAST_PART}")
    stated = "usage" in response if isinstance(response, Mapping) else hasattr(response, "usage")
    if usage is None and (stated or kind == "text_completion"):
        raise ValueError(
            f"{where}.usage: expected that of a whole response; got None: {LAST_PART}. If it was removed, leave it in"
        )


def refuse_count(where: str, usage: Any, tokens: int) -> None:
    """Raises where all choices have `tokens` tokens and the usage says otherwise."""
    count = get(usage, "completion_tokens")
    if count is not None and count != tokens:
        raise ValueError(
            f"{where}.usage.completion_tokens: expected {tokens}, the tokens of all choices; got {count}: {LAST_PART}. "
            "If choices were removed, leave them in, and drop their responses from the result"
        )
