"""Losses from logits that lie on several ranks, against the oracle: vocabulary, context, and both, in real processes.

A world is started once a test; its ranks go through many cases, and what they found is put together and checked here.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import pytest
import ranks
import sharding
import torch
import torch.distributed as dist
from batches import (
    CLASSES,
    FIELDS,
    KINDS,
    LAYOUTS,
    OBJECTIVES,
    WITH_TOKENS,
    Batch,
    arguments,
    edge_batch,
    kept_tokens,
    pairs_of,
    run,
)  # fmt: skip
from checks import check_close, check_gradient, check_outcome, check_rows
from sharding import Case, Found, Grid
from test_linear_plans import OverMean
from tolerances import TOLERANCES
from torch import Tensor

import gspo_kernels
from gspo_kernels import policy_loss, policy_loss_from_logprobs, token_logprobs

pytestmark = ranks.mark

FULL = {"ref": True, "weights": "token", "temperature": "token", "softcap": 6.0, "logit_scale": 0.8}
TERMS = {"beta": 0.1, "entropy_coef": 0.02, "kl_estimator": "k2"}
WEIGHTED = {"beta": 0.5, "kl_weighting": "ratio"}
# build, options, upstream
SETTINGS: list[tuple[dict[str, Any], dict[str, Any], float]] = [
    ({"seed": 1}, {}, -0.75),
    ({"seed": 2, "on_policy": True}, {}, 1.0),
    ({"seed": 3, **FULL}, {**TERMS, "aggregation": "token_mean"}, 1.0),
    ({"seed": 4, "weights": "sequence"}, {"aggregation": "sequence_sum"}, 1.0),
    ({"seed": 5, "on_policy": True}, {"entropy_coef": 0.1, "dual_clip": 3.0}, 1.0),
    ({"seed": 6, "by_token": True}, {"normalizer": 7.5}, 1.0),
    ({"seed": 15, "ref": True, "rollout": True}, WEIGHTED, 1.0),  # the gradient of a sequence's ratio crosses ranks
    ({"seed": 16, "ref": True, "weights": "token"}, {**WEIGHTED, "kl_estimator": "k1", "max_log_ratio": 0.5}, 1.0),
    ({"seed": 17, "ref": True, "on_policy": True}, {**WEIGHTED, "kl_estimator": "k2", "entropy_coef": 0.02}, 1.0),
    ({"seed": 18, "groups": True, "ref": True}, {"aggregation": "group_mean", **WEIGHTED}, 1.0),
    ({"seed": 19, "groups": True, "on_policy": True}, {"aggregation": "group_mean", "normalizer": 2.5}, 1.0),
    ({"seed": 21, "rollout": True}, {"divergence": "kl", "eps_high": math.inf}, 1.0),
    ({"seed": 22, "kept": True}, {}, 1.0),
    ({"seed": 23, "kept": True, "on_policy": True, **FULL}, TERMS, 1.0),
]


def case_of(objective: str, layout: str, setting: tuple[dict[str, Any], dict[str, Any], float]) -> Case:
    build, options, upstream = setting
    own = {x.name for x in fields(CLASSES[objective])}
    options = {name: x for name, x in options.items() if name not in FIELDS - own}
    return Case(objective, layout, {**build, **({"by_token": False} if objective not in WITH_TOKENS else {})}, options,
                upstream=upstream)  # fmt: skip


PLAIN = [case_of(*each) for each in pairs_of([OBJECTIVES, LAYOUTS, SETTINGS])]
PLAIN += [
    Case("gspo", "packed", {"seed": 7, "dtype": torch.bfloat16}),
    Case("grpo", "padded", {"seed": 8, "dtype": torch.float16}),
    Case("gspo", "padded", {"seed": 9, "dtype": torch.float64}, {"backend": "reference"}),
    Case("gspo", "packed", {"seed": 10}, {"overwrite_logits": True}),
    Case("ppo", "packed", {"seed": 11}, {"max_log_ratio": 1.5}),
    Case("gspo", "packed", {"seed": 12, "lengths": (3,)}),
    Case("gspo", "padded", {"seed": 13, "lengths": (0, 0)}),
    Case("gspo", "packed", {"seed": 14, "lengths": ()}),
]
GRIDS = [
    Grid(tp=2),
    Grid(tp=2, vocab="dtensor"),
    Grid(tp=4, vocab="loose"),
    Grid(tp=4, vocab="unequal"),
    Grid(tp=4, vocab="dtensor"),
    Grid(cp=2),
    Grid(cp=4, tokens="contiguous"),
    Grid(cp=4, tokens="whole"),
    Grid(tp=2, cp=2),
    Grid(tp=2, cp=2, vocab="dtensor", tokens="whole"),
]


def complaints(at: Grid, cases: Sequence[Case], found: Sequence[Sequence[Any]]) -> list[str]:
    """Of every case, what the oracle says against it."""
    said = []
    for i, case in enumerate(cases):
        batch = case.batch()
        try:
            outcome = sharding.put_together([of_rank[i] for of_rank in found], at, case, batch)
            check_outcome(outcome, batch, case.objective, upstream=case.upstream, **oracle_options(case))
        except AssertionError as error:
            said.append(f"{case}: {error}")
    return said


def oracle_options(case: Case) -> dict[str, Any]:
    return {name: x for name, x in case.options.items() if name not in ("backend", "overwrite_logits")}


@pytest.mark.parametrize("at", GRIDS, ids=lambda at: f"tp{at.tp}-{at.vocab}-cp{at.cp}-{at.tokens}")
def test_shares_of_all_ranks_are_the_loss_of_one(at: Grid) -> None:
    """Loss, stats, arrays and the gradient of every shard, against the oracle, within the bounds of one process."""
    found = ranks.run(at.size, sharding.from_logits, at, PLAIN)
    said = complaints(at, PLAIN, found)
    assert not said, f"{len(said)} of {len(PLAIN)}:\n" + "\n".join(said[:5])


# --- wrong ways, which must not pass --------------------------------------------------------------------------------


def not_the_owner_not_touched(real: Callable[..., Any]) -> Callable[..., Any]:
    """What a plain all-reduce of the target's logit does: in the backward only the rank that has the target knows."""

    def wrong(*arguments: Any) -> Any:
        stats, upstream = real(*arguments)
        return stats, upstream._replace(lse=None)

    return wrong


