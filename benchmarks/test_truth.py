"""Broken answers that the check before the timing must reject: a benchmark never reports on a kernel that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .cases import SMOKE_ROWS, WORKS, Case, Problem, build
from .contestants import CONTESTANTS, Contestant, Run
from .race import Rounds, race
from .truth import WrongAnswer, check

BY_NAME = {work.name: work for work in WORKS}


def no_softmax_term(gradient: Tensor, problem: Problem) -> Tensor:
    target = problem.token_ids.reshape(-1, 1)
    return torch.zeros_like(gradient).scatter_(1, target, gradient.gather(1, target))


def target_missed(gradient: Tensor, problem: Problem) -> Tensor:
    return gradient.scatter(1, problem.token_ids.reshape(-1, 1), 0.0)


def off_by_one_target(gradient: Tensor, problem: Problem) -> Tensor:
    return gradient.roll(1, 1)


def wrong_count(gradient: Tensor, problem: Problem) -> Tensor:
    return gradient * (8 / 7)


def sign_flipped(gradient: Tensor, problem: Problem) -> Tensor:
    return -gradient


def row_skipped(gradient: Tensor, problem: Problem) -> Tensor:
    row = int((problem.coefficients != 0).nonzero()[-2])
    return gradient.index_fill(0, torch.tensor([row]), 0.0)


def inactive_row_written(gradient: Tensor, problem: Problem) -> Tensor:
    row = int((problem.coefficients == 0).nonzero()[0])
    return gradient.index_fill(0, torch.tensor([row]), 1e-12)


def not_a_number(gradient: Tensor, problem: Problem) -> Tensor:
    return gradient.clone().index_fill_(1, problem.token_ids.reshape(-1)[:1], torch.nan)


MUTANTS = (
    no_softmax_term,
    target_missed,
    off_by_one_target,
    wrong_count,
    sign_flipped,
    row_skipped,
    inactive_row_written,
    not_a_number,
)


def answer(problem: Problem) -> tuple[Tensor, Tensor]:
    """The right one, in float64 but for how the gradient is stored."""
    exact = problem.sampled.pristine.double()
    p = (exact - problem.sampled.lse[:, None]).exp()
    target = torch.nn.functional.one_hot(problem.token_ids.reshape(-1), problem.case.vocab)
    return torch.tensor(problem.loss), (problem.coefficients[:, None] * (target - p)).to(problem.logits.dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_wrong_gradient_is_rejected(mutate: Callable[[Tensor, Problem], Tensor], dtype: str) -> None:
    problem = build(Case(BY_NAME["inactive_60"], dtype, 1000, "packed"), SMOKE_ROWS)
    loss, gradient = answer(problem)
    check(problem, loss, gradient)
    with pytest.raises(WrongAnswer, match="gradient"):
        check(problem, loss, mutate(gradient, problem))


def test_wrong_loss_is_rejected() -> None:
    problem = build(Case(BY_NAME["forward"], "fp32", 1000, "padded"), SMOKE_ROWS)
    check(problem, torch.tensor(problem.loss), None)
    with pytest.raises(WrongAnswer, match="loss"):
        check(problem, torch.tensor(problem.loss + 1e-4), None)


def test_wrong_contestant_is_not_timed() -> None:
    def prepare(problem: Problem) -> Run:
        loss, gradient = answer(problem)
        return lambda: (loss, -gradient)

    problem = build(Case(BY_NAME["forward_backward"], "fp32", 1000, "packed"), SMOKE_ROWS)
    outcomes = race(problem, [Contestant("wrong", "wrong", prepare), CONTESTANTS[-1]], Rounds(1, 1))
    assert isinstance(outcomes["wrong"].error, WrongAnswer) and not outcomes["wrong"].seconds
    assert len(outcomes["copy"].seconds) == 1


def test_exactly_60_percent_are_inactive() -> None:
    for layout in ("padded", "packed"):
        problem = build(Case(BY_NAME["inactive_60"], "fp32", 1000, layout), 1000)
        assert int((problem.coefficients == 0).sum()) == 600
