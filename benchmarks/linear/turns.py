"""How the contestants of a case share its time: one call each, checked, then as many rounds as there is time for.

A call takes from a tenth of a second to half a minute. So on a CPU the first round is a measurement too, of time and of
memory (`warm_up` has been there before), until there are two others; only a contestant that compiles is called once
more. Who is too slow for the time that is left sits out the further rounds, in which memory comes from a heap that is
kept between calls (`keep_freed_memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..cases import DTYPES
from ..memory import keep_freed_memory
from ..race import HostMeter, Meter, Rounds, note, take_turns
from ..race import Outcome as RaceOutcome
from ..truth import WrongAnswer
from .cases import DENSE, SMOKE_ROWS, SMOKE_VOCAB, SMOKE_WIDTH, Case, Problem, build
from .contestants import CONTESTANTS, PEERS, Answer, Contestant, Run, left_out
from .truth import check

ENOUGH_ROUNDS, FURTHER_ROUNDS = 3, 6  # further ones; what the slow are left out for, and the most there are
Runs = list[tuple[Contestant, Run]]


@dataclass
class Outcome(RaceOutcome):
    gradient_bytes: int = 0  # of the gradients that a call returns
    absent: str = ""  # why it did not take part
    wrong: str = ""  # what is wrong with its answer; timed all the same


def warm_up() -> None:
    """Libraries are loaded, and products made ready for each dtype, before anything counts."""
    for dtype in DTYPES:
        problem = build(Case(DENSE, dtype, SMOKE_VOCAB, SMOKE_ROWS, SMOKE_WIDTH))
        admit(problem, [c for c in CONTESTANTS if not c.compiles], HostMeter())


def measure(problem: Problem, end: float, deadline: float, most: int = FURTHER_ROUNDS) -> dict[str, Outcome]:
    """On a CPU. From `end` on no further round is begun, from `deadline` on no peer has even its first call."""

    def why_not(contestant: Contestant) -> str:
        late = contestant.name in PEERS and time.perf_counter() > deadline
        return left_out(contestant, problem.case) or ("no time was left" if late else "")

    torch.compiler.reset()  # one shape at a time: the next case compiles afresh instead of generalising this one
    meter = HostMeter()
    outcomes, runs = admit(problem, CONTESTANTS, meter, why_not)
    chosen, rounds = affordable(runs, outcomes, end - time.perf_counter(), most)
    keep_freed_memory(True)  # and not before: a heap that keeps more than a call holds would hide what that is
    try:
        for name, further in take_turns(problem, chosen, rounds, outcomes, meter).items():
            outcomes[name].seconds = further if len(further) > 1 else outcomes[name].seconds + further
    finally:
        keep_freed_memory(False)
    return outcomes


def admit(
    problem: Problem,
    contestants: Iterable[Contestant],
    meter: Meter,
    why_not: Callable[[Contestant], str] = lambda contestant: "",
) -> tuple[dict[str, Outcome], Runs]:
    """Whoever is here and does not fail, ready to run; and what is known of every one so far.

    `why_not` is asked right before a contestant's turn, and gives a reason to leave it out, or "".
    """
    outcomes: dict[str, Outcome] = {}
    runs: Runs = []
    for contestant in contestants:
        outcome = outcomes[contestant.name] = Outcome()
        outcome.absent = why_not(contestant)
        if outcome.absent:
            continue
        try:
            run = contestant.prepare(problem)
        except Exception as error:  # a peer may fail in any way on versions that it does not know
            outcome.absent = words(error)
            continue
        try:
            _first_call(problem, contestant, run, outcome, meter)
        except Exception as error:
            note(error, outcome, meter)
        else:
            runs.append((contestant, run))
        finally:
            problem.restore()
    return outcomes, runs


def affordable(runs: Runs, outcomes: dict[str, Outcome], seconds: float, most: int) -> tuple[Runs, Rounds]:
    """This package and its yardstick, for two more rounds at least; of the peers those that there is time for."""
    enough = min(ENOUGH_ROUNDS, most)
    cost = {contestant.name: outcomes[contestant.name].seconds[0] for contestant, _ in runs}
    for name in sorted(PEERS, key=lambda name: -cost.get(name, 0.0)):
        if enough * sum(cost.values()) <= seconds:
            break
        cost.pop(name, None)
    count = int(seconds / sum(cost.values())) if cost else 0
    rounds = min(max(count, 2), most)
    return [(contestant, run) for contestant, run in runs if contestant.name in cost], Rounds(least=rounds, most=rounds)


def _first_call(problem: Problem, contestant: Contestant, run: Run, outcome: Outcome, meter: Meter) -> None:
    on_host = isinstance(meter, HostMeter)
    if contestant.compiles or not on_host:
        first = meter.timed(run)
        outcome.compile_seconds = first if contestant.compiles else None
    began = ended = 0.0

    def timed() -> Answer | None:
        nonlocal began, ended
        began = time.perf_counter()
        answer = run()
        ended = time.perf_counter()
        return answer

    answer, extra = meter.peak_extra_bytes(timed)
    if on_host:
        outcome.seconds.append(ended - began)
    if answer is None:
        return
    outcome.extra_bytes, outcome.gradient_bytes = extra, answer.gradient_bytes
    try:
        check(problem, answer)
    except WrongAnswer as error:
        outcome.wrong = str(error)


def words(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}"[:500]
