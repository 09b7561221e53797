"""The benchmarks from hidden states: wrong answers are found out, who fails takes nobody along, and all of it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from .linear import __main__ as whole
from .linear import precision
from .linear.cases import DENSE, FORWARD, FROZEN, INACTIVE, SMOKE_ROWS, SMOKE_VOCAB, SMOKE_WIDTH, Case, Problem, build
from .linear.contestants import CONTESTANTS, OURS, PRODUCTS, Answer, Contestant, Run, left_out
from .linear.goals import GOALS
from .linear.results import case_result, load
from .linear.truth import check, exact_of_hidden, exact_of_weight
from .linear.turns import Outcome, admit, affordable
from .race import HostMeter
from .truth import WrongAnswer

DTYPES = ("fp32", "bf16")


def problem_of(work: Any, dtype: str) -> Problem:
    return build(Case(work, dtype, SMOKE_VOCAB, SMOKE_ROWS, SMOKE_WIDTH))


def answer(problem: Problem) -> Answer:
    """The right one, in float64 but for how gradients are stored."""
    rows, tokens = torch.arange(problem.case.rows), torch.arange(problem.case.vocab)
    of_hidden = exact_of_hidden(problem, rows).to(problem.hidden.dtype).view_as(problem.hidden)
    of_weight = exact_of_weight(problem, tokens).to(problem.weight.dtype)
    return Answer(torch.tensor(problem.loss), of_hidden, of_weight)


def without_softmax(right: Answer, problem: Problem) -> Answer:
    inputs, c = problem.inputs, problem.coefficients[:, None]
    of_hidden = (c * inputs.weight[inputs.token_ids].double()).to(problem.hidden.dtype)
    return right._replace(hidden=of_hidden.view_as(problem.hidden))


def without_softmax_in_weight(right: Answer, problem: Problem) -> Answer:
    inputs = problem.inputs
    targets = problem.coefficients[:, None] * inputs.hidden.double()
    of_weight = torch.zeros(problem.weight.shape, dtype=torch.float64).index_add_(0, inputs.token_ids, targets)
    return right._replace(weight=of_weight.to(problem.weight.dtype))


def weight_misses_a_row(right: Answer, problem: Problem) -> Answer:
    assert right.weight is not None
    return right._replace(weight=right.weight.index_fill(0, torch.tensor([problem.case.vocab - 2]), 0.0))


def hidden_misses_a_row(right: Answer, problem: Problem) -> Answer:
    row = int((problem.coefficients != 0).nonzero()[0])
    assert right.hidden is not None
    return right._replace(
        hidden=right.hidden.flatten(0, 1).index_fill(0, torch.tensor([row]), 0.0).view_as(right.hidden)
    )


def wrong_count(right: Answer, problem: Problem) -> Answer:
    """Divides by one sequence less."""
    assert right.hidden is not None and right.weight is not None
    sequences = problem.case.work.sequences
    factor = sequences / (sequences - 1)
    return right._replace(hidden=right.hidden * factor, weight=right.weight * factor)


def inactive_row_written(right: Answer, problem: Problem) -> Answer:
    row = int((problem.coefficients == 0).nonzero()[0])
    assert right.hidden is not None
    return right._replace(
        hidden=right.hidden.flatten(0, 1).index_fill(0, torch.tensor([row]), 1e-9).view_as(right.hidden)
    )


def columns_swapped(right: Answer, problem: Problem) -> Answer:
    """Neighbours of the vocabulary, as a kernel that stores lanes in another order would."""
    assert right.weight is not None
    return right._replace(weight=right.weight.view(-1, 2, problem.case.width).flip(1).reshape(right.weight.shape))


def not_a_number(right: Answer, problem: Problem) -> Answer:
    assert right.weight is not None
    return right._replace(weight=right.weight.index_fill(0, problem.inputs.token_ids[:1], torch.nan))


def loss_of_one_sequence_less(right: Answer, problem: Problem) -> Answer:
    sequences = problem.case.work.sequences
    return right._replace(value=right.value + float(problem.advantages.abs().mean()) / sequences)


MUTANTS = (
    without_softmax,
    without_softmax_in_weight,
    weight_misses_a_row,
    hidden_misses_a_row,
    wrong_count,
    inactive_row_written,
    columns_swapped,
    not_a_number,
    loss_of_one_sequence_less,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_wrong_answer_is_found_out(mutate: Callable[[Answer, Problem], Answer], dtype: str) -> None:
    problem = problem_of(INACTIVE, dtype)
    right = answer(problem)
    check(problem, right)
    with pytest.raises(WrongAnswer):
        check(problem, mutate(right, problem))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_logprobs_are_found_out(dtype: str) -> None:
    problem = problem_of(FORWARD, dtype)
    right = problem.inputs.logprobs.view(problem.token_ids.shape)
    check(problem, Answer(right.float()))
    first_half = (problem.inputs.hidden.double() @ problem.inputs.weight[: SMOKE_VOCAB // 2].double().T).logsumexp(1)
    of_half = (problem.inputs.logprobs + problem.inputs.lse - first_half).view(right.shape)
    for wrong in (of_half, right.roll(1, 1), right.index_fill(0, torch.tensor([0]), torch.nan)):
        with pytest.raises(WrongAnswer, match="log-prob"):
            check(problem, Answer(wrong.float()))


def test_frozen_head_has_no_gradient() -> None:
    problem = problem_of(FROZEN, "fp32")
    right = answer(problem)
    check(problem, right._replace(weight=None))
    with pytest.raises(WrongAnswer, match="frozen"):
        check(problem, right)


def test_sequences_are_active_as_they_should_be_and_far_from_the_bounds() -> None:
    problem = problem_of(INACTIVE, "fp32")
    assert int((problem.advantages == 0).sum()) == 29  # 45% of 64
    assert round(problem.active * 64) == 64 - 29 - 5  # 15% of the rest
    log_ratio = (problem.inputs.logprobs.view(problem.token_ids.shape) - problem.old_logprobs).mean(1)
    assert float(log_ratio[problem.advantages != 0].abs().min()) > 0.029
    assert problem_of(DENSE, "fp32").active == 1.0


def test_who_is_wrong_fails_or_is_absent_takes_nobody_along() -> None:
    problem = problem_of(DENSE, "fp32")

    def wrong(problem: Problem) -> Run:
        return lambda: wrong_count(answer(problem), problem)

    def failing(problem: Problem) -> Run:
        def run() -> Answer:
            raise RuntimeError("no such luck")

        return run

    def absent(problem: Problem) -> Run:
        raise ImportError("no such package")

    entrants = [Contestant(prepare.__name__, "", prepare) for prepare in (absent, failing, wrong)]
    outcomes, runs = admit(problem, [*entrants, OURS], HostMeter())
    assert [contestant.name for contestant, _ in runs] == ["wrong", "ours"]
    assert outcomes["absent"].absent == "ImportError: no such package"
    assert "gradient" in outcomes["wrong"].wrong and len(outcomes["wrong"].seconds) == 1
    assert isinstance(outcomes["failing"].error, RuntimeError) and not outcomes["ours"].wrong
    found = case_result(problem, outcomes)
    assert found.errors == {"failing": "RuntimeError: no such luck"} and found.contestants["wrong"].wrong
    gradients = problem.hidden.numel() + problem.weight.numel()
    assert outcomes["ours"].gradient_bytes == gradients * 4


def test_the_slow_sit_out_when_time_is_short() -> None:
    seconds = {"ours": 2.0, "products": 2.0, "eager": 3.0, "trl": 9.0}
    outcomes = {name: Outcome([s]) for name, s in seconds.items()}
    runs: list[tuple[Contestant, Run]] = [(c, lambda: None) for c in CONTESTANTS if c.name in seconds]

    def names(left: float) -> tuple[list[str], int]:
        chosen, rounds = affordable(runs, outcomes, left, most=6)
        return [contestant.name for contestant, _ in chosen], rounds.most

    assert names(100.0) == (["ours", "products", "eager", "trl"], 6)
    assert names(22.0) == (["ours", "products", "eager"], 3)
    assert names(15.0) == (["ours", "products"], 3)
    assert names(-1.0) == (["ours", "products"], 2)


def test_peers_are_asked_where_something_is_to_be_learned() -> None:
    eager = next(c for c in CONTESTANTS if c.name == "eager")
    large, small = (Case(INACTIVE, "fp32", vocab) for vocab in (151_936, 32_000))
    assert left_out(eager, large) and not left_out(eager, small) and not left_out(eager, replace(large, work=DENSE))
    assert not left_out(OURS, large) and not left_out(PRODUCTS, large)


def test_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "linear.json"
    assert whole.main(["--smoke", "--save", str(path)]) == 0
    results = load(path)
    assert len(results.cases) == 4
    for case in results.cases.values():
        assert {"ours", "products", "eager"} <= case.contestants.keys() and not case.contestants["eager"].wrong
        assert case.contestants.keys() | case.absent.keys() | case.errors.keys() == {c.name for c in CONTESTANTS}
    capsys.readouterr()
    assert whole.main(["--markdown", str(path)]) == 0
    assert "| gspo-kernels |" in capsys.readouterr().out


def test_precision_smoke_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "precision.json"
    assert precision.main(["--smoke", "--save", str(path)]) == 0
    (found,) = json.loads(path.read_text())["lengths"].values()
    assert found["truly_clipped"] > 0
    assert found["contestants"]["ours"]["wrong"] == 0
    assert found["contestants"]["ours"]["log_ratio_error"] < 1e-6 < found["contestants"]["eager"]["log_ratio_error"]
    assert precision.main(["--markdown", str(path)]) == 0
    assert "| gspo-kernels |" in capsys.readouterr().out


def test_goals(tmp_path: Path) -> None:
    def measured(seconds: float, beyond: int, wrong: str = "") -> dict[str, Any]:
        return {
            "median": seconds, "min": seconds, "max": seconds, "rounds": 2, "times_products": seconds / 10.0,
            "flop_per_s": 1e11, "extra_bytes": beyond, "beyond_gradients": beyond, "first_call_seconds": None,
            "wrong": wrong,
        }  # fmt: skip

    def case(work: str, dtype: str, **contestants: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"{work}-{dtype}-151936", "work": work, "title": work, "dtype": dtype, "vocab": 151_936, "rows": 2048,
            "width": 1024, "sequences": 8, "active": 1.0, "contestants": contestants, "absent": {}, "errors": {},
        }  # fmt: skip

    wrong_but_fast = measured(1.0, 1, wrong="loss")
    cases = [
        case("dense", "fp32", ours=measured(10.9, 300), eager=measured(20.0, 3100), torch=wrong_but_fast),
        case("dense", "bf16", ours=measured(11.0, 700), eager=measured(20.0, 3100)),
        case("inactive", "fp32", ours=measured(7.0, 300)),
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {}, "cases": cases}))
    results, verdicts = load(path), {}
    for goal in GOALS:
        try:
            verdicts[goal.text] = goal.judge(results)[0]
        except KeyError:
            verdicts[goal.text] = None
    assert list(verdicts.values()) == [True, True, False, True, None, True, False]
