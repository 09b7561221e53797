"""One part of a run: a process with a limit, whose findings arrive line by line and outlive it.

A part may have items, which its process takes in order. If the process dies, or says nothing for too long, the item it
was at is given up (or tried once more in the part's safer way, see `Part.fallback`) and a fresh process goes on with
the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import Report

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS, SECONDS = "GSPO_BENCH_RECORDS", "GSPO_BENCH_SECONDS"  # where a worker writes, how long it may run
ABSENT = 77  # a worker's exit code where there is nothing to run
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
_GRACE = 2.0  # seconds between a polite and a final end
_POLL = 0.05


@dataclass(frozen=True)
class Part:
    name: str  # in the results
    worker: str = ""  # the module that runs it; by default the one of its name
    limit: float = 60.0  # seconds for all of it
    least: float = 5.0  # with less time left it does not start
    takes: float = 0.0  # about what it takes, for people
    patience: float = 60.0  # seconds without a record after which it counts as hung
    arguments: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    fallback: str = ""  # added to an item that failed, to try it once more in a safer way
    together: bool = False  # one process takes all items at once, and watches over them itself
    light: bool = False  # its worker imports no torch, so that it takes none that has
    command: tuple[str, ...] = ()  # in place of a worker

    def words(self) -> list[str]:
        return [*self.command] if self.command else [*WORKER, self.worker or self.name, *self.arguments]


@dataclass
class _Ended:
    """How one process of a part came to its end."""

    status: str  # ok, failed, timed out, absent
    reason: str = ""


class Starter:
    """Starts the processes of parts. A worker that has imported torch already waits for the next part.

    That costs a part no seconds of imports, which are long on a machine that has just started.
    """

    def __init__(self, environment: Mapping[str, str], log: Path, ahead: bool = True) -> None:
        self.environment, self.log, self.ahead = dict(environment), log, ahead
        self._waiting: subprocess.Popen[bytes] | None = None

    def start(self, part: Part, items: list[str], records: Path, seconds: float) -> subprocess.Popen[bytes]:
        settings = {RECORDS: str(records), SECONDS: f"{seconds:.1f}"}
        words = [*part.words(), *items]
        heavy = not part.command and not part.light
        process = self._take() if heavy else None
        if process is not None and process.stdin is not None:
            task = {"arguments": words[len(WORKER) :], "environment": settings, "log": str(self.log)}
            with suppress(OSError):  # it has died since: what that means is judged like any other end
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.close()
        else:
            process = self._open(words, settings, subprocess.DEVNULL)
        if heavy and self.ahead:
            self.prepare()
        return process

    def prepare(self) -> None:
        """Starts the worker that waits for the next part."""
        self._waiting = self._open([*WORKER, "--wait"], {}, subprocess.PIPE)

    def close(self) -> None:
        process, self._waiting = self._waiting, None
        if process is not None:
            end_group(process)

    def _take(self) -> subprocess.Popen[bytes] | None:
        process, self._waiting = self._waiting, None
        return process if process is not None and process.poll() is None else None

    def _open(self, words: list[str], settings: dict[str, str], stdin: int) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                words,
                cwd=REPOSITORY,
                env={**self.environment, **settings},
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, that can be ended as a whole
            )


def run(part: Part, report: Report, deadline: float, starter: Starter) -> str:
    """Runs a part to its end or its limit; its status, which is in the report too. `deadline`: of time.monotonic()."""
    began = time.monotonic()
    end = min(began + part.limit, deadline - _GRACE)
    place = ("parts", part.name)
    report.put(place, {"status": "running", "limit": part.limit})
    report.save()
    if end - began < part.least:
        return _close(report, part, "skipped", "no time left", began)
    items, reasons, ended = list(part.items), [], _Ended("ok")
    while True:
        finished: set[str] = set()
        report.put((*place, "at"), items[0] if items else "")
        ended = _run_once(part, items, finished, report, end, starter)
        if ended.status in ("ok", "absent"):
            break
        # A worker that ended by itself has gone through its items: what it had to say about them it has recorded.
        culprit = next((item for item in items if item not in finished), None)
        where = report.get(*place, "at")
        running = not part.items or culprit is not None
        reasons.append(f"at {where}: {ended.reason}" if where and running else ended.reason)
        if culprit is None or part.together:
            break
        items = items[items.index(culprit) + 1 :]
        if part.fallback and not culprit.endswith(part.fallback):
            items.insert(0, culprit + part.fallback)
        if not items:
            break
        if end - time.monotonic() < part.least:
            reasons.append(f"no time left for {', '.join(items)}")
            break
    status = ended.status if not reasons else "timed out" if ended.status == "timed out" else "failed"
    return _close(report, part, status, "; ".join(reasons) or ended.reason, began)


def _close(report: Report, part: Part, status: str, reason: str, began: float) -> str:
    found = dict(report.get("parts", part.name) or {})
    found.pop("at", None)
    found |= {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if reason:
        found["reason"] = reason
    report.put(("parts", part.name), found)
    report.save()
    return status


def _run_once(part: Part, items: list[str], finished: set[str], report: Report, end: float, starter: Starter) -> _Ended:
    with tempfile.TemporaryDirectory(prefix="gspo-gpu-") as folder:
        records = Path(folder) / "records"
        records.touch()
        begin_of_log = starter.log.stat().st_size
        process = starter.start(part, items, records, end - time.monotonic())
        reader, ended = _Reader(part, records, report, finished), None
        heard = time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                now = time.monotonic()
                if reader.read():
                    heard = now
                if now > end:
                    ended = _Ended("timed out", "its time was over")
                elif now - heard > part.patience:
                    ended = _Ended("failed", f"nothing heard for {part.patience:.0f} s")
                if ended:
                    break
        finally:
            end_group(process)
            reader.read()
        return ended or _judge(process.returncode, starter.log, begin_of_log)


class _Reader:
    """Brings a worker's records, one JSON object a line, into the report."""

    def __init__(self, part: Part, path: Path, report: Report, finished: set[str]) -> None:
        self._part, self._report, self._finished = part, report, finished
        self._file = path.open("rb")
        self._rest = b""

    def read(self) -> bool:
        data = self._file.read()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            record = json.loads(line)
            if "finished" in record:
                self._finished.add(record["finished"])
            if "progress" in record:
                print(f"  {record['progress']}", flush=True)
            if "at" in record:
                at = ["parts", self._part.name, *record["at"][1:]] if record["at"][0] == "part" else record["at"]
                self._report.put(at, record["value"])
        if lines:
            self._report.save()
        return bool(lines)


def _judge(code: int, log: Path, begin: int) -> _Ended:
    if code == 0:
        return _Ended("ok")
    lines = last_lines(log, begin)
    said = lines[-1].strip()[:300] if lines else ""
    if code == ABSENT:
        return _Ended("absent", said)
    how = f"died by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return _Ended("failed", f"{how}: {said}" if said else how)


def last_lines(log: Path, begin: int = 0) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - 10_000))
        return file.read().decode(errors="replace").strip().splitlines()


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the process and all that it started, hung ones too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(_POLL)  # for its children
    process.wait()
