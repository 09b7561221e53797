"""A row's statistics from hidden states are equal to the bit, whatever is computed along with the row.

Each test is repeated for every way in which products are computed: on a CPU by each library, on a GPU in each dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from linear import chunk_of, force_products
from modes import NOT_INTERPRETED, ON_GPU, on_device
from torch import Tensor

import gspo_kernels

pytestmark = NOT_INTERPRETED  # the logits of a row; its statistics alone are in test_row_independence.py

ROWS, WIDTH, VOCAB = 517, 48, 301
PATHS = {
    "bf16": torch.bfloat16,  # as this machine chooses
    "fp16": torch.float16,
    "fp32": torch.float32,
}
if not ON_GPU:
    PATHS |= {f"bf16, {name}": torch.bfloat16 for name in ("float32", "native", "mkl")}
    PATHS |= {f"fp16, {name}": torch.float16 for name in ("float32", "native")}
    PATHS |= {f"fp32, {name}": torch.float32 for name in ("float32", "native")}


@pytest.fixture(params=PATHS)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the operands, multiplied by one library."""
    _, _, library = request.param.partition(", ")
    if library:
        force_products(library, monkeypatch)
    return PATHS[request.param]


@dataclass
class Batch:
    """Packed rows, on the CPU."""

    hidden: Tensor  # [N, D]
    token_ids: Tensor  # [N]
    temperature: Tensor  # [N]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]

    def rows(self, which: Any) -> Batch:
        hidden, token_ids, temperature = (x[which] for x in (self.hidden, self.token_ids, self.temperature))
        return replace(self, hidden=hidden, token_ids=token_ids, temperature=temperature)

    def operands(self, needs_grad: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        found = (None if x is None else on_device(x.clone()) for x in (self.hidden, self.weight, self.bias))
        hidden, weight, bias = (None if x is None else x.requires_grad_(needs_grad) for x in found)
        assert hidden is not None and weight is not None
        return hidden, weight, bias


@pytest.fixture
def batch(dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(20)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    token_ids = torch.randint(VOCAB, (ROWS,), generator=generator)
    temperature = torch.rand(ROWS, generator=generator) + 0.5
    return Batch(normal(ROWS, WIDTH), token_ids, temperature, normal(VOCAB, WIDTH), normal(VOCAB))


def statistics(
    batch: Batch, chunk: int | None = None, mask: Tensor | None = None, needs_grad: bool = False
) -> list[Tensor]:
    """Log-probability, entropy and logsumexp of each row, on the CPU. `chunk`: rows."""
    hidden, weight, bias = batch.operands(needs_grad)
    found = gspo_kernels.linear_token_logprobs(
        hidden, weight, on_device(batch.token_ids), bias=bias, mask=None if mask is None else on_device(mask),
        temperature=on_device(batch.temperature), chunk_bytes=chunk_of(chunk, VOCAB, weight.dtype),
    )  # fmt: skip
    return [x.detach().cpu() for x in found]


def check_bits(found: Sequence[Tensor], expected: Sequence[Tensor], which: Any, *case: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y[which]), case


@pytest.fixture
def expected(batch: Batch, threads: None) -> list[Tensor]:
    """Statistics of all rows in one batch and one chunk, by two threads; the tests themselves run one."""
    torch.set_num_threads(2)
    found = statistics(batch)
    torch.set_num_threads(1)
    return found


def test_batches_positions_and_threads(batch: Batch, expected: list[Tensor]) -> None:
    for threads in (1,) if ON_GPU else (1, 2, 3):
        torch.set_num_threads(threads)
        for size in (1, 2, 3, 17, 64, 100, 516):
            for start in (1, ROWS - size):
                which = slice(start, start + size)
                check_bits(statistics(batch.rows(which)), expected, which, threads, size, start)


def test_without_a_bias(batch: Batch, threads: None) -> None:
    plain = replace(batch, bias=None)
    expected = statistics(plain)
    for size in (1, 17, 100):
        check_bits(statistics(plain.rows(slice(3, 3 + size))), expected, slice(3, 3 + size), size)


def test_all_logits(batch: Batch, expected: list[Tensor]) -> None:
    """`linear_logits` in batches of any size, padded or packed, and what `token_logprobs` makes of them."""
    hidden, weight, bias = batch.operands()
    for size in (1, 5, 47, ROWS):
        for which in (slice(0, size), slice(ROWS - size, ROWS)):
            logits = gspo_kernels.linear_logits(hidden[which], weight, bias=bias)
            found = gspo_kernels.token_logprobs(
                logits, on_device(batch.token_ids[which]), temperature=on_device(batch.temperature[which])
            )
            check_bits([x.cpu() for x in found], expected, which, size)
    packed = gspo_kernels.linear_logits(hidden, weight.requires_grad_(), vocab_size=VOCAB - 8)
    padded = gspo_kernels.linear_logits(hidden.view(11, 47, WIDTH), weight[: VOCAB - 8])
    assert padded.shape == (11, 47, VOCAB - 8) and torch.equal(padded.flatten(0, 1), packed)
    assert packed.dtype == torch.float32 and not packed.requires_grad
    assert gspo_kernels.linear_logits(hidden[:0], weight).shape == (0, VOCAB)


def test_neighbours(batch: Batch, expected: list[Tensor]) -> None:
    """The same rows in another order; and among rows that are huge."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(21))
    check_bits(statistics(batch.rows(order)), expected, order)
    others = torch.arange(ROWS) % 5 != 2
    hidden = torch.where(others[:, None], batch.hidden * 100.0, batch.hidden)
    found = statistics(replace(batch, hidden=hidden))
    check_bits([x[~others] for x in found], expected, ~others)


def test_chunks(batch: Batch, expected: list[Tensor]) -> None:
    for chunk in (1, 3, 16, 33, 100, 512):
        some = slice(0, 10 if chunk < 16 else ROWS)
        check_bits(statistics(batch.rows(some), chunk), expected, some, chunk)


def test_masks_and_layouts(batch: Batch, expected: list[Tensor]) -> None:
    """Masked rows hold NaN. Padded [11, 47] and packed [517] are the same rows."""
    kept = torch.rand(ROWS, generator=torch.Generator().manual_seed(22)) < 0.6
    hidden = torch.where(kept[:, None], batch.hidden, torch.nan)
    found = statistics(replace(batch, hidden=hidden), 50, kept)
    check_bits([x[kept] for x in found], expected, kept)
    tall = Batch(*(x.reshape(11, 47, *x.shape[1:]) for x in (batch.hidden, batch.token_ids, batch.temperature)),
                 batch.weight, batch.bias)  # fmt: skip
    for mask in (None, kept.reshape(11, 47)):
        which: Any = slice(None) if mask is None else kept
        found = [x.flatten()[which] for x in statistics(tall, mask=mask)]
        check_bits(found, expected, which)


def test_with_gradients(batch: Batch, expected: list[Tensor]) -> None:
    """`linear_token_logprobs` whose operands need gradients, and the log-probabilities in a loss's stats."""
    check_bits(statistics(batch, 100, needs_grad=True), expected, slice(None))
    logprobs = expected[0].float()  # as stats hold them
    ids, temperature, advantages = (on_device(x) for x in (batch.token_ids, batch.temperature, torch.ones(11)))
    ends = on_device(torch.arange(12) * 47)
    plans = {"single_pass": (200, True), "recompute": (30, True), "deferred_scale": (30, False)}
    for name, (chunk, trained) in plans.items():
        hidden, weight, bias = batch.operands(needs_grad=True)
        operands = (hidden, weight.requires_grad_(trained))
        if bias is not None:
            bias.requires_grad_(trained)
        options: dict[str, Any] = {
            "bias": bias, "cu_seqlens": ends, "temperature": temperature,
            "chunk_bytes": chunk_of(chunk, VOCAB, weight.dtype),
        }  # fmt: skip
        arguments = (*operands, ids, advantages, on_device(logprobs))
        assert f"\n{name}: {ROWS} rows" in gspo_kernels.explain(*arguments, **options)
        _, stats = gspo_kernels.linear_gspo_loss(*arguments, **options)
        assert torch.equal(stats.logprobs.cpu(), logprobs), name
        assert float(stats.ratio_max) == 1.0, name


@pytest.mark.parametrize("rank", [1, 20])
def test_a_low_rank_term(batch: Batch, threads: None, rank: int) -> None:
    """`low_rank`: of any number of columns, also where operands of the head and of the term are multiplied apart."""
    generator = torch.Generator().manual_seed(23)
    u, b = (torch.randn(n, rank, generator=generator).to(batch.weight.dtype) for n in (ROWS, VOCAB))

    def rows(which: Any, chunk: int | None = None) -> list[Tensor]:
        hidden, weight, bias = batch.rows(which).operands()
        low_rank = (on_device(u[which]), on_device(b))
        given: tuple[Tensor, ...] = tuple(on_device(x[which]) for x in (batch.token_ids, batch.temperature))
        found = gspo_kernels.linear_token_logprobs(
            hidden, weight, given[0], bias=bias, low_rank=low_rank, temperature=given[1],
            chunk_bytes=chunk_of(chunk, VOCAB, weight.dtype),
        )  # fmt: skip
        logits = gspo_kernels.linear_logits(hidden, weight, bias=bias, low_rank=low_rank)
        check_bits(gspo_kernels.token_logprobs(logits, given[0], temperature=given[1]), found, slice(None))
        return [x.cpu() for x in found]

    torch.set_num_threads(2)
    whole = rows(slice(None))
    torch.set_num_threads(1)
    for chunk in (33, 100, 512):
        check_bits(rows(slice(None), chunk), whole, slice(None), chunk)
    for which in (slice(0, 1), slice(3, 8), slice(5, 52), torch.arange(ROWS - 1, -1, -2)):
        check_bits(rows(which, 7), whole, which, which)
