"""Losses from hidden states whose head or tokens are sharded over ranks, against one process in float64.

Real processes over gloo. Each test starts its ranks once and runs many cases; results are checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import linear_sharding
import pytest
import ranks
import torch
from batches import CLASSES, KINDS, LAYOUTS, OBJECTIVES, WITH_TOKENS
from checks import check_close
from linear_sharding import (
    Collective,
    Crossing,
    HeadGrid,
    Patch,
    as_in_a_cuda_graph,
    complaints,
    gradients_beside_logits,
    nothing,
    ways,
)  # fmt: skip
from sharding import Case, Found
from test_linear_plans import OfSequence, OverMean
from torch import Tensor

from gspo_kernels import token_logprobs
from gspo_kernels.base.layout import Layout
from gspo_kernels.linear import chunked_loss, head
from gspo_kernels.linear.head import Head
from gspo_kernels.linear.head_term import HeadTerm
from gspo_kernels.rows.vocab_shard import VocabShard

pytestmark = ranks.mark

ALL = ("hidden", "weight", "bias")
EVERY_MODE = {"single_pass", "recompute", "deferred_scale", "statistics"}

# build, options, rows of a chunk, which operands need a gradient. Sequences have up to 7 rows, here and there masked.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None, tuple[str, ...]]] = {
    "recompute": ({"bias": True}, {}, 1, ALL),
    "some fit": ({"rollout": True, "groups": True}, {"dual_clip": 3.0, "aggregation": "group_mean"}, 3, ALL),
    "one chunk": ({"bias": True, "temperature": 0.7}, {"max_log_ratio": 1.5}, None, ALL),
    "on-policy": ({"bias": True, "on_policy": True, "weights": "token"}, {}, 2, ALL),
    "on-policy with a bonus": ({"on_policy": True}, {"entropy_coef": 0.01}, 2, ALL),
    "all terms": (
        {"seed": 56, "bias": True, "ref": True, "weights": "token", "temperature": "token", "softcap": 5.0},
        {"beta": 0.05, "kl_weighting": "ratio", "entropy_coef": 0.01, "aggregation": "token_mean"}, 2, ALL,
    ),
    "frozen head": ({"weights": "sequence"}, {"aggregation": "sequence_sum", "normalizer": 7.5}, 1, ("hidden",)),
    "frozen head, KL": ({"bias": True, "ref": True}, {"beta": 0.1, "kl_estimator": "k1"}, 2, ("hidden",)),
    "frozen head, bonus": ({"temperature": "token"}, {"entropy_coef": 0.01}, 1, ("hidden",)),
    "head alone": ({"bias": True, "weights": "token"}, {}, 2, ("weight", "bias")),
    "no gradient": ({"bias": True}, {}, 2, ()),
    "skipping": ({"bias": True}, {"skip_zero_advantage": True, "aggregation": "sequence_mean"}, 2, ALL),
}  # fmt: skip
LOW_RANK = {"low_rank": 5}  # the last columns of hidden states and of the head
BY_TOKEN: dict[str, Any] = {"by_token": True, "bias": True}


def cases_of(turn: int) -> list[Case]:
    """One objective of each kind with every setting, in one layout; the other comes with the next turn. And each."""
    found = []
    for i, objective in enumerate(KINDS):
        for j, (build, options, rows, needs_grad) in enumerate(SETTINGS.values()):
            layout = LAYOUTS[(i + j + turn) % 2]
            found.append(Case(objective, layout, {"seed": 50, **build}, options, rows, needs_grad, (1.0, -2.5)[j % 2]))
        if objective in WITH_TOKENS:
            found.append(Case(objective, LAYOUTS[turn % 2], {"seed": 51, **BY_TOKEN}, {}, 2))
    for objective in OBJECTIVES[turn % 2 :: 2]:
        found.append(Case(objective, LAYOUTS[turn // 2 % 2], {"seed": 50}, {}, 3))
    layout, narrow = LAYOUTS[turn % 2], {"seed": 52, "dtype": torch.bfloat16}
    return [
        *found,
        Case("gspo", layout, {**narrow, "bias": True}, {}, 2),
        Case("gspo", layout, narrow, {}, 1, ("hidden",)),
        Case("ppo", layout, narrow, {}, 3),
        Case("gspo", layout, {"seed": 52, "dtype": torch.float64, "bias": True}, {"backend": "reference"}, 2),
        Case("gspo", layout, {"seed": 53, "lengths": (3,)}, {}, 1),
        Case("grpo", layout, {"seed": 53, "lengths": (1, 0)}, {}, 1),  # under cp some ranks have nothing
        Case("gspo", layout, {"seed": 54, "lengths": (0, 0), "bias": True}),
        Case("ppo", layout, {"seed": 54, "lengths": ()}),
        Case("gspo", layout, {"seed": 58, "width": 29, "bias": True}, LOW_RANK, 1),
        Case("grpo", layout, {"seed": 58, "width": 29, "dtype": torch.bfloat16}, LOW_RANK, 2),
        Case("gspo", layout, {"seed": 59, "width": 29}, LOW_RANK, 1, ("hidden",)),
    ]


GRIDS = [
    HeadGrid(tp=2),
    HeadGrid(tp=2, vocab="unequal"),
    HeadGrid(tp=2, vocab="dtensor"),
    HeadGrid(tp=4, vocab="loose"),
    HeadGrid(tp=4, vocab="dtensor", hidden="plain"),
    HeadGrid(cp=2),
    HeadGrid(cp=2, tokens="contiguous"),
    HeadGrid(cp=4, tokens="whole"),
    HeadGrid(cp=4, tokens="contiguous", idle=True),
    HeadGrid(tp=2, cp=2),
    HeadGrid(tp=2, cp=2, vocab="unequal", tokens="whole"),
    HeadGrid(tp=2, cp=2, vocab="dtensor", idle=True),
]
WITH_ALL = [HeadGrid(tp=2, cp=2)]


def name_of(at: HeadGrid) -> str:
    parts = [f"tp{at.tp}-{at.vocab}-{at.hidden}" if at.vocab == "dtensor" else f"tp{at.tp}-{at.vocab}"] * (at.tp > 1)
    parts += [f"cp{at.cp}-{at.tokens}{'-idle' * at.idle}"] * (at.cp > 1)
    return "-".join(parts)


def refuse(said: Sequence[str], count: int) -> None:
    assert not said, f"{len(said)} of {count}:\n" + "\n".join(said[:5])


@pytest.mark.parametrize("turn", range(len(GRIDS)), ids=lambda turn: name_of(GRIDS[turn]))
def test_parts_of_all_ranks_are_the_loss_of_one(turn: int) -> None:
    """Loss, stats, and the gradient of every part of hidden states, weight and bias; by every way of the plan."""
    at, cases = GRIDS[turn], cases_of(turn)
    if at not in WITH_ALL:  # a setting that one grid leaves out, another has
        cases = [case for k, case in enumerate(cases) if (k + k // len(SETTINGS) + turn) % 3 == 0]
    found = ranks.run(at.size, linear_sharding.from_hidden, at, cases)
    refuse(complaints(found, at, cases), len(cases))
    assert ways(found) | {"statistics"} == EVERY_MODE and (at not in WITH_ALL or "statistics" in ways(found))


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (HeadGrid(tp=2, vocab="unequal"), gradients_beside_logits),
        (HeadGrid(cp=2), gradients_beside_logits),
        (HeadGrid(tp=2), as_in_a_cuda_graph),
        (HeadGrid(cp=2, idle=True), as_in_a_cuda_graph),
    ],
    ids=["beside-tp", "beside-cp", "graph-tp", "graph-cp"],
)
def test_as_on_a_gpu(at: HeadGrid, change: Any) -> None:
    """What a CPU does otherwise: gradients are written beside the logits; and in a CUDA graph nothing is read, so that
    a rank without tokens does not know that it has none to compute."""
    cases = cases_of(1)[::2]
    found = ranks.run(at.size, linear_sharding.from_hidden, at, cases, change)
    refuse(complaints(found, at, cases), len(cases))
    assert ways(found) == EVERY_MODE


OWN: list[Case] = [
    Case("grpo", layout, {"seed": 64, "lengths": (5, 1, 0, 4, 3)}, {"objective": objective}, rows, needs_grad)
    for objective in (OverMean(), OfSequence())
    for layout, rows, needs_grad in (
        ("packed", 1, ALL), ("padded", 1, ("hidden",)), ("packed", 3, ALL), ("padded", 3, ("hidden",)),
        ("padded", None, ALL), ("packed", 2, ()),
    )
] + [
    Case("gspo", "packed", {"seed": 65, "bias": True}, {"objective": Crossing()}, 2),
    Case("gspo", "padded", {"seed": 65, "weights": "token"}, {"objective": Crossing(dual_clip=3.0)}, 1, ("hidden",)),
    Case("gspo", "packed", {"seed": 65, "on_policy": True}, {"objective": Crossing()}, 2),
    Case("grpo", "packed", {"seed": 66, "on_policy": True}, {"objective": OverMean()}, 2),
    Case("grpo", "padded", {"seed": 66, "ref": True}, {"objective": OverMean(), "beta": 0.1}, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    "at",
    [
        HeadGrid(cp=2),
        HeadGrid(cp=4, tokens="contiguous", idle=True),
        HeadGrid(tp=2, cp=2, vocab="dtensor", tokens="whole"),
    ],
    ids=name_of,
)
def test_objectives_of_ones_own(at: HeadGrid) -> None:
    """Of a sequence and of the batch: gradients by sums over ranks cross them, once a chunk."""
    found = ranks.run(at.size, linear_sharding.from_hidden, at, OWN)
    refuse(complaints(found, at, OWN), len(OWN))
    assert ways(found) == EVERY_MODE


# --- the same again ---------------------------------------------------------------------------------------------------


def same_bits(a: Any, b: Any) -> bool:
    """Of all tensors, in whatever they lie."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    return bool(a == b)


