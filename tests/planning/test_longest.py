"""The longest batch: one response more does not fit, and more responses take more memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels.planning.estimate import Estimate
from gspo_kernels.planning.from_hidden import from_hidden, from_kept
from gspo_kernels.planning.from_logits import compiled_torch, from_logits, plain_torch
from gspo_kernels.planning.longest import longest
from gspo_kernels.planning.shape import Shape, even_batch

pytestmark = DEFAULT_MODE

WAYS: list[Callable[[Shape], Estimate]] = [
    plain_torch, compiled_torch, partial(from_logits, overwrite=False), partial(from_logits, overwrite=True),
    from_hidden, from_kept,
]  # fmt: skip
SHAPE = Shape(even_batch(1, 1), 32_000, 1_024, torch.bfloat16, "cuda", kept=8)


def estimate(way: Callable[[Shape], Estimate], responses: int, length: int, shape: Shape = SHAPE) -> Estimate:
    return way(replace(shape, batch=even_batch(responses * length, responses, masked=0.2, active=0.5)))


@pytest.mark.parametrize("way", WAYS, ids=["torch", "compile", "logits", "overwrite", "hidden", "kept"])
@pytest.mark.parametrize("memory", [10**9, 8 * 10**9])
def test_one_response_more_does_not_fit(way: Callable[[Shape], Estimate], memory: int) -> None:
    def total(responses: int) -> int:
        found = estimate(way, responses, 700)
        return found.peak + found.shape.operand_bytes

    found = longest(memory, partial(estimate, way, length=700), 1 << 15)
    assert found >= 1 and total(found) <= memory < total(found + 1)


@pytest.mark.parametrize("way", WAYS, ids=["torch", "compile", "logits", "overwrite", "hidden", "kept"])
def test_beyond_what_is_estimated_it_follows_a_line(way: Callable[[Shape], Estimate]) -> None:
    estimate_of = partial(estimate, way, length=700, shape=replace(SHAPE, chunk_bytes=2_048 * 32_000 * 4))
    exact, by_line = (longest(320 * 10**9, estimate_of, most) for most in (1 << 17, 1 << 11))
    assert by_line == pytest.approx(exact, rel=0.01)


def test_the_line_is_not_followed_beyond_the_memory() -> None:
    """Products of 2,048 rows of a wide vocabulary: the peak moves to the rounding of gradients late."""
    shape = replace(SHAPE, vocab=151_936, width=64, chunk_bytes=151_936 * 4 * 2_048)
    estimate_of = partial(estimate, from_hidden, length=16_000, shape=shape)
    found = estimate_of(longest(40 * 10**9, estimate_of, 16))
    assert 0.9 * 40e9 < found.peak + found.shape.operand_bytes <= 40e9


def test_none_fits() -> None:
    assert longest(10**6, partial(estimate, from_hidden, length=700), 1 << 15) == 0


@pytest.mark.parametrize("way", WAYS, ids=["torch", "compile", "logits", "overwrite", "hidden", "kept"])
@pytest.mark.parametrize("options", [{}, {"on_policy": True}, {"frozen_head": True}, {"device": "cpu"}], ids=str)
def test_more_responses_take_more(way: Callable[[Shape], Estimate], options: dict[str, object]) -> None:
    """Which the search needs, over the sizes at which chunks fill up. There the last product may have fewer rows."""
    shape = replace(SHAPE, chunk_bytes=1_024 * 32_000 * 4, **options)  # type: ignore[arg-type]
    for length in (100, 1_500):
        peaks = [estimate(way, responses, length, shape).peak for responses in range(1, 60)]
        assert all(most <= 1.01 * peak for most, peak in zip(itertools.accumulate(peaks, max), peaks, strict=True))
