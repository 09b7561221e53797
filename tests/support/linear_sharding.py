"""Losses from hidden states over a grid of ranks: the parts that ranks find, reassembled, and the expected result.

The truth is that of `linear.py`, one process in float64, by way of the logits; so are the bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from batches import LINEAR, PUBLIC, Batch, arguments, flat, of_units, to_padded
from linear import Gradients, Problem, Separate, check_same, chunk_of, with_low_rank, without_synchronization
from linear import from_logits as one_process
from ranks import grid, refused
from sharding import Case, Found, Grid, agreed, clipped_sequences, dtensor, found_of, keywords_of, part, shard_of
from torch import Tensor

from gspo_kernels import GSPO, explain, linear_policy_loss, linear_token_logprobs, policy_loss
from gspo_kernels.base.agreement import Agreement
from gspo_kernels.base.checks import is_dtensor
from gspo_kernels.linear import chunked_loss, operators


@dataclass(frozen=True)
class HeadGrid(Grid):
    """A `Grid` that hidden states and a head lie on.

    idle: the last of the cp ranks has no token of anything.
    hidden: beside a DTensor head "replicated", a DTensor on its mesh, or "plain", and `tp_group` says it is shared.
    """

    idle: bool = False
    hidden: str = "replicated"

    def _part(self, rows: list[int], sequence: int, c: int) -> list[int]:
        if not self.idle:
            return super()._part(rows, sequence, c)
        return [] if c == self.cp - 1 else Grid(cp=self.cp - 1, tokens=self.tokens)._part(rows, sequence, c)

    def row_indices(self, batch: Batch) -> list[Tensor]:
        """[cp], which rows of the batch."""
        return [torch.tensor(list(itertools.chain(*rows)), dtype=torch.int64) for rows in self.rows(batch)]

    def usual_columns(self, vocab: int) -> int:
        """By which all ranks count the rows of a chunk."""
        return -(-vocab // self.tp)


@dataclass(frozen=True)
class Crossing(GSPO):
    """GSPO that does not say that its terms come from sequences alone: the gradient by a sum then crosses ranks."""

    by_sequence_alone: ClassVar[bool] = False


# --- in a rank --------------------------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch
Change = Callable[[Patch], None]  # of the package


def nothing(patch: Patch) -> None:
    pass


def gradients_beside_logits(patch: Patch) -> None:
    """As on a GPU."""
    patch.setattr(operators, "Head", Separate)


def as_in_a_cuda_graph(patch: Patch) -> None:
    """The host reads nothing: masked rows are selected too, and the plan is the same for any batch."""
    without_synchronization(patch)


def from_hidden(rank: int, at: HeadGrid, cases: Sequence[Case], change: Change = nothing) -> list[Found]:
    """The losses of all cases from this rank's part, and their backward."""
    (found,) = with_changes(rank, at, cases, [change])
    return found


def with_changes(rank: int, at: HeadGrid, cases: Sequence[Case], changes: Sequence[Change]) -> list[list[Found]]:
    """One after the other. None may let a rank call a collective that others do not."""
    groups, found = grid(rank, at.tp, at.cp), []
    for change in changes:
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            found.append([hidden_case(rank, at, case, groups) for case in cases])
    return found


@dataclass
class Operands:
    """Of one rank; leaves; those in `case.needs_grad` require a gradient."""

    hidden: Any
    weight: Any
    bias: Any
    keywords: dict[str, Any] = field(default_factory=dict)  # that say how the head is sharded, and of the chunk

    def gradients(self) -> dict[str, Tensor | None]:
        leaves = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        grads = {name: None if x is None else x.grad for name, x in leaves.items()}
        return {name: g if g is None or not is_dtensor(g) else g.to_local() for name, g in grads.items()}


def operands(
    rank: int, at: HeadGrid, case: Case, p: Problem, batch: Batch, row_indices: Tensor, groups: Any
) -> Operands:
    """`p` is the whole problem, `batch` and `row_indices` say which rows of it are here."""
    vocab = p.weight.shape[0]
    local: list[Any] = [p.hidden[row_indices], p.weight, p.bias]
    if case.layout == "padded":
        local[0] = to_padded(local[0], batch.lengths, float("nan"), batch.padding)
    if at.tp > 1:
        span = at.columns(vocab)[rank % at.tp]
        local[1:] = [None if x is None else shard_of(x, *span, 0) for x in local[1:]]
    if at.tp > 1 and at.vocab == "dtensor":
        local[1:] = [None if x is None else dtensor(x, groups[0], vocab, 0) for x in local[1:]]
        if at.hidden == "replicated":
            local[0] = replicated(local[0], local[1].device_mesh)
    hidden, weight, bias = (None if x is None else x.detach().clone() for x in local)
    for name, leaf in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if leaf is not None:
            leaf.requires_grad_(name in case.needs_grad)
    keywords = keywords_of(at, rank, vocab, *groups)
    if at.tp > 1 and at.vocab == "dtensor" and at.hidden == "plain":
        keywords["tp_group"] = groups[0]
    keywords["chunk_bytes"] = chunk_of(case.rows, at.usual_columns(vocab), p.weight.dtype)
    return Operands(hidden, weight, bias, keywords)


