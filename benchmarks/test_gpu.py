"""The machinery of `benchmarks.gpu`, without a GPU: what breaks is recorded, and nothing else is lost."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from . import gpu as program
from . import gpu_parts as parts
from . import gpu_profile, gpu_speed
from .gpu import ONE_READ, runs
from .gpu_parts import REPOSITORY, Part, Report, Starter, run

RUNS = runs()
# A worker in a few lines. What goes wrong is in FAULT, <what>:<item>; of a part without items the item is empty.
WORKER = """
import json, os, sys, time
def write(**record):
    open(os.environ["GSPO_BENCH_RECORDS"], "a").write(json.dumps(record) + "\\n")
part, *items = sys.argv[1:]
fault = os.environ.get("FAULT", "")
for item in items or [""]:
    write(at=["part", "at"], value=f"the middle of {item}")
    write(at=["cases", part, item], value="begun")
    if fault == f"{part}:crash:{item}": os.abort()
    if fault == f"{part}:raise:{item}": raise ValueError("no such luck")
    if fault == f"{part}:absent:{item}": print("ImportError: no such peer"), sys.exit(77)
    if fault == f"{part}:hang:{item}": open(os.environ["HANGS"], "w").close(), time.sleep(600)
    write(at=["cases", part, item], value="done")
    write(finished=item)
"""


def fake(part: Part) -> Part:
    return replace(part, command=(sys.executable, "-c", WORKER, part.name))


class Clock:
    """Time that stands still, and jumps as soon as a worker hangs: nobody waits, and no speed of a machine matters."""

    def __init__(self, hangs: Path, jump: float) -> None:
        self._hangs, self._jump = hangs, jump
        self._now = time.monotonic()
        self._polls = 0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self._polls += self._hangs.exists()
        if self._polls == 2:  # what the worker said before has been read
            self._now += self._jump


class Bench:
    """Runs parts as `main` does, in a folder of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.report = Report(folder / "gpu-test.json")
        self.log = folder / "log"
        self.log.touch()

    def part(self, part: Part, fault: str = "", jump: float = 0.0, seconds: float = 10_000.0) -> str:
        hangs = self.folder / "hangs"
        hangs.unlink(missing_ok=True)
        self._monkeypatch.setattr(parts, "time", Clock(hangs, jump))
        starter = Starter({**os.environ, "FAULT": fault, "HANGS": str(hangs)}, self.log, ahead=False)
        status = run(part, self.report, parts.time.monotonic() + seconds, starter)
        assert json.loads(self.report.path.read_text()) == self.report.content
        return status

    def cases(self, part: Part) -> dict[str, str]:
        found: dict[str, str] = self.report.get("cases", part.name)
        return found

    def reason(self, part: Part) -> str:
        found: str = self.report.get("parts", part.name, "reason")
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


GOOD = Part("good", command=(sys.executable, "-c", WORKER, "good"), items=("a",))
# Of the parts of both runs one of each kind, by what decides how a fault is handled.
EVERY = [part for run in RUNS.values() for part in run.parts]
KINDS = {(bool(p.items), p.fallback, p.patience >= p.limit): p for p in EVERY}


@pytest.mark.parametrize("part", KINDS.values(), ids=[part.name for part in KINDS.values()])
@pytest.mark.parametrize("fault", ["crash", "raise", "hang"])
def test_a_fault_loses_one_item(bench: Bench, part: Part, fault: str) -> None:
    """One that nothing is heard of until its limit loses those that follow; no other part loses anything."""
    part = fake(part)
    culprit = part.items[0] if part.items else ""
    status = bench.part(part, f"{part.name}:{fault}:{culprit}", jump=part.patience + 1)
    hung = fault == "hang" and part.patience >= part.limit
    assert status == ("timed out" if hung else "failed")
    expected = {culprit: "begun"}
    if not hung:
        expected |= {culprit + part.fallback: "done"} if part.fallback else {}
        expected |= {item: "done" for item in part.items[1:]}
    assert bench.cases(part) == expected
    words = {
        "crash": "died by SIGABRT",
        "raise": "exit code 1: ValueError: no such luck",
        "hang": "its time was over" if hung else "nothing heard for",
    }
    assert f"at the middle of {culprit}: {words[fault]}" in bench.reason(part)
    assert bench.part(GOOD) == "ok"


def test_an_absent_part_has_its_reason(bench: Bench) -> None:
    part = fake(Part("peers", items=("a", "b")))
    assert bench.part(part, "peers:absent:a") == "absent"
    assert bench.reason(part) == "ImportError: no such peer"
    assert bench.part(GOOD) == "ok"


