"""Kept columns from hidden states whose head or tokens are sharded over ranks, against one process in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import linear_sharding
import pytest
import ranks
import torch
from batches import kept_tokens
from checks import check_close
from linear_sharding import HeadGrid, Patch, complaints, nothing
from sharding import Case
from test_linear_sharded import LOW_RANK, name_of, refuse

from gspo_kernels import linear_token_logprobs, token_logprobs
from gspo_kernels.linear import sparse_head
from gspo_kernels.rows.vocab_shard import VocabShard

pytestmark = ranks.mark

KEPT: dict[str, Any] = {"seed": 80, "kept": True}
CASES = [
    Case("gspo", "packed", {**KEPT, "bias": True}, {}, 2),
    Case("ppo", "padded", {**KEPT, "temperature": "token", "softcap": 5.0, "ref": True}, {"beta": 0.05}, 2),
    Case("gspo", "packed", {**KEPT, "on_policy": True}, {"entropy_coef": 0.01}, 2, ("hidden",), -2.5),
    Case("gspo", "padded", {**KEPT, "dtype": torch.bfloat16}, {}, 3),
    Case("grpo", "packed", {**KEPT, "width": 29}, LOW_RANK, 1),
    Case("grpo", "packed", {**KEPT, "lengths": (1, 0)}, {}, 1),  # under cp some ranks have nothing
    Case("gspo", "packed", {**KEPT, "dtype": torch.float64, "bias": True}, {"backend": "reference"}, 2, ("weight",)),
]
GRIDS = [
    HeadGrid(tp=2, vocab="unequal"),
    HeadGrid(tp=4, vocab="loose"),  # the last ranks have no column
    HeadGrid(tp=2, cp=2, vocab="dtensor", idle=True),
]


@pytest.mark.parametrize("at", GRIDS, ids=name_of)
def test_parts_of_all_ranks_are_the_loss_of_one(at: HeadGrid) -> None:
    """Most rows keep no column of some rank: all of its logits are -inf."""
    found = ranks.run(at.size, linear_sharding.from_hidden, at, CASES)
    refuse(complaints(found, at, CASES), len(CASES))


# --- log-probabilities ------------------------------------------------------------------------------------------------


def logprobs(rank: int, at: HeadGrid, case: Case) -> dict[str, Any]:
    """Of both distributions, and the gradient through both of this rank's part of the head and of hidden states."""
    p, groups = linear_sharding.problem_of(case), ranks.grid(rank, at.tp, at.cp)
    given = linear_sharding.operands(rank, at, case, p, p.batch, at.row_indices(p.batch)[0], groups)
    keywords = {name: x for name, x in given.keywords.items() if name != "cp_group"}
    kept = kept_tokens(p.batch, "packed")
    found = linear_token_logprobs(
        given.hidden, given.weight, p.batch.token_ids, bias=given.bias, mask=p.batch.mask, kept=kept, **keywords
    )
    assert found.full is not None
    (linear_sharding.mixed(found.kept) + 0.5 * linear_sharding.mixed(found.full)).backward()
    return {"kept": tuple(found.kept), "full": tuple(found.full), **given.gradients()}


def test_token_logprobs_of_both_distributions() -> None:
    case, at = Case("gspo", "packed", {**KEPT, "bias": True}, {}, 2), HeadGrid(tp=2, vocab="unequal")
    found, p = ranks.run(at.size, logprobs, at, case), linear_sharding.problem_of(case)
    logits = p.batch.logits.clone().requires_grad_()
    of_logits = {"mask": p.batch.mask, "kept": kept_tokens(p.batch, "packed"), "backend": "reference"}
    truth = token_logprobs(logits, p.batch.token_ids, **of_logits)  # type: ignore[call-overload]
    for name in ("kept", "full"):
        for one, other, x in zip(found[0][name], found[1][name], getattr(truth, name), strict=True):
            assert torch.equal(one, other)
            check_close(name, one, x, 3e-6 * (1 + x.abs()))
    (linear_sharding.mixed(truth.kept) + 0.5 * linear_sharding.mixed(truth.full)).backward()
    assert logits.grad is not None
    g, hidden = logits.grad, torch.where(p.batch.mask[:, None], p.hidden.double(), 0.0)
    size = g.abs()
    for one in found:
        check_close("gradient of hidden", one["hidden"], g @ p.weight.double(), 1e-5 * (size @ p.weight.double().abs()))
    for name, expected, bound in (("weight", g.t() @ hidden, size.t() @ hidden.abs()), ("bias", g.sum(0), size.sum(0))):
        parts = [one[name][:width] for one, (_, width) in zip(found, at.columns(len(expected)), strict=True)]
        check_close(f"gradient of {name}", torch.cat(parts), expected, 1e-5 * bound)


# --- what is broken is found ------------------------------------------------------------------------------------------


def hidden_gradient_of_this_rank(patch: Patch) -> None:
    patch.setattr(sparse_head, "all_reduce_", lambda values, group: None)


def columns_of_the_whole_head(patch: Patch) -> None:
    """The other ranks' columns count here as well, as columns of this rank's numbers."""

    def local_kept(self: VocabShard, ids: Any) -> Any:
        return (ids - self.begin) % max(self.columns, 1)

    patch.setattr(VocabShard, "local_kept", local_kept)


MUTANTS: Sequence[Any] = [hidden_gradient_of_this_rank, columns_of_the_whole_head]


def test_mutants_are_rejected_and_the_code_without_a_fault_is_not() -> None:
    at, cases = HeadGrid(tp=2), [CASES[0], CASES[4]]
    found = ranks.run(at.size, linear_sharding.with_changes, at, cases, [nothing, *MUTANTS])
    for k, change in enumerate([nothing, *MUTANTS]):
        said = complaints([of_rank[k] for of_rank in found], at, cases)
        assert len(said) == (0 if change is nothing else len(cases)), f"{change.__name__}: {said}"