def replicated(local: Tensor, mesh: Any) -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(local, mesh, [Replicate()], run_check=False)


def hidden_case(rank: int, at: HeadGrid, case: Case, groups: Any) -> Found:
    p = problem_of(case)
    c = rank // at.tp
    batch = part(p.batch, at.rows(p.batch)[c])
    given = operands(rank, at, case, p, batch, at.row_indices(p.batch)[c], groups)
    args = arguments(batch, case.layout)
    options = {**case.options}
    function = LINEAR[case.objective]
    if "objective" in options:
        function = partial(linear_policy_loss, objective=options.pop("objective"))
    if "low_rank" in options:
        function = with_low_rank(function, options.pop("low_rank"))
    keywords = {**args.keywords, **given.keywords, **options}
    with pytest.MonkeyPatch.context() as patch:
        steps = recorded_steps(patch)
        loss, stats = function(given.hidden, given.weight, *args.rest, bias=given.bias, **keywords)
    if case.needs_grad:
        (loss * case.upstream).backward()
    assert loss.requires_grad == bool(case.needs_grad)
    found = given.gradients()
    padding = None
    if case.layout == "padded" and found["hidden"] is not None:
        inside = torch.zeros(found["hidden"].shape[:2], dtype=torch.bool)
        for i, length in enumerate(batch.lengths):
            inside[i, :length] = True
        found["hidden"], padding = found["hidden"][inside], found["hidden"][~inside]
    return found_of(loss, stats, batch, case) | found | {"padding": padding, "steps": steps}


def recorded_steps(patch: Patch) -> list[tuple[str, int, int]]:
    """(mode, first, last sequence) of each step of the next loss."""
    steps: list[tuple[str, int, int]] = []
    original = chunked_loss.plan_steps

    def record(*given: Any) -> Any:
        found = original(*given)
        steps.extend((step.mode, step.first, step.last) for step in found)
        return found

    patch.setattr(chunked_loss, "plan_steps", record)
    return steps


def logprobs_case(rank: int, at: HeadGrid, case: Case, groups: Any) -> Found:
    """`linear_token_logprobs`, and the gradient of all three outputs; without one, of none."""
    p = problem_of(case)
    given = operands(rank, at, case, p, p.batch, at.row_indices(p.batch)[0], groups)
    args = arguments(p.batch, case.layout)
    keywords = {name: x for name, x in given.keywords.items() if name != "cp_group"}
    of_rows = ("mask", "temperature", "logit_scale", "softcap")
    keywords |= {name: args.keywords[name] for name in of_rows if name in args.keywords}
    out = linear_token_logprobs(given.hidden, given.weight, args.rest[0], bias=given.bias, **keywords)
    if case.needs_grad:
        mixed(out).backward()
    found = given.gradients()
    for name in ("logprobs", "entropy", "lse"):
        found[name] = flat(getattr(out, name), p.batch, case.layout)
    if found["hidden"] is not None:
        found["hidden"] = flat(found["hidden"], p.batch, case.layout)
    return found


def mixed(out: Any) -> Tensor:
    """A number that all three outputs have a part in."""
    total: Tensor = (2 * out.logprobs.double() - 3 * out.entropy.double() + 0.5 * out.lse).sum()
    return total


def logprobs_from_hidden(rank: int, at: HeadGrid, cases: Sequence[Case]) -> list[Found]:
    groups = grid(rank, at.tp, at.cp)
    return [logprobs_case(rank, at, case, groups) for case in cases]