@pytest.mark.parametrize("name", RUNS)
def test_the_table_of_parts(name: str) -> None:
    chosen = RUNS[name]
    names = [part.name for part in chosen.parts]
    assert names[:2] == ["environment", "extension"] and len(set(names)) == len(names)
    for part in chosen.parts:
        for file in part.items if part.worker == "gpu_suite.run" else ():
            assert len(list((REPOSITORY / "tests").rglob(file))) == 1, file
        module, _, function = part.worker.partition(".")
        assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))
        assert part.least <= part.takes <= part.limit or part.name == "extension"
        assert part.takes > 0 and part.patience <= part.limit
    assert sum(part.takes for part in chosen.parts) <= chosen.seconds
    assert sum(part.least for part in chosen.parts) <= chosen.seconds / 2
    assert [part.name for part in runs(smoke=True)[name].parts] == names


def test_items_are_known() -> None:
    """The runs share out the cases of `one_read`; items of profiles name works and contestants."""
    found = [item for part in EVERY if part.worker == "gpu_speed.one_read" for item in part.items]
    assert sorted(found) == sorted(ONE_READ)
    for item in program.PROFILED:
        work, contestant = gpu_profile.contestant_of(item)
        assert work in gpu_speed.WORKS and contestant in gpu_speed.OURS


def test_a_part_and_its_items_are_chosen() -> None:
    chosen = RUNS["gpu"]

    def names(only: list[str], skip: list[str] | None = None) -> list[str]:
        return [part.name for part in program.selected(chosen, only, skip or [])]

    assert names([], ["tests", "counters"]) == [p.name for p in chosen.parts if p.name not in ("tests", "counters")]
    assert names(["speed", "bandwidth"]) == ["environment", "bandwidth", "speed"]
    _, speed, one_read = program.selected(chosen, ["one_read:grpo-bf16-151936-4096", "speed:gspo,grpo"], [])
    assert speed.items == ("gspo:ours", "grpo:ours")
    assert one_read.items == ("grpo-bf16-151936-4096",)


def test_limit_is_kept(bench: Bench) -> None:
    part = fake(Part("slow", limit=30.0, least=0.5, patience=60.0, items=("a", "b")))
    assert bench.part(part, "slow:hang:b", jump=31.0) == "timed out"
    assert bench.cases(part) == {"a": "done", "b": "begun"}
    late = fake(Part("late", limit=60.0))
    assert bench.part(late, seconds=1.0) == "skipped"
    assert {name: part["status"] for name, part in bench.report.get("parts").items()} == {
        "slow": "timed out",
        "late": "skipped",
    }


def test_no_record_is_lost_when_its_reader_is_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    records = parts.Records(path)
    for _ in records:
        break
    assert list(records) == [{"a": 1}, {"a": 2}]
    path.write_text(path.read_text() + ": 3}\n")
    assert list(records) == [{"a": 3}]


def test_children_of_a_part_end_with_it(bench: Bench) -> None:
    pid = bench.folder / "pid"
    child = (
        f"import os, time; open({str(pid)!r} + '.new', 'w').write(str(os.getpid())); "
        f"os.rename({str(pid)!r} + '.new', {str(pid)!r}); open(os.environ['HANGS'], 'w').close(); time.sleep(600)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    part = Part("parent", command=(sys.executable, "-c", code), limit=30.0, least=0.0)
    assert bench.part(part, jump=31.0) == "timed out"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)


# A whole run in a process of its own, whose parts are fakes; without torch, which it takes seconds to import.
FAKE_RUN = """
import sys
repository, worker, *arguments = sys.argv[1:]
sys.path.insert(0, repository)
from benchmarks import gpu as program, gpu_carried
from benchmarks.gpu import Run
from benchmarks.gpu_parts import Part
parts = [Part(name, command=(sys.executable, "-c", worker, name), items=("a", "b"))
         for name in ("environment", "first", "second")]
program.runs = lambda smoke: {name: Run(name, 240.0, tuple(parts)) for name in ("gpu", "gpu-more")}
gpu_carried.use = lambda environment: {}
sys.modules["benchmarks.gpu_page"] = type("Page", (), {"tables": str, "ahead": str})
sys.exit(program.main(arguments))
"""


def start_fake_run(folder: Path, *arguments: str, fault: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FAKE_RUN, str(REPOSITORY), WORKER, "--output", str(folder), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "FAULT": fault, "HANGS": str(folder / "hangs")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path: Path) -> None:
    process = start_fake_run(tmp_path, fault="first:hang:b")
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == program.KILLED
    found = json.loads((tmp_path / "gpu-unknown.json").read_text())
    assert found["parts"]["environment"]["status"] == "ok"
    assert found["parts"]["first"]["status"] == "failed" and "the run was ended" in found["parts"]["first"]["reason"]
    assert found["cases"]["first"]["a"] == "done" and not found["runs"]["gpu"]["finished"]


def test_the_second_run_adds_to_the_first(tmp_path: Path) -> None:
    def done(*arguments: str, fault: str = "") -> tuple[int | None, dict[str, Any]]:
        process = start_fake_run(tmp_path, *arguments, fault=fault)
        process.communicate()
        return process.returncode, json.loads((tmp_path / "gpu-unknown.json").read_text())

    code, first = done("--only", "first")
    assert code == 0 and first["parts"].keys() == {"environment", "first"} and first["runs"]["gpu"]["finished"]
    code, both = done("--more", "--only", "second", fault="second:crash:b")
    assert code == program.FAILED and both["parts"].keys() == {"environment", "first", "second"}
    assert both["cases"]["first"] == first["cases"]["first"] and both["cases"]["second"]["a"] == "done"


