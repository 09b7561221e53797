"""One part of a GPU run: a process with a time limit that writes each result as soon as it has it.

A part may have items, which its process takes in order. If the process dies, or is silent for too long, the item that
it was running is given up (or tried once more in the part's safer way, see `Part.fallback`) and a fresh process
continues with the rest. `Report` is the results file, `Part` and `run` start and watch a process, `Context` and
`work` are the inside of that process: `work` imports a part's function and calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS, SECONDS = "GSPO_BENCH_RECORDS", "GSPO_BENCH_SECONDS"  # environment: where a worker writes, how long it may run
ABSENT = 77  # a worker's exit code where there is nothing to run
WORKER = (sys.executable, "-c", "import sys; from benchmarks.gpu_parts import work; sys.exit(work(sys.argv[1:]))")
_GRACE = 2.0  # seconds between SIGTERM and SIGKILL
_POLL = 0.05

# ---- the results file

# How to read the numbers; stored with them.
MEANINGS = {
    "units": "passes over the logits that must go through memory; token-level and on-policy losses need no second read"
    "; a contestant's: as many as its way takes; Triton's kernels read twice for a ratio per token, off-policy",
    "floor_seconds": "time to move a case's `units` at the speed of its own copy, timed in turn with the contestants",
    "times_floor": "median / the same time for the contestant's own `units`",
    "median, min, max": "seconds on the device's clock, the host running ahead of it as it does in training",
    "idle_median": "seconds by the host's clock from an idle device to an idle device, launches and Python included",
    "extra_bytes": "peak of allocated device memory beyond the inputs, a fresh gradient included",
    "first_call_seconds": "of a contestant that compiles, on a cache that may be warm",
    "launches": "kernels on the device in one call",
    "one_read": "cases in which CUDA C++ (ours_cuda) has a kernel of its own, beside Triton (ours)",
    "linear": "cases from hidden states; flop_per_s: operations that arithmetic needs / median, wrong answers too",
}


class Report:
    """The results file, complete at any moment: a change is written to a file beside it, which then replaces it."""

    def __init__(self, path: Path, content: dict[str, Any] | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {"meanings": MEANINGS, **(content or {})}

    def put(self, at: Sequence[str], value: Any) -> None:
        """Sets content[at[0]][at[1]]...; `save` writes it."""
        *path, last = at
        found = self.content
        for key in path:
            found = found.setdefault(key, {})
        found[last] = value

    def get(self, *at: str) -> Any:
        found: Any = self.content
        for key in at:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(json.dumps(rounded(self.content), indent=1) + "\n")
        os.replace(beside, self.path)


def rounded(value: Any) -> Any:
    """Numbers of six significant digits; infinities, which JSON does not have, as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: str = "---|", right: str = "--:|") -> list[str]:
    """Lines of Markdown; `left`: how the first columns are aligned, `right` each of the others."""
    rule = "|" + left + right * (len(heads) - left.count("|"))
    head = "".join(f"| {word} " if word else "| " for word in heads) + "|"
    return [head, rule, *(f"| {' | '.join(cells)} |" for cells in rows)]


# ---- a part and its process


@dataclass(frozen=True)
class Part:
    name: str  # in the results
    worker: str = ""  # the function that runs it: a module of this package, a dot, its name
    limit: float = 60.0  # seconds for all of it
    least: float = 5.0  # with less time left it does not start
    takes: float = 0.0  # about what it takes on an H100, for the reader
    patience: float = 60.0  # seconds without a record after which it counts as hung
    arguments: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    fallback: str = ""  # added to an item that failed, to try it once more in a safer way
    light: bool = False  # its worker needs no torch: it does not use up the process that has imported torch
    command: tuple[str, ...] = ()  # in place of a worker

    def words(self) -> list[str]:
        return [*self.command] if self.command else [*WORKER, self.worker, *self.arguments]


class Starter:
    """Starts the processes of parts. One that has imported torch waits for the next part: imports take seconds."""

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
            with contextlib.suppress(OSError):  # it has died: `_judge` finds its exit code
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.close()
        else:
            process = self._open(words, settings, subprocess.DEVNULL)
        if heavy and self.ahead:
            self.prepare()
        return process

    def prepare(self) -> None:
        """Starts the process that waits for the next part."""
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
                start_new_session=True,  # a process group, which `end_group` can end
            )


def run(part: Part, report: Report, deadline: float, starter: Starter) -> str:
    """Runs a part to its end or its limit; returns its status. `deadline` is a time of time.monotonic()."""
    began = time.monotonic()
    end = min(began + part.limit, deadline - _GRACE)
    entry = ("parts", part.name)
    report.put(entry, {"status": "running", "limit": part.limit})
    report.save()
    if end - began < part.least:
        return _close(report, part, "skipped", "no time left", began)
    items, reasons = list(part.items), []
    while True:
        finished: set[str] = set()
        report.put((*entry, "at"), items[0] if items else "")
        how, why = _run_once(part, items, finished, report, end, starter)
        if how in ("ok", "absent"):
            break
        # A worker that returned on its own has finished all its items, and has recorded what was wrong with them.
        culprit = next((item for item in items if item not in finished), None)
        where = report.get(*entry, "at")
        running = not part.items or culprit is not None
        reasons.append(f"at {where}: {why}" if where and running else why)
        if culprit is None:
            break
        items = items[items.index(culprit) + 1 :]
        if part.fallback and not culprit.endswith(part.fallback):
            items.insert(0, culprit + part.fallback)
        if not items:
            break
        if end - time.monotonic() < part.least:
            reasons.append(f"no time left for {', '.join(items)}")
            break
    status = how if not reasons or how == "timed out" else "failed"
    return _close(report, part, status, "; ".join(reasons) or why, began)


