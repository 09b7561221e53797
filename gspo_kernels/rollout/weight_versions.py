"""Which version of the weights sampled each token: engines whose weights are updated while they sample report it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from .parsing import LAST_PART, describe, get, read_list


@dataclass(frozen=True, eq=False)
class WeightVersions:
    """Which version of the weights sampled each token, as the engine reported it."""

    labels: tuple[str, ...]  # distinct, in the order in which they appear
    of_tokens: Tensor  # int64, one per token: an index into `labels`; -1 where nothing was sampled or reported

    def masks(self, mask: Tensor) -> dict[str, Tensor]:
        """For each label the tokens of `mask` (bool, one per token) that this version sampled."""
        return {label: mask & (self.of_tokens == i) for i, label in enumerate(self.labels)}

    def to(self, device: Any) -> WeightVersions:
        return WeightVersions(self.labels, self.of_tokens.to(device))


Span = tuple[str, int]  # a label, and how many tokens it sampled


def read_versions(where: str, spans: Any, tokens: int) -> list[Span] | None:
    """The spans (version, start, end) that cover a response's tokens in order; None where the engine returned none."""
    if spans is None:
        return None
    found = list[Span]()
    at = 0
    for i, span in enumerate(read_list(where, spans, "spans with `version`, `start` and `end`")):
        if get(span, "version") is None:
            raise TypeError(f"{where}[{i}]: expected a span with `version`, `start` and `end`; got {describe(span)}")
        start = checks.whole(f"{where}[{i}].start", get(span, "start"), "the index of a token")
        end = checks.whole(f"{where}[{i}].end", get(span, "end"), "the index after a token")
        if start != at or end < start:
            raise ValueError(f"{where}[{i}]: expected a span of tokens that starts at {at}; got {start} to {end}")
        found.append((str(get(span, "version")), end - start))
        at = end
    if at != tokens:
        part = f": {LAST_PART}" if at > tokens else ""
        raise ValueError(f"{where}: expected spans of the {tokens} sampled tokens; got spans of {at}{part}")
    return found


def versions_of_tokens(found: list[tuple[int, list[Span] | None]], device: torch.device) -> WeightVersions | None:
    """Of all responses (tokens, spans), one after the other; None where no response has spans."""
    if all(spans is None for _, spans in found):
        return None
    labels = tuple(dict.fromkeys(label for _, spans in found for label, count in spans or () if count))
    numbers = {label: i for i, label in enumerate(labels)}
    runs = list[tuple[int, int]]()  # an index into labels, and for how many tokens
    for tokens, spans in found:
        runs += [(-1, tokens)] if spans is None else [(numbers[label], count) for label, count in spans if count]
    indices, counts = torch.tensor(runs, dtype=torch.int64, device="cpu").view(-1, 2).unbind(1)
    return WeightVersions(labels, indices.repeat_interleave(counts).to(device))