def test_the_same_bits_twice() -> None:
    at, cases = HeadGrid(tp=2, cp=2), cases_of(0)[::4]
    for rank, (first, second) in enumerate(
        ranks.run(at.size, linear_sharding.with_changes, at, cases, [nothing, nothing])
    ):
        for case, a, b in zip(cases, first, second, strict=True):
            assert same_bits(a, b), f"{case} on rank {rank}"
            assert not case.needs_grad or not same_bits(a, {**b, "loss": b["loss"] + 1}), "the comparison sees nothing"


# --- log-probabilities ------------------------------------------------------------------------------------------------

LOGPROBS = [
    Case(layout=layout, build={"seed": 96, "bias": bias, **build}, rows=rows, needs_grad=needs_grad)
    for layout, bias, rows, needs_grad, build in (
        ("packed", True, 2, ALL, {}), ("padded", False, None, ALL, {"temperature": "token"}),
        ("padded", True, 1, ("hidden",), {}), ("packed", False, 3, (), {}), ("packed", True, 2, ("bias",), {}),
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "at",
    [
        HeadGrid(tp=2),
        HeadGrid(tp=2, vocab="dtensor"),
        HeadGrid(tp=4, vocab="loose"),
        HeadGrid(tp=4, vocab="unequal"),
    ],
    ids=name_of,
)
def test_token_logprobs(at: HeadGrid) -> None:
    """Log-probability, entropy and logsumexp, the same bits on every rank, and the gradient of all three."""
    found = ranks.run(at.size, linear_sharding.logprobs_from_hidden, at, LOGPROBS)
    for i, case in enumerate(LOGPROBS):
        check_logprobs([of_rank[i] for of_rank in found], at, case)


def check_logprobs(found: Sequence[Found], at: HeadGrid, case: Case) -> None:
    p = linear_sharding.problem_of(case)
    logits = p.batch.logits.clone().requires_grad_()
    truth = token_logprobs(
        logits, p.batch.token_ids, mask=p.batch.mask, temperature=p.batch.temperature, backend="reference"
    )
    for name in ("logprobs", "entropy", "lse"):
        expected = getattr(truth, name)
        assert all(torch.equal(one[name], found[0][name]) for one in found), f"{case}: {name} differs among ranks"
        check_close(name, found[0][name], expected, 3e-6 * (1 + expected.abs()))
        assert bool((found[0][name][~p.batch.mask] == 0).all())
    for name in ALL:
        needed = name in case.needs_grad and getattr(p, name) is not None
        assert all((one[name] is not None) == needed for one in found), f"{case}: gradient of {name}"
    if not case.needs_grad:
        return
    linear_sharding.mixed(truth).backward()
    assert logits.grad is not None
    g, hidden = logits.grad, torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0)
    size = g.abs()
    if "hidden" in case.needs_grad:
        assert all(torch.equal(one["hidden"], found[0]["hidden"]) for one in found)
        bound = 1e-5 * (size @ p.weight.double().abs())
        check_close("gradient of hidden", found[0]["hidden"], g @ p.weight.double(), bound)
    for name, expected, bound in (
        ("weight", g.t() @ hidden, size.t() @ hidden.abs()),
        ("bias", g.sum(0), size.sum(0)),
    ):
        if found[0][name] is not None:
            parts = [linear_sharding.shards_added_up(found, at, case, name, t, p.weight.shape[0]) for t in range(at.tp)]
            check_close(f"gradient of {name}", torch.cat(parts), expected, 1e-5 * bound)


