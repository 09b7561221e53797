"""Options of `pytest benchmarks`, its cases, and its report: one table, and a JSON with --save-results."""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import gate
from .cases import CASES, GATE, SEQUENCES, SMOKE, SMOKE_ROWS, Case, Problem, build
from .contestants import BY_NAME, GATED, YARDSTICK, Contestant, contestants_of
from .gate import rows_of
from .race import SMOKE_ROUNDS, HostMeter, Outcome, Rounds, race
from .results import machine, record, save, title

FINISHED = pytest.StashKey[list[dict[str, Any]]]()
COMPILED = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# How to read the numbers; stored with them.
MEANINGS = {
    "units": "passes over the logits that must go through memory (forward reads; the backward reads again and writes)",
    "visits": "passes over the logits that arithmetic needs: masked and inactive rows are not visited",
    "copy_seconds": "time to move `units` at the speed of a plain copy (one copy moves two units)",
    "fraction_of_copy": "copy_seconds / median",
    "gb_per_s": "units * bytes of the logits / median",
    "gelem_per_s_per_core": "visits * elements of the logits / median / threads",
    "extra_bytes": "peak resident memory beyond the inputs, a fresh gradient included",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gspo-kernels benchmarks")
    group.addoption("--smoke", action="store_true", help=f"{SMOKE_ROWS} rows, {len(SMOKE)} cases: does it run at all?")
    group.addoption("--gate", action="store_true", help="few cases; figures are multiples of torch.exp's time")
    group.addoption("--save-results", type=Path, metavar="PATH", help="write the results here, if no check failed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINISHED] = []
    config.option.benchmark_quiet = True  # the table below says more; -v brings the plugin's own back
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
    config.pluginmanager.register(gate)
    warnings.filterwarnings("ignore", "Benchmark machine_info is different")  # `gate.table` says what differs
    if config.getoption("gate"):
        torch.set_num_threads(1)  # threads that wait for others spin, and that counts as processor time
    # Compile times are to be a first run's, not those of a cache from an earlier one.
    if not config.getoption("smoke"):
        config.stash[COMPILED] = tempfile.TemporaryDirectory(prefix="gspo-bench-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = config.stash[COMPILED].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMPILED in config.stash:
        config.stash[COMPILED].cleanup()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tests of this folder's commands are no part of the gate, and their imports take seconds."""
    ignored = config.getoption("gate") and collection_path.suffix == ".py" and collection_path.name != "test_speed.py"
    return True if ignored and collection_path.name.startswith("test_") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        gated = metafunc.config.getoption("gate")
        cases = GATE if gated else SMOKE if metafunc.config.getoption("smoke") else CASES
        pairs = [(case, c) for case in cases for c in contestants_of(case.work) if not gated or c.name in GATED]
        metafunc.parametrize(("case", "contestant"), pairs, ids=[f"{case.id}-{c.name}" for case, c in pairs])


@pytest.fixture(scope="session")
def outcomes_of(request: pytest.FixtureRequest) -> Callable[[Case], dict[str, Outcome]]:
    """What a case's selected contestants made of it; all are measured, in turn, at the first of their tests."""
    config, gated = request.config, request.config.getoption("gate")
    selected: dict[Case, list[Contestant]] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if "contestant" in parameters:
            selected.setdefault(parameters["case"], []).append(parameters["contestant"])
    if config.getoption("benchmark_disable"):
        rounds = Rounds(least=0, most=0)  # answers are still checked
    else:
        rounds = gate.ROUNDS if gated else SMOKE_ROUNDS if config.getoption("smoke") else Rounds()
    meter = gate.METER if gated else HostMeter()

    @functools.cache
    def measure(case: Case) -> dict[str, Outcome]:
        problem = build(case, rows_of(config))
        outcomes = race(problem, [*selected[case], *([YARDSTICK] if gated else [])], rounds, meter, heap_kept=gated)
        if not gated and any(outcome.seconds for outcome in outcomes.values()):
            config.stash[FINISHED].append(case_result(problem, outcomes))
        return outcomes

    return measure


def case_result(problem: Problem, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Of the contestants that were timed; one that failed its check has no numbers."""
    copies = outcomes["copy"].seconds if "copy" in outcomes else []
    a_unit = statistics.median(copies) / 2 if copies else None

    def of(name: str, outcome: Outcome) -> dict[str, Any]:
        units, visits = (2.0, 2.0) if name == "copy" else (problem.units, problem.visits)
        median, extra = statistics.median(outcome.seconds), outcome.extra_bytes
        return {
            "fraction_of_copy": None if a_unit is None else a_unit * units / median,
            "gb_per_s": units * problem.logits_bytes / median / 1e9,
            "gelem_per_s_per_core": visits * problem.logits.numel() / median / torch.get_num_threads() / 1e9,
            "extra_bytes": extra,
            "extra_in_logits": None if extra is None else extra / problem.logits_bytes,
            "compile_seconds": outcome.compile_seconds,
        }

    return record(
        problem,
        outcomes,
        of,
        layout=problem.case.layout,
        logits_bytes=problem.logits_bytes,
        units=problem.units,
        visits=problem.visits,
        copy_seconds=None if a_unit is None else a_unit * problem.units,
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    path, finished = config.getoption("save_results"), config.stash[FINISHED]
    if path and finished and session.testsfailed == 0:
        sizes = {"rows": rows_of(config), "sequences": SEQUENCES}
        save(path, {"machine": machine(), **sizes, "meanings": MEANINGS, "cases": finished})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    finished = config.stash[FINISHED]
    if not finished:
        return
    write = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    write(f"{title(machine())}, {rows_of(config):,} rows")
    write("of copy: a memory copy of the same bytes / time. extra: peak memory beyond the inputs, in logits' sizes.")
    for case in finished:
        write("")
        write(f"{case['id']:<44} {'ms':>9} {'min':>9} {'max':>9} {'rounds':>6} {'of copy':>8} {'extra':>7} {'GB/s':>6}")
        for name, m in case["contestants"].items():
            of_copy = "" if m["fraction_of_copy"] is None else f"{m['fraction_of_copy']:.0%}"
            extra = "" if m["extra_in_logits"] is None else f"{m['extra_in_logits']:.2f}x"
            seconds = " ".join(f"{m[key] * 1e3:9.2f}" for key in ("median", "min", "max"))
            label = BY_NAME[name].label_in(case["work"])
            write(f"  {label:<42} {seconds} {m['rounds']:6} {of_copy:>8} {extra:>7} {m['gb_per_s']:6.1f}")
    path = config.getoption("save_results")
    if path:
        write("")
        failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
        write(f"{path}: not written, because a check failed" if failed else f"results written to {path}")
