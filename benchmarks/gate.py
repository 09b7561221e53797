"""What pytest-benchmark saves and compares here: has a loss become slower than it was?

With `--gate` a figure is a multiple: a call's processor time over that of the yardstick (`contestants.YARDSTICK`) in
the same round, both on one thread. Time that the processor spends on other processes is not counted, and what those do
to caches and clocks slows both. Without it, figures are seconds. docs/benchmark-gate.md shows the commands, and how
often either form raises a false alarm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from typing import Any

import pytest
from pytest_benchmark.session import PerformanceRegression
from pytest_benchmark.utils import PercentageRegressionCheck, RegressionCheck

from .cases import GATE_ROWS, ROWS, SMOKE_ROWS
from .contestants import YARDSTICK
from .race import HostMeter, Outcome, Rounds
from .results import machine, title

ROUNDS, METER = Rounds(least=15, most=60, seconds=3.0), HostMeter(time.process_time)
SECONDS, MULTIPLES = "seconds", f"multiples of {YARDSTICK.label}"
FIXED = ("unit", "rows", "cpu", "threads")  # figures are compared only where these are equal
NAMED = ("backend", "gspo_kernels", "torch", "python")  # what a comparison may be about; the table names what differs

MACHINE = pytest.StashKey[dict[str, Any]]()
FIGURES = pytest.StashKey[list[dict[str, Any]]]()  # pytest-benchmark's, of this run and of those it is compared with
LOADED = pytest.StashKey[list[str]]()  # on what the latter were measured
FAILED = pytest.StashKey[bool]()


def rows_of(config: pytest.Config) -> int:
    if config.getoption("smoke"):
        return SMOKE_ROWS
    return GATE_ROWS if config.getoption("gate") and "GSPO_BENCH_ROWS" not in os.environ else ROWS


def unit_of(config: pytest.Config) -> str:
    return MULTIPLES if config.getoption("gate") else SECONDS


def multiples(outcome: Outcome, yardstick: Outcome) -> list[float]:
    """One a round."""
    return [mine / its for mine, its in zip(outcome.seconds, yardstick.seconds, strict=True)]


# ---- pytest-benchmark's hooks: what figures depend on is saved with them, and has to be the same later


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    if MACHINE not in config.stash:
        about = {key: value for key, value in machine().items() if key not in ("commit", "date")}
        config.stash[MACHINE] = {"unit": unit_of(config), "rows": rows_of(config), **about}
    return config.stash[MACHINE]


def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    then = compared_benchmark["machine_info"]
    for key in FIXED:
        if then.get(key) != machine_info[key]:
            raise pytest.UsageError(
                f"--benchmark-compare: expected figures of the same {key}: others say nothing of a change; "
                f"got {then.get(key)!r} in the saved run, {machine_info[key]!r} now. Save a baseline as you run now, "
                "or compare with another run (--benchmark-compare=NUMBER)"
            )
    changed = [key for key in NAMED if then.get(key) != machine_info[key]]
    about = f"{compared_benchmark['datetime'][:16]}, commit {compared_benchmark['commit_info']['id'][:12]}"
    about += "".join(f"; {key} was {then.get(key)}" for key in changed)
    config.stash.setdefault(LOADED, []).append(about)


def pytest_benchmark_scale_unit(config: pytest.Config, unit: str) -> tuple[str, float] | None:
    """Of the table that -v prints: "time in multiples"."""
    if not config.getoption("gate"):
        return None
    return ("multiple", 1.0) if unit == "seconds" else ("", 1.0)


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config: pytest.Config, benchmarks: list[dict[str, Any]]) -> Generator[None, Any, Any]:
    config.stash[FIGURES] = [dict(each) for each in benchmarks]
    return (yield)


# ---- the table and the exit status


def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("benchmark_compare_fail") and not config.stash.get(LOADED, []):
        raise pytest.UsageError(
            "--benchmark-compare-fail: expected a saved run to compare with; got none. Save one first "
            "(--benchmark-save=NAME), then add --benchmark-compare (the last one) or --benchmark-compare=NUMBER"
        )


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Generator[None, None, None]:
    figures = config.stash.get(FIGURES, [])
    if figures and (config.getoption("gate") or config.stash.get(LOADED, [])):
        terminalreporter.section("figures")
        for text in table(config, figures):
            terminalreporter.write_line(text)
    if config.getoption("benchmark_compare_fail") and all(figure["path"] is None for figure in figures):
        why = "save a baseline of the same cases" if figures else "it measured none (pytest -n measures none either)"
        terminalreporter.write_line(f"\nno figure of this run is in the saved run: {why}")
        config.stash[FAILED] = True
    try:
        yield
    except PerformanceRegression:  # pytest would print its traceback
        config.stash[FAILED] = True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    yield
    if session.config.stash.get(FAILED, False) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def table(config: pytest.Config, figures: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each figure of this run, and one for each saved run that has it."""
    checks = config.getoption("benchmark_compare_fail") or []
    lines = [title(machine()), f"{rows_of(config):,} rows, {unit_of(config)}"]
    lines += [f"saved: {about}" for about in config.stash.get(LOADED, [])]
    lines += ["", f"{'':<52} {'median':>9} {'min':>9} {'max':>9} {'saved':>9} {'change':>7}"]
    now = [figure for figure in figures if figure["path"] is None]
    for figure in now:
        name = figure["param"]
        line = f"{name:<52} " + " ".join(f"{figure[key]:9.3g}" for key in ("median", "min", "max"))
        saved = [each for each in figures if each["path"] is not None and each["fullname"] == figure["fullname"]]
        if not saved:
            lines.append(line + ("  not in the saved run" if config.stash.get(LOADED, []) else ""))
        for each in saved:
            over = [limit(check) for check in checks if check.fails(figure, each)]
            change = f"{each['median']:9.3g} {figure['median'] / each['median'] - 1:+7.0%}"
            lines.append(f"{line} {change}" + (f"  SLOWER: {', '.join(over)}" if over else ""))
    return lines


def limit(check: RegressionCheck) -> str:
    percent = "%" if isinstance(check, PercentageRegressionCheck) else ""
    return f"{check.field} by more than {check.threshold}{percent}"
