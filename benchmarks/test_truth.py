"""Broken answers that the check must reject: a benchmark never reports on a kernel that is wrong without saying so."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .cases import DENSE, FORWARD, HARD_CASES, INACTIVE, SMOKE_ROWS, WORKS, Case, Problem, build, linear_smoke, means
from .contestants import CONTESTANTS, Answer, Contestant, Run
from .linear import OURS, case_result
from .peers import HARD, build_hard, in_words
from .race import Rounds, admit, race
from .truth import WrongAnswer, check, exact_gradients

OF_LOGITS = {work.name: work for work in WORKS}
Mutant = Callable[[Answer, Problem], Answer]


def right(problem: Problem) -> Answer:
    """In float64 but for how gradients are stored."""
    gradients = zip(exact_gradients(problem), problem.leaves, strict=True)
    return Answer(torch.tensor(problem.loss), tuple(exact.to(x.dtype).view_as(x) for exact, x in gradients))


def problem_of(start: str, dtype: str) -> Problem:
    if start == "hidden":
        return build(linear_smoke(INACTIVE, dtype))
    return build(Case(OF_LOGITS["inactive_60"], dtype, 1000, "packed"), SMOKE_ROWS)


def scaled(factor: float) -> Mutant:
    return lambda answer, problem: answer._replace(gradients=tuple(factor * x for x in answer.gradients))


def changed(change: Callable[[Tensor, Problem], Tensor], which: int = 0) -> Mutant:
    """Of one gradient, as rows."""

    def mutate(answer: Answer, problem: Problem) -> Answer:
        gradients = list(answer.gradients)
        gradient = gradients[which]
        gradients[which] = (
            change(gradient.reshape(-1, gradient.shape[-1]), problem).to(gradient.dtype).view_as(gradient)
        )
        return answer._replace(gradients=tuple(gradients))

    return mutate


def filled(row: Callable[[Problem], int], value: float) -> Callable[[Tensor, Problem], Tensor]:
    return lambda gradient, problem: gradient.index_fill(0, torch.tensor([row(problem)]), value)


def active_row(problem: Problem) -> int:
    return int((problem.coefficients != 0).nonzero()[0 if problem.case.width else -2])


def inactive_row(problem: Problem) -> int:
    return int((problem.coefficients == 0).nonzero()[0])


def no_softmax(gradient: Tensor, problem: Problem) -> Tensor:
    if not problem.case.from_logits:
        return problem.coefficients[:, None] * problem.sampled.pristine[1][problem.sampled.token_ids].double()
    target = problem.token_ids.reshape(-1, 1)
    return torch.zeros_like(gradient).scatter_(1, target, gradient.gather(1, target))


def no_softmax_in_weight(gradient: Tensor, problem: Problem) -> Tensor:
    targets = problem.coefficients[:, None] * problem.sampled.pristine[0].double()
    return torch.zeros(gradient.shape, dtype=torch.float64).index_add_(0, problem.sampled.token_ids, targets)


def one_sequence_less(problem: Problem) -> float:
    return problem.case.sequences / (problem.case.sequences - 1)


def loss_of_one_sequence_less(answer: Answer, problem: Problem) -> Answer:
    return answer._replace(value=answer.value + float(problem.advantages.abs().mean()) / problem.case.sequences)


BOTH: dict[str, Mutant] = {
    "no softmax term": changed(no_softmax),
    "wrong count": lambda answer, problem: scaled(one_sequence_less(problem))(answer, problem),
    "sign flipped": scaled(-1.0),
    "row skipped": changed(filled(active_row, 0.0)),
    "inactive row written": changed(filled(inactive_row, 1e-9)),
    "loss of one sequence less": loss_of_one_sequence_less,
}
MUTANTS: dict[str, dict[str, Mutant]] = {
    "logits": BOTH
    | {
        "target missed": changed(lambda gradient, p: gradient.scatter(1, p.token_ids.reshape(-1, 1), 0.0)),
        "target off by one": changed(lambda gradient, problem: gradient.roll(1, 1)),
        "not a number": changed(lambda gradient, p: gradient.index_fill(1, p.token_ids.reshape(-1)[:1], math.nan)),
    },
    "hidden": BOTH
    | {
        "no softmax term in weight": changed(no_softmax_in_weight, 1),
        "row of weight skipped": changed(filled(lambda problem: problem.case.vocab - 2, 0.0), 1),
        "columns swapped": changed(lambda x, p: x.view(-1, 2, p.case.width).flip(1).reshape(x.shape), 1),
        "not a number": changed(filled(lambda problem: int(problem.sampled.token_ids[0]), math.nan), 1),
    },
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("start", "name"), [(start, name) for start, mutants in MUTANTS.items() for name in mutants])
def test_wrong_answer_is_rejected(start: str, name: str, dtype: str) -> None:
    problem = problem_of(start, dtype)
    check(problem, *right(problem))
    with pytest.raises(WrongAnswer, match="loss" if name.startswith("loss") else "gradient"):
        check(problem, *MUTANTS[start][name](right(problem), problem))


def test_wrong_loss_alone_is_rejected() -> None:
    problem = build(Case(OF_LOGITS["forward"], "fp32", 1000), SMOKE_ROWS)
    check(problem, torch.tensor(problem.loss))
    with pytest.raises(WrongAnswer, match="loss"):
        check(problem, torch.tensor(problem.loss + 1e-4))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wrong_logprobs_are_rejected(dtype: str) -> None:
    problem = build(linear_smoke(FORWARD, dtype))
    hidden, weight = (x.double() for x in problem.sampled.pristine)
    exact = problem.sampled.logprobs.view(problem.token_ids.shape)
    check(problem, exact.float())
    first_half = (hidden @ weight[: len(weight) // 2].T).logsumexp(1)
    of_half = (problem.sampled.logprobs + problem.sampled.lse - first_half).view(exact.shape)
    for wrong in (of_half, exact.roll(1, 1), exact.index_fill(0, torch.tensor([0]), math.nan)):
        with pytest.raises(WrongAnswer, match="log-prob"):
            check(problem, wrong.float())


def test_autograd_agrees_with_the_exact_gradients() -> None:
    """The formulas of the truth against torch's own derivative, in float64."""
    for start in HARD_CASES:
        problem = build(HARD_CASES[start])
        leaves = [x.double().requires_grad_() for x in problem.sampled.pristine]
        logits = leaves[0] if start == "logits" else leaves[0] @ leaves[1].T
        logprobs = logits.log_softmax(1).gather(1, problem.sampled.token_ids[:, None])[:, 0]
        gradients = torch.autograd.grad((problem.coefficients * logprobs).sum(), leaves)
        for found, exact in zip(gradients, exact_gradients(problem), strict=True):
            assert float((found - exact).norm() / exact.norm()) < 1e-12


