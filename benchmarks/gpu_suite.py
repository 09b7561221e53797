"""Files of the package's own tests on the device, by pytest, in several processes where pytest-xdist is installed.

A test whose process dies fails, and a fresh process goes on with the others. One that hangs, or dies where pytest-xdist
is not installed, costs the rest of its file. A file that needs a package this machine lacks is reported, and does not
count as failed. `make gpu-wheels` brings pytest-xdist to a machine without a network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .gpu_parts import REPOSITORY, Absent, Context

if find_spec("pytest") is None:
    raise Absent("pytest is not installed")

import pytest

PROCESSES, SMOKE_PROCESSES = 12, 1
MOST_FAILURES = 40  # in all; then the suite ends
_END = 4.0  # seconds before the part's end at which the suite ends
_DEVICE = "GSPO_KERNELS_TEST_DEVICE"
OPTIONS = (
    "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "benchmarks.gpu_suite",
    "--continue-on-collection-errors", f"--maxfail={MOST_FAILURES}",
    "-o", "faulthandler_timeout=35",
)  # fmt: skip


def run(context: Context) -> bool:
    """Arguments: names of files in tests/, the most valuable first."""
    if not context.smoke:
        os.environ[_DEVICE] = context.device
    files = [str(next((REPOSITORY / "tests").rglob(name))) for name in context.arguments]
    groups = [files] if find_spec("xdist") else [[file] for file in files]
    return all([run_files(context, group, SMOKE_PROCESSES if context.smoke else PROCESSES) for group in groups])


def run_files(context: Context, files: list[str], count: int) -> bool:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    options = [*OPTIONS, "-n", str(count), "--dist", "worksteal"] if find_spec("xdist") else [*OPTIONS]
    recorder = Recorder(context, files)
    code = pytest.main([*files, *options], plugins=[recorder])
    for name in recorder.files:
        context.say(f"{name}: {recorder.summary(name)}")
        context.finished(name)
    if lost := sum(recorder.not_run(name) for name in recorder.files):
        context.put("part", "not_run", value=f"{lost} tests: {recorder.ended_early or 'too many failures'}")
    # Failed tests are recorded; codes above 2 are errors of pytest itself, but for 5: no tests.
    return code in (0, 1, 2, 5) and not recorder.failed()


class Recorder:
    """A pytest plugin of the process that hears of all tests: one entry of the results for each file."""

    def __init__(self, context: Context, files: list[str]) -> None:
        self.context, self.ended_early, self._collected = context, "", False
        self.files: dict[str, dict[str, Any]] = {}
        self._tests: dict[str, set[str]] = {}  # by file, those that have not ended
        for name in files:
            self._entry(name)

    def summary(self, name: str) -> str:
        entry = self.files[name]
        counts = {outcome: entry[outcome] for outcome in ("passed", "failed", "skipped", "not_run") if entry[outcome]}
        return entry.get("needs") or ", ".join(f"{count} {word}" for word, count in counts.items()) or "no tests"

    def not_run(self, name: str) -> int:
        return len(self._tests[name])

    def failed(self) -> bool:
        known = any(entry["passed"] or entry["skipped"] or "needs" in entry for entry in self.files.values())
        return not known or any(entry["failed"] for entry in self.files.values())

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if not self._collected:  # all processes collect the same, and a late one must not bring tests back
            self._expect(ids)
            self._collected = True

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            reason = _reason(report.longrepr)
            if "ModuleNotFoundError" in reason:
                self._entry(report.nodeid)["needs"] = reason
            else:
                self._fail(report.nodeid or "tests", reason)
            self._write(report.nodeid or "tests")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.context.at(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        entry = self._entry(report.nodeid)
        if report.failed:
            self._fail(report.nodeid, _reason(report.longrepr))
        elif report.when == "call" or report.skipped:
            entry[report.outcome] += 1
            entry["slowest"] = sorted([*entry["slowest"], (report.duration, report.nodeid)], reverse=True)[:3]
        if report.failed or report.when == "teardown":
            self._tests[_file(report.nodeid)].discard(report.nodeid)
        self._write(report.nodeid)
        if not self.not_run(_file(report.nodeid)):
            self.context.finished(_file(report.nodeid))
        if self.context.left() < _END:
            self.ended_early = "its time was over"
            pytest.exit(self.ended_early)

    def _expect(self, ids: Iterable[str]) -> None:
        for test in ids:
            self._entry(test)
            self._tests[_file(test)].add(test)

    def _fail(self, test: str, reason: str) -> None:
        entry = self._entry(test)
        failures = entry.setdefault("failures", {})
        entry["failed"] += test not in failures
        failures.setdefault(test, reason)

    def _entry(self, test: str) -> dict[str, Any]:
        self._tests.setdefault(_file(test), set())
        return self.files.setdefault(_file(test), {"passed": 0, "failed": 0, "skipped": 0, "not_run": 0, "slowest": []})

    def _write(self, test: str) -> None:
        entry = self._entry(test)
        entry["not_run"] = self.not_run(_file(test))
        slowest = [f"{seconds:.1f} s {name}" for seconds, name in entry["slowest"]]
        self.context.put("tests", _file(test), value={**entry, "slowest": slowest})


def _file(test: str) -> str:
    return Path(test.partition("::")[0]).name


def _reason(longrepr: Any) -> str:
    """What was raised, or the last line."""
    lines = [line.strip() for line in str(longrepr).splitlines() if line.strip()]
    raised = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (" / ".join(raised) or "".join(lines[-1:]))[:300]


# ---- in each process that runs tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU the tests of the torch reference are left out."""
    if os.environ.get(_DEVICE) == "cuda":
        left = [item for item in items if "reference" in item.name.partition("[")[2]]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    """A process whose CUDA context a test has broken ends, and another one takes its place."""
    if report.failed and os.environ.get(_DEVICE) == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)
