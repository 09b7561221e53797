"""Options of the benchmark run, its cases, and its report: one table, and a JSON where one was asked for."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import CASES, ROWS, SMOKE, SMOKE_ROWS, Case, build
from .contestants import BY_NAME, Contestant, contestants_of
from .race import SMOKE_ROUNDS, Outcome, Rounds, race
from .results import CaseResult, case_result, machine, save

FINISHED = pytest.StashKey[list[CaseResult]]()
COMPILED = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gspo-kernels benchmarks")
    group.addoption("--smoke", action="store_true", help=f"{SMOKE_ROWS} rows, {len(SMOKE)} cases: does it run at all?")
    group.addoption("--save-results", type=Path, metavar="PATH", help="write the results here, if no check failed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINISHED] = []
    config.option.benchmark_quiet = True  # the table below says more; -v brings the plugin's own back
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
    if not config.getoption("smoke"):  # compile times are to be a first run's, not those of a cache from an earlier one
        config.stash[COMPILED] = tempfile.TemporaryDirectory(prefix="gspo-bench-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.stash[COMPILED].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMPILED in config.stash:
        config.stash[COMPILED].cleanup()


def rows_of(config: pytest.Config) -> int:
    """`GSPO_BENCH_ROWS`, but in a smoke run."""
    return SMOKE_ROWS if config.getoption("smoke") else ROWS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        cases = SMOKE if metafunc.config.getoption("smoke") else CASES
        pairs = [(case, c) for case in cases for c in contestants_of(case.work)]
        metafunc.parametrize(("case", "contestant"), pairs, ids=[f"{case.id}-{c.name}" for case, c in pairs])


@pytest.fixture(scope="session")
def outcomes_of(request: pytest.FixtureRequest) -> Callable[[Case], dict[str, Outcome]]:
    """What a case's selected contestants made of it; all are measured, in turn, when the first is asked for."""
    config = request.config
    selected: dict[Case, list[Contestant]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "contestant" in parameters:
            selected.setdefault(parameters["case"], []).append(parameters["contestant"])
    if config.getoption("benchmark_disable"):
        rounds = Rounds(least=0, most=0)  # answers are still checked
    else:
        rounds = SMOKE_ROUNDS if config.getoption("smoke") else Rounds()

    @functools.cache
    def measure(case: Case) -> dict[str, Outcome]:
        problem = build(case, rows_of(config))
        outcomes = race(problem, selected[case], rounds)
        if any(outcome.seconds for outcome in outcomes.values()):
            config.stash[FINISHED].append(case_result(problem, outcomes))
        return outcomes

    return measure


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("save_results")
    if path and session.config.stash[FINISHED] and session.testsfailed == 0:
        save(path, rows_of(session.config), session.config.stash[FINISHED])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    finished = config.stash[FINISHED]
    if not finished:
        return
    write = terminalreporter.write_line
    about = machine()
    terminalreporter.section("benchmarks")
    write(
        f"{about['cpu']}, {about['threads']} threads, {about['backend']}, torch {about['torch']}, "
        f"commit {about['commit']}, {rows_of(config):,} rows"
    )
    write("of copy: a memory copy of the same bytes / time. extra: peak memory beyond the inputs, in logits' sizes.")
    for case in finished:
        write("")
        write(f"{case.id:<44} {'ms':>9} {'min':>9} {'max':>9} {'rounds':>6} {'of copy':>8} {'extra':>7} {'GB/s':>6}")
        for name, m in case.contestants.items():
            of_copy = "" if m.fraction_of_copy is None else f"{m.fraction_of_copy:.0%}"
            extra = "" if m.extra_in_logits is None else f"{m.extra_in_logits:.2f}x"
            times = " ".join(f"{seconds * 1e3:9.2f}" for seconds in (m.median, m.min, m.max))
            label = BY_NAME[name].label_in(case.work)
            write(f"  {label:<42} {times} {m.rounds:6} {of_copy:>8} {extra:>7} {m.gb_per_s:6.1f}")
    path = config.getoption("save_results")
    if path:
        write("")
        failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
        write(f"{path}: not written, because a check failed" if failed else f"results written to {path}")