# ---- what becomes of a wrong answer


def answering(name: str, call: Callable[[Problem], Answer]) -> Contestant:
    def prepare(problem: Problem) -> Run:
        return lambda: call(problem)

    return Contestant(name, name, prepare)


def test_wrong_contestant_is_not_timed() -> None:
    wrong = answering("wrong", lambda problem: scaled(-1.0)(right(problem), problem))
    problem = build(Case(OF_LOGITS["forward_backward"], "fp32", 1000, "packed"), SMOKE_ROWS)
    outcomes = race(problem, [wrong, CONTESTANTS[-1]], Rounds(1, 1))
    assert isinstance(outcomes["wrong"].error, WrongAnswer) and not outcomes["wrong"].seconds
    assert len(outcomes["copy"].seconds) == 1


def test_who_is_wrong_fails_or_is_absent_stops_nobody_else() -> None:
    problem = build(linear_smoke(DENSE, "fp32"))

    def fail(problem: Problem) -> Answer:
        raise RuntimeError("no such luck")

    def absent(problem: Problem) -> Run:
        raise ImportError("no such package")

    wrong = answering("wrong", lambda problem: scaled(2.0)(right(problem), problem))
    entrants = [Contestant("absent", "", absent), answering("failing", fail), wrong, OURS]
    outcomes, runs = admit(problem, entrants, keep_wrong=True)
    assert [contestant.name for contestant, _ in runs] == ["wrong", "ours"]
    assert outcomes["absent"].absent == "ImportError: no such package"
    assert "gradient" in outcomes["wrong"].wrong and not outcomes["ours"].wrong
    assert case_result(problem, outcomes)["errors"] == {"failing": "RuntimeError: no such luck"}
    assert outcomes["ours"].gradient_bytes == sum(x.numel() * 4 for x in problem.leaves)


