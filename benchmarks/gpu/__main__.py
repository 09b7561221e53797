"""Runs the parts in order, the most valuable first, within one budget of time; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .goals import print_goals
from .parts import REPOSITORY, Part, run
from .report import Report

NO_DEVICE = 2  # exit code
WORKS = ("gspo", "gspo_on_policy", "forward", "grpo", "gspo_inactive")
ROWS, SMOKE_ROWS = (8_192, 1_024, 32_768), 16  # the first carries the goals
OWN, SHAPES = ("gspo_on_policy", "grpo", "ppo"), ("bf16-151936", "bf16-151937", "fp32-151936", "fp32-151937")
ONE_READ = (  # the first carry the goals; cases that share logits stand together, they are built once
    *(f"{work}-bf16-151936-{rows}" for rows in ROWS[:2] for work in OWN),
    *(f"{work}-{shape}-4096" for shape in SHAPES for work in OWN[:2]),
    *(f"{work}-bf16-151936-{ROWS[2]}" for work in OWN),
)
SMOKE_ONE_READ = (*(f"{work}-bf16-100-16" for work in OWN), "grpo-fp32-101-16")
LINEAR_ITEMS = ("dense", "inactive", "frozen_head", "forward", "products")
KERNELS = ("forward", "backward", "forward_backward")
FOLDER = REPOSITORY / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    began = time.monotonic()
    deadline = began + options.minutes * 60
    signal.signal(signal.SIGTERM, _terminated)
    environment = _environment(options.smoke)
    options.output.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix="gspo-gpu-") as name:  # the files' names need the GPU's first
        first = Report(Path(name) / "report.json")
        log = Path(name) / "log"
        status = run(_environment_part(options.smoke), first, log, deadline, environment)
        said = log.read_bytes()
        if status == "absent":
            print(f"benchmarks.gpu needs a CUDA device: {first.get('parts', 'environment', 'reason')}", file=sys.stderr)
            print("(--smoke tries the machinery on the CPU)", file=sys.stderr)
            return NO_DEVICE
    path = options.output / f"gpu-{slug(first.get('machine', 'gpu') or 'unknown')}.json"
    log, report = path.with_suffix(".log"), Report(path, _before(path) if options.only else None)
    with log.open("ab" if options.only else "wb") as file:
        file.write(said)
    report.put(("machine",), first.get("machine"))
    report.put(("parts", "environment"), first.get("parts", "environment"))
    report.save()
    print(f"results: {path}", flush=True)

    statuses = {"environment": status}
    for part in parts(options):
        wanted = part.name if part.name in options.only else part.name.split("-")[0]
        if (options.only and wanted not in options.only) or wanted in options.skip:
            continue
        part = _with_bandwidth(part, report)
        print(f"{part.name}, {max(deadline - time.monotonic(), 0):.0f} s left", flush=True)
        statuses[part.name] = run(part, report, log, deadline, environment)
        report.put(("parts", part.name, "commit"), report.get("machine", "commit"))
        report.save()
        print(f"  {statuses[part.name]} {report.get('parts', part.name, 'reason') or ''}".rstrip(), flush=True)
    print(f"\n{time.monotonic() - began:.0f} s\n")
    if not options.smoke:
        print_goals(report.content)
    return 1 if {"failed", "timed out"} & set(statuses.values()) else 0


def parts(options: argparse.Namespace) -> list[Part]:
    """After the environment. What goals stand on comes before what only confirms it."""
    smoke = ("--smoke",) if options.smoke else ()
    sizes = (SMOKE_ROWS,) if options.smoke else ROWS

    def speed(rows: int, limit: float) -> Part:
        return Part.of(
            "speed", f"speed-{rows}", (*smoke, str(rows), "{bandwidth}"), limit=limit, least=15.0, patience=75.0,
            items=WORKS, fallback=":ours",
        )  # fmt: skip

    found = [
        Part.of("extension", arguments=smoke, limit=180.0, patience=180.0),
        Part.of("bandwidth", arguments=smoke, limit=60.0),
        speed(sizes[0], 200.0),
        Part.of(
            "linear", arguments=smoke, limit=110.0, least=15.0, patience=75.0, items=LINEAR_ITEMS, fallback=":ours"
        ),
        # In a process of its own: kernels of which less is known take no other number along.
        Part.of(
            "one_read",
            arguments=(*smoke, "{bandwidth}"),
            limit=100.0,
            least=15.0,
            patience=40.0,
            items=SMOKE_ONE_READ if options.smoke else ONE_READ,
        ),
        Part.of("suite", "tests", smoke, limit=240.0, least=15.0, patience=120.0, items=_test_files(options.smoke)),
        *(speed(rows, 120.0) for rows in sizes[1:]),
        Part.of("sanitizer", "sanitizer-memcheck", (*smoke, "memcheck"), limit=100.0, least=15.0, patience=100.0),
        Part.of("sanitizer", "sanitizer-racecheck", (*smoke, "racecheck"), limit=60.0, least=15.0, patience=60.0),
    ]
    if options.tune or "tuning" in options.only:
        found.append(Part.of("tuning", arguments=smoke, limit=300.0, least=20.0, patience=60.0, items=KERNELS))
    return found


def _environment_part(smoke: bool) -> Part:
    return Part.of("environment", arguments=("--smoke",) if smoke else (), limit=90.0)


def _with_bandwidth(part: Part, report: Report) -> Part:
    bandwidth = report.get("bandwidth", "copy", "bytes_per_second") or 0
    command = tuple(str(bandwidth) if word == "{bandwidth}" else word for word in part.command)
    return Part(**{**vars(part), "command": command})


def _test_files(smoke: bool) -> tuple[str, ...]:
    """Those about the GPU first."""
    if smoke:
        return ("test_advantages.py",)
    names = sorted(path.name for path in (REPOSITORY / "tests").glob("test_*.py"))
    return tuple(sorted(names, key=lambda name: not re.search("cuda|gpu|triton", name)))


def _environment(smoke: bool) -> dict[str, str]:
    """Without what would change the package, or the meaning of a time."""
    removed = {"GSPO_KERNELS_TEST_DEVICE", "GSPO_KERNELS_DEBUG", "CUDA_LAUNCH_BLOCKING", "PYTHONSAFEPATH"}
    if not smoke:
        removed.add("TRITON_INTERPRET")
    return {**{key: value for key, value in os.environ.items() if key not in removed}, "PYTHONUNBUFFERED": "1"}


def _before(path: Path) -> dict[str, Any] | None:
    """What an earlier run left: with --only, the other parts' results stay."""
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU has to show.")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results; smoke: a new one")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="speed, speed-8192, tests, ...")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART")
    parser.add_argument("--tune", action="store_true", help="then sweep launch sizes in what time is left")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    names = {part.name for part in parts(argparse.Namespace(smoke=options.smoke, tune=True, only=[]))}
    known = names | {name.split("-")[0] for name in names}
    for name in (*options.only, *options.skip):
        if name not in known:
            parser.error(f"expected parts among {', '.join(sorted(known))}; got {name!r}")
    if options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="gspo-gpu-smoke-")) if options.smoke else FOLDER
    return options


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)  # by way of every `finally`, so that no part runs on


if __name__ == "__main__":
    sys.exit(main())
