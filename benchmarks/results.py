"""What a run leaves behind: one JSON with the machine, the versions and, for every case, each contestant's numbers."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gspo_kernels

from .cases import SEQUENCES, Problem
from .race import Outcome

FOLDER = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parent.parent

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


@dataclass(frozen=True)
class Measured:
    """One contestant in one case; times in seconds."""

    median: float
    min: float
    max: float
    rounds: int
    fraction_of_copy: float | None
    gb_per_s: float
    gelem_per_s_per_core: float
    extra_bytes: int | None
    extra_in_logits: float | None
    compile_seconds: float | None


@dataclass(frozen=True)
class CaseResult:
    id: str
    work: str
    dtype: str
    vocab: int
    layout: str
    rows: int
    logits_bytes: int
    units: float
    visits: float
    copy_seconds: float | None
    contestants: dict[str, Measured]


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    rows: int
    cases: dict[str, CaseResult]

    def find(self, work: str, dtype: str, vocab: int, layout: str) -> CaseResult | None:
        wanted = (work, dtype, vocab, layout)
        return next((c for c in self.cases.values() if (c.work, c.dtype, c.vocab, c.layout) == wanted), None)


def case_result(problem: Problem, outcomes: dict[str, Outcome]) -> CaseResult:
    """Of the contestants that were timed; one that failed its check has no numbers."""
    case, elements = problem.case, problem.logits.numel()
    copies = outcomes["copy"].seconds if "copy" in outcomes else []
    copy_seconds = problem.units / 2 * statistics.median(copies) if copies else None

    def measured(name: str, outcome: Outcome) -> Measured:
        median = statistics.median(outcome.seconds)
        units, visits = (2.0, 2.0) if name == "copy" else (problem.units, problem.visits)
        needed = statistics.median(copies) if name == "copy" else copy_seconds
        extra = outcome.extra_bytes
        return Measured(
            median=median,
            min=min(outcome.seconds),
            max=max(outcome.seconds),
            rounds=len(outcome.seconds),
            fraction_of_copy=None if needed is None else needed / median,
            gb_per_s=units * problem.logits_bytes / median / 1e9,
            gelem_per_s_per_core=visits * elements / median / torch.get_num_threads() / 1e9,
            extra_bytes=extra,
            extra_in_logits=None if extra is None else extra / problem.logits_bytes,
            compile_seconds=outcome.compile_seconds,
        )

    return CaseResult(
        id=case.id,
        work=case.work.name,
        dtype=case.dtype,
        vocab=case.vocab,
        layout=case.layout,
        rows=problem.rows,
        logits_bytes=problem.logits_bytes,
        units=problem.units,
        visits=problem.visits,
        copy_seconds=copy_seconds,
        contestants={name: measured(name, o) for name, o in outcomes.items() if o.seconds},
    )


def save(path: Path, rows: int, cases: list[CaseResult]) -> None:
    content = {
        "machine": machine(),
        "rows": rows,
        "sequences": SEQUENCES,
        "meanings": MEANINGS,
        "cases": [rounded(asdict(case)) for case in cases],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def newest() -> Path:
    """The committed results with the latest date."""
    candidates = list(FOLDER.glob("cpu-*.json"))
    if not candidates:
        raise SystemExit(f"no results in {FOLDER}: run pytest benchmarks --save-results <path>, or name a file")
    return max(candidates, key=lambda path: str(json.loads(path.read_text())["machine"]["date"]))


def load(path: Path) -> Results:
    content = json.loads(path.read_text())
    cases = [
        CaseResult(**{**case, "contestants": {name: Measured(**m) for name, m in case["contestants"].items()}})
        for case in content["cases"]
    ]
    return Results(content["machine"], content["rows"], {case.id: case for case in cases})


def machine() -> dict[str, Any]:
    """Of this process: what the numbers depend on."""
    backend = gspo_kernels.explain(torch.empty(1, 1, 2)).split(": ")[0]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": backend,
        "gspo_kernels": gspo_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The commit that this tree stands on, "-dirty" if files differ from it; "unknown" outside a repository.

    GSPO_BENCH_COMMIT says it where a tree was copied without its history.
    """
    if told := os.environ.get("GSPO_BENCH_COMMIT"):
        return told
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def rounded(value: Any) -> Any:
    """Six significant digits: the file is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return value
