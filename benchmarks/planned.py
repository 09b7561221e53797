"""What `python -m gspo_kernels plan` says of peaks, beside what was measured: python -m benchmarks.planned

    python -m benchmarks.planned            3 minutes, 2 GB; the table of docs/memory.md
    python -m benchmarks.planned --smoke    tiny sizes: does it run at all?

On this CPU by resident memory, each case in a process of its own; of GPUs by the committed results. tests/planning has
the same cases at small sizes, where torch's profiler counts every tensor.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from gspo_kernels import KeptTokens, gspo_loss, linear_gspo_loss, linear_token_logprobs
from gspo_kernels.linear.schedule import row_stride
from gspo_kernels.planning.command import DTYPES
from gspo_kernels.planning.estimate import Estimate
from gspo_kernels.planning.from_hidden import from_hidden, from_kept
from gspo_kernels.planning.from_logits import from_logits, plain_torch
from gspo_kernels.planning.shape import Batch, Shape

from .contestants import torch_logprobs, torch_loss_of_logprobs
from .gpu_model import batch_of
from .gpu_page import committed
from .gpu_parts import table
from .memory import peak_extra_bytes
from .results import size
from .sampled import SEED


@dataclass(frozen=True)
class Case:
    """`way`: hidden, kept, logits, overwrite, torch."""

    title: str
    way: str
    sequences: int = 16
    length: int = 128
    vocab: int = 32_000
    width: int = 1_024
    dtype: str = "fp32"
    chunk_rows: int = 512  # of the logits
    active: int = 16  # sequences with an advantage
    frozen: bool = False
    on_policy: bool = False
    mask: bool = True
    kept: int = 0

    @property
    def shape(self) -> Shape:
        lengths = (self.length,) * self.sequences
        active = tuple(self.length if i < self.active else 0 for i in range(self.sequences))
        return Shape(
            Batch(sum(lengths), lengths, active, self.mask), self.vocab, self.width, DTYPES[self.dtype], "cpu",
            frozen_head=self.frozen, on_policy=self.on_policy, chunk_bytes=self.chunk_bytes, kept=self.kept,
        )  # fmt: skip

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * row_stride(self.vocab, "cpu") * 4

    def estimate(self) -> Estimate:
        return {
            "hidden": from_hidden,
            "kept": from_kept,
            "logits": lambda shape: from_logits(shape, overwrite=False),
            "overwrite": lambda shape: from_logits(shape, overwrite=True),
            "torch": plain_torch,
        }[self.way](self.shape)


CASES = (
    Case("plain torch", "torch"),
    Case("plain torch, bf16", "torch", dtype="bf16"),
    Case("from logits", "logits"),
    Case("from logits, on-policy", "logits", on_policy=True),
    Case("from logits, `overwrite_logits=True`", "overwrite"),
    Case("from hidden states", "hidden"),
    Case("from hidden states, bf16", "hidden", dtype="bf16"),
    Case("from hidden states, half of the responses active", "hidden", active=8),
    Case("from hidden states, head frozen", "hidden", frozen=True),
    Case("from hidden states, small chunks", "hidden", chunk_rows=128),
    Case("responses longer than a chunk", "hidden", sequences=2, length=1_024, chunk_rows=256, active=2),
    Case("the same, head frozen", "hidden", sequences=2, length=1_024, chunk_rows=256, active=2, frozen=True),
    Case("kept sets of 8 columns", "kept", kept=8),
    Case("kept sets of 64 columns, head frozen", "kept", kept=64, frozen=True),
)


def prepare(case: Case) -> Callable[[], tuple[Any, ...]]:
    """The call whose memory is planned; its gradients are those of hidden states and, unless it is frozen, the head."""
    generator = torch.Generator().manual_seed(SEED)
    rows, dtype = case.sequences * case.length, DTYPES[case.dtype]
    hidden = torch.randn(rows, case.width, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(case.vocab, case.width, generator=generator).mul_(0.02).to(dtype).requires_grad_(not case.frozen)
    leaves = [hidden] if case.frozen else [hidden, head]
    token_ids = torch.randint(case.vocab - case.kept, (rows,), generator=generator)
    advantages = (torch.arange(case.sequences) < case.active).float()
    boundaries = torch.arange(case.sequences + 1) * case.length
    mask = torch.ones(rows, dtype=torch.bool) if case.mask else None
    old = None
    if not (case.on_policy or case.kept):
        old = linear_token_logprobs(hidden.detach(), head.detach(), token_ids).logprobs
    options: dict[str, Any] = {"cu_seqlens": boundaries, "mask": mask}
    if case.kept:
        columns = token_ids[:, None] + torch.arange(case.kept)
        options["kept"] = KeptTokens(columns.flatten(), torch.arange(rows + 1) * case.kept)
    sequence_of = torch.arange(rows) // case.length

    def of_logits() -> Any:
        logits = torch.nn.functional.linear(hidden, head)
        found = gspo_loss(logits, token_ids, advantages, old, overwrite_logits=case.way == "overwrite", **options)
        return found.loss, None

    def of_hidden() -> Any:
        loss, stats = linear_gspo_loss(
            hidden, head, token_ids, advantages, old, chunk_bytes=None if case.kept else case.chunk_bytes, **options
        )
        return loss, tuple(int(count) for count in stats.head)

    def of_torch() -> Any:
        logprobs = torch_logprobs((hidden, head), token_ids)
        return torch_loss_of_logprobs(logprobs, advantages, old, torch.ones(rows), sequence_of, "gspo"), None

    find = {"torch": of_torch, "logits": of_logits, "overwrite": of_logits}.get(case.way, of_hidden)

    def run() -> tuple[Any, ...]:
        loss, counts = find()
        return torch.autograd.grad(loss, leaves), counts

    return run


def small(case: Case) -> Case:
    """Of which a few numbers a row are little, too."""
    return replace(case, length=case.length // 8, vocab=2_048, width=512, chunk_rows=case.chunk_rows // 8)


def measured(case: Case) -> int | None:
    prepare(small(case))()  # what is loaded once
    return peak_extra_bytes(prepare(case))[1]


def on_this_cpu(smoke: bool) -> Iterator[list[str]]:
    for case in map(small, CASES) if smoke else CASES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:  # with a heap of its own
            yield _row(case.title, case.estimate().peak, executor.submit(measured, case).result())


def of_gpus() -> Iterator[list[str]]:
    """The cases from hidden states that the results have a peak of."""
    for content in committed():
        name = content["machine"]["gpu"].removeprefix("NVIDIA ")
        for work, case in content["linear"]["cases"].items():
            found = estimate_of_gpu(case)
            yield _row(f"{name}: {case['title']}", found.peak, case["contestants"]["ours"]["extra_bytes"])
            if work == "dense":
                yield _row(
                    f"{name}: plain torch", plain_torch(found.shape).peak, case["contestants"]["eager"]["extra_bytes"]
                )


def estimate_of_gpu(case: dict[str, Any], chunk_bytes: int | None = None) -> Estimate:
    """Of a case of `gpu_linear`, whose every other response is active, or so."""
    gradient = case["work"] != "forward"
    batch = batch_of(case["rows"], case["sequences"], case["active"])._replace(mask=gradient)
    return from_hidden(
        Shape(
            batch, case["vocab"], case["width"], DTYPES[case["dtype"]], "cuda", gradient=gradient,
            frozen_head=case["work"] == "frozen_head", chunk_bytes=chunk_bytes,
        )
    )  # fmt: skip


def _row(title: str, planned: int, measured: int | None) -> list[str]:
    of = "" if not measured else f"{planned / measured - 1:+.1%}"
    return [title, size(planned), size(measured), of]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planned", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    heads = ["peak beside hidden states and head", "planned", "measured", "off by"]
    print("\n".join(table(heads, [])))
    for row in itertools.chain(on_this_cpu(options.smoke), of_gpus()):
        print(table(heads, [row])[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
