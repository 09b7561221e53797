"""Data parallel: ranks and micro-batches that each return their share of the loss are one process with the whole batch.

A batch is dealt to ranks and micro-batches in unequal parts, down to nothing; their shares are added up, and meet
the oracle of the whole. By hand first, then with DDP and FSDP2 as the ones that average.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from batches import (
    ALL_MASKED,
    CLASSES,
    KINDS,
    LAYOUTS,
    LENGTHS,
    LINEAR,
    OBJECTIVES,
    PUBLIC,
    WITH_TOKENS,
    Batch,
    Outcome,
    arguments,
    pairs_of,
    ragged_batch,
    tokens_of_groups,
)  # fmt: skip
from checks import check_close, check_outcome, check_stats
from linear import Identity, chunk_of
from sharding import Case, Found, Grid, keywords_of, logits_case, part, put_together, shard_of
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gspo_kernels
from gspo_kernels import Stats, global_count
from gspo_kernels.losses.reduction import AGGREGATIONS
from gspo_kernels.losses.stats import ARRAYS

pytestmark = ranks.mark

EMPTY = LENGTHS.index(0)
Deal = list[list[list[int]]]  # [rank][micro-batch], which sequences

# Nobody has as many sequences or tokens as another. EMPTY and ALL_MASKED count nowhere.
DEALS: dict[int, dict[str, Deal]] = {
    2: {
        "unequal": [[[0, 1, EMPTY]], [[12, 4, 5, 6, 7, ALL_MASKED, 9, 10, 11, 3]]],
        "a rank without a sequence": [[[]], [list(range(13))]],
        "a rank whose sequences are masked": [[[0, 1, 3, 4, 5, 6, 7, 9]], [[EMPTY, ALL_MASKED]]],
        "micro-batches": [[[5, 0], [ALL_MASKED], [12, 1, 3, 4]], [[], [EMPTY], [6, 7, 9, 10, 11]]],
        "nothing": [[[EMPTY], [ALL_MASKED]], [[], [EMPTY]]],
    },
    4: {
        "unequal": [[[0]], [[1, EMPTY, 3]], [[5, 4]], [[6, 7, ALL_MASKED, 9, 10, 11, 12]]],
        "a rank without a sequence": [[[0, 1, 3]], [[5, 6, 7, 9, 10, 11]], [[4]], [[]]],
        "ranks whose sequences are masked": [[[EMPTY, ALL_MASKED]], [[0, 1, 3, 4, 5]], [[ALL_MASKED]], [[6, 7]]],
        "micro-batches": [[[5, 0], [1]], [[], [EMPTY, 12, 3, 4]], [[6], [ALL_MASKED]], [[7, 9], [10, 11]]],
        "nothing": [[[EMPTY]], [[ALL_MASKED]], [[]], [[ALL_MASKED]]],
    },
}
WAYS = ["logits", "hidden", "hidden in chunks", "logprobs"]
EVERYTHING = {"ref": True, "weights": "token", "temperature": "token"}, {"beta": 0.05, "entropy_coef": 0.01}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off-policy": ({"rollout": True}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "everything": (EVERYTHING[0], {**EVERYTHING[1], "kl_weighting": "ratio"}),
    "everything, on-policy": ({**EVERYTHING[0], "weights": "sequence", "on_policy": True}, EVERYTHING[1]),
}


@dataclass(frozen=True)
class Split:
    """How the sequences of a batch are dealt to ranks and micro-batches. `inner`: ranks that share one part."""

    case: Case
    deal: Deal
    way: str = "logits"
    averaged: bool = False
    inner: Grid = field(default_factory=Grid)
    mutant: str = ""

    @property
    def micro_batches(self) -> int:
        return len(self.deal[0])

    @property
    def averages_over(self) -> int:
        """Ranks whose gradients are averaged."""
        return (len(self.deal) * self.inner.cp) if self.averaged else 1

    def chosen(self, micro: int | None = None) -> Batch:
        """The sequences of all ranks in a micro-batch, or in all of them."""
        taken = [x if micro is None else x[micro : micro + 1] for x in self.deal]
        return choose(self.batch(), dealt(taken))

    def batch(self) -> Batch:
        """The whole, whose groups are of sequences that are dealt."""
        return regrouped(self.case.batch(), dealt(self.deal))

    @property
    def aggregation(self) -> str:
        usual = oracle.OBJECTIVES[self.case.objective].aggregation
        return str(self.case.options.get("aggregation", usual))


@dataclass(frozen=True)
class Chosen(Case):
    """Some sequences of a case."""

    sequences: tuple[int, ...] = ()
    dealt: tuple[int, ...] = ()  # to all ranks

    def batch(self) -> Batch:
        return choose(regrouped(super().batch(), self.dealt), self.sequences)


def dealt(deal: Deal) -> list[int]:
    return [i for of_rank in deal for sequences in of_rank for i in sequences]


def regrouped(batch: Batch, sequences: Sequence[int]) -> Batch:
    """With groups that have these sequences alone."""
    return batch if batch.group_tokens is None else replace(batch, group_tokens=tokens_of_groups(batch, sequences))


def choose(batch: Batch, sequences: Sequence[int]) -> Batch:
    """These sequences, in this order."""
    return batch.of(sequences, [batch.sequences[i] for i in sequences])


def splits_of(world: int, inners: Sequence[Grid]) -> list[Split]:
    """Of objectives, aggregations, deals, ways and so on every pair."""
    deals = DEALS[world // inners[0].size]
    axes: list[Sequence[Any]] = [OBJECTIVES, AGGREGATIONS, list(deals), WAYS, LAYOUTS, list(OPTIONS)]
    axes += [(False, True), (False, True), inners]
    found = []
    for objective, aggregation, deal, way, layout, option, by_token, averaged, inner in pairs_of(axes):
        build, options = OPTIONS[option]
        case = Case(
            objective, layout,
            {"seed": 30, "by_token": by_token and objective in WITH_TOKENS, **build, **grouped(aggregation)},
            {"aggregation": aggregation, **options}, rows=3 if way == "hidden in chunks" else None,
        )  # fmt: skip
        split = Split(case, deals[deal], way, averaged, inner)
        if looks_by_sequence(split):
            plain = {"by_token": False, **({"weights": "sequence"} if case.build.get("weights") else {})}
            split = replace(split, case=replace(case, build={**case.build, **plain}))
        found.append(split)
    return found


def grouped(aggregation: str) -> dict[str, Any]:
    """Of `ragged_batch`, for an aggregation: groups have sequences of several ranks and micro-batches."""
    return {"groups": True} if aggregation == "group_mean" else {}


def looks_by_sequence(split: Split) -> bool:
    """Whether an array per token of some context-parallel rank might as well be one per sequence."""
    batch = split.batch()
    parts = [choose(batch, sequences) for of_rank in split.deal for sequences in of_rank]
    held = [sum(map(len, rows)) == len(x.lengths) for x in parts for rows in split.inner.rows(x)]
    return split.inner.cp > 1 and split.case.layout == "packed" and any(held)


# --- in a rank --------------------------------------------------------------------------------------------------------


def shares(rank: int, splits: Sequence[Split]) -> list[list[Found]]:
    """[split][micro-batch], what this rank found."""
    groups = {size: ranks.grid(rank, size, dist.get_world_size() // size) for size in {s.inner.size for s in splits}}
    return [share(rank, split, *groups[split.inner.size]) for split in splits]


def share(rank: int, split: Split, inner_group: Any, outer_group: Any) -> list[Found]:
    """The micro-batches of one rank, with the count that belongs to them."""
    inner = split.inner
    d, i = divmod(rank, inner.size)
    case, every = split.case, tuple(dealt(split.deal))
    cases = [
        Chosen(
            case.objective, case.layout, case.build, case.options, case.rows, sequences=tuple(sequences), dealt=every
        )
        for sequences in split.deal[d]
    ]
    group, cp_group = (dist.group.WORLD, inner_group) if inner.cp > 1 else (outer_group, None)
    counted = [to_count(part(c.batch(), inner.rows(c.batch())[i // inner.tp]), case.layout) for c in cases]
    with mutated(split.mutant):
        counts = [
            global_count(
                **of_mask,
                aggregation=split.aggregation,
                group=None if split.mutant == "a local count" else group,
                cp_group=None if split.mutant == "sequences of every rank" else cp_group,
                averaged=split.averaged and split.mutant not in ("a local count", "not divided"),
            )
            for of_mask in counted
        ]
        count = torch.stack(counts).sum()
        if split.mutant == "a mean of means":  # which is right where shares are equal, and is what one is tempted by
            count = None
        elif split.mutant == "a count for each micro-batch":
            count = counts[0]
        found = []
        for each in cases:
            given = replace(each, options={**each.options, "normalizer": count})
            # from hidden states it is the head that a tp group shares out
            at = Grid(cp=inner.cp, tokens=inner.tokens) if "hidden" in split.way else inner
            function = loss_of_split(split, outer_group, inner_group, i)
            found.append(logits_case(i if at.size > 1 else 0, at, given, (inner_group, inner_group), function))
    for one in found:
        one["count"] = count
    return found


@contextlib.contextmanager
def mutated(mutant: str) -> Iterator[None]:
    """`Stats.over`, broken."""
    right = Stats.over

    def of_ranks(stats: Stats, name: str, group: Any) -> Tensor:
        mine: Tensor = getattr(stats, name)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        return torch.stack(found)

    def over(stats: Stats, group: Any) -> Stats:
        if mutant == "units are tokens":
            return replace(right(replace(stats, ratio_of="token"), group), ratio_of=stats.ratio_of)
        found = right(stats, group)
        if mutant == "means of means":
            names = ("clip_fraction", "ratio_mean", "approx_kl", "entropy")
            found = replace(found, **{name: of_ranks(stats, name, group).mean() for name in names})
        elif mutant == "ratios of ranks without any":
            found = replace(found, ratio_min=of_ranks(stats, "ratio_min", group).amin())
        return found

    with mock.patch.object(Stats, "over", over):
        yield


def to_count(batch: Batch, layout: str) -> dict[str, Tensor]:
    """What `global_count` takes of it."""
    keywords = arguments(batch, layout).keywords
    return {name: keywords[name] for name in ("mask", "cu_seqlens", "group_tokens") if name in keywords}


def loss_of_split(split: Split, group: Any, inner_group: Any, i: int) -> Callable[..., Any]:
    """The loss as a function of logits, with stats over data-parallel ranks."""
    objective = split.case.objective

    def function(given: Tensor, *rest: Any, **keywords: Any) -> Any:
        if split.way == "logits":
            loss, mine = PUBLIC[objective](given, *rest, **keywords)
        elif split.way == "logprobs":
            loss, mine = from_logprobs(objective, given, *rest, **keywords)
        elif split.inner.tp > 1:
            loss, mine = from_sharded_head(split, inner_group, i, given, *rest, **keywords)
        else:
            loss, mine = Identity(objective, split.case.rows)(given, *rest, **keywords)
        every = mine.over(group)
        assert all(getattr(every, x) is getattr(mine, x) for x in (*ARRAYS, "head"))
        assert every.ratio_of == mine.ratio_of and (mine.head is not None) == ("hidden" in split.way)
        assert all(x.dtype == torch.float32 and x.shape == () for x in every.as_dict().values())
        return loss, every

    return function


def from_logprobs(objective: str, logits: Tensor, *rest: Any, **keywords: Any) -> Any:
    token_ids, advantages, old_logprobs = rest
    names = ("temperature", "tp_group", "vocab_start", "vocab_size")
    of_rows = {name: keywords.pop(name) for name in names if name in keywords}
    found = gspo_kernels.token_logprobs(logits, token_ids, mask=keywords["mask"], **of_rows)
    given = {**keywords, "objective": CLASSES[objective](), "entropy": found.entropy}
    return gspo_kernels.policy_loss_from_logprobs(found.logprobs, advantages, old_logprobs, **given)


def from_sharded_head(split: Split, group: Any, i: int, hidden: Tensor, *rest: Any, **keywords: Any) -> Any:
    """As `Identity`, of whose rows this rank has some."""
    vocab = hidden.shape[-1]
    columns = split.inner.columns(vocab)
    of_head = {name: shard_of(x, *columns[i], 0) for name, x in (("w", torch.eye(vocab)), ("b", torch.zeros(vocab)))}
    weight, bias = (x.requires_grad_() for x in of_head.values())
    chunk_bytes = chunk_of(split.case.rows, columns[0][1], hidden.dtype)
    given = {**keywords, **keywords_of(split.inner, i, vocab, group, None), "bias": bias, "chunk_bytes": chunk_bytes}
    return LINEAR[split.case.objective](hidden, weight, *rest, **given)


# --- added up ---------------------------------------------------------------------------------------------------------


def check(split: Split, found: Sequence[list[Found]]) -> None:
    """The shares of all ranks (`found` [rank][micro-batch]) are the whole batch."""
    whole, inner, objective = split.chosen(), split.inner, split.case.objective
    outcomes: list[Outcome] = []
    for d, of_rank in enumerate(split.deal):
        for micro, sequences in enumerate(of_rank):
            mine = [found[d * inner.size + i][micro] for i in range(inner.size)]
            at = inner
            if "hidden" in split.way and inner.tp > 1:  # what each rank returns is whole, and the same
                assert all(torch.equal(one["gradient"], mine[0]["gradient"]) for one in mine)
                at, mine = Grid(), mine[:1]
            outcomes.append(put_together(mine, at, split.case, choose(split.batch(), sequences)))
    options = {**split.case.options, "aggregation": split.aggregation}
    truth = oracle.OBJECTIVES[objective].options(**options)
    for micro in range(split.micro_batches):
        every = [of_rank[micro]["stats"] for of_rank in found]
        scalars = {name: x for name, x in every[0].items() if not name.startswith("head_")}
        for other in every:
            differing = [name for name, x in scalars.items() if not same_bits(other[name], x)]
            assert not differing, f"{differing} of the stats differ among ranks"
        batch = split.chosen(micro)
        numbers = {name: float(x) for name, x in scalars.items()}
        check_stats(numbers, batch, batch.expected(objective, **options), truth, TOLERANCES[torch.float32])

    expected = whole.expected(objective, **options)
    counted = expected.stats["num_tokens" if split.aggregation == "token_mean" else "num_sequences"]
    if whole.group_tokens is not None:
        shares = zip(whole.sequences, whole.group_tokens.tolist(), strict=True)
        counted = sum(float(whole.mask[list(rows)].sum()) / max(size, 1.0) for rows, size in shares)
    if not split.mutant:
        for of_rank in found:
            count = float(of_rank[0]["count"]) * split.averages_over
            assert count == pytest.approx(counted, rel=1e-14), f"the count is not {counted:g}"
    factor = 1.0 / split.averages_over
    merged = Outcome(
        torch.stack([one.loss.double() for one in outcomes]).sum().float() * factor,
        SimpleNamespace(**{name: torch.tensor(x) for name, x in expected.stats.items()}),  # checked above
        *(torch.cat([getattr(one, x) for one in outcomes]) for x in ("gradient", "padding_gradient")),
        *(torch.cat([getattr(one, x) for one in outcomes]) for x in ("logprobs", "log_ratio", "clipped")),
    )
    merged.gradient = merged.gradient * factor
    check_outcome(merged, whole, objective, roundings=2, **options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_all(splits: Sequence[Split], found: Sequence[list[list[Found]]]) -> None:
    """`found` [rank][split][micro-batch]."""
    for k, split in enumerate(splits):
        try:
            check(split, [of_rank[k] for of_rank in found])
        except AssertionError as error:
            raise AssertionError(f"{split}\n{error}") from error


NONE = [Grid()]
CONTEXT = [Grid(cp=2, tokens=tokens) for tokens in ("contiguous", "zigzag", "whole")]
VOCABULARY = [Grid(tp=2, vocab=vocab) for vocab in ("padded", "unequal")]


@pytest.mark.parametrize(
    ("world", "inners"),
    [(2, NONE), (4, NONE), (4, CONTEXT), (4, VOCABULARY)],
    ids=["2 ranks", "4 ranks", "2 x 2 with context", "2 x 2 with vocabulary"],
)
def test_shares_are_the_whole_batch(world: int, inners: list[Grid]) -> None:
    splits = splits_of(world, inners)
    check_all(splits, ranks.run(world, shares, splits))


# name, and for which split it is wrong
MUTANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("a local count", "unequal", {}),
    ("a local count", "micro-batches", {}),
    ("a mean of means", "unequal", {"averaged": True}),
    ("a mean of means", "micro-batches", {"averaged": True}),
    ("a count for each micro-batch", "micro-batches", {}),
    ("not divided", "unequal", {"averaged": True}),
    ("means of means", "unequal", {}),
    ("means of means", "a rank without a sequence", {}),
    ("units are tokens", "unequal", {}),
    ("ratios of ranks without any", "a rank whose sequences are masked", {}),
]
IN_GRID: list[tuple[str, str, dict[str, Any]]] = [("sequences of every rank", "unequal", {"inner": CONTEXT[1]})]


def broken(mutants: list[tuple[str, str, dict[str, Any]]]) -> list[Split]:
    """Each mutant, and last all the same splits without a fault."""
    found = []
    for mutant, deal, how in mutants:
        for objective in ("gspo", "ppo"):  # a unit is a sequence, or a token; sequences are counted, or tokens
            split = Split(Case(objective, build={"seed": 31}), DEALS[2][deal], mutant=mutant, **how)
            # where units are tokens, or where tokens are counted, these two are right
            if objective == "gspo" or mutant not in ("units are tokens", "sequences of every rank"):
                found.append(split)
    unspoiled: list[Split] = []
    for split in (replace(x, mutant="") for x in found):
        unspoiled += [split] if split not in unspoiled else []
    return found + unspoiled


@pytest.mark.parametrize(("world", "mutants"), [(2, MUTANTS), (4, IN_GRID)], ids=["2 ranks", "2 x 2 with context"])
def test_wrong_counts_and_means_are_found_out(world: int, mutants: list[tuple[str, str, dict[str, Any]]]) -> None:
    splits = broken(mutants)
    found = ranks.run(world, shares, splits)
    alive = []
    for k, split in enumerate(splits):
        mine = [of_rank[k] for of_rank in found]
        if not split.mutant:
            check(split, mine)
            continue
        with contextlib.suppress(AssertionError):
            check(split, mine)
            alive.append(split)
    assert not alive, alive


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_counts_of_micro_batches_add_up(aggregation: str) -> None:
    """To that of all of them in one, also where some have nothing that counts, or a part of a group."""
    batch, every = ragged_batch("gspo", seed=32), [[0, 1], [ALL_MASKED], [], [3, EMPTY], [EMPTY], [4, 5, 6, 7]]
    if aggregation == "group_mean":
        batch.group_tokens = tokens_of_groups(batch, sorted({i for x in every for i in x}))
    for layout in LAYOUTS:
        parts = [choose(batch, x) for x in every]
        counts = [global_count(**to_count(x, layout), aggregation=aggregation) for x in parts]
        assert all(x.dtype == torch.float64 and x.shape == () for x in counts)
        whole = choose(batch, [0, 1, ALL_MASKED, 3, EMPTY, EMPTY, 4, 5, 6, 7])
        total = global_count(**to_count(whole, layout), aggregation=aggregation)
        assert total.tolist() == pytest.approx(sum(x.tolist() for x in counts), rel=1e-14)
        if aggregation == "group_mean":
            assert total.tolist() == pytest.approx(2.0, rel=1e-14)  # sequences 0 to 3, and 4 to 7
        else:
            expected = [int(x.mask.sum()) for x in parts] if aggregation == "token_mean" else [2, 0, 0, 1, 0, 4]
            assert [x.tolist() for x in counts] == expected


def test_a_count_of_zero_is_no_excuse_for_a_batch_with_tokens() -> None:
    args = arguments(ragged_batch("gspo", seed=33, lengths=(2, 3)), "packed")
    zero = torch.zeros((), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"normalizer: expected a global count .*; got a tensor of 0"):
        gspo_kernels.gspo_loss(args.logits, *args.rest, **args.keywords, normalizer=zero)


# --- no collective without a group ------------------------------------------------------------------------------------


def without_collectives(rank: int) -> tuple[list[str], list[Any]]:
    """Rank 0 computes losses; nobody else does, so a collective could not end."""
    stats = gspo_kernels.gspo_loss(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)).stats
    called: list[str] = []
    with contextlib.ExitStack() as stack:
        for owner in (dist, dist.distributed_c10d, dist.ProcessGroup):
            for name in dir(owner):
                if name.lstrip("_").startswith(COLLECTIVES) and callable(getattr(owner, name)):
                    stack.enter_context(mock.patch.object(owner, name, refusing(name, called)))
        if rank == 0:
            for objective, layout, on_policy in itertools.product(KINDS, LAYOUTS, (False, True)):
                case = Case(objective, layout, {"seed": 34, "on_policy": on_policy, "ref": True}, {"beta": 0.05})
                for function in (PUBLIC[objective], Identity(objective, 3)):
                    logits_case(0, Grid(), case, (None, None), function)
                args = arguments(case.batch(), layout)
                loss, of_logprobs = from_logprobs(objective, args.logits, *args.rest, **args.keywords)
                loss.backward()
                of_logprobs.as_dict()
                count = global_count(args.keywords["mask"], args.keywords.get("cu_seqlens"))
                assert count.tolist() == int(of_logprobs.num_sequences)
        refusals = [ranks.refused(call) for call in (lambda: stats.over(dist.group.WORLD), lambda: dist.barrier())]
    return called, refusals


COLLECTIVES = (
    "all_", "allgather", "allreduce", "alltoall", "barrier", "broadcast", "gather", "irecv", "isend", "monitored",
    "recv", "reduce", "scatter", "send",
)  # fmt: skip


def refusing(name: str, called: list[str]) -> Callable[..., None]:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        called.append(name)
        raise RuntimeError(f"a collective: {name}")

    return refuse


def test_without_a_group_no_loss_talks_to_anybody() -> None:
    """In a world of ranks. `Stats.over` and a barrier are collectives, which this test must notice."""
    for called, refusals in ranks.run(2, without_collectives):
        assert all(x is not None and x.message.startswith("a collective") for x in refusals), refusals
        assert len(called) == len(refusals), called


def refusals(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "other"))
    mask = torch.ones(1, 2)
    stats = gspo_kernels.gspo_loss(torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)).stats
    calls: list[Callable[[], Any]] = [
        lambda: global_count(mask, averaged=True),
        lambda: global_count(mask, group=mesh),
        lambda: global_count(mask, group="dp"),
        lambda: global_count(mask, group=dist.group.WORLD, aggregation="mean"),
        lambda: global_count(mask[0], group=dist.group.WORLD),
        lambda: stats.over(None),
        lambda: stats.over(mesh),
    ]
    refused = [ranks.refused(call) for call in calls]
    accepted = [global_count(mask, group=g, averaged=True) for g in (mesh["dp"], mesh["dp"].get_group())]
    return [*refused, *accepted, stats.over(mesh["dp"]).num_tokens]


def test_what_is_no_group_is_refused() -> None:
    """On each rank by itself: these do not depend on what others pass."""
    for found in ranks.run(2, refusals):
        kinds = [(x.type, x.message.split(":")[0]) for x in found[:7]]
        value, kind = "ValueError", "TypeError"
        assert kinds == [
            (value, "group"), (value, "group"), (kind, "group"), (value, "aggregation"), (value, "cu_seqlens"),
            (kind, "group"), (value, "group"),
        ]  # fmt: skip
        assert [x.tolist() for x in found[7:]] == [1.0, 1.0, 2.0]


# --- NaN --------------------------------------------------------------------------------------------------------------

SPOILED = Split(Case(build={"seed": 35}), DEALS[2]["unequal"])


def with_nan(rank: int) -> list[dict[str, Tensor]]:
    return [nan_stats(objective, SPOILED.deal[rank][0], dist.group.WORLD) for objective in KINDS]


def nan_stats(objective: str, sequences: Sequence[int], group: Any) -> dict[str, Tensor]:
    """A logit of one row of sequence 5 is NaN."""
    batch = ragged_batch(objective, seed=35)
    row = next(t for t in batch.sequences[5] if batch.mask[t])
    batch.logits[row, 3] = math.nan
    args = arguments(choose(batch, sequences), "packed")
    stats = PUBLIC[objective](args.logits, *args.rest, **args.keywords).stats
    found: dict[str, Tensor] = (stats if group is None else stats.over(group)).as_dict()
    return found


def test_a_nan_of_one_rank_is_everybodys() -> None:
    """As in one process, and not a number that looks well."""
    found = ranks.run(2, with_nan)
    for k, objective in enumerate(KINDS):
        truth = nan_stats(objective, list(range(13)), None)
        for of_rank in found:
            for name, x in of_rank[k].items():
                expected = pytest.approx(float(truth[name]), rel=2e-6, abs=1e-9, nan_ok=True)
                assert float(x) == expected, f"{objective}: {name}"
                assert same_bits(x, found[0][k][name])
        has_nan = {name for name, x in found[0][k].items() if bool(x.isnan())}
        assert has_nan >= {"ratio_mean", "ratio_min", "ratio_max", "approx_kl", "entropy"}


# --- DDP and FSDP2 ----------------------------------------------------------------------------------------------------

WIDTH, VOCAB = 16, 53


class Policy(nn.Module):
    """A body and a head. From hidden states the loss belongs into the forward: there the weight is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, loss: Callable[..., Any] | None = None, *rest: Any, **options: Any) -> Any:
        hidden = torch.tanh(self.body(x))
        if loss is None:
            return self.head(hidden).clone()  # of padded batches it is a view, of which FSDP warns
        return loss(hidden, self.head.weight, *rest, bias=self.head.bias, **options)


