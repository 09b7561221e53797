"""Trainers' names of reductions: one table, known to the losses, shown on the page about migration."""

from __future__ import annotations

import pytest
import reduction_table

from gspo_kernels.integrations.reductions import NORMALIZERS, OPTIONS, reduction_of
from gspo_kernels.losses.reduction import AGGREGATIONS


def test_every_reduction_is_one_of_the_losses() -> None:
    found = [reduction for option in OPTIONS.values() for reduction in option.values.values()]
    assert {reduction.aggregation for reduction in found} <= set(AGGREGATIONS)
    assert {reduction.normalizer for reduction in found} <= set(NORMALIZERS)


def test_names_are_the_trainers() -> None:
    assert reduction_of("verl", "seq-mean-token-sum") == ("sequence_sum", "responses")
    with pytest.raises(ValueError, match=r"loss_agg_mode: expected .*'token-mean'.*; got 'token_mean'"):
        reduction_of("verl", "token_mean")


def test_the_page_has_the_table() -> None:
    text = reduction_table.PAGE.read_text()
    assert reduction_table.with_table(text) == text, "run python docs/scripts/reduction_table.py"
