"""This tree against another commit: both are built and run in turn. Fails if this tree is slower beyond the noise.

    python -m benchmarks.compare <commit>

Each round is two fresh processes, one a commit, in the order A B, B A, A B, ...: a drift of the machine's speed affects
both alike. A round gives one ratio a case, and a case fails where the median ratio exceeds 1 by more than 5% and by
more than three standard errors of that median, estimated from the median absolute deviation. Both commits run this
tree's benchmarks, which use the public API alone; files that git does not know yet are part of this tree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gspo_kernels

from .cases import GATE, GATE_ROWS, build
from .contestants import GATED, contestants_of
from .race import Rounds, race
from .results import REPOSITORY

LEAST_SLOWDOWN = 0.05
STANDARD_ERRORS = 3.0
IN_PROCESS = Rounds(least=5, most=15, seconds=0.7)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", nargs="?", metavar="BASE", help="the commit to compare with, such as HEAD or main")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of processes (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name has this word")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(options.only)))
        return 0
    if not options.base:
        parser.error("BASE is missing: name the commit to compare with, as in make bench-compare BASE=HEAD~1")
    base = _git("rev-parse", "--verify", f"{options.base}^{{commit}}")
    if options.rounds < 3:
        parser.error(f"--rounds: expected at least 3, to tell noise from change; got {options.rounds}")
    with both_built(base) as (ours, theirs):
        ratios = alternate(ours, theirs, options.rounds, options.only)
    return report(ratios, base)


def measure(only: str) -> dict[str, float]:
    """Seconds by case and contestant, in this process, whose working directory has the package that is measured."""
    assert Path(gspo_kernels.__file__).resolve().parents[1] == Path.cwd().resolve(), gspo_kernels.__file__
    seconds: dict[str, float] = {}
    for case in GATE:
        chosen = [c for c in contestants_of(case.work) if c.name in GATED and only in f"{case.id}-{c.name}"]
        for name, outcome in race(build(case, GATE_ROWS), chosen, IN_PROCESS).items() if chosen else ():
            if outcome.error is not None:
                raise outcome.error
            seconds[f"{case.id}-{name}"] = min(outcome.seconds)  # whatever else the machine does only adds
    return seconds


def alternate(ours: Path, theirs: Path, rounds: int, only: str) -> dict[str, list[float]]:
    """Time of this tree over time of the base, per case and round."""
    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        trees = (theirs, ours) if number % 2 == 0 else (ours, theirs)
        measured = {tree: _run_worker(tree, only) for tree in trees}
        for key, seconds in measured[ours].items():
            ratios.setdefault(key, []).append(seconds / measured[theirs][key])
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return ratios


def report(ratios: dict[str, list[float]], base: str) -> int:
    """Prints a line per case; 1 if any is slower beyond the noise."""
    if not ratios:
        print("no case has that word in its name")
        return 2
    print(f"time of this tree / time of {base[:12]}, {GATE_ROWS} rows\n")
    print(f"{'case':<48} {'median':>7} {'spread':>15} {'limit':>7}")
    slower = 0
    for key, values in ratios.items():
        median, limit = statistics.median(values), 1.0 + max(LEAST_SLOWDOWN, STANDARD_ERRORS * standard_error(values))
        word = "SLOWER" if median > limit else "faster" if median < 2.0 - limit else ""
        slower += word == "SLOWER"
        print(f"{key:<48} {median:7.3f} {min(values):7.3f}-{max(values):.3f} {limit:8.3f}  {word}")
    print(f"\n{slower} of {len(ratios)} cases are slower beyond the noise" if slower else "\nno case is slower")
    return 1 if slower else 0


def standard_error(values: Sequence[float]) -> float:
    """Of the median, if the values are normal but for outliers."""
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return math.sqrt(math.pi / 2 / len(values)) * deviation


@contextmanager
def both_built(base: str) -> Iterator[tuple[Path, Path]]:
    """Folders with the package of this tree and of the base, built, and this tree's benchmarks; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gspo-compare-") as name:
        folder = Path(name)
        ours, theirs = folder / "source-this", folder / "source-base"
        try:
            _git("worktree", "add", "--quiet", "--detach", str(theirs), base)
            for file in _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0"):
                if file and (REPOSITORY / file).is_file():
                    (ours / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(REPOSITORY / file, ours / file)
            for source, target in ((ours, "this"), (theirs, "base")):
                print(f"building {target}", file=sys.stderr)
                _build(source, folder / target)
            yield folder / "this", folder / "base"
        finally:
            shutil.rmtree(theirs, ignore_errors=True)
            _git("worktree", "prune")


def _build(source: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    _output(command, f"the build of {source.name}", env={**os.environ, "GSPO_KERNELS_REQUIRE_NATIVE": "1"})
    shutil.copytree(REPOSITORY / "benchmarks", target / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "tests").mkdir(exist_ok=True)
    shutil.copy2(REPOSITORY / "tests" / "oracle.py", target / "tests")


def _run_worker(tree: Path, only: str) -> dict[str, float]:
    """`tree` is the working directory, so its packages are the ones imported, whatever else is installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "benchmarks.compare", "--worker", "--only", only]
    printed = _output(command, f"the benchmarks of {tree.name}", cwd=tree, env=environment)
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def _git(*arguments: str) -> str:
    return _output(["git", "-C", str(REPOSITORY), *arguments], f"git {arguments[0]}").strip()


def _output(command: list[str], what: str, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{what} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
