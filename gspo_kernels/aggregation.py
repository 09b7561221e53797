"""From numbers per token to one: the only place that divides by a count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .layout import Layout

AGGREGATIONS = ("sequence_mean", "token_mean", "sequence_sum")


def token_weights(layout: Layout, aggregation: str, normalizer: float | Tensor | None) -> Tensor:
    """What each token's number counts for in the loss: `loss = sum_t weight_t * x_t`.

    - "sequence_mean": mean over a sequence's unmasked tokens, then over sequences;
    - "token_mean":    mean over all unmasked tokens;
    - "sequence_sum":  sum over a sequence's unmasked tokens, mean over sequences.

    A sequence without an unmasked token is not counted. `normalizer` stands for the local count (of sequences, or of
    tokens for "token_mean"): with a global one, the shares of any split of the batch add up to the whole.

    Returns: [tokens] float64, 0 where masked.
    """
    count = layout.num_tokens if aggregation == "token_mean" else layout.num_sequences
    share = 1.0 / count.clamp(min=1) if normalizer is None else torch.ones_like(count) / normalizer
    if aggregation == "sequence_mean":
        return layout.spread(share / layout.lengths.clamp(min=1))
    return layout.select(share.expand(layout.mask.shape))


def check(aggregation: Any, normalizer: Any) -> None:
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    if isinstance(normalizer, Tensor):
        checks.shape("normalizer", normalizer, (), "one global count")
    elif normalizer is not None:
        checks.number("normalizer", normalizer, "a global count of sequences, or of tokens for token_mean", above=0.0)