def everybody_owns(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda stats, upstream, *_: (stats, upstream)


def entropies_added(real: Callable[..., Any]) -> Callable[..., Any]:
    """Without what a rank's share of the probability has of its own."""

    def wrong(local: Any, *rest: Any) -> Any:
        whole = real(local, *rest)
        return whole._replace(entropy=real(local._replace(entropy=local.entropy * 0), *rest).entropy)

    return wrong


def own_sums(real: Callable[..., Any]) -> Callable[..., Any]:
    """Each rank for itself, as if the tokens it has were the sequence."""
    return lambda values, of_ranks, crosses: values


def own_share_of_the_gradient(real: Callable[..., Any]) -> Callable[..., Any]:
    """An all-reduce that is right in the forward; in the backward the other ranks' shares of the loss do not count."""

    def wrong(self: Any, of_each: Tensor, shares: Tensor) -> Tensor:
        local = (
            self.layout.local_lengths
            if self.importance_weights is None
            else self.layout.local_sum(self.importance_weights)
        )
        return (of_each * shares * local).sum()

    return wrong


def as_often_as_ranks(real: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient that is summed over ranks, although each had it whole."""
    return lambda values, of_ranks, crosses: real(values, of_ranks, crosses=True)


MUTANTS: dict[str, tuple[str, Callable[..., Any], Grid]] = {
    "plain all-reduce": ("rows.vocab_shard.of_this_rank", not_the_owner_not_touched, Grid(tp=2)),
    "everybody owns": ("rows.vocab_shard.of_this_rank", everybody_owns, Grid(tp=2)),
    "entropies added": ("rows.vocab_shard.merged", entropies_added, Grid(tp=2)),
    "own sums": ("base.layout.sum_over_ranks", own_sums, Grid(cp=2)),
    "own share of the gradient": ("losses.token_stage.TokenStage._of_sequences", own_share_of_the_gradient, Grid(cp=2)),
    "gradient as often as ranks": ("base.layout.sum_over_ranks", as_often_as_ranks, Grid(cp=2)),
}


def mutated(rank: int, at: Grid, cases: Sequence[Case], names: Sequence[str]) -> dict[str, list[Any]]:
    """In a rank: what the cases come to with each mutant; "" is none."""
    found = {}
    for name in names:
        if not name:
            found[name] = sharding.from_logits(rank, at, cases)
            continue
        path, change, _ = MUTANTS[name]
        target = f"gspo_kernels.{path}"
        with mock.patch(target, change(pkgutil.resolve_name(target))):
            found[name] = sharding.from_logits(rank, at, cases)
    return found


@pytest.mark.parametrize("at", [Grid(tp=2), Grid(cp=2)], ids=["tp", "cp"])
def test_wrong_ways_are_found(at: Grid) -> None:
    """Each by the loss that it is about, while the right way passes."""
    cases = [
        Case("gspo", "packed", {"seed": 1}),
        Case("gspo", "packed", {"seed": 3, **FULL}, {"beta": 0.1, "entropy_coef": 0.5}),
        Case("grpo", "padded", {"seed": 4}),
    ]
    names = ["", *(name for name, (_, _, where) in MUTANTS.items() if where == at)]
    found = ranks.run(at.size, mutated, at, cases, names)
    verdicts = {name: bool(complaints(at, cases, [of_rank[name] for of_rank in found])) for name in names}
    assert verdicts == {name: bool(name) for name in names}


# --- rows -------------------------------------------------------------------------------------------------------------


def hard_rows() -> Batch:
    """Rows that a merge may get wrong: nothing on a shard, certainty, a target of -inf, logits of any size."""
    generator = torch.Generator().manual_seed(20)
    logits, ids = torch.randn(12, 16, generator=generator), torch.arange(12)
    logits[0, 8:] = -torch.inf  # the second half is filtered away; the target, 0, is in the first
    logits[1, :8] = -torch.inf
    logits[1, 1] = 0.0
    logits[2, :8] = -torch.inf  # with the target in it
    logits[3, 3] = 40.0  # as certain as can be
    logits[4, 4], logits[4, 12] = 30.0, 29.5  # two that share all there is, on two ranks
    logits[5] += 1e4
    logits[6] -= 1e4
    logits[7] *= 1e3
    logits[8, 8] = -60.0
    logits[9, :] = -torch.inf
    logits[9, 9] = -3.0  # a single token left: its probability is 1
    logits[10, 2] = torch.nan  # on the rank without the target
    logits[11, 5] = torch.inf
    return Batch(logits, ids, torch.ones(12, dtype=torch.bool), [12], torch.zeros(1))


UPSTREAM = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (-0.5, 0.3, 0.2)]


def statistics(rank: int, at: Grid) -> list[Found]:
    """In a rank: what `token_logprobs` finds, and the gradient through each of its results."""
    tp_group, _ = ranks.grid(rank, at.tp, at.cp)
    batch = hard_rows()
    first, width = at.columns(16)[rank]
    found = []
    for upstream in UPSTREAM:
        leaf = sharding.shard_of(batch.logits, first, width, -1).requires_grad_()
        start = {"vocab_start": first} if at.vocab == "unequal" else {}
        three = token_logprobs(leaf, batch.token_ids, tp_group=tp_group, vocab_size=16, **start)
        sum((x.double() * g).sum() for x, g in zip(three, upstream, strict=True) if g).backward()
        found.append({"three": list(three), "gradient": leaf.grad})
    return found


@pytest.mark.parametrize("at", [Grid(tp=2), Grid(tp=4, vocab="loose"), Grid(tp=4, vocab="unequal")], ids=str)
def test_rows_that_are_hard_to_merge(at: Grid) -> None:
    batch, tol = hard_rows(), TOLERANCES[torch.float32]
    found = ranks.run(at.size, statistics, at)
    sound = torch.arange(10)
    for i, upstream in enumerate(UPSTREAM):
        of_ranks = [of_rank[i] for of_rank in found]
        for one in of_ranks:
            for mine, first in zip(one["three"], of_ranks[0]["three"], strict=True):
                assert torch.equal(mine[sound], first[sound]) and bool(mine[10:].isnan().all())
        logprobs, entropy, lse = (x[sound] for x in of_ranks[0]["three"])
        check_rows(logprobs, entropy, lse, batch.rows[:10], tol)
        assert float(logprobs[2]) == -torch.inf and float(logprobs[9]) == 0.0
        gradient = torch.cat([one["gradient"] for one in of_ranks], -1)[:, :16]
        assert bool(gradient[10:].isnan().all()), "a NaN or infinite logit is not hidden from any shard"
        check_gradient(gradient[:10], sharding.part(batch, [range(10)]), *([g] * 10 for g in upstream), tol=tol)


def kept_rows() -> Batch:
    """The same rows, each keeping some columns: on one rank alone, without those that are NaN, all, or nothing said."""
    batch = hard_rows()
    batch.kept = [
        [0],
        None,
        [2, 9],
        [3, 1, 15],
        [12, 4],
        [7, 6, 5],
        [6, 1],
        list(range(16)),
        [8, 10],
        [9],
        [10],
        [11, 0],
    ]
    return batch


def kept_statistics(rank: int, at: Grid) -> list[list[Found]]:
    """In a rank: the same of the kept columns and of all, from one call."""
    tp_group, _ = ranks.grid(rank, at.tp, at.cp)
    batch = kept_rows()
    first, width = at.columns(16)[rank]
    kept, start = kept_tokens(batch, "packed"), {"vocab_start": first} if at.vocab == "unequal" else {}
    found = []
    for upstream in UPSTREAM:
        leaf = sharding.shard_of(batch.logits, first, width, -1).requires_grad_()
        both = token_logprobs(leaf, batch.token_ids, kept=kept, tp_group=tp_group, vocab_size=16, **start)
        of_call = []
        for three in both:
            assert three is not None
            scalar = sum((x.double() * g).sum() for x, g in zip(three, upstream, strict=True) if g)
            (gradient,) = torch.autograd.grad(scalar, leaf, retain_graph=True)
            of_call.append({"three": list(three), "gradient": gradient})
        found.append(of_call)
    return found


@pytest.mark.parametrize("at", [Grid(tp=2), Grid(tp=4, vocab="loose"), Grid(tp=4, vocab="unequal")], ids=str)
def test_kept_rows_over_ranks(at: Grid) -> None:
    """Most ranks have no kept column of most rows."""
    batch, whole, tol = kept_rows(), hard_rows(), TOLERANCES[torch.float32]
    found = ranks.run(at.size, kept_statistics, at)
    for i, upstream in enumerate(UPSTREAM):
        for which, truth, count in ((0, batch, 12), (1, whole, 10)):
            of_ranks = [of_rank[i][which] for of_rank in found]
            check_rows(*(x[:count] for x in of_ranks[0]["three"]), truth.rows[:count], tol)
            assert all(bool(x[count:].isnan().all()) for x in of_ranks[0]["three"])
            gradient = torch.cat([one["gradient"] for one in of_ranks], -1)[:count, :16]
            part = sharding.part(truth, [range(count)])
            check_gradient(gradient, part, *([g] * count for g in upstream), tol=tol)


# --- on the edge of the clip range ------------------------------------------------------------------------------------


def edges(rank: int, at: Grid) -> list[list[float]]:
    """In a rank: which sequences have a gradient, where ratios are as little as 3e-8 from the bound."""
    groups = ranks.grid(rank, at.tp, at.cp)
    found = []
    for side in ("low", "high"):
        batch = edge_batch("gspo", side)
        mine = sharding.part(batch, at.rows(batch)[rank // at.tp])
        args = arguments(mine, "packed")
        leaf = sharding.shard_of(args.logits.detach(), *at.columns(33)[rank % at.tp], -1).requires_grad_()
        loss, stats = gspo_kernels.gspo_loss(
            leaf, *args.rest, **args.keywords, **sharding.keywords_of(at, rank, 33, *groups)
        )
        loss.backward()
        assert leaf.grad is not None
        found.append([float(stats.clip_fraction), *(leaf.grad != 0).any(-1).tolist()])
    return found


def test_ranks_decide_alike_on_the_edge() -> None:
    at = Grid(tp=2, cp=2, tokens="contiguous")
    for of_rank in ranks.run(at.size, edges, at):
        assert of_rank == [[0.5, True, True, False, False]] * 2


# --- objectives of one's own, and losses from log-probabilities -------------------------------------------------------


class Variance(gspo_kernels.Objective):
    """A sequence's ratio and the variance of its tokens' about their mean: down to tokens and up again."""

    ratio_of: ClassVar[str] = "sequence"
    advantages_per_token: ClassVar[bool] = False
    depends_on: ClassVar[str] = "sequence"

    def terms(self, tokens: gspo_kernels.TokenBatch) -> gspo_kernels.Terms:
        log_ratio, layout = tokens.log_ratio, tokens.layout
        mean = layout.mean(log_ratio)
        variance = layout.mean((log_ratio - layout.spread(mean)).square())
        return gspo_kernels.Terms(loss=variance - torch.exp(mean) * tokens.advantages, log_ratio=mean)


OWN = {"grpo": OverMean(), "gspo": Variance()}  # by what their units are like


def objectives_of_ones_own(rank: int, at: Grid, cases: Sequence[Case]) -> list[Found]:
    groups = ranks.grid(rank, at.tp, at.cp)
    own = {name: partial(policy_loss, objective=objective) for name, objective in OWN.items()}
    return [sharding.logits_case(rank, at, case, groups, own[case.objective]) for case in cases]


@pytest.mark.parametrize("at", [Grid(cp=2), Grid(cp=4, tokens="whole")], ids=str)
def test_objectives_of_ones_own(at: Grid) -> None:
    """Whatever an objective makes of sums over sequences, its gradient is that of one process."""
    cases = []
    for name in OWN:
        cases += [Case(name, layout, {"seed": 30, "weights": "token"}) for layout in LAYOUTS]
        cases += [Case(name, "packed", {"seed": 31, "on_policy": True})]
    found = ranks.run(at.size, objectives_of_ones_own, at, cases)
    for i, case in enumerate(cases):
        batch = case.batch()
        whole = run(batch, case.layout, case.objective, function=partial(policy_loss, objective=OWN[case.objective]))
        outcome = sharding.put_together([of_rank[i] for of_rank in found], at, case, batch)
        assert float(outcome.loss) == pytest.approx(float(whole.loss), rel=1e-6, abs=1e-7)
        size = whole.gradient.abs().amax(-1, keepdim=True)
        check_close("gradient", outcome.gradient, whole.gradient, 2e-6 * size.expand_as(whole.gradient) + 1e-30)
        for name, value in whole.stats.as_dict().items():
            assert float(getattr(outcome.stats, name)) == pytest.approx(float(value), rel=1e-6, abs=1e-7), name


def of_logprobs(rank: int, at: Grid, cases: Sequence[Case]) -> list[Found]:
    """In a rank: the loss from log-probabilities and entropies that are already there."""

    def function(logits: Tensor, token_ids: Tensor, *rest: Any, **keywords: Any) -> Any:
        names = ("temperature", "logit_scale", "softcap")
        of_rows = {name: keywords.pop(name) for name in names if name in keywords}
        three = token_logprobs(logits, token_ids, mask=keywords["mask"], **of_rows)
        objective = {"gspo": gspo_kernels.GSPO(), "ppo": gspo_kernels.PPO()}[case.objective]
        return policy_loss_from_logprobs(three.logprobs, *rest, **keywords, objective=objective, entropy=three.entropy)

    found, groups = [], ranks.grid(rank, at.tp, at.cp)
    for case in cases:
        found.append(sharding.logits_case(rank, at, case, groups, function))
    return found


def test_from_logprobs() -> None:
    at = Grid(cp=2)
    options = {"beta": 0.1, "entropy_coef": 0.02}
    cases = [Case(o, layout, {"seed": 32, **FULL}, options) for o in ("gspo", "ppo") for layout in LAYOUTS]
    said = complaints(at, cases, ranks.run(at.size, of_logprobs, at, cases))
    assert not said, "\n".join(said)


# --- collectives ------------------------------------------------------------------------------------------------------


def counted(rank: int, cases: Sequence[Case]) -> list[tuple[int, int]]:
    """In a rank: collectives in the forward and in the backward of each case, without those of the checks."""
    calls = []
    real = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor

    def gather(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return real(*arguments, **keywords)

    found = []
    groups = ranks.grid(rank, 2, 2)
    with (
        mock.patch(f"torch.distributed.{real.__name__}", gather),
        mock.patch("gspo_kernels.base.checks.may_read", lambda tensor: False),
    ):
        for case in cases:
            for at in (Grid(tp=2), Grid(cp=2), Grid(tp=2, cp=2)):
                whole = case.batch()
                batch = sharding.part(whole, at.rows(whole)[rank // 2 % at.cp])
                args = arguments(batch, "packed")
                local = args.logits.detach()
                if at.tp > 1:
                    local = sharding.shard_of(local, *at.columns(61)[rank % 2], -1)
                leaf = local.requires_grad_()
                calls.clear()
                keywords = sharding.keywords_of(at, rank, 61, *groups)
                loss, _ = sharding.PUBLIC[case.objective](leaf, *args.rest, **args.keywords, **keywords)
                forward = len(calls)
                loss.backward()
                found.append((forward, len(calls) - forward))
    return found


def test_how_many_collectives_there_are() -> None:
    """One over the vocabulary; over the context one for the sequences and one for the stats. None in the backward."""
    cases = [Case(objective, build={"seed": 40, "weights": "token"}) for objective in KINDS]
    for of_rank in ranks.run(4, counted, cases):
        assert of_rank == [(1, 0), (2, 0), (3, 0)] * len(cases)


def twice(rank: int, at: Grid, cases: Sequence[Case]) -> tuple[list[Found], list[Found]]:
    return sharding.from_logits(rank, at, cases), sharding.from_logits(rank, at, cases)


def test_same_world_same_bits() -> None:
    """Twice in one world, and in another world of the same size."""
    at, cases = Grid(tp=2, cp=2), PLAIN[:12]
    first, second = (ranks.run(at.size, twice, at, cases) for _ in range(2))
    for rank in range(at.size):
        a, b = first[rank]
        c, _ = second[rank]
        for one, *others in zip(a, b, c, strict=True):
            for other in others:
                for name in ("loss", "gradient", "logprobs", "log_ratio"):
                    assert torch.equal(one[name], other[name]), name
                assert all(torch.equal(x, other["stats"][name]) for name, x in one["stats"].items())


def backwards(rank: int, cases: Sequence[Case]) -> list[Tensor]:
    """In a rank: log-probabilities and gradients, with the first columns on the last rank."""
    group, _ = ranks.grid(rank, 4, 1)
    found = []
    for case in cases:
        args = arguments(case.batch(), "packed")
        begin = (3 - rank) * 16
        leaf = sharding.shard_of(args.logits.detach(), begin, min(16, 61 - begin), -1).requires_grad_()
        loss, stats = sharding.PUBLIC[case.objective](
            leaf, *args.rest, **args.keywords, tp_group=group, vocab_start=begin, vocab_size=61
        )
        loss.backward()
        found += [loss, stats.logprobs, leaf.grad]
    return found


def test_the_order_of_ranks_does_not_matter() -> None:
    """Up to rounding: the same columns, on other ranks."""
    cases = [Case(objective, build={"seed": 41}) for objective in KINDS]
    at = Grid(tp=4)
    straight = ranks.run(4, sharding.from_logits, at, cases)
    turned = ranks.run(4, backwards, cases)
    for i, case in enumerate(cases):
        whole = sharding.put_together([of_rank[i] for of_rank in straight], at, case, case.batch())
        loss, logprobs = turned[0][3 * i : 3 * i + 2]
        gradient = torch.cat([of_rank[3 * i + 2] for of_rank in reversed(turned)], -1)
        assert float(loss) == pytest.approx(float(whole.loss), rel=1e-6)
        check_close("logprobs", logprobs, whole.logprobs, 1e-6 * whole.logprobs.abs() + 2.0**-126)
        check_close("gradient", gradient, whole.gradient, 2e-6 * whole.gradient.abs() + 2.0**-126)


def groups_of_one(rank: int, cases: Sequence[Case]) -> list[bool]:
    """In a rank, whether a group of one changes no bit but those of a sum taken in another way."""
    tp_group, _ = ranks.grid(rank, 1, 2)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    found = []
    for case in cases:
        results = []
        for keywords in ({}, {"tp_group": tp_group}, {"cp_group": alone}, {"tp_group": tp_group, "cp_group": alone}):
            args = arguments(case.batch(), case.layout)
            loss, stats = sharding.PUBLIC[case.objective](args.logits, *args.rest, **args.keywords, **keywords)
            loss.backward()
            results.append([loss.detach(), args.logits.grad, *stats.as_dict().values()])
        for other in results[1:]:
            found += [torch.allclose(a, b, rtol=1e-6, atol=2**-126) for a, b in zip(results[0], other, strict=True)]
    return found


def test_groups_of_one() -> None:
    cases = [Case(objective, build={"seed": 42}) for objective in KINDS]
    for of_rank in ranks.run(2, groups_of_one, cases):
        assert of_rank and all(of_rank)
