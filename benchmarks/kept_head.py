"""Losses of kept columns from hidden states: their time and memory beside those of the full head.

    python -m benchmarks.kept_head                          3 minutes, 5 GB; writes results/kept-head-cpu-<name>.json
    python -m benchmarks.kept_head --smoke                  tiny sizes
    python -m benchmarks.kept_head --markdown [file.json]   the table, from results; `linear --write` fills in the page

Rows keep as many columns as top-p 0.8 leaves in public measurements: 8 on average, 2 in the middle, 82 at the 99th
percentile, and 46% of the rows one. Which columns is drawn evenly from the vocabulary: no cache helps. The loss is
on-policy, so every row has a coefficient; one that keeps its token alone has no gradient.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gspo_kernels import KeptTokens, linear_gspo_loss, linear_token_logprobs

from .cases import DTYPES, SEED
from .gpu_parts import table
from .memory import freed_memory_kept
from .race import HostMeter
from .results import arguments_of, default_path, load, machine, newest, save, size, title

KIND = "kept-head-cpu"
GOAL = 20.0  # times as fast as the full head
WHOLE, SMOKE = (2_048, 1_024, 151_936), (64, 32, 1_000)  # rows, width, vocabulary
SINGLES, MU, SIGMA = 0.46, 1.931, 1.187  # the share of rows that keep one column; log-normal: how many the others keep
LABELS = {
    "full": "full head",
    "dense": "kept columns",
    "sparse": "kept columns, `sparse_weight_grad=True`",
    "frozen": "kept columns, head frozen",
    "zeros": "zeros [V, D], which the dense gradient begins with",
}

# How to read the numbers; stored with them.
MEANINGS = {
    "seconds": "of a loss and its gradients: medians, with a heap that is kept between calls",
    "extra_bytes": "peak resident memory beyond the arguments in a first call, returned gradients included",
    "gradient_bytes": "of the returned gradients",
}


def kept_sizes(rows: int, vocab: int) -> Tensor:
    """How many columns each row keeps, at evenly spaced quantiles of their distribution."""
    singles = round(SINGLES * rows)
    quantiles = (torch.arange(rows - singles, dtype=torch.float64) + 0.5) / (rows - singles)
    others = torch.special.ndtri(quantiles).mul(SIGMA).add(MU).exp().round().clamp(2, vocab // 2)
    return torch.cat([torch.ones(singles, dtype=torch.int64), others.long()])


def kept_tokens(token_ids: Tensor, vocab: int, generator: torch.Generator) -> KeptTokens:
    """The sampled token, and other columns after it, all of them different."""
    sizes = kept_sizes(len(token_ids), vocab)[torch.randperm(len(token_ids), generator=generator)]
    found = []
    for token, count in zip(token_ids.tolist(), sizes.tolist(), strict=True):
        others = torch.randint(vocab - 1, (2 * count,), generator=generator).unique()
        others = others[torch.randperm(len(others), generator=generator)][: count - 1]
        found.append([token, *((others + token + 1) % vocab).tolist()])
    return KeptTokens.from_lists(found)


def measured(dtype: str, sizes: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    rows, width, vocab = sizes
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(rows, width, generator=generator).to(DTYPES[dtype]).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul_(2.0 / math.sqrt(width)).to(DTYPES[dtype])
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    kept = kept_tokens(token_ids, vocab, generator)
    advantages, boundaries = torch.linspace(-1.5, 1.5, 8), torch.arange(9) * (rows // 8)
    weight.requires_grad_()

    def loss(head: Tensor = weight, **options: Any) -> tuple[Tensor, ...]:
        found, _ = linear_gspo_loss(hidden, head, token_ids, advantages, cu_seqlens=boundaries, **options)
        return torch.autograd.grad(found, [x for x in (hidden, head) if x.requires_grad])

    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "full": loss,
        "dense": lambda: loss(kept=kept),
        "sparse": lambda: loss(kept=kept, sparse_weight_grad=True),
        "frozen": lambda: loss(weight.detach(), kept=kept),
        "zeros": lambda: (torch.zeros_like(weight),),
    }
    check(hidden, weight, token_ids, kept, runs)
    meter, found = HostMeter(), {}
    for name, run in runs.items():
        gradients, extra = meter.peak_extra_bytes(run)
        found[name] = {"extra_bytes": extra, "gradient_bytes": sum(map(bytes_of, gradients))}
        del gradients
    with freed_memory_kept():
        for name, run in runs.items():
            seconds = [meter.timed(run) for _ in range(1 + (min(rounds, 3) if name == "full" else rounds))]
            found[name]["seconds"] = statistics.median(seconds[1:])
    counts = kept.counts.double()
    about = {"mean": float(counts.mean()), "median": float(counts.median()), "p99": float(counts.quantile(0.99))}
    return {"dtype": dtype, "rows": rows, "width": width, "vocab": vocab, "kept": about, "contestants": found}


def bytes_of(gradient: Tensor) -> int:
    if gradient.is_sparse:
        return bytes_of(gradient._values()) + bytes_of(gradient._indices())
    return gradient.numel() * gradient.element_size()


def check(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, kept: KeptTokens, runs: dict[str, Callable[[], Any]]
) -> None:
    """Log-probabilities against float64, and the gradients against each other."""
    with torch.no_grad():
        found = linear_token_logprobs(hidden, weight, token_ids, kept=kept, full_distribution=False).kept.logprobs
        row_of = torch.arange(len(kept)).repeat_interleave(kept.counts)
        logits = (hidden[row_of].double() * weight[kept.token_ids.long()].double()).sum(1)
        sums = torch.zeros(len(kept), dtype=torch.float64).index_add_(0, row_of, logits.exp())
        torch.testing.assert_close(found.double(), logits[kept.offsets[:-1]] - sums.log(), rtol=1e-5, atol=1e-5)
    (of_hidden, of_weight), (same, sparse), (frozen,) = (runs[name]() for name in ("dense", "sparse", "frozen"))
    assert torch.equal(of_hidden, same) and torch.equal(of_hidden, frozen)
    assert torch.equal(of_weight, sparse.to_dense()) and bool(of_weight.any())


def times_as_fast(case: dict[str, Any], name: str = "dense") -> float:
    return float(case["contestants"]["full"]["seconds"] / case["contestants"][name]["seconds"])


def markdown(content: dict[str, Any]) -> str:
    cases, about = content["cases"], content["machine"]
    cases = list(cases.values()) if isinstance(cases, dict) else cases
    first = cases[0]
    rows = []
    for name, label in LABELS.items():
        cells = []
        for case in cases:
            m = case["contestants"][name]
            faster = f", {times_as_fast(case, name):.0f}x" if name in ("dense", "sparse", "frozen") else ""
            beside = max(m["extra_bytes"] - m["gradient_bytes"], 0) if m["extra_bytes"] is not None else None
            memory = "" if name == "zeros" else f", {size(m['gradient_bytes'])} + {size(beside)}"
            cells.append(f"{m['seconds']:.3f} s{faster}{memory}")
        rows.append([label, *cells])
    sizes = f"N = {first['rows']:,}, D = {first['width']:,}, V = {first['vocab']:,}"
    kept, heads = first["kept"], [sizes, *(case["dtype"] for case in cases)]
    return "\n".join(
        [
            f"Kept columns on {about['cores']} cores of {about['cpu']}, {about['date']}. Rows keep {kept['mean']:.1f} "
            f"on average, {kept['median']:.0f} in the middle, {kept['p99']:.0f} at the 99th percentile. Time of a loss "
            "and its gradients, how many times as fast as the full head, and memory: of the returned gradients, and "
            "beside them.",
            "",
            *table(heads, rows),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of("kept_head", __doc__, KIND).parse_args(arguments)
    if options.markdown is not None:
        print(markdown(load(options.markdown if options.markdown.name else newest(KIND))))
        return 0
    about = machine()
    print(title(about), flush=True)
    cases = []
    for dtype in DTYPES:
        found = measured(dtype, SMOKE, 1) if options.smoke else _in_a_process(dtype)
        cases.append({"id": dtype, **found})
        print(f"{dtype}: {times_as_fast(found):.1f} and {times_as_fast(found, 'sparse'):.1f} times as fast", flush=True)
    content = {"machine": about, "meanings": MEANINGS, "cases": cases}
    print("", markdown(content), sep="\n")
    path = options.save or (None if options.smoke else default_path(KIND))
    if path:
        save(path, content)
        print(f"\nresults: {path}")
    slow = [] if options.smoke else [case["id"] for case in cases if times_as_fast(case) < GOAL]
    if slow:
        print(f"\nless than {GOAL:g} times as fast as the full head: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


def _in_a_process(dtype: str) -> dict[str, Any]:
    """With a heap of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measured, dtype, WHOLE, 7).result()


if __name__ == "__main__":
    sys.exit(main())
