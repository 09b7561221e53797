"""Files of the package's own tests on the device, in several processes that take a few tests at a time.

A process that dies, hangs or has lost its CUDA context loses the tests that it had taken; a fresh process goes on with
the rest. Of packages it needs pytest alone. A file that needs a package this machine lacks is reported, and does not
count as failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .gpu_parts import REPOSITORY, Absent, Context, Records, die_with_parent, end_group

if TYPE_CHECKING:
    import pytest

PROCESSES, SMOKE_PROCESSES = 8, 1
HANGS_AFTER = 40.0  # seconds without a test's end: a process's first tests compile
MOST_FAILURES = 40  # in all; then the suite ends
MOST_STARTS = 24  # of processes
BROKEN = 70  # exit code of a process whose CUDA context a test has broken
_END = 4.0  # seconds before the part's end at which the processes are ended


def run(context: Context) -> bool:
    """Arguments: names of files in tests/, the most valuable first."""
    if find_spec("pytest") is None:
        raise Absent("pytest is not installed")
    environment = dict(os.environ)
    if not context.smoke:
        environment["GSPO_KERNELS_TEST_DEVICE"] = context.device
    files = [str(next((REPOSITORY / "tests").rglob(name))) for name in context.arguments]
    count = SMOKE_PROCESSES if context.smoke else PROCESSES
    with tempfile.TemporaryDirectory(prefix="gspo-tests-") as folder:
        suite = Suite(context, Path(folder), files, environment, count)
        try:
            suite.watch()
        finally:
            suite.end()
        suite.write()
    for file in context.arguments:
        if not suite.not_run(file):
            context.finished(file)
        context.say(suite.line(file))
    if suite.lost():
        context.put("part", "not_run", value=suite.lost())
    return not suite.failed()


@dataclass
class _File:
    counts: dict[str, int] = field(default_factory=lambda: {"passed": 0, "failed": 0, "skipped": 0})
    failures: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)
    collected: int | None = None
    finished: set[str] = field(default_factory=set)
    needs: str = ""


@dataclass
class _Process:
    process: subprocess.Popen[bytes]
    records: Records
    heard: float
    test: str = ""  # which runs


class Suite:
    """Starts the processes, reads what they write, and puts it into the results, one entry for each test file."""

    def __init__(
        self, context: Context, folder: Path, files: list[str], environment: dict[str, str], count: int
    ) -> None:
        self._context, self._folder, self._files, self._count = context, folder, files, count
        threads = max(1, (os.cpu_count() or 1) // count)
        self._environment = {**environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._running: list[_Process] = []
        self._began = self._written = time.monotonic()
        self._starts = 0
        self.ended_early = ""
        self.found = {Path(name).name: _File() for name in files}

    def watch(self) -> None:
        while len(self._running) < self._count:
            self._start()
        while self._running:
            time.sleep(0.1)
            now = time.monotonic()
            for process in list(self._running):
                self._listen(process, now)
            if now - self._written > 2:
                self.write()
            failures = sum(len(file.failures) for file in self.found.values())
            if self._context.left() < _END:
                self.ended_early = "its time was over"
            elif failures >= MOST_FAILURES:
                self.ended_early = f"{failures} failures"
            if self.ended_early:
                return

    def end(self) -> None:
        for process in self._running:
            end_group(process.process)
        self._running.clear()

    def _start(self) -> None:
        self._starts += 1
        records = self._folder / f"records-{self._starts}"
        records.touch()
        command = [sys.executable, "-m", "benchmarks.gpu_suite", str(records), str(self._folder), *self._files]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._running.append(_Process(process, Records(records), time.monotonic()))

    def _listen(self, process: _Process, now: float) -> None:
        code = process.process.poll()  # before its last records are read
        for record in process.records:
            process.heard = now
            self._take(process, record)
        if code is None and now - process.heard > HANGS_AFTER:
            end_group(process.process)
            self._give_up(process, f"nothing heard for {HANGS_AFTER:.0f} s")
        elif code is not None and code not in (0, BROKEN):
            self._give_up(process, f"its process ended with {code}")
        elif code is not None:
            self._running.remove(process)
            if code == BROKEN:
                self._again()

    def _give_up(self, process: _Process, reason: str) -> None:
        self._running.remove(process)
        test = process.test or f"{next(iter(self.found))}::its start"
        self._fail(test, reason)
        if process.test:
            self._again()  # a process that did not reach a test would not reach one the next time

    def _again(self) -> None:
        if self._starts < MOST_STARTS and self._context.left() > 3 * _END:
            self._start()

    def _take(self, process: _Process, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        if kind == "collected":
            for name, count in record["files"].items():
                self._file(name).collected = count
        elif kind == "starts":
            process.test = record["test"]
            self._context.at(process.test)
        elif kind == "ended":
            self._file(process.test).finished.add(process.test)
            process.test = ""
        elif kind == "needs":
            self._file(record["test"]).needs = record["reason"]
        elif kind == "failed":
            self._fail(record["test"], record["reason"])
        elif kind == "outcome":
            file = self._file(record["test"])
            file.counts[record["outcome"]] = file.counts.get(record["outcome"], 0) + 1
            file.slowest = sorted([*file.slowest, (record["seconds"], record["test"])], reverse=True)[:3]

    def _fail(self, test: str, reason: str) -> None:
        file = self._file(test)
        if test not in file.failures:
            file.counts["failed"] += 1
        file.failures[test] = reason

    def _file(self, test: str) -> _File:
        return self.found.setdefault(Path(test.partition("::")[0]).name, _File())

    def write(self) -> None:
        self._written = time.monotonic()
        for name, file in self.found.items():
            value: dict[str, Any] = {**file.counts, "seconds": round(self._written - self._began, 1)}
            value["slowest"] = [f"{seconds:.1f} s {test}" for seconds, test in file.slowest]
            value |= {"failures": dict(file.failures)} if file.failures else {}
            value |= {"needs": file.needs} if file.needs else {}
            value |= {"not_run": self.not_run(name)} if self.not_run(name) else {}
            self._context.put("tests", name, value=value)

    def not_run(self, name: str) -> int:
        file = self.found[name]
        return max(0, (file.collected or 0) - len(file.finished))

    def lost(self) -> str:
        """How many tests did not run, and why; empty if all did."""
        count = sum(self.not_run(name) for name in self.found)
        return f"{count} tests: {self.ended_early or 'their processes broke'}" if count else ""

    def failed(self) -> bool:
        collected = any(file.collected or file.needs for file in self.found.values())
        return not collected or any(file.failures for file in self.found.values())

    def line(self, name: str) -> str:
        file = self.found[name]
        counts = [f"{count} {outcome}" for outcome, count in file.counts.items() if count]
        counts += [f"{self.not_run(name)} not run"] if self.not_run(name) else []
        return f"{name}: {file.needs or ', '.join(counts) or 'no tests'}"


# ---- one of the processes

TAKEN = 8  # tests at a time


class Shard:
    """A pytest plugin: one of the processes. On a GPU the tests of the torch reference are left out.

    All processes collect the same tests. A process takes the next few by creating a file with their number in `folder`.
    Neighbours in the list compile the same kernels.
    """

    def __init__(self, records: Path, folder: Path, on_gpu: bool) -> None:
        self._records, self._folder, self._on_gpu = records.open("a"), folder, on_gpu

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self._on_gpu:
            left = [item for item in items if "reference" in item.name.partition("[")[2]]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write("collected", files=Counter(item.nodeid.partition("::")[0] for item in session.items))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            reason = _last_line(report.longrepr)
            missing = "ModuleNotFoundError" in reason
            self._write("needs" if missing else "failed", test=report.nodeid or "tests", reason=reason)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for first in range(0, len(session.items), TAKEN):
            if not self._take(first):
                continue
            items: list[Any] = [*session.items[first : first + TAKEN], None]
            for item, following in pairwise(items):
                self._write("starts", test=item.nodeid)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self._write("ended")
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write("failed", test=report.nodeid, reason=_last_line(report.longrepr))
            if self._on_gpu and _context_is_broken():
                self._write("ended")
                sys.stdout.flush()
                os._exit(BROKEN)
        elif report.when == "call" or report.skipped:
            self._write("outcome", test=report.nodeid, outcome=report.outcome, seconds=report.duration)

    def _take(self, number: int) -> bool:
        try:
            os.close(os.open(self._folder / f"taken-{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _write(self, kind: str, **record: Any) -> None:
        self._records.write(json.dumps({"kind": kind, **record}) + "\n")
        self._records.flush()


def _context_is_broken() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _last_line(longrepr: Any) -> str:
    lines = [line for line in str(longrepr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    return (errors or lines or [""])[-1][:300]


def main(arguments: list[str]) -> int:
    import pytest

    die_with_parent()
    records, folder, *files = arguments
    on_gpu = os.environ.get("GSPO_KERNELS_TEST_DEVICE", "") == "cuda"
    options = ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    options += ["--continue-on-collection-errors", "-o", f"faulthandler_timeout={HANGS_AFTER - 5:.0f}"]
    code = pytest.main([*files, *options], plugins=[Shard(Path(records), Path(folder), on_gpu)])
    # Failed tests are recorded; an error of pytest itself is the process's own.
    return 0 if code in (0, 1, 2, 5) else int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