# --- ranks that would part company ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [HeadGrid(tp=2), HeadGrid(cp=2)], ids=name_of)
def test_another_plan_on_one_rank_is_refused(at: HeadGrid) -> None:
    """By what decides how many rows a chunk has, and which; `explain` says where a plan is not this rank's alone."""
    case = Case("gspo", "packed", {"seed": 71}, {}, 2)
    names = {
        "dtype": "dtype that hidden and weight", "autocast": "dtype that hidden and weight",
        "skip_zero_advantage": "skip_zero_advantage", "vocab_size": "vocab_size", "low_rank": "hidden (how wide)",
    }  # fmt: skip
    for found in ranks.run(at.size, linear_sharding.odd_one_out, at, case):
        assert found.pop("none") is None
        assert ("over cp_group" in found.pop("explained")) == (at.cp > 1)
        for name, refusal in found.items():
            assert refusal is not None, f"{name}: accepted"
            assert refusal.message.startswith(names[name]), refusal
            assert "expected the same on every rank" in refusal.message, refusal


# --- what is broken is found ------------------------------------------------------------------------------------------


def hidden_gradient_of_this_rank(patch: Patch) -> None:
    patch.setattr(Head, "_sum_hidden_gradient", lambda self, shard: None)


def low_rank_gradient_of_this_rank(patch: Patch) -> None:
    original = HeadTerm.sum_hidden_gradient

    def of_head_alone(self: HeadTerm, *rest: Any) -> None:
        if self.hidden.shape[1] != LOW_RANK["low_rank"]:
            original(self, *rest)

    patch.setattr(HeadTerm, "sum_hidden_gradient", of_head_alone)


