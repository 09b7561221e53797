"""The staleness study: its task, one training, the choice of ranges and rates, and a journal that goes on."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels import GRPO, GSPO

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

sys.path += [str(Path(__file__).parents[2] / "examples"), str(Path(__file__).parents[2] / "examples" / "paper")]

import lab  # noqa: E402
import running_sums  # noqa: E402
import staleness  # noqa: E402
from running_sums import EOS, PAD, Task, Trial, name_of  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]

TASK = Task(digits=2, slip=0.1, warmup_steps=25)
TRIAL = Trial(TASK, 0, "GSPO x1", GSPO(), 1e-3, mini_batches=2, updates=4, samples=16)


def test_a_demonstration_without_slips_is_right_and_graded_so() -> None:
    digits = [7, 5, 8]
    answer = running_sums.demonstration(digits, random.Random(0), slip=0.0)
    assert answer == [7, 7, 5, 2, 8, 0, EOS]
    rows = torch.tensor(
        [
            [7, 7, 5, 2, 8, 0, EOS, PAD],
            [0, EOS, PAD, PAD, PAD, PAD, PAD, PAD],  # the working is not graded
            [7, 7, 5, 2, 8, 1, EOS, PAD],
            [7, 7, 5, 2, 8, 0, 0, 0],  # cut off
            [EOS, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        ]
    )
    assert running_sums.grade(rows, [digits] * 5).tolist() == [1, 1, 0, 0, 0]


def test_a_slip_is_carried_on() -> None:
    """Each sum but a wrong one follows from the sum before and the digit written."""
    rng, wrong = random.Random(1), 0
    for _ in range(200):
        answer, total = running_sums.demonstration([3, 1, 4, 1], rng, slip=0.1)[:-1], 0
        for written, sum_so_far in zip(answer[::2], answer[1::2], strict=True):
            wrong += (total + written) % 10 != sum_so_far
            total = sum_so_far
    assert 40 < wrong < 110  # 800 sums, a slip's digit is the right one in a tenth


class Watch:
    """The largest distance of a ratio from 1 in the first update of each rollout, and in the others."""

    def __init__(self, trial: Trial) -> None:
        self.first, self.later = 0.0, 0.0

    def see(self, part: running_sums.Part, stats: Any, depth: int) -> None:
        off = torch.where(part.mask, stats.logprobs - part.old_logprobs, 0.0).abs().max().item()
        if depth == 0:
            self.first = max(self.first, off)
        else:
            self.later = max(self.later, off)

    def result(self) -> dict[str, Any]:
        return {"first": self.first, "later": self.later}


@pytest.mark.parametrize(("experts", "replay"), [(0, False), (4, True)])
def test_a_training_is_on_policy_first_and_repeatable(tmp_path: Path, experts: int, replay: bool) -> None:
    trial = replace(TRIAL, experts=experts, replay=replay, clip_share=0.3)
    found = running_sums.train(trial, tmp_path, Watch)
    assert found["first"] < 1e-5 < found["later"]
    if not experts:
        assert {**running_sums.train(trial, tmp_path, Watch), "seconds": 0} == {**found, "seconds": 0}
    assert len(found["rewards"]) == len(found["ranges"]) == 2


def test_a_trials_name_has_everything_that_its_result_depends_on() -> None:
    changed = {each.name: replace(TRIAL, **{each.name: "other"}) for each in fields(TRIAL)}
    assert len({name_of(TRIAL), *map(name_of, changed.values())}) == len(changed) + 1
    assert name_of(replace(TRIAL, objective=GSPO(eps_low=1e-3))) != name_of(TRIAL)
    assert name_of(replace(TRIAL, objective=GRPO(eps_low=3e-4, eps_high=4e-4))) != name_of(TRIAL)


def test_a_journal_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def here(run: Any, jobs: Any, total: int, workers: int, title: str, finished: Any) -> None:
        for job in jobs:
            finished(job, run(*job))

    def double(number: int) -> float:
        ran.append(number)
        return 2.0 * number

    monkeypatch.setattr(lab, "side_by_side", here)
    path, jobs = tmp_path / "j.jsonl", [(1,), (2,), (3,)]
    assert lab.Journal(path).run(double, jobs[:2], 1, "", str) == [2.0, 4.0]
    path.write_text(path.read_text() + '{"run": "(3,)", "res')  # stopped in the middle of a line
    assert lab.Journal(path).run(double, jobs, 1, "", str) == [2.0, 4.0, 6.0]
    assert ran == [1, 2, 3]
    assert [json.loads(line)["result"] for line in path.read_text().splitlines()] == [2.0, 4.0, 6.0]


def test_ranges_and_rates_are_chosen_by_the_first_two_seeds_alone() -> None:
    plan = staleness.Plan(TASK, (1e-4, 2e-4, 4e-4), (4,), tuple(staleness.ARMS), seeds=range(4))
    best = {"GRPO 0.5": 2e-4, "GSPO x10": 1e-4}

    def result(trial: Trial) -> dict[str, float]:
        good = best.get(trial.name) == trial.learning_rate
        return {"accuracy": 0.9 if good else 0.5 - abs(trial.learning_rate - 2e-4)}

    first = plan.first()
    assert {trial.seed for trial in first} == {0, 1}
    assert len(first) == 2 * 3 * len(staleness.ARMS)
    results = {name_of(trial): result(trial) for trial in first}
    chosen = {name: rate for _, name, rate in plan.chosen(results)}
    assert chosen == {
        **best,
        **dict.fromkeys((*staleness.DEFAULTS, *staleness.ADAPTIVE), 2e-4),
    }
    second = plan.second(results)
    assert {trial.seed for trial in second} == {2, 3}
    assert (
        sum(trial.name == "GSPO x10" for trial in second) == 2 * 2
    )  # its best rate and the next, which is the lowest's only neighbour
    assert sum(trial.name == "GSPO x1" for trial in second) == 2  # its best rate
    assert not set(map(name_of, second)) & set(results)
    (check, _) = plan.check(results)
    assert (check.name, check.learning_rate, check.objective.eps_low) == ("GSPO-token x10", 1e-4, 10 * GSPO.eps_low)  # type: ignore[attr-defined]
