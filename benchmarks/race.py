"""Measures the contestants of one case in turn: first each one's answer and memory, then A B C D, A B C D, ..."""

from __future__ import annotations

import contextlib
import gc
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from .cases import Problem
from .contestants import Contestant, Run, Unfit
from .memory import freed_memory_kept, peak_extra_bytes
from .truth import WrongAnswer, check

T = TypeVar("T")
Runs = list[tuple[Contestant, Run]]


class Meter(Protocol):
    """How time and memory are measured: on the host, or by a GPU's own clock (`gpu_meter.py`)."""

    def timed(self, run: Callable[[], object]) -> float: ...
    def peak_extra_bytes(self, run: Callable[[], T]) -> tuple[T, int | None]: ...
    def forget(self) -> None:
        """Frees what a contestant that failed has left in caches."""


@dataclass(frozen=True)
class HostMeter:
    clock: Callable[[], float] = time.perf_counter

    def timed(self, run: Callable[[], object]) -> float:
        gc.disable()
        try:
            start = self.clock()
            answer = run()
            seconds = self.clock() - start
            del answer  # a gradient is freed outside the timing
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
    extra_bytes: int | None = None  # peak beyond the inputs, returned gradients included
    gradient_bytes: int = 0  # of the gradients that a call returns
    compile_seconds: float | None = None  # what the first call took, where that compiles
    judged: Any = None  # what `judge` said of the answer
    wrong: str = ""  # what is wrong with an answer that was timed all the same
    absent: str = ""  # why it did not take part
    error: Exception | None = None  # why it was not timed


def race(
    problem: Problem,
    contestants: Iterable[Contestant],
    rounds: Rounds,
    meter: Meter = HostMeter(),
    *,
    heap_kept: bool = False,
    **options: Any,
) -> dict[str, Outcome]:
    """`heap_kept`: memory that a call frees serves the next ones. Not before the answers: that hides their memory."""
    outcomes, runs = admit(problem, contestants, meter, **options)
    with freed_memory_kept() if heap_kept else contextlib.nullcontext():
        for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
            outcomes[name].seconds = seconds
    return outcomes


def admit(
    problem: Problem,
    contestants: Iterable[Contestant],
    meter: Meter = HostMeter(),
    why_not: Callable[[Contestant], str] = lambda contestant: "",
    *,
    judge: Callable[..., Any] = check,
    keep_wrong: bool = False,
    warm_up: bool = True,
) -> tuple[dict[str, Outcome], Runs]:
    """Whoever gives the right answer, ready to run; and what is known of every contestant so far.

    `why_not` is called right before a contestant's first call, and returns a reason to leave it out, or "".
    `judge(problem, value, gradients)` raises WrongAnswer; with `keep_wrong` the contestant stays, its answer marked.
    `warm_up=False`: where a call takes long, only a contestant that compiles has one call more than the judged one.
    """
    outcomes: dict[str, Outcome] = {}
    runs: Runs = []
    for contestant in contestants:
        outcome = outcomes[contestant.name] = Outcome(absent=why_not(contestant))
        if outcome.absent:
            continue
        answer = None
        try:
            run = contestant.prepare(problem)
            if contestant.compiles or warm_up:
                first_call = meter.timed(run)
                outcome.compile_seconds = first_call if contestant.compiles else None
                problem.restore()
            answer, extra_bytes = meter.peak_extra_bytes(run)
            if answer is not None:
                outcome.extra_bytes = extra_bytes
                outcome.gradient_bytes = sum(x.numel() * x.element_size() for x in answer.gradients)
                try:
                    outcome.judged = judge(problem, *answer)
                except WrongAnswer as error:
                    if not keep_wrong:
                        raise
                    outcome.wrong = str(error)
            runs.append((contestant, run))
        except (Unfit, ImportError) as error:
            outcome.absent = words(error)
        except Exception as error:  # whatever is wrong with one says nothing of the others
            note(error, outcome, meter)
        finally:
            answer = None  # the next contestant's memory does not have this one's gradient in it
            problem.restore()
    return outcomes, runs


def take_turns(
    problem: Problem,
    runs: Sequence[tuple[Contestant, Callable[[], object]]],
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


def note(error: Exception, outcome: Outcome, meter: Meter) -> None:
    """Why a contestant was not timed. Its stack frames are cleared, for they hold a gradient."""
    traceback.clear_frames(error.__traceback__)
    outcome.error = error
    meter.forget()


def words(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {error}"[:500]
