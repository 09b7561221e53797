"""Times every contestant in the works that it is given, at one number of rows; each answer is checked first.

Items are names of works; `<work>:ours` times this package alone, for when somebody else's kernel broke the process.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from ..cases import Problem
from ..contestants import Contestant
from ..race import Outcome, Rounds, Runs, admit, take_turns
from .contestants import CONTESTANTS, OURS, absent
from .context import Context
from .meter import finish, idle_seconds, launches, meter_of
from .works import BY_NAME, build_on

ROUNDS, IDLE_ROUNDS = Rounds(least=10, most=30, seconds=4.0), Rounds(least=5, most=5)
SMOKE_ROUNDS = Rounds(least=1, most=1)
COUNTED_ROWS = 1_024  # launches are counted at one size, they are the same at all


def run(context: Context) -> bool:
    """Arguments: rows, bytes per second of a copy (0: unknown, the case's own copy counts), then the items."""
    rows, bandwidth = int(context.arguments[0]), float(context.arguments[1])
    good = True
    for item in context.arguments[2:]:
        name, _, only_ours = item.partition(":")
        context.at(f"{name}, building its inputs")
        problem = build_on(context.device, BY_NAME[name], rows)
        good &= _case(context, problem, bool(only_ours), bandwidth)
        context.finished(item)
        del problem
        gc.collect()
    return good


def _case(context: Context, problem: Problem, only_ours: bool, bandwidth: float) -> bool:
    case, meter = problem.case, meter_of(context.device)
    missing: dict[str, str] = {}

    def entrants() -> Iterator[Contestant]:
        for contestant in CONTESTANTS:
            if contestant.gradient_only and not case.work.gradient:
                continue
            reason = _left_out(context, contestant.name, only_ours) or absent(contestant.name)
            if reason:
                missing[contestant.name] = reason
            else:
                context.at(f"{case.work.name}, first calls of {contestant.name}")
                yield contestant

    outcomes, runs = admit(problem, entrants(), meter)
    rounds, idle_rounds = (SMOKE_ROUNDS, SMOKE_ROUNDS) if context.smoke else (ROUNDS, IDLE_ROUNDS)
    context.at(f"{case.work.name}, in turn: {', '.join(contestant.name for contestant, _ in runs)}")
    for name, seconds in take_turns(problem, runs, rounds, outcomes, meter).items():
        outcomes[name].seconds = seconds
    idle = take_turns(problem, runs, idle_rounds, outcomes, meter, idle_seconds)
    finish()

    key = f"{case.work.name}-{problem.rows}"
    found = _record(problem, outcomes, idle, missing, bandwidth)
    context.put("cases", key, value=found)
    context.say(_line(key, found))
    if context.device == "cuda" and problem.rows == COUNTED_ROWS:
        _count_launches(context, problem, runs, key)
    return not any(name in found["errors"] for name in OURS)


def _left_out(context: Context, name: str, only_ours: bool) -> str:
    if only_ours and name not in (*OURS, "copy"):
        return "the process broke with all of them in it"
    return "not in a smoke run" if context.smoke and name == "compile" else ""


def _count_launches(context: Context, problem: Problem, runs: Runs, key: str) -> None:
    for contestant, run_once in runs:
        if contestant.name in OURS:
            context.at(f"{problem.case.work.name}, counting launches of {contestant.name}")
            count = launches(run_once)
            problem.restore()
            context.put("cases", key, "contestants", contestant.name, "launches", value=count)


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
    floor = problem.units * problem.logits_bytes / bandwidth if bandwidth else None

    def measured(name: str, outcome: Outcome) -> dict[str, Any]:
        median, extra = statistics.median(outcome.seconds), outcome.extra_bytes
        units = 2.0 if name == "copy" else problem.units
        needed = 2 * problem.logits_bytes / bandwidth if name == "copy" and bandwidth else floor
        return {
            "median": median,
            "min": min(outcome.seconds),
            "max": max(outcome.seconds),
            "rounds": len(outcome.seconds),
            "times_floor": None if needed is None else median / needed,
            "bytes_per_second": units * problem.logits_bytes / median,
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
        "floor_seconds": floor,
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