def hidden_gradient_summed_twice(patch: Patch) -> None:
    once = Head._sum_hidden_gradient

    def sum_twice(self: Head, shard: Any) -> None:
        once(self, shard)
        once(self, shard)

    patch.setattr(Head, "_sum_hidden_gradient", sum_twice)


def rank_not_told_of_other_columns(patch: Patch) -> None:
    patch.setattr(head, "of_this_rank", lambda stats, upstream, *rest: (stats, upstream))


def statistics_of_this_rank(patch: Patch) -> None:
    patch.setattr(head, "merged", lambda local, *rest: local)


def padding_multiplied(patch: Patch) -> None:
    patch.setattr(VocabShard, "columns", property(lambda self: self.width))


def chunks_of_this_rank(patch: Patch) -> None:
    """Coefficients of a sequence from the tokens of it that are here."""
    init = chunked_loss.Coefficients.__init__

    def alone(self: Any, *given: Any) -> None:
        init(self, *given)
        self._step_crosses_ranks = False

    patch.setattr(chunked_loss.Coefficients, "__init__", alone)


def gradients_that_stay(patch: Patch) -> None:
    """That by a sum over ranks is not summed over ranks."""
    init = Layout.__init__
    patch.setattr(Layout, "__init__", lambda self, batch, crosses: init(self, batch, False))


