"""Times every contestant in the works that it is given, at one number of rows; each answer is checked first.

Items are names of works; `<work>:ours` times this package and the copy alone: in a run that is short of time, or after
somebody else's kernel broke the process.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..cases import Problem
from ..contestants import Contestant
from ..race import Outcome, Rounds, Runs, admit, take_turns
from .contestants import BY_NAME as CONTESTANT
from .contestants import CONTESTANTS, OURS, absent, units
from .context import Context
from .meter import finish, idle_seconds, launches, meter_of
from .works import BY_NAME, build_on

ROUNDS, IDLE_ROUNDS = Rounds(least=10, most=30, seconds=2.5), Rounds(least=5, most=5)
SMOKE_ROUNDS = Rounds(least=1, most=1)
COUNTED_ROWS = 1_024  # launches are counted at one size, they are the same at all
COMPILED_ROWS = 8_192  # torch.compile takes part where the goals are


def run(context: Context) -> bool:
    """Arguments: rows, bytes per second of a copy (0: unknown, the case's own copy counts), then the items."""
    rows, bandwidth = int(context.arguments[0]), float(context.arguments[1])
    good = True
    for item in context.arguments[2:]:
        name, _, only_ours = item.partition(":")
        context.at(f"{name}, building its inputs")
        problem = build_on(context.device, BY_NAME[name], rows)
        why_not = functools.partial(_left_out, context, rows, bool(only_ours))
        good &= measure(context, problem, CONTESTANTS, bandwidth, ("cases", f"{name}-{rows}"), why_not)
        context.finished(item)
        del problem
        gc.collect()
    return good


def measure(
    context: Context,
    problem: Problem,
    contestants: tuple[Contestant, ...],
    bandwidth: float,
    place: tuple[str, ...],
    why_not: Callable[[Contestant], str] = lambda contestant: "",
) -> bool:
    """One case into the results at `place`, whose last is its name; False if this package failed in it."""
    key, meter = place[-1], meter_of(context.device)
    missing: dict[str, str] = {}

    def entrants() -> Iterator[Contestant]:
        for contestant in contestants:
            if contestant.gradient_only and not problem.case.work.gradient:
                continue
            reason = why_not(contestant) or absent(contestant, problem)
            if reason:
                missing[contestant.name] = reason
            else:
                context.at(f"{key}, first calls of {contestant.name}")
                yield contestant

    outcomes, runs = admit(problem, entrants(), meter)
    rounds, idle_rounds = (SMOKE_ROUNDS, SMOKE_ROUNDS) if context.smoke else (ROUNDS, IDLE_ROUNDS)
    context.at(f"{key}, in turn: {', '.join(contestant.name for contestant, _ in runs)}")
    for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
        outcomes[name].seconds = seconds
    idle = take_turns(problem, runs, idle_rounds, outcomes, meter, idle_seconds)
    finish()

    found = _record(problem, outcomes, idle, missing, bandwidth)
    context.put(*place, value=found)
    context.say(_line(key, found))
    if context.device == "cuda" and problem.rows == COUNTED_ROWS:
        _count_launches(context, problem, runs, place)
    return not any(name in found["errors"] for name in OURS)


def _left_out(context: Context, rows: int, only_ours: bool, contestant: Contestant) -> str:
    if only_ours and contestant.name not in (*OURS, "copy"):
        return "this package alone was measured here"
    if contestant.name == "compile" and context.smoke:
        return "not in a smoke run"
    # Half a minute of compilation for each number of rows.
    return f"compiled at {COMPILED_ROWS:,} rows alone" if contestant.name == "compile" and rows != COMPILED_ROWS else ""


def _count_launches(context: Context, problem: Problem, runs: Runs, place: tuple[str, ...]) -> None:
    for contestant, run_once in runs:
        if contestant.name in OURS:
            context.at(f"{place[-1]}, counting launches of {contestant.name}")
            try:
                count = launches(run_once)
            except RuntimeError as error:  # no CUPTI, or one that is in use
                context.say(f"launches are not counted: {error}")
                return
            finally:
                problem.restore()
            context.put(*place, "contestants", contestant.name, "launches", value=count)


def _record(
    problem: Problem,
    outcomes: dict[str, Outcome],
    idle: dict[str, list[float]],
    missing: dict[str, str],
    bandwidth: float,
) -> dict[str, Any]:
    copies = outcomes["copy"].seconds if "copy" in outcomes else []
    if not bandwidth and copies:
        bandwidth = 2 * problem.logits_bytes / statistics.median(copies)

    def measured(name: str, outcome: Outcome) -> dict[str, Any]:
        median, extra = statistics.median(outcome.seconds), outcome.extra_bytes
        moved = units(CONTESTANT[name], problem) * problem.logits_bytes
        return {
            "units": moved / problem.logits_bytes,
            "median": median,
            "min": min(outcome.seconds),
            "max": max(outcome.seconds),
            "rounds": len(outcome.seconds),
            "times_floor": median * bandwidth / moved if bandwidth else None,
            "bytes_per_second": moved / median,
            "idle_median": statistics.median(idle[name]) if idle.get(name) else None,
            "extra_bytes": extra,
            "extra_in_logits": None if extra is None else extra / problem.logits_bytes,
            "first_call_seconds": outcome.compile_seconds,
        }

    case = problem.case
    return {
        "work": case.work.name,
        "title": case.work.title,
        "dtype": case.dtype,
        "vocab": case.vocab,
        "rows": problem.rows,
        "sequences": case.sequences,
        "logits_bytes": problem.logits_bytes,
        "held_bytes": 2 * problem.logits_bytes,  # the logits, and a copy to bring them back: not there to contestants
        "units": problem.units,
        "floor_seconds": problem.units * problem.logits_bytes / bandwidth if bandwidth else None,
        "contestants": {name: measured(name, o) for name, o in outcomes.items() if o.seconds},
        "errors": {name: words(o.error) for name, o in outcomes.items() if o.error},
        "absent": missing,
    }


def words(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}"[:500]


def _line(key: str, found: dict[str, Any]) -> str:
    parts = [f"{name} {m['median'] * 1e3:.3f} ms" for name, m in found["contestants"].items()]
    parts += [f"{name}: {error.splitlines()[0][:80]}" for name, error in found["errors"].items()]
    floor = "" if found["floor_seconds"] is None else f" (floor {found['floor_seconds'] * 1e3:.3f} ms)"
    return f"{key}{floor}: {', '.join(parts)}"
