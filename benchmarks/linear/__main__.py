"""Runs the cases within one budget of time, and says what came of it; see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ..cases import DTYPES
from .cases import CASES, ROWS, SMOKE, Case
from .contestants import CONTESTANTS, left_out
from .goals import print_goals
from .results import CaseResult, Results, about, default_path, load, measured, newest, save
from .table import lines, markdown, title
from .turns import FURTHER_ROUNDS, warm_up


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.markdown is not None:
        print(markdown(load(options.markdown if options.markdown.name else newest())))
        return 0
    cases = [case for case in (SMOKE if options.smoke else CASES) if all(word in case.id for word in options.only)]
    if not options.smoke:
        cases = [dataclasses.replace(case, rows=options.rows) for case in cases]
    if not cases:
        raise SystemExit(f"no case has all of {', '.join(options.only)} in its name; they are {_names()}")
    print(title(about()), flush=True)
    began = time.perf_counter()
    if options.smoke:
        warm_up()
    finished = _run(cases, began + options.budget, options.smoke)
    print(f"\n{time.perf_counter() - began:.0f} s")
    whole = not (options.smoke or options.only or options.rows != ROWS)
    path = options.save or (default_path() if whole else None)
    if path:
        save(path, finished)
        print(f"\nresults: {path}")
    if not options.smoke:
        print()
        print_goals(Results(about(), {case.id: case for case in finished}))
    failed = [case.id for case in finished if "ours" not in case.contestants or case.contestants["ours"].wrong]
    if failed:
        print(f"\ngspo-kernels failed or gave a wrong answer: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(cases: Sequence[Case], deadline: float, smoke: bool) -> list[CaseResult]:
    speeds = {dtype: _speed(dtype) for dtype in (*DTYPES.values(), torch.float64)}
    estimates = [_estimate(case, speeds) for case in cases]
    finished = []
    for i, case in enumerate(cases):
        left = deadline - time.perf_counter()
        spare = max(left - sum(estimates[i:]), 0.0)  # beyond a first call of everybody
        seconds = estimates[i] + spare * estimates[i] / sum(estimates[i:])
        finished.append(measured(case, 1, seconds, left) if smoke else _in_a_process(case, seconds, left))
        print("", *lines(finished[-1]), sep="\n", flush=True)
    return finished


def _in_a_process(case: Case, seconds: float, left: float) -> CaseResult:
    """Of its own: what a case leaves in a heap would change what the next one seems to need."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), warm_up) as executor:
        return executor.submit(measured, case, FURTHER_ROUNDS, seconds, left).result()


def _speed(dtype: torch.dtype) -> float:
    """Operations per second of a product."""
    left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
    torch.mm(left, right)
    began = time.perf_counter()
    torch.mm(left, right)
    return 2 * 1024**3 / (time.perf_counter() - began)


def _estimate(case: Case, speeds: dict[torch.dtype, float]) -> float:
    """Seconds that a case's first calls may take: products, walks over the logits, compilations, and the truth."""
    entrants = [contestant for contestant in CONTESTANTS if not left_out(contestant, case)]
    compiling = sum(contestant.compiles for contestant in entrants)
    call = 1.3 * case.work.products() * case.unit / speeds[DTYPES[case.dtype]] + 5e-9 * case.rows * case.vocab
    truth = 2.0 * case.unit / speeds[torch.float64]
    return (len(entrants) + compiling) * call + 15.0 * compiling + truth


def _names() -> str:
    return ", ".join(case.id for case in CASES)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear", description="The losses from hidden states against their peers, on a CPU."
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--rows", type=int, default=ROWS, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose names have all these words")
    parser.add_argument("--budget", type=float, default=1200.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--save", type=Path, metavar="FILE", help="a whole run's: results/linear-cpu-<name>.json")
    parser.add_argument(
        "--markdown", nargs="?", type=Path, const=Path(), metavar="FILE", help="print the table of results that exist"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
