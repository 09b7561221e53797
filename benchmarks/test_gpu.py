"""The machinery of `benchmarks.gpu`, without a GPU: what breaks is recorded, and takes nothing else along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gspo_kernels.logprobs import cuda_rows

from .gpu import faster, goals
from .gpu.__main__ import SMOKE_ONE_READ
from .gpu.parts import REPOSITORY, Part, run
from .gpu.report import Report

# A worker in a few lines: what it is told to do, an item at a time.
WORKER = """
import json, os, sys, time
def write(**record):
    open(os.environ["GSPO_BENCH_RECORDS"], "a").write(json.dumps(record) + "\\n")
for item in sys.argv[1:]:
    write(at=["part", "at"], value=f"the middle of {item}")
    write(at=["cases", item], value="begun")
    if item == "crash": os.abort()
    if item == "hang": time.sleep(600)
    if item == "raise": raise ValueError("no such luck")
    write(at=["cases", item], value="done")
    write(finished=item)
"""
COMMAND = (sys.executable, "-c", WORKER)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    (tmp_path / "log").touch()
    return Report(tmp_path / "gpu-test.json")


def run_part(report: Report, part: Part, seconds: float = 60.0) -> str:
    status = run(part, report, report.path.parent / "log", time.monotonic() + seconds, os.environ)
    assert json.loads(report.path.read_text()) == report.content
    return status


def test_crash_costs_one_item(report: Report) -> None:
    part = Part("works", COMMAND, limit=60.0, least=0.0, items=("a", "crash", "raise", "b"))
    assert run_part(report, part) == "failed"
    assert report.get("cases") == {"a": "done", "crash": "begun", "raise": "begun", "b": "done"}
    reason = report.get("parts", "works", "reason")
    assert "at the middle of crash: died by SIGABRT" in reason
    assert "at the middle of raise: exit code 1: ValueError: no such luck" in reason


def test_failed_item_is_tried_again_in_its_safer_way(report: Report) -> None:
    part = Part("works", COMMAND, limit=60.0, least=0.0, items=("crash", "b"), fallback=":ours")
    assert run_part(report, part) == "failed"
    assert report.get("cases") == {"crash": "begun", "crash:ours": "done", "b": "done"}


def test_silence_costs_one_item(report: Report) -> None:
    part = Part("works", COMMAND, limit=60.0, least=0.0, patience=2.0, items=("hang", "b"))
    assert run_part(report, part) == "failed"
    assert report.get("cases") == {"hang": "begun", "b": "done"}
    assert "nothing heard" in report.get("parts", "works", "reason")


def test_limit_is_kept_and_other_parts_survive(report: Report) -> None:
    assert run_part(report, Part("good", COMMAND, limit=60.0, least=0.0, items=("a",))) == "ok"
    began = time.monotonic()
    assert run_part(report, Part("slow", COMMAND, limit=2.0, least=0.5, items=("b", "hang"))) == "timed out"
    assert time.monotonic() - began < 10.0
    assert run_part(report, Part("late", COMMAND, limit=60.0), seconds=1.0) == "skipped"
    assert {name: part["status"] for name, part in report.get("parts").items()} == {
        "good": "ok",
        "slow": "timed out",
        "late": "skipped",
    }
    assert report.get("cases") == {"a": "done", "b": "done", "hang": "begun"}


def test_children_of_a_part_end_with_it(report: Report, tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    part = Part("parent", (sys.executable, "-c", code.format(child)), limit=3.0, least=0.0)
    assert run_part(report, part) == "timed out"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.1)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_smoke_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--output", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--only", "bandwidth", "speed", "linear", "one_read", "sanitizer"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu-smoke.log").read_text()
    found = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert {part["status"] for part in found["parts"].values()} == {"ok"}
    assert len(found["cases"]) == 5
    for case in found["cases"].values():
        assert {"ours", "eager", "copy"} <= case["contestants"].keys()
        for name in ("liger", "trl"):
            assert name in case["absent"] or name in case["errors"]  # they run on a GPU or in the interpreter
    assert found["one_read"]["cases"].keys() == set(SMOKE_ONE_READ)
    for case in found["one_read"]["cases"].values():
        assert {"ours", "ours_fresh", "copy"} == case["contestants"].keys() and not case["errors"]
        assert case["absent"].keys() == {"ours_cuda", "ours_cuda_fresh"}  # on a CPU
    of_grpo = found["one_read"]["cases"]["grpo-bf16-100-16"]
    assert of_grpo["contestants"]["ours"]["units"] > of_grpo["units"] == 2.0
    assert any(line.startswith("cuda") for line in found["one_read"]["explain"])
    assert found["linear"]["cases"].keys() == {"dense", "inactive", "frozen_head", "forward"}
    for case in found["linear"]["cases"].values():
        assert {"ours", "products", "eager"} <= case["contestants"].keys()
        assert not case["contestants"]["ours"]["wrong"]
    assert "median" in found["linear"]["products"]["logits, bf16"]
    again = subprocess.run([*command, "--only", "bandwidth"], cwd=REPOSITORY, env=environment, capture_output=True)
    assert again.returncode == 0
    kept = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert kept["cases"] == found["cases"]


def results(milliseconds: float, gpu: str, copy: float) -> dict[str, Any]:
    def times(seconds: float, extra: int) -> dict[str, Any]:
        return {"median": seconds, "times_floor": 1.1, "extra_bytes": extra, "launches": 4}

    contestants = {
        "ours": times(milliseconds / 1e3, 0),
        "ours_fresh": times(milliseconds / 1e3, 100),
        "eager": times(1.0, 600),
    }
    case = {"contestants": contestants, "absent": {"liger": "ImportError: no liger"}, "errors": {}}
    return {"machine": {"gpu": gpu}, "bandwidth": {"copy": {"bytes_per_second": copy}}, "cases": {"gspo-8192": case}}


def test_goals() -> None:
    by_text = {goal.text: goal for goal in goals.GOALS}
    goal = by_text["off-policy GSPO, forward and backward"]
    assert goal.judge(results(1.9, "NVIDIA H200", 4.2e12))[0]
    assert not goal.judge(results(2.0, "NVIDIA H200", 4.2e12))[0]
    assert goal.judge(results(2.7, "NVIDIA H100 80GB HBM3", 3.0e12))[0]  # a slower memory, the same multiple of it
    assert not goal.judge(results(2.8, "NVIDIA H100 80GB HBM3", 3.0e12))[0]
    assert by_text["peak memory against eager, every case"].judge(results(1.9, "NVIDIA H200", 4.2e12))[0]
    with pytest.raises(KeyError, match="no liger"):
        by_text["time against liger, every case"].judge(results(1.9, "NVIDIA H200", 4.2e12))


def test_goals_of_the_linear_part() -> None:
    def times(milliseconds: float, flop_per_s: float, wrong: str = "") -> dict[str, Any]:
        return {"median": milliseconds / 1e3, "flop_per_s": flop_per_s, "extra_bytes": 10, "wrong": wrong}

    def content(gpu: str, ours: float, rate: float, wrong: str = "") -> dict[str, Any]:
        contestants = {"ours": times(ours, 7e14, wrong), "products": times(39.0, rate), "eager": times(60.0, 5e14)}
        case = {"contestants": contestants, "absent": {"liger": "ImportError: no liger"}, "errors": {}}
        return {"machine": {"gpu": gpu}, "linear": {"cases": {"dense": case}}}

    by_text = {goal.text: goal for goal in goals.GOALS}
    goal = by_text["from hidden states, D = 4,096, dense"]
    assert goal.judge(content("NVIDIA H200", 41.0, 7.88e14))[0]
    assert not goal.judge(content("NVIDIA H200", 42.0, 7.88e14))[0]
    assert not goal.judge(content("NVIDIA H200", 41.0, 7.88e14, wrong="loss"))[0]
    assert goal.judge(content("NVIDIA H100", 81.0, 3.94e14))[0]  # products at half the speed
    assert by_text["linear, time against eager"].judge(content("NVIDIA H200", 41.0, 7.88e14))[0]
    assert not by_text["linear, memory against eager"].judge(content("NVIDIA H200", 41.0, 7.88e14))[0]
    with pytest.raises(KeyError, match="no liger"):
        by_text["linear, time against liger"].judge(content("NVIDIA H200", 41.0, 7.88e14))


def one_read(milliseconds: float, rivals: float = 2.0, gpu: str = "NVIDIA H200") -> dict[str, Any]:
    def case(launches: int) -> dict[str, Any]:
        times = {"ours": rivals, "ours_fresh": rivals, "ours_cuda": milliseconds, "ours_cuda_fresh": milliseconds}
        measured = {name: {"median": ms / 1e3, "times_floor": 1.1, "launches": launches} for name, ms in times.items()}
        return {"contestants": measured, "absent": {}, "errors": {}}

    cases = {"gspo_on_policy-bf16-151936-8192": case(4), "grpo-bf16-151936-8192": case(5)}
    return {"machine": {"gpu": gpu}, "one_read": {"cases": cases}, "parts": {"one_read": {"status": "ok"}}}


def test_goals_in_cuda() -> None:
    by_text = {goal.text: goal for goal in goals.GOALS}
    goal = by_text["GRPO, a ratio per token, in CUDA C++"]
    assert goal.judge(one_read(1.3))[0] and not goal.judge(one_read(1.31))[0]
    with pytest.raises(KeyError):
        by_text["PPO, one mean over all tokens, in CUDA C++"].judge(one_read(1.3))
    absent = one_read(1.3)
    case = absent["one_read"]["cases"]["grpo-bf16-151936-8192"]
    del case["contestants"]["ours_cuda"]
    case["absent"]["ours_cuda"] = "the CUDA kernels were not built"
    with pytest.raises(KeyError, match="not built"):
        goal.judge(absent)


def test_launches_are_a_goal_for_triton_and_counted_for_cuda() -> None:
    by_text = {goal.text: goal for goal in goals.GOALS}
    met, text = by_text["launches of forward and backward"].judge(results(1.9, "NVIDIA H200", 4.2e12) | one_read(1.3))
    assert met and text.endswith("in CUDA C++ gspo_on_policy-bf16-151936-8192 4, grpo-bf16-151936-8192 5")


def test_the_line_for_the_package_is_printed_where_cuda_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(named: set[str], milliseconds: float) -> str:
        monkeypatch.setattr(cuda_rows, "FASTER_ON", frozenset(named))
        return faster.lines(one_read(milliseconds))[-1]

    other, this = "NVIDIA GH200", "NVIDIA H200"
    assert said(set(), 1.3) == 'FASTER_ON: frozenset[str] = frozenset({"NVIDIA H200"})'
    assert said({other}, 1.3) == 'FASTER_ON: frozenset[str] = frozenset({"NVIDIA GH200", "NVIDIA H200"})'
    assert said({this}, 2.1) == "FASTER_ON: frozenset[str] = frozenset()"
    assert "rightly" in said({this}, 1.3) and "not ahead" in said({other}, 2.1)
    lines = faster.lines(one_read(1.6))
    assert sum("1.250x" in line for line in lines) == 2
    assert faster.lines({"machine": None}) == ["CUDA C++ against Triton: not measured"]


def test_goals_without_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert goals.print_goals(None) == len(goals.GOALS)
    assert capsys.readouterr().out.count("not measured") == len(goals.GOALS)