def gradients_that_cross_twice(patch: Patch) -> None:
    """Where it is known whole on every rank, it is summed all the same."""
    init = Layout.__init__
    patch.setattr(Layout, "__init__", lambda self, batch, crosses: init(self, batch, True))


def count_of_this_rank(patch: Patch) -> None:
    """Sequences and tokens in the denominators."""
    patch.setattr(Layout, "lengths", property(lambda self: self.local_lengths))


def plan_of_this_rank(patch: Patch) -> None:
    patch.setattr(
        chunked_loss,
        "plan_steps",
        lambda inputs, layout, lengths, head: chunked_loss.plan_for(inputs, lengths, head.chunk_size, head.needs_grad),
    )


TP_MUTANTS = [
    hidden_gradient_of_this_rank, low_rank_gradient_of_this_rank, hidden_gradient_summed_twice,
    rank_not_told_of_other_columns, statistics_of_this_rank, padding_multiplied,
]  # fmt: skip
CP_MUTANTS = [chunks_of_this_rank, gradients_that_stay, gradients_that_cross_twice, count_of_this_rank]
ORDINARY = [
    Case("gspo", "packed", {"seed": 50, "bias": True}, {}, 1),
    Case("gspo", "padded", {"seed": 50}, {"entropy_coef": 0.01}, 3, ("hidden",)),
    Case("grpo", "packed", {"seed": 50, "bias": True}, {"objective": OfSequence()}, 2),
    Case("gspo", "packed", {"seed": 50, "width": 29}, LOW_RANK, 2),
]
# Every rank alone would take as many steps over as many sequences as the other, but over its own.
WHOLE = [Case("gspo", "packed", {"seed": 70, "lengths": (3, 3, 3, 3)}, {}, 1)]
BROKEN = [
    pytest.param(HeadGrid(tp=2), ORDINARY, TP_MUTANTS, id="tp"),
    pytest.param(HeadGrid(cp=2), ORDINARY, CP_MUTANTS, id="cp"),
    pytest.param(HeadGrid(cp=2, tokens="whole"), WHOLE, [plan_of_this_rank], id="plan"),
]


@pytest.mark.parametrize(("at", "cases", "mutants"), BROKEN)
def test_a_fault_is_found(at: HeadGrid, cases: list[Case], mutants: list[Any]) -> None:
    found = ranks.run(at.size, linear_sharding.with_changes, at, cases, [nothing, *mutants])
    refuse(complaints([of_rank[0] for of_rank in found], at, cases), len(cases))
    for k, mutant in enumerate(mutants, start=1):
        assert complaints([of_rank[k] for of_rank in found], at, cases), f"{mutant.__name__} lives"


# --- collectives ------------------------------------------------------------------------------------------------------


def sizes(collectives: Sequence[Collective], when: str, kind: str, group: str) -> list[int]:
    """Float64 (of the hidden states' gradient, float32) of one rank, a number for each collective."""
    return [c.numbers for c in collectives if (c.when, c.kind, c.group) == (when, kind, group)]


def selected(case: Case) -> int:
    return int(linear_sharding.problem_of(case).batch.mask.sum())


A_ROW = 2  # float64: logsumexp, and as float32 two more