# ---- the cases are what their names say


def test_exactly_60_percent_are_inactive() -> None:
    for layout in ("padded", "packed"):
        problem = build(Case(OF_LOGITS["inactive_60"], "fp32", 1000, layout), 1000)
        assert int((problem.coefficients == 0).sum()) == 600


def test_sequences_from_hidden_states_are_active_as_they_should_be_and_far_from_the_bounds() -> None:
    problem = build(linear_smoke(INACTIVE, "fp32"))
    assert int((problem.advantages == 0).sum()) == 29  # 45% of 64
    assert round(problem.active * 64) == 64 - 29 - 5  # 15% of the rest
    assert problem.old_logprobs is not None
    log_ratio = (problem.sampled.logprobs.view(problem.token_ids.shape) - problem.old_logprobs).mean(1)
    assert float(log_ratio[problem.advantages != 0].abs().min()) > 0.029
    assert build(linear_smoke(DENSE, "fp32")).active == 1.0


@pytest.mark.parametrize("start", HARD_CASES)
def test_a_third_of_the_responses_is_outside_the_clip_range(start: str) -> None:
    problem = build(dataclasses.replace(HARD_CASES[start], sequences=64, rows=512))
    assert problem.old_logprobs is not None
    log_ratio = problem.sampled.logprobs - problem.old_logprobs.flatten()
    ratio = means(log_ratio, problem.mask.flatten(), problem.sequence_of, 64).exp()
    assert 0.2 < float(((ratio < 1 - 3e-4) | (ratio > 1 + 4e-4)).double().mean()) < 0.45


# ---- hard cases, in words

WRONG: dict[str, tuple[Callable[[Answer], Answer], str]] = {
    "nothing": (lambda answer: answer, "right"),
    "a factor": (lambda answer: answer._replace(gradients=tuple(0.5 * x for x in answer.gradients)), "0.5 times the"),
    "a sign": (lambda answer: answer._replace(gradients=tuple(-x for x in answer.gradients)), "gradient off by 200%"),
    "the loss": (lambda answer: answer._replace(value=answer.value + 0.25), "loss off by"),
    "a NaN": (
        lambda answer: answer._replace(gradients=(answer.gradients[0] * math.nan, *answer.gradients[1:])),
        "gradient NaN",
    ),
    "an infinity": (lambda answer: answer._replace(value=answer.value * math.inf), "loss inf"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("start", HARD_CASES)
def test_what_is_wrong_is_said(start: str, what: str) -> None:
    change, words = WRONG[what]
    problem = build(HARD_CASES[start])
    assert in_words(problem, *change(right(problem))).startswith(words)


def test_a_gradient_without_its_softmax_is_wrong() -> None:
    """What is missing is small beside the sampled tokens' columns, and measured apart from them."""
    problem = build(HARD_CASES["logits"])
    assert in_words(problem, *changed(no_softmax)(right(problem), problem)) == "gradient off by 100%"


@pytest.mark.parametrize("name", HARD)
def test_the_truth_of_a_hard_case_is_finite(name: str) -> None:
    for start in HARD[name].starts:
        problem = build_hard(name, start)
        assert math.isfinite(problem.loss)
        assert all(bool(gradient.isfinite().all()) for gradient in exact_gradients(problem))
