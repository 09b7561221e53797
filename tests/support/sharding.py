"""A batch over a grid of ranks: which columns and tokens each holds, and their results merged into one `Outcome`.

The merged outcome meets the same oracle within the same bounds as the outcome of one process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from batches import PUBLIC, Batch, Outcome, arguments, flat, of_units, ragged_batch
from linear import Problem, problem
from ranks import grid
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """tp ranks share the vocabulary of what cp ranks share the tokens of. Rank c * tp + t has columns t and tokens c.

    vocab: "padded" to equal shards by less than one, "loose": so far that the last ranks have nothing but padding,
        "unequal", told by vocab_start, or "dtensor", which is unequal too.
    tokens: "contiguous" parts of each sequence, "zigzag" halves as Megatron has them, or "whole" sequences: then ranks
        have none of most.
    """

    tp: int = 1
    cp: int = 1
    vocab: str = "padded"
    tokens: str = "zigzag"

    @property
    def size(self) -> int:
        return self.tp * self.cp

    def columns(self, vocab: int) -> list[tuple[int, int]]:
        """(first, width) of each of the tp ranks."""
        if self.vocab == "unequal":
            ends = [round(vocab * (t / self.tp) ** 1.7) for t in range(self.tp + 1)]
            return [(a, b - a) for a, b in itertools.pairwise(ends)]
        width = -(-vocab // self.tp) if self.vocab != "loose" else vocab // 2 + 3
        if self.vocab == "dtensor":
            return [(min(t * width, vocab), max(min(width, vocab - t * width), 0)) for t in range(self.tp)]
        return [(t * width, width) for t in range(self.tp)]

    def rows(self, batch: Batch) -> list[list[list[int]]]:
        """[cp][sequence]: which rows."""
        return [[self._part(list(rows), i, c) for i, rows in enumerate(batch.sequences)] for c in range(self.cp)]

    def _part(self, rows: list[int], sequence: int, c: int) -> list[int]:
        if self.tokens == "whole":
            return rows if sequence % self.cp == c else []
        pieces = self.cp if self.tokens == "contiguous" else 2 * self.cp
        ends = [len(rows) * k // pieces for k in range(pieces + 1)]
        mine = [c] if self.tokens == "contiguous" else [c, pieces - 1 - c]
        return [t for k in mine for t in rows[ends[k] : ends[k + 1]]]


def part(batch: Batch, rows: Sequence[Sequence[int]]) -> Batch:
    """These rows of each sequence."""
    return batch.of(range(len(rows)), rows)


@dataclass(frozen=True)
class Case:
    """One loss to be computed: a batch, a layout, options. Plain values, from which every rank makes the same batch."""

    objective: str = "gspo"
    layout: str = "packed"
    build: dict[str, Any] = field(default_factory=dict)  # of ragged_batch, or of problem
    options: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None  # of a chunk, from hidden states
    needs_grad: tuple[str, ...] = ("hidden", "weight", "bias")
    upstream: float = 1.0

    def batch(self) -> Batch:
        return ragged_batch(self.objective, **self.build)

    def problem(self) -> Problem:
        return problem(self.objective, **self.build)


Found = dict[str, Any]  # what a rank found in a case


def shard_of(values: Tensor, first: int, width: int, dimension: int) -> Tensor:
    """Columns [first, first + width) in their own memory; those beyond the last are garbage."""
    whole = values.shape[dimension]
    inside = values.narrow(dimension, min(first, whole), max(min(first + width, whole) - first, 0))
    shape = list(values.shape)
    shape[dimension] = width - inside.shape[dimension]
    return torch.cat([inside, torch.full(shape, math.nan, dtype=values.dtype)], dimension)


def keywords_of(at: Grid, rank: int, vocab: int, tp_group: Any, cp_group: Any) -> dict[str, Any]:
    keywords: dict[str, Any] = {"cp_group": cp_group if at.cp > 1 else None}
    if at.tp > 1 and at.vocab != "dtensor":
        keywords |= {"tp_group": tp_group, "vocab_size": vocab}
    if at.vocab == "unequal":
        keywords["vocab_start"] = at.columns(vocab)[rank % at.tp][0]
    return keywords


def from_logits(rank: int, at: Grid, cases: Sequence[Case], function: Callable[..., Any] | None = None) -> list[Found]:
    """In a rank: the losses of all cases from its shard of the logits, and their backward."""
    groups = grid(rank, at.tp, at.cp)
    return [logits_case(rank, at, case, groups, function) for case in cases]


def logits_case(rank: int, at: Grid, case: Case, groups: Any, function: Callable[..., Any] | None = None) -> Found:
    whole = case.batch()
    vocab = whole.logits.shape[-1]
    batch = part(whole, at.rows(whole)[rank // at.tp])
    args = arguments(batch, case.layout)
    keywords = {**args.keywords, **keywords_of(at, rank, vocab, *groups), **case.options}
    local = args.logits.detach()
    if at.tp > 1:
        local = shard_of(local, *at.columns(vocab)[rank % at.tp], -1)
    leaf = local.clone().requires_grad_()
    given = leaf
    if at.vocab == "dtensor":
        given = dtensor(leaf, groups[0], vocab, leaf.ndim - 1)
    if keywords.get("overwrite_logits"):
        given = given * 1  # a leaf that requires a gradient cannot be overwritten
    loss, stats = (function or PUBLIC[case.objective])(given, *args.rest, **keywords)
    (loss * case.upstream).backward()
    assert leaf.grad is not None
    gradient = leaf.grad
    padding = gradient.flatten(0, -2)[:0]
    if case.layout == "padded":
        inside = torch.zeros(gradient.shape[:2], dtype=torch.bool)
        for i, length in enumerate(batch.lengths):
            inside[i, :length] = True
        gradient, padding = gradient[inside], gradient[~inside]
    return found_of(loss, stats, batch, case) | {"gradient": gradient, "padding": padding}


def dtensor(local: Tensor, group: Any, columns: int, dimension: int) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    shape = list(local.shape)
    shape[dimension] = columns
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dimension)], run_check=False, shape=torch.Size(shape), stride=strides)


def found_of(loss: Tensor, stats: Any, batch: Batch, case: Case) -> Found:
    log_ratio, clipped = of_units(stats, batch, case.layout, stats.ratio_of == "sequence")
    return {
        "loss": loss,
        "stats": stats.as_dict(),
        "logprobs": flat(stats.logprobs, batch, case.layout),
        "log_ratio": log_ratio,
        "clipped": clipped,
        "by_sequence": stats.ratio_of == "sequence",
    }


# --- outside ----------------------------------------------------------------------------------------------------------


def agreed(found: Sequence[Found], at: Grid, case: Case) -> None:
    """What must be the same bits on several ranks: all of a tp group's, and the scalars and sequences of all."""
    for r, one in enumerate(found):
        first = found[r // at.tp * at.tp]
        for name in ("loss", "logprobs", "log_ratio", "clipped"):
            assert torch.equal(one[name], first[name]), f"{case}: {name} differs among the ranks of a tp group"
        names = [name for name in one["stats"] if not name.startswith("head_")]
        differing = [name for name in names if not torch.equal(one["stats"][name], found[0]["stats"][name])]
        assert not differing, f"{case}: {differing} of the stats differ among ranks"
        if one["by_sequence"]:
            assert torch.equal(one["log_ratio"], found[0]["log_ratio"]), f"{case}: log_ratio differs among ranks"


def clipped_sequences(found: Sequence[Found], at: Any, case: Case, batch: Batch, row_indices: list[Tensor]) -> Tensor:
    """bool [S, 2]. A rank knows it of the sequences of which it has a token, and says False of all others."""
    whole = torch.stack([one["clipped"] for one in found]).any(0)
    for r, one in enumerate(found):
        mine = torch.zeros_like(batch.mask).index_fill(0, row_indices[r // at.tp], True) & batch.mask
        held = torch.tensor([bool(mine[list(rows)].any()) for rows in batch.sequences], dtype=torch.bool)
        assert torch.equal(one["clipped"], whole & held[:, None]), f"{case}: clip decisions of rank {r}"
    return whole


def put_together(found: Sequence[Found], at: Grid, case: Case, batch: Batch) -> Outcome:
    """The outcome of the whole batch from those of all ranks."""
    agreed(found, at, case)
    n, vocab = batch.logits.shape
    row_indices = [torch.tensor([t for of in rows for t in of], dtype=torch.int64) for rows in at.rows(batch)]
    assert sorted(torch.cat(row_indices).tolist()) == list(range(n)), "every row is on one rank"
    gradient = torch.full((n, vocab), math.nan, dtype=batch.logits.dtype)
    logprobs = torch.full((n,), math.nan)
    log_ratio, clipped = torch.full((n,), math.nan), torch.ones(n, 2, dtype=torch.bool)
    if found[0]["by_sequence"]:
        log_ratio, clipped = found[0]["log_ratio"], clipped_sequences(found, at, case, batch, row_indices)
    padding = []
    for r, one in enumerate(found):
        rows = row_indices[r // at.tp]
        first, width = at.columns(vocab)[r % at.tp] if at.tp > 1 else (0, vocab)
        inside = max(min(first + width, vocab) - first, 0)
        assert one["gradient"].dtype == batch.logits.dtype
        gradient[rows[:, None], torch.arange(first, first + inside)[None, :]] = one["gradient"][:, :inside]
        padding += [one["gradient"][:, inside:].flatten(), one["padding"].flatten()]
        logprobs[rows] = one["logprobs"]
        if not one["by_sequence"]:
            log_ratio[rows], clipped[rows] = one["log_ratio"], one["clipped"]
    loss = torch.stack([one["loss"] for one in found[:: at.tp]]).sum()
    scalars = {name: value for name, value in found[0]["stats"].items()}
    return Outcome(loss, SimpleNamespace(**scalars), gradient, torch.cat(padding), logprobs, log_ratio, clipped)
