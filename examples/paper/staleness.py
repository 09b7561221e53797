"""Stale rollouts: GSPO and GRPO with several clip ranges and learning rates, with 4, 16 and 64 updates per rollout.

The GSPO paper claims stability. Here both losses get what decides over it: a range of learning rates, several clip
ranges each, and rollouts that are more or less stale when the last update learns from them. The task and the trainings
are those of `running_sums.py`; all arms have the same updates, responses and problems. Every clip range is tried on two
seeds at every rate; for each loss the one whose best rate is best is confirmed on the other seeds.

    python examples/paper/staleness.py                     # 1.5 CPU hours; goes on where it was stopped
    python examples/paper/staleness.py --quick             # a smoke run of a minute
    python examples/paper/staleness.py --tokens 21         # the short responses alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab
import running_sums
from lab import Journal, mean
from running_sums import LONG, SHORT, Task, Trial, name_of

from gspo_kernels import GRPO, GSPO, GSPOToken, Objective


def gspo(times: float) -> Objective:
    """GSPO with a multiple of the paper's range."""
    return GSPO(eps_low=times * GSPO.eps_low, eps_high=times * GSPO.eps_high)


RANGES: dict[str, Objective] = {
    "GRPO 0.05": GRPO(eps_low=0.05, eps_high=0.0675),
    "GRPO 0.2": GRPO(),
    "GRPO 0.2, dual": GRPO(dual_clip=3.0),
    "GRPO 0.5": GRPO(eps_low=0.5, eps_high=1.0),
    "GRPO 0.8": GRPO(eps_low=0.8, eps_high=3.0),
    **{f"GSPO x{times}": gspo(times) for times in (1, 10, 30, 100, 300)},
}
SHARE = 0.15  # of the adaptive arms
ADAPTIVE: dict[str, Objective] = {f"GRPO, share {SHARE:g}": GRPO(), f"GSPO, share {SHARE:g}": gspo(30)}
ARMS = RANGES | ADAPTIVE
DEFAULTS = ("GRPO 0.2", "GSPO x1")  # confirmed, too
LOSSES = ("GRPO", "GSPO")


class Plan:
    """Which trials to run: a list that depends on the results of the trials before."""

    def __init__(
        self,
        task: Task,
        rates: Sequence[float],
        staleness: Sequence[int],
        names: Sequence[str],
        seeds: int,
        updates: int = 320,
    ) -> None:
        self.task, self.rates, self.staleness, self.names, self.updates = task, rates, staleness, names, updates
        self.choosing, self.confirming = range(min(2, seeds)), range(2, seeds)

    def trial(self, mini_batches: int, name: str, rate: float, seed: int) -> Trial:
        share = SHARE if name in ADAPTIVE else None
        return Trial(self.task, seed, name, ARMS[name], rate, mini_batches, self.updates, clip_share=share)

    def first(self) -> list[Trial]:
        """The choosing seeds: every arm at every rate."""
        return [
            self.trial(stale, name, rate, seed)
            for stale in self.staleness
            for name in self.names
            for rate in self.rates
            for seed in self.choosing
        ]

    def chosen(self, results: dict[str, Any]) -> Iterator[tuple[int, str, float]]:
        """Staleness, arm and best rate: of each loss the best constant range, the adaptive one, and the default."""
        for stale in self.staleness:
            best = {name: self._best(results, stale, name) for name in self.names}  # rate, accuracy
            for loss in LOSSES:
                constant = [name for name in RANGES if name in self.names and name.startswith(loss)]
                winner = max(constant, key=lambda name: best[name][1])
                shown = {winner, *(name for name in (*DEFAULTS, *ADAPTIVE) if name in self.names)}
                yield from ((stale, name, best[name][0]) for name in self.names if name in shown and loss in name)

    def second(self, results: dict[str, Any]) -> list[Trial]:
        """The confirming seeds: a loss's best range at every rate, the others chosen at their best rate."""
        found = []
        for stale, name, best_rate in self.chosen(results):
            whole = name not in DEFAULTS and (name not in ADAPTIVE or stale == max(self.staleness))
            for rate in self.rates if whole else (best_rate,):
                found += [self.trial(stale, name, rate, seed) for seed in self.confirming]
        return found

    def check(self, results: dict[str, Any]) -> list[Trial]:
        """GSPO-token with GSPO's range and rate, on the choosing seeds."""
        found = []
        for stale, name, rate in self.chosen(results):
            if name.startswith("GSPO") and name in RANGES and name not in DEFAULTS:
                objective = RANGES[name]
                assert isinstance(objective, GSPO)
                token = GSPOToken(eps_low=objective.eps_low, eps_high=objective.eps_high)
                trials = [self.trial(stale, name, rate, seed) for seed in self.choosing]
                found += [replace(trial, name=f"GSPO-token{name[4:]}", objective=token) for trial in trials]
        return found

    def _best(self, results: dict[str, Any], stale: int, name: str) -> tuple[float, float]:
        """The rate with the highest mean accuracy over the choosing seeds, and that accuracy."""

        def of(rate: float) -> float:
            trials = [self.trial(stale, name, rate, seed) for seed in self.choosing]
            return mean([results[name_of(trial)]["accuracy"] for trial in trials])

        return max(((rate, of(rate)) for rate in self.rates), key=lambda pair: pair[1])


RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
LONG_NAMES = tuple(name for name in ARMS if name not in ("GSPO x300", "GRPO 0.5"))
FRESH_NAMES = ("GRPO 0.2", "GRPO 0.8", "GSPO x10", "GSPO x30")
PLANS = {
    21: [Plan(SHORT, RATES, (64, 16, 4), tuple(ARMS), seeds=8)],
    101: [
        Plan(LONG, (2e-4, 4e-4, 8e-4), (64,), LONG_NAMES, seeds=4),
        Plan(LONG, (4e-4, 8e-4), (16, 4), FRESH_NAMES, seeds=4),
    ],
}
TINY = Task(digits=3, slip=0.1, warmup_steps=20)
QUICK = {7: [Plan(TINY, (2e-4, 8e-4), (4, 2), tuple(ARMS), seeds=3, updates=8)]}


def work(plans: Sequence[Plan], folder: Path, workers: int) -> dict[str, Any]:
    """Runs what the journal lacks -> the results by trial."""
    journal = Journal(folder / "staleness.jsonl")
    for plan in plans:
        seeds = [*plan.choosing, *plan.confirming]
        jobs = [(folder, plan.task, seed) for seed in seeds]
        lab.side_by_side(running_sums.prepare, jobs, len(jobs), workers, "warm-up")

        def run(trials: list[Trial], title: str) -> None:
            title = f"{title}, {plan.task.tokens} tokens"  # noqa: B023
            journal.run(running_sums.train, [(t, folder) for t in trials], workers, title, lambda job: name_of(job[0]))

        run(plan.first(), "choosing")
        run(plan.second(journal.results), "confirming")
        run(plan.check(journal.results), "GSPO-token")
    return journal.results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths of right responses")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/paper"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    plans = QUICK if arguments.quick else PLANS
    chosen = [plan for tokens in arguments.tokens or plans for plan in plans[tokens]]
    began = time.perf_counter()
    work(chosen, arguments.output, arguments.workers)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
