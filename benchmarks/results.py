"""What a run leaves behind: one JSON with the machine, the versions and, for every case, each contestant's numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gspo_kernels

from .cases import Problem
from .gpu_parts import rounded
from .race import Outcome, words

FOLDER = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).resolve().parent.parent


def record(
    problem: Problem, outcomes: Mapping[str, Outcome], of: Callable[[str, Outcome], dict[str, Any]], **more: Any
) -> dict[str, Any]:
    """A case: its sizes, each contestant that was timed (seconds and what `of` says), and why others were not."""
    case = problem.case
    timed = {name: outcome for name, outcome in outcomes.items() if outcome.seconds and not outcome.error}
    return {
        "id": case.id,
        "work": case.work.name,
        "title": case.work.title,
        "dtype": case.dtype,
        "vocab": case.vocab,
        "rows": problem.rows,
        "sequences": case.sequences,
        **more,
        "contestants": {name: {**times(outcome), **of(name, outcome)} for name, outcome in timed.items()},
        "errors": {name: words(outcome.error) for name, outcome in outcomes.items() if outcome.error},
        "absent": {name: outcome.absent for name, outcome in outcomes.items() if outcome.absent},
    }


def line(key: str, found: dict[str, Any]) -> str:
    """A case in one line, for a terminal."""
    parts = [
        f"{name} {m['median'] * 1e3:,.3f} ms" + (f" (wrong: {m['wrong'][:80]})" if m.get("wrong") else "")
        for name, m in found["contestants"].items()
    ]
    parts += [f"{name}: {error.splitlines()[0][:80]}" for name, error in found["errors"].items()]
    return f"{key}: {', '.join(parts)}"


def arguments_of(module: str, doc: str | None, kind: str = "") -> argparse.ArgumentParser:
    """What the commands of this folder have in common; of those that save results of a `kind` more."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=(doc or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    if kind:
        parser.add_argument("--save", type=Path, metavar="FILE", help=f"a whole run's: results/{kind}-<name>.json")
        exist = "print results that exist"
        parser.add_argument("--markdown", nargs="?", type=Path, const=Path(), metavar="FILE", help=exist)
    return parser


def times(outcome: Outcome) -> dict[str, Any]:
    """In seconds."""
    seconds = outcome.seconds
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "rounds": len(seconds)}


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(content), indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """The file's content, with `cases` by id."""
    content: dict[str, Any] = json.loads(path.read_text())
    if "cases" in content:
        content["cases"] = {case["id"]: case for case in content["cases"]}
    return content


def newest(kind: str) -> Path:
    """The committed results <kind>-*.json with the latest date; kind: "cpu", "linear-cpu", ..."""
    candidates = list(FOLDER.glob(f"{kind}-*.json"))
    if not candidates:
        raise SystemExit(f"no {kind}-*.json in {FOLDER}: run the benchmark, or name a file")
    return max(candidates, key=lambda path: str(json.loads(path.read_text())["machine"]["date"]))


def committed(kind: str) -> list[dict[str, Any]]:
    """The results of this kind of every machine, by the names of the files."""
    return [load(path) for path in sorted(FOLDER.glob(f"{kind}-*.json"))]


def default_path(kind: str, by_products: bool = False) -> Path:
    """cpu-epyc-2cores.json, or `by_products` linear-cpu-epyc-native-2cores.json."""
    here = machine()
    cpu = re.search(r"epyc|xeon|ryzen|core|neoverse|apple", str(here["cpu"]).lower())
    products = [here["bf16_products"]] if by_products else []
    return FOLDER / f"{'-'.join([kind, cpu.group() if cpu else 'other', *products])}-{here['cores']}cores.json"


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What the numbers of this process depend on; `packages` with their versions, None for what is not installed."""
    # Here, for compare.py runs these files on older commits, which lack them.
    from gspo_kernels.doctor.machine import memory_bytes, processor_model
    from gspo_kernels.doctor.versions import version_of
    from gspo_kernels.linear.cpu_products import cpu_products

    backend = gspo_kernels.explain(torch.empty(1, 1, 2)).split(": ")[0]
    found: dict[str, Any] = {
        "cpu": processor_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": backend,  # with its instruction set
        "bf16_products": cpu_products(torch.bfloat16).name,
        "bf16_products_are": cpu_products(torch.bfloat16).reason,
        "gspo_kernels": gspo_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    return {**found, "packages": {name: version_of(name) for name in packages}} if packages else found


def title(machine: dict[str, Any]) -> str:
    """The machine and the versions, in a line or two."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("packages", {}).items() if version)
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return (
        f"{machine['cpu']}, {threads}, {machine['backend']}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}" + (f"\n{versions}" if versions else "")
    )


def size(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def commit() -> str:
    """The commit that this tree stands on, "-dirty" if files differ from it; "unknown" outside a repository.

    GSPO_BENCH_COMMIT says it where a tree was copied without its history.
    """
    if told := os.environ.get("GSPO_BENCH_COMMIT"):
        return told
    from gspo_kernels.doctor.versions import commit_of

    return commit_of(REPOSITORY) or "unknown"
