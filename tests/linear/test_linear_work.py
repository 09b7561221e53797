"""The cost: operations counted at each product, and memory measured by the operating system."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import LAYOUTS, OBJECTIVES
from linear import Problem, chunk_of, from_hidden, problem, random_problem, rows_of_work, unmasked
from modes import DEFAULT_MODE, NOT_INTERPRETED, ON_GPU
from torch import Tensor

import gspo_kernels
from gspo_kernels.linear import products, weight_sums
from gspo_kernels.linear.cpu_products import cpu_products

WIDTH, VOCAB = 24, 61
ONE = 2 * WIDTH * VOCAB  # operations of a row, each time it is multiplied by the head


class Counted:
    """Operations of all products, without the rows that fill up a block."""

    def __init__(self) -> None:
        self.operations = 0

    def __call__(self, of: products.Products, rows: Tensor) -> None:
        assert bool(torch.isfinite(rows).all()), "a masked row was multiplied"
        self.operations += 2 * rows.shape[0] * of.weight.shape[0] * of.weight.shape[1]


def counting(original: Callable[..., Any], count: Counted) -> Callable[..., Any]:
    def product(self: products.Products, rows: Tensor, *rest: Any) -> Any:
        count(self, rows)
        return original(self, rows, *rest)

    return product


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Every product is one of these three, and its first operand has a row for each row of logits."""
    count = Counted()
    for name in ("logits", "hidden_gradient", "weight_gradient"):
        monkeypatch.setattr(products.Products, name, counting(getattr(products.Products, name), count))
    return count


def all_active() -> Problem:
    """Nothing masked, clipped or of advantage 0."""
    return unmasked(problem("gspo", seed=70, lengths=(5, 3, 7, 4, 6), bias=True))


@NOT_INTERPRETED
@pytest.mark.parametrize(
    ("plan", "rows", "needs_grad", "factor"),
    [
        ("single pass", 100, ["hidden", "weight"], 3),
        ("single pass, in chunks", 8, ["hidden", "weight", "bias"], 3),
        ("frozen head", 100, ["hidden"], 2),
        ("frozen head, deferred scale", 2, ["hidden"], 2),
        ("only the head", 100, ["weight"], 2),
        ("only the bias", 100, ["bias"], 1),  # a sum, and no product
        ("no gradient", 2, [], 1),
        ("recompute", 2, ["hidden", "weight"], 4),
        ("recompute for the bias", 2, ["bias"], 2),
    ],
)
def test_operations_of_each_plan(plan: str, rows: int, needs_grad: list[str], factor: int, counted: Counted) -> None:
    """6 N D V for a trained head, 4 for a frozen one, 2 without a gradient, 8 where sequences exceed a chunk."""
    p = all_active()
    found = from_hidden(p, "packed", "gspo", rows=rows, needs_grad=needs_grad, eps_low=0.9, eps_high=9.0)
    assert float(found.stats.clip_fraction) == 0
    assert counted.operations == factor * len(p.hidden) * ONE


@NOT_INTERPRETED
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_row_is_multiplied_without_need(objective: str, layout: str, dtype: torch.dtype, counted: Counted) -> None:
    """Masked rows not at all, clipped ones and those of advantage 0 not in the backward, no fitting sequence twice."""
    p = problem(objective, seed=71, dtype=dtype)
    truth = p.batch.expected(objective)
    selected, active = int(p.batch.mask.sum()), sum(g != 0 for g in truth.d_logprobs)
    assert 0 < active < selected < len(p.hidden), "some of each"
    found = from_hidden(p, layout, objective, rows=8)
    forward, again, backward, _ = rows_of_work(found.stats)
    assert counted.operations == (forward + again + 2 * backward) * ONE, "stats.head tells what was done"
    if not ON_GPU:  # where gradient rows come in multiples
        assert counted.operations == (selected + 2 * active) * ONE
    assert (forward, again) == (selected, 0)