def test_a_worker_that_waits_takes_the_next_part(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    report = Report(tmp_path / "gpu-test.json")
    starter = Starter(dict(os.environ), log)
    starter.prepare()
    try:
        starter.log = tmp_path / "renamed"
        starter.log.touch()
        starter.ahead = False
        waiting = starter._waiting
        assert waiting is not None
        part = Part("extension", "gpu_carried.extension", arguments=("--smoke",), limit=120.0)
        assert run(part, report, time.monotonic() + 120, starter) == "absent"
        assert waiting.returncode == parts.ABSENT
        assert "==== gpu_carried.extension" in starter.log.read_text()
    finally:
        starter.close()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


# --- the tests in several processes -----------------------------------------------------------------------------------

TESTS = """
import os, pathlib, signal, time
import pytest

@pytest.mark.parametrize("number", range(30))
def test_number(number):
    assert number != 3
    if number == 10: os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
"""


SUITE = """
import sys
from benchmarks.gpu_parts import Context
from benchmarks.gpu_suite import run_files
sys.exit(not run_files(Context([], smoke=True, records=sys.argv[1]), sys.argv[2:], 2))
"""


def test_without_xdist_a_file_that_dies_costs_itself_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part's process runs a file at a time, and its successor goes on with the next file."""
    code = (
        f"import sys; from benchmarks import gpu_suite, gpu_parts; gpu_suite.find_spec = lambda name: None; "
        f"gpu_suite.REPOSITORY = gpu_suite.Path({str(bench.folder)!r}); sys.exit(gpu_parts.work(sys.argv[1:]))"
    )
    (bench.folder / "tests").mkdir()
    for name, body in (("dies", "import os; os.abort()"), ("passes", "pass")):
        (bench.folder / "tests" / f"test_{name}.py").write_text(f"def test_it(): {body}\n")
    command = (sys.executable, "-c", code, "gpu_suite.run", "--smoke")
    part = Part("tests", command=command, items=("test_dies.py", "test_passes.py"))
    assert bench.part(part) == "failed" and "died by SIGABRT" in bench.reason(part)
    assert bench.report.get("tests", "test_passes.py", "passed") == 1


def run_suite(tmp_path: Path, text: str) -> tuple[bool, dict[str, Any]]:
    """Whether all is well, and what is recorded of a file of tests."""
    (tmp_path / "test_some.py").write_text(text)
    records = tmp_path / "records"
    command = [sys.executable, "-c", SUITE, str(records), str(tmp_path / "test_some.py")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    written = [json.loads(line) for line in records.read_text().splitlines()]
    found = [record["value"] for record in written if record.get("at") == ["tests", "test_some.py"]]
    assert found, done.stdout + done.stderr
    return done.returncode == 0, found[-1]


def test_a_process_that_dies_costs_the_test_that_it_ran(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    good, some = run_suite(tmp_path, TESTS)
    assert not good
    assert {test.partition("::")[2] for test in some["failures"]} == {"test_number[3]", "test_number[10]"}
    assert (some["failed"], some["passed"], some["skipped"], some["not_run"]) == (2, 28, 1, 0)


def test_a_file_that_lacks_a_module_is_no_failure(tmp_path: Path) -> None:
    good, some = run_suite(tmp_path, "import no_such_module\n")
    assert good and "no_such_module" in some["needs"]


# --- smoke, on the CPU ------------------------------------------------------------------------------------------------


def test_smoke_run_of_peers_that_do_not_import(tmp_path: Path) -> None:
    """`.ci/run` has the whole runs; here are the parts with contestants, and what is in the results."""
    for name in ("liger_kernel", "trl"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('no such peer')\n")
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--more", "--output", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--only", "peers:gspo", "linear:dense", "one_read-more"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu-smoke.log").read_text()
    found = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert {name: part["status"] for name, part in found["parts"].items()} == {
        name: "ok" for name in ("environment", "peers", "linear", "one_read-more")
    }
    (case,) = found["cases"].values()
    assert {"ours", "eager", "copy"} <= case["contestants"].keys()
    assert {case["absent"][name] for name in ("liger", "trl")} == {"ImportError: no such peer"}
    for case in found["one_read"]["cases"].values():
        assert {"ours", "ours_fresh", "copy"} == case["contestants"].keys() and not case["errors"]
        assert case["absent"].keys() == {"ours_cuda", "ours_cuda_fresh"}  # on a CPU
    dense = found["linear"]["cases"]["dense"]
    assert {"ours", "products", "eager"} <= dense["contestants"].keys()
    assert not dense["contestants"]["ours"]["wrong"]
    assert "no such peer" in {**dense["errors"], **dense["absent"]}["liger"]