COUNTED = [
    Case("gspo", "packed", {"seed": 80, "bias": True}, {}, 1),
    Case("gspo", "padded", {"seed": 80, "bias": True}, {}, 1, ("hidden",)),
    Case("gspo_token", "padded", {"seed": 80, "weights": "token"}, {}, 1),
    Case("gspo", "packed", {"seed": 80, "on_policy": True}, {}, 1),
    Case("grpo", "packed", {"seed": 80}, {"entropy_coef": 0.01}, 1),
    Case("ppo", "packed", {"seed": 80, "weights": "token"}, {}, 1),
    Case("gspo", "packed", {"seed": 80}, {}, 1, ("weight",)),
    Case("gspo", "packed", {"seed": 80}, {}, 1, ()),
    Case("gspo", "padded", {"seed": 80, "weights": "token"}, {}, 1, ()),
    Case("ppo", "padded", {"seed": 80}, {}, 1, ()),
    Case("gspo", "packed", {"seed": 80, "width": 29}, LOW_RANK, 1),
]


@pytest.mark.parametrize("at", [HeadGrid(tp=2), HeadGrid(cp=2), HeadGrid(tp=2, cp=2)], ids=name_of)
def test_collectives_of_a_loss(at: HeadGrid) -> None:
    """None in the backward; before it, over tp, one a chunk, and the gradient of hidden states once. Over cp as from
    logits and, where a coefficient depends on a whole sequence, more: see `over_cp`."""
    for rank, of_rank in enumerate(ranks.run(at.size, linear_sharding.counted, at, COUNTED, False)):
        for case, (found, collectives) in zip(COUNTED, of_rank, strict=True):
            where = f"{case} on rank {rank}: {collectives}"
            assert not any(c.when == "backward" for c in collectives), where
            p = linear_sharding.problem_of(case)
            rows = sum(int(p.batch.mask[t]) for of in at.rows(p.batch)[rank // at.tp] for t in of)
            a_row = [A_ROW] * rows if at.tp > 1 else []  # as many chunks as rows
            assert sizes(collectives, "loss", "gather", "tp") == a_row, where
            columns = case.options.get("low_rank", 0)
            widths = [p.hidden.shape[1] - columns, columns] if columns else [p.hidden.shape[1]]
            reduced = [rows * width for width in widths] if at.tp > 1 and "hidden" in case.needs_grad else []
            assert sizes(collectives, "loss", "reduce", "tp") == reduced, where
            gathered = over_cp(case, found["steps"]) if at.cp > 1 else []
            assert sizes(collectives, "loss", "gather", "cp") == gathered, where
            assert not sizes(collectives, "loss", "reduce", "cp"), where


def over_cp(case: Case, steps: Sequence[tuple[str, int, int]]) -> list[int]:
    """What ranks gather: lengths, by which they plan as well; for each step the sum of each sequence beside its length
    (and that of weights); for the loss the sums once more; and stats."""
    sequences, stats = len(linear_sharding.problem_of(case).batch.lengths), 12
    by_sequence, weights = CLASSES[case.objective].depends_on == "sequence", int("weights" in case.build)
    if not case.needs_grad:
        return [(1 + by_sequence + weights) * sequences, stats]
    if not by_sequence:
        return [sequences, stats]
    if case.build.get("on_policy"):
        return [sequences, 2 * sequences, sequences, stats]
    of_steps = [(2 + weights) * (last - first) for _, first, last in steps]
    return [sequences, *of_steps, sequences, stats]


def test_collectives_of_token_logprobs() -> None:
    """Of each row in the forward, and in the backward the gradient of hidden states."""
    at = HeadGrid(tp=2)
    for of_rank in ranks.run(at.size, linear_sharding.counted, at, LOGPROBS, True):
        for case, (_, collectives) in zip(LOGPROBS, of_rank, strict=True):
            assert sum(sizes(collectives, "loss", "gather", "tp")) == A_ROW * selected(case), collectives
            assert not sizes(collectives, "loss", "reduce", "tp")
            reduced = (
                [selected(case) * linear_sharding.problem_of(case).hidden.shape[1]]
                if "hidden" in case.needs_grad
                else []
            )
            assert sizes(collectives, "backward", "reduce", "tp") == reduced
            assert not sizes(collectives, "backward", "gather", "tp")