@dataclass(frozen=True)
class Training:
    """One optimizer step's gradient: who averages, from logits or hidden states, of which deal."""

    kind: str  # "ddp" or "fsdp"
    hidden: bool
    objective: str
    aggregation: str
    layout: str
    deal: str
    cp: int = 1
    by_mesh: bool = False  # groups are given as meshes

    @property
    def options(self) -> dict[str, Any]:
        return {"aggregation": self.aggregation, "eps_low": 0.1, "eps_high": 0.1, "entropy_coef": 0.01}

    def made(self) -> tuple[Policy, Batch]:
        """The same on each rank; the rows of the batch are what the model is given."""
        torch.manual_seed(0)
        policy, n, generator = Policy(), sum(LENGTHS), torch.Generator().manual_seed(1)
        with torch.no_grad():
            policy.head.weight.mul_(6)
        x = torch.randn(n, WIDTH, generator=generator)
        ids = torch.randint(VOCAB, (n,), generator=generator)
        mask = torch.rand(n, generator=generator) < 0.8
        advantages = torch.randn(len(LENGTHS), generator=generator)
        with torch.no_grad():
            logprobs = policy(x).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        batch = Batch(x, ids, mask, list(LENGTHS), advantages)
        for i in (EMPTY, ALL_MASKED):
            batch.mask[batch.sequences[i].start : batch.sequences[i].stop] = False
        batch.old_logprobs = (logprobs + torch.randn(n, generator=generator) * 0.2).clamp(max=0.0)
        if self.aggregation == "group_mean":
            batch.group_tokens = tokens_of_groups(batch, dealt(DEALS[2][self.deal]))
        return policy, batch

    def loss(self, policy: nn.Module, batch: Batch, **given: Any) -> Tensor:
        args = arguments(batch, self.layout)
        x = args.logits.detach().nan_to_num(0.0)  # padding that a model can read
        options = {**args.keywords, **self.options, **given}
        if self.hidden:
            loss, _ = policy(x, LINEAR[self.objective], *args.rest, chunk_bytes=chunk_of(4, VOCAB), **options)
        else:
            loss, _ = PUBLIC[self.objective](policy(x), *args.rest, **options)
        found: Tensor = loss
        return found


