"""Measures the contestants of one case in turn: first each one's answer and memory, then A B C D, A B C D, ..."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from .cases import Problem
from .contestants import Contestant, Run
from .memory import peak_extra_bytes
from .truth import check

T = TypeVar("T")
Runs = list[tuple[Contestant, Run]]


class Meter(Protocol):
    """How time and memory are taken: on the host, or by a GPU's own clock (`gpu_meter.py`)."""

    def timed(self, run: Callable[[], object]) -> float: ...
    def peak_extra_bytes(self, run: Callable[[], T]) -> tuple[T, int | None]: ...
    def forget(self) -> None:
        """Gives back what a contestant that failed has left in caches."""


class Entrant(Protocol):
    """What taking turns must know of a contestant."""

    @property
    def name(self) -> str: ...
    @property
    def overwrites(self) -> bool: ...


class Restorable(Protocol):
    """Inputs that a contestant may have written over."""

    def restore(self) -> None: ...


class HostMeter:
    def timed(self, run: Callable[[], object]) -> float:
        gc.disable()
        try:
            start = time.perf_counter()
            answer = run()
            seconds = time.perf_counter() - start
            del answer  # a gradient is given back outside the timing
        finally:
            gc.enable()
        return seconds

    def peak_extra_bytes(self, run: Callable[[], T]) -> tuple[T, int | None]:
        return peak_extra_bytes(run)

    def forget(self) -> None:
        gc.collect()


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


def race(
    problem: Problem, contestants: Iterable[Contestant], rounds: Rounds, meter: Meter = HostMeter()
) -> dict[str, Outcome]:
    outcomes, runs = admit(problem, contestants, meter)
    for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
        outcomes[name].seconds = seconds
    return outcomes


def admit(
    problem: Problem, contestants: Iterable[Contestant], meter: Meter = HostMeter()
) -> tuple[dict[str, Outcome], Runs]:
    """Whoever gives the right answer, ready to run; and what is known of every one so far."""
    outcomes: dict[str, Outcome] = {}
    runs: Runs = []
    for contestant in contestants:
        outcome = outcomes[contestant.name] = Outcome()
        try:
            runs.append((contestant, _admit(problem, contestant, outcome, meter)))
        except Exception as error:  # whatever is wrong with one says nothing of the others
            note(error, outcome, meter)
        finally:
            problem.restore()
    return outcomes, runs


def take_turns(
    problem: Restorable,
    runs: Sequence[tuple[Entrant, Callable[[], object]]],
    rounds: Rounds,
    outcomes: Mapping[str, Outcome],
    meter: Meter = HostMeter(),
    timed: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each, a list a contestant; by the meter's clock or by `timed`."""
    timed = timed or meter.timed
    found: dict[str, list[float]] = {contestant.name: [] for contestant, _ in runs}
    running = list(runs)
    began, count = time.perf_counter(), 0
    while running and (count < rounds.least or (count < rounds.most and time.perf_counter() - began < rounds.seconds)):
        for contestant, run in list(running):
            try:
                found[contestant.name].append(timed(run))
            except Exception as error:
                running.remove((contestant, run))
                note(error, outcomes[contestant.name], meter)
            if contestant.overwrites:
                problem.restore()
        count += 1
    return found


def _admit(problem: Problem, contestant: Contestant, outcome: Outcome, meter: Meter) -> Run:
    """Runs a contestant once to warm up, once more for its memory and its answer."""
    run = contestant.prepare(problem)
    first_call = meter.timed(run)
    outcome.compile_seconds = first_call if contestant.compiles else None
    problem.restore()
    answer, outcome.extra_bytes = meter.peak_extra_bytes(run)
    if answer is not None:
        check(problem, *answer)
    return run


def note(error: Exception, outcome: Outcome, meter: Meter) -> None:
    """Why a contestant was not timed; and nothing of it is kept."""
    traceback.clear_frames(error.__traceback__)  # which hold a gradient
    outcome.error = error
    meter.forget()
