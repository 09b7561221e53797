"""Measures the contestants of one case in turn: first each one's answer and memory, then A B C D, A B C D, ..."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

from .cases import Problem
from .contestants import Contestant, Run
from .memory import peak_extra_bytes
from .truth import check


@dataclass(frozen=True)
class Rounds:
    """As many rounds as `seconds` allow, within bounds."""

    least: int = 5
    most: int = 15
    seconds: float = 10.0


SMOKE_ROUNDS = Rounds(least=3, most=3)


@dataclass
class Outcome:
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int | None = None  # peak beyond the inputs, a fresh gradient included
    compile_seconds: float | None = None  # what the first call took, where that compiles
    error: Exception | None = None  # why it was not timed


def race(problem: Problem, contestants: Iterable[Contestant], rounds: Rounds) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    runs: list[tuple[Contestant, Run]] = []
    for contestant in contestants:
        outcome = outcomes[contestant.name] = Outcome()
        try:
            runs.append((contestant, _admit(problem, contestant, outcome)))
        except Exception as error:  # whatever is wrong with one says nothing of the others
            traceback.clear_frames(error.__traceback__)  # which hold a gradient
            outcome.error = error
        finally:
            problem.restore()

    began, count = time.perf_counter(), 0
    while runs and (count < rounds.least or (count < rounds.most and time.perf_counter() - began < rounds.seconds)):
        for contestant, run in runs:
            outcomes[contestant.name].seconds.append(_timed(run))
            if contestant.overwrites:
                problem.restore()
        count += 1
    return outcomes


def _admit(problem: Problem, contestant: Contestant, outcome: Outcome) -> Run:
    """Runs a contestant once to warm up, once more for its memory and its answer."""
    run = contestant.prepare(problem)
    first_call = _timed(run)
    outcome.compile_seconds = first_call if contestant.compiles else None
    problem.restore()
    answer, outcome.extra_bytes = peak_extra_bytes(run)
    if answer is not None:
        check(problem, *answer)
    return run


def _timed(run: Run) -> float:
    gc.disable()
    try:
        start = time.perf_counter()
        answer = run()
        seconds = time.perf_counter() - start
        del answer  # a gradient is given back outside the timing
    finally:
        gc.enable()
    return seconds