@NOT_INTERPRETED
def test_log_probabilities_and_their_gradient(counted: Counted) -> None:
    """Forward once; the gradient computes the logits of its rows again, and only of those."""
    r = random_problem(2, 10, WIDTH, VOCAB)
    hidden, weight = r.hidden.clone().requires_grad_(), r.weight.clone().requires_grad_()
    out = gspo_kernels.linear_token_logprobs(hidden, weight, r.token_ids, chunk_bytes=chunk_of(4, VOCAB))
    assert counted.operations == 20 * ONE
    (out.logprobs[3] + out.entropy[17]).backward()
    rows = 2 if not ON_GPU else 4
    assert counted.operations <= (20 + 2 + 2 * rows) * ONE


@NOT_INTERPRETED
def test_sequences_of_advantage_zero_may_be_left_out(counted: Counted) -> None:
    p = all_active()
    p.batch.advantages[1] = p.batch.advantages[3] = 0.0
    found = from_hidden(p, "packed", "gspo", eps_low=0.9, eps_high=9.0, skip_zero_advantage=True)
    assert counted.operations == 3 * (5 + 7 + 6) * ONE
    assert rows_of_work(found.stats)[0] == 5 + 7 + 6


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, gspo_kernels
from benchmarks.memory import peak_extra_bytes
torch.set_num_threads(1)
D, V, ROWS = 32, 16384, 64
for dtype in (torch.float32, torch.bfloat16):
    for N in (256, 1024, 2048):
        torch.manual_seed(0)
        hidden, weight = (torch.randn(n, D).to(dtype).requires_grad_() for n in (N, V))
        ids, old, ends = torch.randint(V, (N,)), torch.full((N,), -10.0), torch.arange(0, N + 1, 32)
        def work():
            loss, _ = gspo_kernels.linear_grpo_loss(
                hidden, weight, ids, torch.ones(N // 32), old, cu_seqlens=ends, chunk_bytes=4 * V * ROWS)
            loss.backward()
            return hidden.grad, weight.grad
        if N == 256:
            work()  # what is loaded and cached once
            continue
        _, peak = peak_extra_bytes(work)
        print(dtype, N, -1 if peak is None else peak)
"""


@DEFAULT_MODE
@pytest.mark.plain_memory
def test_the_peak_is_a_chunk_and_does_not_grow_with_the_batch() -> None:
    """In a process of its own. N V logits would be 64 and 128 MiB; a chunk of them is 4.

    The threshold keeps glibc from raising it: freed blocks would then stay in a fragmented heap, some MB a run.
    """
    root = Path(__file__).resolve().parents[2]
    search = os.pathsep.join([str(Path(gspo_kernels.__file__).parents[1]), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=root, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": search, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        dtype, _, measured = line.split()
        peaks.setdefault(dtype, []).append(int(measured))
    if -1 in peaks["torch.float32"]:
        pytest.skip("no high-water mark of memory on this system")
    width, vocab, chunk, slack = 32, 16384, 4 << 20, 2 << 20
    for dtype, (one, two) in peaks.items():
        sums, narrow = 4, 2 if dtype == "torch.bfloat16" else 0
        of_dtype = torch.bfloat16 if narrow else torch.float32
        high, low = weight_sums.empty_sums(torch.empty(1, 1, dtype=of_dtype), torch.float32)
        of_head = high.itemsize + low.numel() + (0 if low.numel() else narrow)  # a float32 sum is rounded to a copy
        head = vocab * width * of_head
        head += products.products(torch.empty(vocab, width, dtype=of_dtype), of_dtype).converted_bytes
        if cpu_products(of_dtype).name == "native":  # packs the smaller operand, here the head in panels of 64 columns
            head += vocab * 64 * 4
        for rows, peak in ((1024, one), (2048, two)):
            assert peak < head + chunk + 8 * sums * rows * width + slack, (dtype, rows, peak)
        assert two - one < 8 * sums * 1024 * width + slack, f"{dtype}: twice the rows took {one} and {two} bytes"
