"""Every contestant in every case: its answer is checked, then its times go to pytest-benchmark.

The times were taken in turn with those of the other contestants (`race.py`), which pytest-benchmark cannot do. A clock
that advances by the recorded times hands them over: its statistics, --benchmark-json and --benchmark-compare all work.
With --gate it advances by multiples of the yardstick's time in place of seconds (`gate.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import Case
from .contestants import YARDSTICK, Contestant
from .gate import multiples
from .race import Outcome

_now = 0.0


def recorded_time() -> float:
    return _now


@pytest.mark.benchmark(timer=recorded_time)
def test_speed(
    benchmark: BenchmarkFixture, outcomes_of: Callable[[Case], dict[str, Outcome]], case: Case, contestant: Contestant
) -> None:
    outcomes = outcomes_of(case)
    outcome = outcomes[contestant.name]
    assert not outcome.absent
    if outcome.error is not None:
        raise outcome.error
    yardstick = outcomes.get(YARDSTICK.name)
    figures = (outcome.seconds if yardstick is None else multiples(outcome, yardstick)) or [0.0]
    times = iter(figures)

    def replay() -> None:
        global _now
        _now += next(times)

    benchmark.group = case.id
    benchmark.extra_info["extra_bytes"] = outcome.extra_bytes
    benchmark.extra_info["compile_seconds"] = outcome.compile_seconds
    benchmark.pedantic(replay, rounds=len(figures))  # type: ignore[no-untyped-call]