def trainings(cp: int) -> list[Training]:
    deals = [name for name in DEALS[2] if name != "nothing"]
    kinds = [(kind, hidden) for kind in ("ddp", "fsdp") for hidden in (False, True)]
    axes: list[Sequence[Any]] = [kinds, OBJECTIVES, AGGREGATIONS, LAYOUTS, deals, (False, True)]
    return [Training(*kind, *rest, cp, by_mesh) for kind, *rest, by_mesh in pairs_of(axes)]


def trained(rank: int, steps: Sequence[Training]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each, the sum of the shares of the loss, and the parameters' gradients after averaging."""
    cp = steps[0].cp
    mesh = init_device_mesh("cpu", (2, cp), mesh_dim_names=("dp", "cp"))
    every = mesh["dp"] if cp == 1 else mesh["dp", "cp"]._flatten("dp_cp")
    return [step_of(rank, step, mesh, every) for step in steps]


def step_of(rank: int, step: Training, mesh: Any, every: Any) -> tuple[Tensor, dict[str, Tensor]]:
    whole, batch = step.made()
    d, c = divmod(rank, step.cp)
    group, cp_group = every, (mesh["cp"] if step.cp > 1 else None)
    if not step.by_mesh:
        group, cp_group = (None if x is None else x.get_group() for x in (group, cp_group))
    batches = [choose(batch, sequences) for sequences in DEALS[2][step.deal][d]]
    batches = [part(x, Grid(cp=step.cp).rows(x)[c]) for x in batches]
    counts = [
        global_count(
            **to_count(x, step.layout), aggregation=step.aggregation, group=group, cp_group=cp_group, averaged=True
        )
        for x in batches
    ]
    count = torch.stack(counts).sum()
    policy: Any = whole
    if step.kind == "ddp":
        policy = DistributedDataParallel(whole, process_group=every.get_group())
    else:
        policy = fully_shard(whole, mesh=every)
    total = torch.zeros(())
    for micro, x in enumerate(batches):
        last = micro == len(batches) - 1
        if isinstance(policy, FSDPModule):
            policy.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or step.kind == "fsdp" else policy.no_sync():
            loss = step.loss(policy, x, normalizer=count, cp_group=cp_group)
            loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    gradients = {}
    for name, x in whole.named_parameters():
        assert x.grad is not None, name
        gradients[name] = x.grad.full_tensor() if step.kind == "fsdp" else x.grad
    return total / every.size(), gradients


@pytest.mark.parametrize("cp", [1, 2], ids=["2 ranks", "2 x 2 with context"])
def test_ddp_and_fsdp2_have_the_gradient_of_one_process(cp: int) -> None:
    """After the mean over ranks, with and without gradient accumulation; the same on each rank."""
    steps = trainings(cp)
    found = ranks.run(2 * cp, trained, steps)
    for k, step in enumerate(steps):
        policy, batch = step.made()
        taken = choose(batch, dealt(DEALS[2][step.deal]))
        truth = replace(step, hidden=False).loss(policy.double(), widened(taken), backend="reference")
        truth.backward()
        for of_rank in found:
            loss, gradients = of_rank[k]
            assert float(loss) == pytest.approx(float(truth.detach()), rel=3e-6, abs=1e-6), step
            assert set(gradients) == {name for name, _ in policy.named_parameters()}
            for name, x in policy.named_parameters():
                assert x.grad is not None and bool(x.grad.any())
                bound = 1e-5 * x.grad.abs() + 2e-6 * x.grad.abs().max()
                check_close(f"{step}: {name}", gradients[name], x.grad, bound)
                assert torch.equal(gradients[name], found[0][k][1][name])


def widened(batch: Batch) -> Batch:
    """In float64."""
    wide = copy.copy(batch)
    for x in fields(Batch):
        value = getattr(batch, x.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(wide, x.name, value.double())
    return wide
