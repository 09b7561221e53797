"""The project's goals for the CPU, each with what was measured: python -m benchmarks.goals [results.json]

Ratios are of medians within one run. A goal is met if it is met in both layouts. An element counts each time that
arithmetic visits it: once in the forward and once in the backward (see `results.MEANINGS`).
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .cases import CASES
from .results import CaseResult, Results, load, newest

VOCAB = 151_936
LAYOUTS = ("padded", "packed")
BYTES_A_ROW = 4096  # what O(N) may cost: a row of these logits has 303,872 or more


@dataclass(frozen=True)
class Goal:
    text: str
    at_least: bool
    bound: float
    unit: str
    measure: Callable[[Results, str], float]  # of the results, in one layout; KeyError where the run lacks it


def _case(results: Results, work: str, dtype: str, layout: str) -> CaseResult:
    found = results.find(work, dtype, VOCAB, layout)
    if found is None:
        raise KeyError(f"{work}-{dtype}-{VOCAB}-{layout}")
    return found


def times_faster(contestant: str, than: str, dtype: str) -> Callable[[Results, str], float]:
    def measure(results: Results, layout: str) -> float:
        found = _case(results, "forward_backward", dtype, layout).contestants
        return found[than].median / found[contestant].median

    return measure


def against_three_units(results: Results, layout: str) -> float:
    found = _case(results, "forward_backward", "fp32", layout).contestants
    return found["ours"].median / (1.5 * found["copy"].median)


def speed_of_a_core(results: Results, layout: str) -> float:
    return _case(results, "forward_backward", "bf16", layout).contestants["ours"].gelem_per_s_per_core


def masked_against_dense(dtype: str) -> Callable[[Results, str], float]:
    def measure(results: Results, layout: str) -> float:
        dense = _case(results, "forward_backward", dtype, layout).contestants["ours"].median
        return dense / _case(results, "masked_60", dtype, layout).contestants["ours"].median

    return measure


def extra_bytes_a_row(results: Results, layout: str) -> float:
    """The worst of all cases at this layout, without the gradient where that is fresh."""
    worst = -1.0
    for case in results.cases.values():
        for name, gradient in (("ours", 0), ("ours_fresh", case.logits_bytes)):
            measured = case.contestants.get(name)
            if case.layout == layout and measured is not None and measured.extra_bytes is not None:
                worst = max(worst, (measured.extra_bytes - gradient) / case.rows)
    if worst < 0:
        raise KeyError("extra memory")
    return worst


GOALS = (
    Goal("fp32, over the logits, against torch eager", True, 10, "x", times_faster("ours", "eager", "fp32")),
    Goal("fp32, over the logits, against torch.compile", True, 5, "x", times_faster("ours", "compile", "fp32")),
    Goal("fp32, over the logits, time of moving three units", False, 1.3, "x", against_three_units),
    Goal("bf16, over the logits, against torch eager", True, 15, "x", times_faster("ours", "eager", "bf16")),
    Goal("bf16, over the logits, against torch.compile", True, 5, "x", times_faster("ours", "compile", "bf16")),
    Goal("bf16, over the logits, on AVX-512", True, 1.7, " Gelem/s a core", speed_of_a_core),
    Goal("fp32, fresh gradient, against torch.compile", True, 3, "x", times_faster("ours_fresh", "compile", "fp32")),
    Goal("bf16, fresh gradient, against torch.compile", True, 3, "x", times_faster("ours_fresh", "compile", "bf16")),
    Goal("fp32, 60% of rows masked, against dense", True, 1.6, "x", masked_against_dense("fp32")),
    Goal("bf16, 60% of rows masked, against dense", True, 1.6, "x", masked_against_dense("bf16")),
    Goal("memory beside the gradient, any case", False, BYTES_A_ROW, " bytes a row", extra_bytes_a_row),
)


def judge(goal: Goal, results: Results) -> tuple[bool | None, str]:
    """Whether the goal is met (None: not measured), and the measurements in words."""
    try:
        by_layout = {layout: goal.measure(results, layout) for layout in LAYOUTS}
    except KeyError as missing:
        return None, f"not in this run ({missing.args[0]})"
    met = operator.ge if goal.at_least else operator.le
    worst = min if goal.at_least else max
    values = ", ".join(f"{layout} {value:.3g}" for layout, value in by_layout.items())
    return met(worst(by_layout.values()), goal.bound), values + goal.unit


def main() -> int:
    results = load(Path(sys.argv[1]) if len(sys.argv) > 1 else newest())
    about = results.machine
    print(f"V = {VOCAB:,}, {results.rows:,} rows, forward + backward; {about['cpu']}, {about['threads']} threads,")
    print(f"{about['backend']}, torch {about['torch']}, commit {about['commit']}, {about['date']}")
    print(f"{len(results.cases)} of {len(CASES)} cases measured\n")
    missed = 0
    for goal in GOALS:
        verdict, values = judge(goal, results)
        missed += verdict is not True
        sign = ">=" if goal.at_least else "<="
        word = {True: "met", False: "MISSED", None: "?"}[verdict]
        print(f"{word:<7} {goal.text + ':':<62} {sign} {goal.bound:g}{goal.unit}; {values}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
