"""Planned rows and chunks are those that `stats.head` counts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from linear import chunk_of, force_products
from modes import DEFAULT_MODE

from gspo_kernels import GSPO, GSPOToken, KeptTokens, linear_policy_loss, linear_token_logprobs
from gspo_kernels.linear.gradient_rows import multiplied_rows
from gspo_kernels.planning.from_hidden import from_hidden, from_kept
from gspo_kernels.planning.shape import Batch, Shape, even_batch

pytestmark = DEFAULT_MODE

VOCAB, WIDTH, SEQUENCES = 61, 24, 6
SHARES = (1.0, 0.5, 0.2)


def shape_of(batch: Batch, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(batch, VOCAB, WIDTH, dtype, "cpu")


def counted(shape: Shape, advantages: torch.Tensor, mask: torch.Tensor, skip: bool = False) -> tuple[int, ...]:
    """`stats.head` of a loss of this shape; slightly off-policy, nothing is clipped."""
    batch = shape.batch
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch.tokens, WIDTH, generator=generator).to(shape.dtype).requires_grad_()
    head = torch.randn(VOCAB, WIDTH, generator=generator).to(shape.dtype).requires_grad_(not shape.frozen_head)
    token_ids = torch.randint(VOCAB, (batch.tokens,), generator=generator)
    old = None
    if not shape.on_policy:
        old = linear_token_logprobs(hidden.detach(), head.detach(), token_ids).logprobs + 1e-6
    boundaries = torch.arange(SEQUENCES + 1) * (batch.tokens // SEQUENCES)
    found = linear_policy_loss(
        hidden, head, token_ids, advantages, old, objective=shape.objective, cu_seqlens=boundaries, mask=mask,
        chunk_bytes=shape.chunk_bytes, skip_zero_advantage=skip,
    )  # fmt: skip
    assert found.stats.head is not None
    return tuple(int(count) for count in found.stats.head)


def masked_tail(length: int, batch: Batch) -> torch.Tensor:
    """As many unmasked rows of each response as the batch has."""
    return (torch.arange(length) < torch.tensor(batch.lengths)[:, None]).flatten()


@pytest.mark.parametrize(("products", "dtype"), [("native", torch.bfloat16), ("float32", torch.float32)], ids=str)
def test_planned_rows_are_counted_rows(products: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses of one chunk and of several, active in part: each token has an advantage of its own."""
    force_products(products, monkeypatch)
    for masked, active, frozen, on_policy, (length, rows) in itertools.product(
        (0.0, 0.3), SHARES, (False, True), (False, True), ((10, 24), (40, 16), (40, None))
    ):
        batch = even_batch(SEQUENCES * length, SEQUENCES, masked=masked, active=active)
        shape = replace(
            shape_of(batch, dtype), frozen_head=frozen, on_policy=on_policy, chunk_bytes=chunk_of(rows, VOCAB),
            objective=GSPOToken(eps_low=0.9, eps_high=9.0),
        )  # fmt: skip
        positions = torch.arange(length)
        advantages = (positions < torch.tensor(batch.active)[:, None]).float().flatten()
        found = counted(shape, advantages, masked_tail(length, batch))
        planned = from_hidden(shape)
        assert planned.head == found, (masked, active, frozen, on_policy, length, rows)
        assert planned.multiplied == found[0] + found[1] + (1 if frozen else 2) * found[2]


@pytest.mark.parametrize("skip", [False, True])
def test_responses_of_no_advantage(skip: bool) -> None:
    """GSPO's: a response has a gradient or not, and those of advantage 0 may be left out."""
    for active, frozen, (length, rows) in itertools.product(
        (1.0, 0.5, 1 / 3), (False, True), ((10, 24), (40, 16), (40, None))
    ):
        batch = even_batch(SEQUENCES * length, SEQUENCES, active=active, skip_zero_advantage=True)
        some = torch.tensor(batch.lengths) > 0
        if not skip:
            batch = batch._replace(lengths=(length,) * SEQUENCES)
        objective = GSPO(eps_low=0.9, eps_high=9.0)
        shape = replace(shape_of(batch), frozen_head=frozen, chunk_bytes=chunk_of(rows, VOCAB), objective=objective)
        found = counted(shape, some.float(), torch.ones(batch.tokens, dtype=torch.bool), skip)
        assert from_hidden(shape).head == found, (active, frozen, length, rows)


def test_kept_columns_are_no_product_of_the_head() -> None:
    rows, kept = SEQUENCES * 5, 4
    shape = replace(shape_of(even_batch(rows, SEQUENCES)), kept=kept, frozen_head=True)
    generator = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(rows, WIDTH, generator=generator).requires_grad_(), torch.randn(VOCAB, WIDTH)
    token_ids = torch.randint(VOCAB - kept, (rows,), generator=generator)
    columns = KeptTokens((token_ids[:, None] + torch.arange(kept)).flatten(), torch.arange(rows + 1) * kept)
    boundaries = torch.arange(SEQUENCES + 1) * 5
    stats = linear_policy_loss(
        hidden, head, token_ids, torch.ones(SEQUENCES), cu_seqlens=boundaries, kept=columns
    ).stats
    assert stats.head is not None
    planned = from_kept(shape)
    assert planned.head == tuple(int(count) for count in stats.head) == (0, 0, 0, 0)
    assert planned.operations == pytest.approx(2 * 2 * rows * kept * WIDTH)


def test_rows_of_a_gpu_are_rounded_up() -> None:
    """By the rule that `ActiveCount` follows, within the rows that a chunk has."""
    batch = Batch(1_024, (256,) * 4, (100, 0, 256, 130))
    shape = Shape(batch, 1_000, 64, torch.bfloat16, "cuda", chunk_bytes=512 * 1_024 * 4)
    assert from_hidden(shape).head == (
        1_024,
        0,
        multiplied_rows(100, 512, "cuda") + multiplied_rows(386, 512, "cuda"),
        2,
    )
    assert multiplied_rows(100, 512, "cuda") == 128 and multiplied_rows(500, 500, "cuda") == 500
