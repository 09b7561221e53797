"""The package's own test-suite on the device, a file an item: what ran before a crash or the limit is known.

pytest is all that it needs. A file that wants a module this machine lacks is reported as such, and is no failure.
"""

from __future__ import annotations

import os
import time
from typing import Any

from .context import Absent, Context
from .meter import finish
from .parts import REPOSITORY

MOST_FAILURES = 30  # in a file; more say nothing new
HANGS_AFTER = 100  # seconds in one test, after which every thread's stack goes to the log


def run(context: Context) -> bool:
    """Arguments: names of files in tests/."""
    try:
        import pytest
    except ImportError as error:
        raise Absent("pytest is not installed") from error
    if not context.smoke:
        os.environ["GSPO_KERNELS_TEST_DEVICE"] = context.device
    good = True
    for file in context.arguments:
        recorder = Recorder(context, file)
        options = ["-vv", "-rfE", "--tb=short", f"--maxfail={MOST_FAILURES}", "-p", "no:cacheprovider"]
        options += ["-o", f"faulthandler_timeout={HANGS_AFTER}"]
        pytest.main([str(REPOSITORY / "tests" / file), *options], plugins=[recorder])
        recorder.write()
        good &= recorder.good
        if not context.smoke:
            finish()  # raises if a kernel broke the context: the next file needs a fresh process
        context.finished(file)
        context.say(recorder.line())
    return good


class Recorder:
    """A pytest plugin that keeps count."""

    def __init__(self, context: Context, file: str) -> None:
        self._context, self._file = context, file
        self._began = self._written = time.monotonic()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: dict[str, str] = {}
        self.needs = ""
        self.slowest: list[tuple[float, str]] = []

    @property
    def good(self) -> bool:
        return not self.failures

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._context.at(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed or report.skipped:
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
        if report.failed:
            self.failures[report.nodeid] = _last_line(report.longrepr)
        if report.when == "call":
            self.slowest = sorted([*self.slowest, (report.duration, report.nodeid)], reverse=True)[:3]
        if report.failed or time.monotonic() - self._written > 2:
            self.write()

    def pytest_collectreport(self, report: Any) -> None:
        if not report.failed:
            return
        reason = _last_line(report.longrepr)
        if "ModuleNotFoundError" in reason:
            self.needs = reason
        else:
            self.failures[report.nodeid] = reason

    def write(self) -> None:
        self._written = time.monotonic()
        found: dict[str, Any] = {**self.counts, "seconds": round(self._written - self._began, 1)}
        found["slowest"] = [f"{seconds:.1f} s {nodeid}" for seconds, nodeid in self.slowest]
        if self.failures:
            found["failures"] = self.failures
        if self.needs:
            found["not_run"] = self.needs
        self._context.put("tests", self._file, value=found)

    def line(self) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items() if count)
        return f"{self._file}: {self.needs or counts or 'no tests'}"


def _last_line(longrepr: Any) -> str:
    lines = [line for line in str(longrepr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[-1][:300]
