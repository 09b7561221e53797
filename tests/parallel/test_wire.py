"""The arithmetic against numbers worked out by hand, and the page against the script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import wire  # docs/scripts/wire.py
from wire import Step

# Small enough for the head: 2 responses a GPU of 4 rows each, so 8 rows.
SMALL = Step(tensor=2, context=4, data=3, responses=6, tokens=16, hidden=3, vocabulary=10)


def test_a_small_step() -> None:
    assert (SMALL.gpus, SMALL.micro_batches, SMALL.rows) == (24, 2, 8)
    assert wire.gathered_logits(SMALL) == 8 * 5 * 2  # rows, the other rank's columns, bf16
    assert wire.megatron_cross_entropy(SMALL) == 8 * (1 + 2) * 4  # over 2 ranks a ring brings 2 x 1/2 of the size
    assert wire.our_rows(SMALL) == 8 * 16  # one other rank's 16 bytes a row
    assert wire.hidden_gradient(SMALL) == 8 * 3 * 4
    assert wire.slime_log_probs(SMALL) == 2 * 2 * 1.5 * 16 * 4  # collectives, responses, 2 x 3/4, tokens, fp32
    assert wire.gathered_log_probs(SMALL) == 3 * 8 * 4  # 3 other ranks' rows
    assert wire.our_sequences(SMALL) == 2 * 3 * (2 + 12) * 8  # responses, other ranks, numbers, fp64
    assert wire.our_count(SMALL) == 2 * (8 + 12 * 4)  # of two other ranks
    assert (wire.logits_of_response(SMALL), wire.logits_of_response(SMALL, 2)) == (4 * 10 * 2, 4 * 5 * 2)


def test_qwen_on_64_gpus() -> None:
    step = next(step for step in wire.STEPS if step.gpus == 64)
    assert step.rows == 1_048_576  # 128 responses of 8,192 rows
    assert wire.gathered_logits(step) == 3 * 1_048_576 * 37_984 * 2
    assert wire.our_rows(step) == 1_048_576 * 48
    assert wire.megatron_cross_entropy(step) == 1_048_576 * 18
    assert wire.our_sequences(step) == 128 * 336


def test_one_rank_receives_nothing() -> None:
    alone = replace(SMALL, tensor=1, context=1, data=1)
    assert wire.gathered_logits(alone) == wire.megatron_cross_entropy(alone) == wire.our_rows(alone) == 0
    assert wire.slime_log_probs(alone) == wire.our_sequences(alone) == wire.our_count(alone) == 0


def test_every_layout_shares_the_step_evenly() -> None:
    assert [step.gpus for step in wire.STEPS] == [8, 16, 32, 64, 128, 256, 512]
    for step in wire.STEPS:
        assert (step.responses % step.data, step.tokens % step.context, step.vocabulary % step.tensor) == (0, 0, 0)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (96, "96 B"),
        (350.0, "350 B"),
        (349.6, "350 B"),
        (999.6, "1.00 kB"),
        (99.96, "100 B"),
        (6144, "6.14 kB"),
        (3e12, "3 TB"),
    ],
)
def test_three_digits(count: float, words: str) -> None:
    assert wire.readable(count) == words


def test_the_page_has_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    for table in wire.markdown():
        assert table in page, "python docs/scripts/wire.py prints the tables of docs/parallel.md"
