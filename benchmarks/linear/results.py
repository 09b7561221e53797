"""What a run leaves behind: one JSON with the machine, the versions and, for every case, each contestant's numbers."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..gpu_parts import rounded
from ..results import FOLDER, machine
from .cases import Case, Problem, build
from .peers import versions
from .turns import Outcome, measure, words

# How to read the numbers; stored with them.
MEANINGS = {
    "products": "the matrix products that a loss needs (3, 2 with a frozen head, 1 without a gradient), of all rows",
    "times_products": "median / that of the products",
    "flop_per_s": "operations that arithmetic needs, on rows with a coefficient alone where it can be so, / median",
    "extra_bytes": "peak resident memory beyond the inputs, returned gradients included",
    "beyond_gradients": "extra_bytes less the returned gradients",
    "first_call_seconds": "of a contestant that compiles, on a cache that may be warm",
    "wrong": "what is wrong with the answer: timed all the same, and not to be compared",
}


@dataclass(frozen=True)
class Measured:
    """One contestant in one case; times in seconds."""

    median: float
    min: float
    max: float
    rounds: int
    times_products: float | None
    flop_per_s: float
    extra_bytes: int | None
    beyond_gradients: int | None
    first_call_seconds: float | None
    wrong: str


@dataclass(frozen=True)
class CaseResult:
    id: str
    work: str
    title: str
    dtype: str
    vocab: int
    rows: int
    width: int
    sequences: int
    active: float  # share of rows with a coefficient
    contestants: dict[str, Measured]
    absent: dict[str, str]
    errors: dict[str, str]


@dataclass(frozen=True)
class Results:
    machine: dict[str, Any]
    cases: dict[str, CaseResult]

    def find(self, work: str, dtype: str, vocab: int) -> CaseResult:
        """KeyError where the run lacks it."""
        return self.cases[f"{work}-{dtype}-{vocab}"]


def measured(case: Case, most: int, seconds: float, left: float) -> CaseResult:
    """At most so many further rounds, begun in the next `seconds`; first calls of peers within what is `left`."""
    now = time.perf_counter()
    problem = build(case)
    return case_result(problem, measure(problem, now + seconds, now + left, most))


def case_result(problem: Problem, outcomes: Mapping[str, Outcome]) -> CaseResult:
    case, yardstick = problem.case, outcomes.get("products", Outcome()).seconds

    def of(name: str, outcome: Outcome) -> Measured:
        median = statistics.median(outcome.seconds)
        flops = case.work.products() * case.unit if name == "products" else problem.flops
        extra = outcome.extra_bytes
        return Measured(
            median=median,
            min=min(outcome.seconds),
            max=max(outcome.seconds),
            rounds=len(outcome.seconds),
            times_products=median / statistics.median(yardstick) if yardstick else None,
            flop_per_s=flops / median,
            extra_bytes=extra,
            beyond_gradients=None if extra is None else max(extra - outcome.gradient_bytes, 0),
            first_call_seconds=outcome.compile_seconds,
            wrong=outcome.wrong,
        )

    return CaseResult(
        id=case.id,
        work=case.work.name,
        title=case.work.title,
        dtype=case.dtype,
        vocab=case.vocab,
        rows=case.rows,
        width=case.width,
        sequences=case.work.sequences,
        active=problem.active,
        contestants={name: of(name, o) for name, o in outcomes.items() if o.seconds and not o.error},
        absent={name: o.absent for name, o in outcomes.items() if o.absent},
        errors={name: words(o.error) for name, o in outcomes.items() if o.error},
    )


def about() -> dict[str, Any]:
    return {**machine(), "packages": versions()}


def save(path: Path, cases: list[CaseResult]) -> None:
    write(path, {"machine": about(), "meanings": MEANINGS, "cases": [asdict(case) for case in cases]})


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(content), indent=1) + "\n")


def load(path: Path) -> Results:
    content = json.loads(path.read_text())
    cases = [
        CaseResult(**{**case, "contestants": {name: Measured(**m) for name, m in case["contestants"].items()}})
        for case in content["cases"]
    ]
    return Results(content["machine"], {case.id: case for case in cases})


def default_path(kind: str = "linear") -> Path:
    """linear-cpu-xeon-2cores.json"""
    here = machine()
    cpu = re.search(r"epyc|xeon|ryzen|core|neoverse|apple", str(here["cpu"]).lower())
    return FOLDER / f"{kind}-cpu-{cpu.group() if cpu else 'other'}-{here['cores']}cores.json"


def newest(kind: str = "linear") -> Path:
    """The committed results with the latest date."""
    candidates = list(FOLDER.glob(f"{kind}-cpu-*.json"))
    if not candidates:
        raise SystemExit(f"no results of a CPU in {FOLDER}: python -m benchmarks.linear, or name a file")
    return max(candidates, key=lambda path: str(json.loads(path.read_text())["machine"]["date"]))