def _close(report: Report, part: Part, status: str, reason: str, began: float) -> str:
    found = dict(report.get("parts", part.name) or {})
    found.pop("at", None)
    found |= {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if reason:
        found["reason"] = reason
    report.put(("parts", part.name), found)
    report.save()
    return status


def _run_once(
    part: Part, items: list[str], finished: set[str], report: Report, end: float, starter: Starter
) -> tuple[str, str]:
    """How one process ended (ok, failed, timed out, absent), and the reason; `finished` receives its items."""
    with tempfile.TemporaryDirectory(prefix="gspo-gpu-") as folder:
        path = Path(folder) / "records"
        path.touch()
        begin_of_log = starter.log.stat().st_size
        process = starter.start(part, items, path, end - time.monotonic())
        records, ended = Records(path), None
        heard = time.monotonic()
        try:
            while process.poll() is None and not ended:
                time.sleep(_POLL)
                now = time.monotonic()
                if _read(records, part, finished, report):
                    heard = now
                if now > end:
                    ended = "timed out", "its time was over"
                elif now - heard > part.patience:
                    ended = "failed", f"nothing heard for {part.patience:.0f} s"
        finally:
            end_group(process)
            _read(records, part, finished, report)
        return ended or _judge(process.returncode, starter.log, begin_of_log)


@dataclass
class Records:
    """A file of JSON lines that another process writes. An iteration yields the complete lines that are new.

    A line counts as read once its record has been handled, so that a signal's exception loses none.
    """

    path: Path
    offset: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)
                self.offset += len(line)


def _read(records: Records, part: Part, finished: set[str], report: Report) -> bool:
    """Copies what a worker has written into the report; whether there was anything."""
    before = records.offset
    for record in records:
        if "finished" in record:
            finished.add(record["finished"])
        if "progress" in record:
            print(f"  {record['progress']}", flush=True)
        if "at" in record:
            at = ["parts", part.name, *record["at"][1:]] if record["at"][0] == "part" else record["at"]
            report.put(at, record["value"])
    if records.offset > before:
        report.save()
    return records.offset > before


def _judge(code: int, log: Path, begin: int) -> tuple[str, str]:
    if code == 0:
        return "ok", ""
    lines = last_lines(log, begin)
    said = lines[-1].strip()[:300] if lines else ""
    if code == ABSENT:
        return "absent", said
    how = f"died by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "failed", f"{how}: {said}" if said else how


def last_lines(log: Path, begin: int = 0) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - 10_000))
        return file.read().decode(errors="replace").strip().splitlines()


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends the process and all processes that it started."""
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


# ---- inside the process


class Absent(Exception):
    """Why there is nothing to run here."""


@dataclass
class Context:
    """What a part's function is given: its arguments, its time, and where to write results."""

    arguments: list[str]
    smoke: bool
    began: float = field(default_factory=time.monotonic)
    seconds: float = field(default_factory=lambda: float(os.environ.get(SECONDS, "600")))
    records: str = field(default_factory=lambda: os.environ.get(RECORDS, os.devnull))

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def put(self, *at: str, value: Any) -> None:
        """Writes into the results file. Where `at` begins with "part" it is this part's own entry."""
        self._write({"at": at, "value": value})

    def at(self, where: str) -> None:
        """Says what runs next. If the process dies then, the report names it."""
        self.put("part", "at", value=where)

    def finished(self, item: str) -> None:
        self._write({"finished": item})

    def say(self, line: str) -> None:
        """Prints to the terminal and the log."""
        print(line, flush=True)
        self._write({"progress": line})

    def _write(self, record: dict[str, Any]) -> None:
        with Path(self.records).open("a") as file:
            file.write(json.dumps(record) + "\n")


def work(arguments: list[str]) -> int:
    """The process of a part: the name of its function, then the function's arguments; or --wait."""
    die_with_parent()
    if arguments == ["--wait"]:
        arguments = _wait()
        if not arguments:
            return 0
    name, *rest = arguments
    module, _, function = name.partition(".")
    context = Context([a for a in rest if a != "--smoke"], "--smoke" in rest)
    print(f"\n==== {name} {' '.join(rest)}", flush=True)
    try:
        result: bool = getattr(importlib.import_module(f"benchmarks.{module}"), function)(context)
    except Absent as reason:
        print(reason, flush=True)
        return ABSENT
    return 0 if result else 1


def _wait() -> list[str]:
    """Imports torch, then waits for the arguments on standard input.

    It does not import gspo_kernels, whose extension may be built first, and does nothing that touches the GPU.
    """
    with contextlib.suppress(Exception):
        import torch

        importlib.import_module("triton")
        if torch.version.cuda:  # a smoke run on a CPU is short of processors, not of time
            importlib.import_module("torch._dynamo")
    line = sys.stdin.readline()
    if not line:
        return []  # the run is over
    task = json.loads(line)
    os.environ.update(task["environment"])
    with open(task["log"], "ab") as log:  # the file has been renamed since this process started
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    arguments: list[str] = task["arguments"]
    return arguments


def die_with_parent() -> None:
    """So that no process keeps the GPU after the one that started it was killed. Linux only."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