def odd_one_out(rank: int, at: HeadGrid, case: Case) -> dict[str, Any]:
    """How each loss is refused whose last rank would take other chunks; and the plan of one that is not refused."""
    groups, p = grid(rank, at.tp, at.cp), problem_of(case)
    batch = part(p.batch, at.rows(p.batch)[rank // at.tp])
    given = operands(rank, at, case, p, batch, at.row_indices(p.batch)[rank // at.tp], groups)
    args, odd = arguments(batch, case.layout), rank == at.size - 1
    keywords = {**args.keywords, **given.keywords}

    def loss(hidden: Tensor, weight: Tensor, **others: Any) -> Any:
        return LINEAR[case.objective](hidden, weight, *args.rest, **{**keywords, **others})

    def autocast() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=odd):
            return loss(given.hidden, given.weight)

    found = {
        "dtype": refused(lambda: loss(given.hidden, given.weight.double() if odd else given.weight)),
        "autocast": refused(autocast),
        "skip_zero_advantage": refused(lambda: loss(given.hidden, given.weight, skip_zero_advantage=odd)),
        "low_rank": refused(lambda: with_low_rank(loss, 1 + odd)(given.hidden, given.weight)),
        "none": refused(lambda: loss(given.hidden, given.weight)),
        "explained": explain(given.hidden, given.weight, *args.rest, **keywords),
    }
    if at.tp == 1:
        found["vocab_size"] = refused(lambda: loss(given.hidden, given.weight[:-1] if odd else given.weight))
    return found


@dataclass(frozen=True)
class Collective:
    when: str  # "checks", which run on a CPU alone, "loss" or "backward"
    kind: str  # "gather" or "reduce"
    group: str  # "tp" or "cp"
    numbers: int  # of one rank


def counted(rank: int, at: HeadGrid, cases: Sequence[Case], logprobs: bool) -> list[tuple[Found, list[Collective]]]:
    """What each case found and the collectives that it took."""
    groups = grid(rank, at.tp, at.cp)
    found = []
    for case in cases:
        with pytest.MonkeyPatch.context() as patch:
            collectives = recorded_collectives(patch, groups)
            of_case = logprobs_case if logprobs else hidden_case
            found.append((of_case(rank, at, case, groups), collectives))
    return found


def recorded_collectives(patch: Patch, groups: Any) -> list[Collective]:
    """Of torch.distributed, from here on."""
    names = {groups[0].group_name: "tp", groups[1].group_name: "cp"}
    taken: list[Collective] = []
    when = ["loss"]

    def during(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            when.append(what)
            try:
                return function(*given, **named)
            finally:
                when.pop()

        return run

    def counting(name: str, kind: str) -> None:
        original = getattr(dist, name)

        def run(*given: Any, group: Any) -> Any:
            taken.append(Collective(when[-1], kind, names[group.group_name], given[-1].numel()))
            return original(*given, group=group)

        patch.setattr(dist, name, run)

    counting("all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor", "gather")
    counting("all_reduce", "reduce")
    for name in ("all_gather", "broadcast", "reduce", "all_to_all_single"):
        patch.delattr(dist, name)
    patch.setattr(Agreement, "__exit__", during("checks", Agreement.__exit__))
    patch.setattr(Tensor, "backward", during("backward", Tensor.backward))
    return taken


_PROBLEMS: dict[str, Problem] = {}


def problem_of(case: Case) -> Problem:
    """The same on every rank, and in the parent; made once a process. Nothing writes into it."""
    key = f"{case.objective} {case.build}"
    if key not in _PROBLEMS:
        _PROBLEMS[key] = case.problem()
    return _PROBLEMS[key]


# --- outside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatStats:
    """`linear.check_same_stats` for stats whose tokens have no layout."""

    scalars: dict[str, Tensor]
    logprobs: Tensor  # [N]
    log_ratio: Tensor  # [S] or [N]
    clipped: Tensor  # [S, 2] or [N, 2]

    @property
    def clipped_low(self) -> Tensor:
        return self.clipped[:, 0]

    @property
    def clipped_high(self) -> Tensor:
        return self.clipped[:, 1]

    def as_dict(self) -> dict[str, Tensor]:
        return self.scalars


_TRUTHS: dict[str, tuple[Problem, Gradients]] = {}


def truth_of(case: Case) -> tuple[Problem, Gradients]:
    """One process in float64, by way of the logits; made once, for all grids. Token arrays of the stats are flat."""
    if repr(case) not in _TRUTHS:
        p = problem_of(case)
        options = {name: x for name, x in case.options.items() if name not in ("backend", "low_rank")}
        if options.pop("skip_zero_advantage", False):
            p, options["normalizer"] = without_zero_advantage(p)
        function = PUBLIC[case.objective]
        if "objective" in options:
            function = partial(policy_loss, objective=options.pop("objective"))
        truth = one_process(p, case.layout, case.objective, function=function, upstream=case.upstream, **options)
        units = of_units(truth.stats, p.batch, case.layout, truth.stats.ratio_of == "sequence")
        stats = FlatStats(truth.stats.as_dict(), flat(truth.stats.logprobs, p.batch, case.layout), *units)
        _TRUTHS[repr(case)] = p, replace(truth, stats=stats)
    return _TRUTHS[repr(case)]


def without_zero_advantage(p: Problem) -> tuple[Problem, float]:
    """Sequences of advantage 0 masked, and how many there were with them."""
    batch, mask = p.batch, p.batch.mask.clone()
    for i, rows in enumerate(batch.sequences):
        mine = [float(batch.advantages[t]) for t in rows if mask[t]] if batch.by_token else [float(batch.advantages[i])]
        if not any(mine):
            mask[list(rows)] = False
    assert not torch.equal(mask, batch.mask), "some are skipped"
    count = sum(bool(batch.mask[list(rows)].any()) for rows in batch.sequences)
    return replace(p, batch=replace(batch, mask=mask)), float(count)


def put_together(found: Sequence[Found], at: HeadGrid, case: Case, p: Problem) -> Gradients:
    """Of the whole problem, from what all ranks found."""
    agreed(found, at, case)
    n, vocab = len(p.hidden), p.weight.shape[0]
    row_indices = at.row_indices(p.batch)
    assert sorted(torch.cat(row_indices).tolist()) == list(range(n)), "every row is on one cp rank"
    by_sequence = found[0]["by_sequence"]
    logprobs = torch.full((n,), torch.nan)
    log_ratio, clipped = torch.full((n,), torch.nan), torch.ones(n, 2, dtype=torch.bool)
    if by_sequence:
        log_ratio, clipped = found[0]["log_ratio"], clipped_sequences(found, at, case, p.batch, row_indices)
    hidden = torch.full_like(p.hidden, torch.nan)
    for r, one in enumerate(found):
        rows, first = row_indices[r // at.tp], found[r // at.tp * at.tp]
        assert one["steps"] == first["steps"], f"{case}: ranks of a tp group took other steps"
        logprobs[rows] = one["logprobs"]
        if not by_sequence:
            log_ratio[rows], clipped[rows] = one["log_ratio"], one["clipped"]
        for name in ("hidden", "weight", "bias"):
            needed = name in case.needs_grad and getattr(p, name) is not None
            assert (one[name] is not None) == needed, f"{case}: gradient of {name} on rank {r}"
        if one["hidden"] is not None:
            assert one["hidden"].dtype == p.hidden.dtype
            assert torch.equal(one["hidden"], first["hidden"]), f"{case}: hidden gradients differ in a tp group"
            assert one["padding"] is None or not bool(one["padding"].any()), f"{case}: the padding has a gradient"
            hidden[rows] = one["hidden"]
    heads = {}
    for name in ("weight", "bias"):
        if found[0][name] is not None:
            heads[name] = torch.cat([shards_added_up(found, at, case, name, t, vocab) for t in range(at.tp)])
            assert len(heads[name]) == vocab
    return Gradients(
        torch.stack([one["loss"] for one in found[:: at.tp]]).sum(),
        FlatStats(found[0]["stats"], logprobs, log_ratio, clipped),
        hidden if found[0]["hidden"] is not None else None,
        heads.get("weight"),
        heads.get("bias"),
    )


def shards_added_up(found: Sequence[Found], at: HeadGrid, case: Case, name: str, t: int, vocab: int) -> Tensor:
    """Of tp rank t, over the cp ranks, without its padding."""
    first, width = at.columns(vocab)[t] if at.tp > 1 else (0, vocab)
    shares = torch.stack([one[name] for one in found[t :: at.tp]])
    assert shares.shape[1] == width, f"{case}: gradient of {name}: {shares.shape[1]} rows of {width}"
    inside = max(min(first + width, vocab) - first, 0)
    assert not bool(shares[:, inside:].any()), f"{case}: padding of {name} has a gradient"  # NaN is not False
    return shares[:, :inside].double().sum(0).to(shares.dtype)


def check(found: Sequence[Found], at: HeadGrid, case: Case) -> None:
    """All that the ranks found in this case, within the bounds of `test_linear_logits.py`."""
    p, truth = truth_of(case)
    whole = put_together(found, at, case, p)
    if p.weight.dtype == torch.bfloat16:  # statistics as in fp32; gradients as the operand that the logits' gradient is
        check_same(whole, truth, p, number=2.0**-8 * min(at.cp, 2), stats=False)  # and once more, where shares add up
        whole = replace(whole, hidden=None, weight=None, bias=None)
    check_same(whole, truth, p, number=1.5e-5 if case.options.get("entropy_coef") else 3e-6)


def complaints(found: Sequence[Sequence[Found]], at: HeadGrid, cases: Sequence[Case]) -> list[str]:
    """[rank][case] -> what is wrong."""
    said = []
    for i, case in enumerate(cases):
        try:
            check([of_rank[i] for of_rank in found], at, case)
        except AssertionError as error:
            said.append(f"{case}: {error}")
    return said


def ways(found: Sequence[Sequence[Found]]) -> set[str]:
    return {way for of_rank in found for one in of_rank for way, _, _ in one["steps"]}
