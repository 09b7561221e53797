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
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from . import carried
from .goals import print_goals
from .parts import REPOSITORY, Part, Starter, run
from .report import Report
from .runs import Run, runs

NO_DEVICE, FAILED, KILLED = 2, 1, 143  # exit codes
AT_THE_END = 6.0  # seconds of a run for what comes after its parts: the goals, which import torch
FOLDER = REPOSITORY / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    chosen: Run = runs(options.smoke)["gpu-more" if options.more else "gpu"]
    return _run(options, chosen)


def _run(options: argparse.Namespace, chosen: Run) -> int:
    began = time.monotonic()
    deadline = began + (options.seconds or chosen.seconds) - AT_THE_END
    signal.signal(signal.SIGTERM, _terminated)
    environment = _environment(options.smoke)
    brought = {} if options.smoke else carried.use(environment)

    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output / "gpu-unnamed.json")
    log = report.path.with_suffix(".log")
    log.write_bytes(b"")
    report.put(("carried",), brought)
    starter = Starter(environment, log)
    try:
        return _parts(options, chosen, report, began, deadline, starter)
    except BaseException:
        _close_killed(report, chosen, began)
        raise
    finally:
        starter.close()


def _parts(
    options: argparse.Namespace, chosen: Run, report: Report, began: float, deadline: float, starter: Starter
) -> int:
    parts = selected(chosen, options.only, options.skip)
    first, *parts = parts
    statuses = {first.name: run(first, report, deadline, starter)}
    if statuses[first.name] == "absent":
        print(f"benchmarks.gpu needs a CUDA device: {report.get('parts', first.name, 'reason')}", file=sys.stderr)
        print("(--smoke tries the machinery on the CPU)", file=sys.stderr)
        for path in (report.path, _log(report)):
            path.unlink(missing_ok=True)
        return NO_DEVICE
    _name(options, report)
    starter.log = _log(report)
    print(f"results: {report.path}", flush=True)
    _put_run(report, chosen, began)
    for name, said in (report.get("carried") or {}).items():
        print(f"  {name}: {said}", flush=True)

    for number, part in enumerate(parts):
        part = _with_bandwidth(part, report)
        starter.ahead = number + 1 < len(parts)
        kept = sum(later.least for later in parts[number + 1 :])
        print(f"{part.name}, {max(deadline - time.monotonic(), 0):.0f} s left", flush=True)
        statuses[part.name] = run(part, report, deadline - kept, starter)
        report.put(("parts", part.name, "commit"), report.get("machine", "commit"))
        _put_run(report, chosen, began)
        print(f"  {statuses[part.name]} {report.get('parts', part.name, 'reason') or ''}".rstrip(), flush=True)
    _put_run(report, chosen, began, finished=True)
    print(f"\n{time.monotonic() - began:.0f} s\n", flush=True)
    if options.save_cache:
        said = carried.save_cache(Path(starter.environment.get("TRITON_CACHE_DIR", os.devnull)), options.save_cache)
        print(said, flush=True)
    if not options.smoke:
        print_goals(report.content)
    return FAILED if {"failed", "timed out"} & set(statuses.values()) else 0


def selected(chosen: Run, only: Sequence[str], skip: Sequence[str]) -> list[Part]:
    """The environment, and of the other parts those that are wanted, with the items that are wanted."""
    first, *others = chosen.parts
    wanted: dict[str, list[str]] = {}
    for word in only:
        name, _, items = word.partition(":")
        wanted.setdefault(name, []).extend(filter(None, items.split(",")))
    found = [part for part in others if part.name not in skip and (not only or part.name in wanted)]
    return [first, *(_with_items(part, wanted.get(part.name, [])) for part in found)]


def _with_items(part: Part, names: Sequence[str]) -> Part:
    """An item may be named without its suffix (gspo for gspo:ours), and one that the table lacks is tried as it is."""
    if not names:
        return part
    items = [item for name in names for item in [*_matching(part, name), name][:1]]
    return replace(part, items=tuple(items))


def _matching(part: Part, name: str) -> list[str]:
    return [item for item in part.items if name in (item, item.partition(":")[0])]


def _log(report: Report) -> Path:
    return report.path.with_suffix(".log")


def _name(options: argparse.Namespace, report: Report) -> None:
    """Names the results after the GPU, and adds them to earlier ones of the same GPU where that is wanted."""
    gpu = _gpu(report.content)
    path, log = options.output / f"gpu-{slug(gpu)}.json", _log(report)
    before = options.before or (path if options.only or options.more else None)
    if before is not None and before.exists():
        earlier = _read(before)
        if _gpu(earlier) == gpu:
            report.content = _merged(earlier, report.content)
        else:
            print(f"{before}: not added to, it is of {_gpu(earlier)}", file=sys.stderr)
    report.path.unlink(missing_ok=True)
    report.path = path
    said = log.read_bytes()
    with _log(report).open("ab" if _log(report).exists() and before == path else "wb") as file:
        file.write(said)
    log.unlink()
    report.save()


def _merged(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Cases, parts and runs of both; what is in both is as it is now."""
    found = {**earlier, **now}
    for key in now.keys() & earlier.keys() - {"machine"}:
        if isinstance(now[key], dict) and isinstance(earlier[key], dict):
            found[key] = {**earlier[key], **now[key]}
    return found


def _gpu(content: dict[str, Any]) -> str:
    return str((content.get("machine") or {}).get("gpu") or "unknown")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return {}
    return found


def _put_run(report: Report, chosen: Run, began: float, **more: Any) -> None:
    seconds = round(time.monotonic() - began, 1)
    report.put(("runs", chosen.name), {"limit": chosen.seconds, "seconds": seconds, "finished": False, **more})
    report.save()


def _close_killed(report: Report, chosen: Run, began: float) -> None:
    """What was running when the run was ended from outside."""
    for part in (report.get("parts") or {}).values():
        if part.get("status") == "running":
            part |= {"status": "failed", "reason": f"the run was ended at {part.pop('at', '') or 'its start'}"}
    _put_run(report, chosen, began)


def _with_bandwidth(part: Part, report: Report) -> Part:
    bandwidth = report.get("bandwidth", "copy", "bytes_per_second") or 0
    arguments = tuple(str(bandwidth) if word == "{bandwidth}" else word for word in part.arguments)
    return replace(part, arguments=arguments)


def _environment(smoke: bool) -> dict[str, str]:
    """Without what would change the package, or the meaning of a time."""
    removed = {"GSPO_KERNELS_TEST_DEVICE", "GSPO_KERNELS_DEBUG", "CUDA_LAUNCH_BLOCKING", "PYTHONSAFEPATH"}
    if not smoke:
        removed.add("TRITON_INTERPRET")
    kept = {key: value for key, value in os.environ.items() if key not in removed}
    path = kept.get("PATH", os.defpath)
    if "/usr/local/cuda/bin" not in path.split(os.pathsep):  # ncu, nvcc and compute-sanitizer may be there
        path = os.pathsep.join([path, "/usr/local/cuda/bin"])
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1"}


def slug(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU has to show.")
    parser.add_argument("--more", action="store_true", help="the second run: peers, linear, other sizes, sanitizers")
    parser.add_argument("--seconds", type=float, help="for everything (default: the run's own limit)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results; smoke: a new one")
    parser.add_argument("--before", type=Path, metavar="FILE", help="earlier results, which this run adds to")
    part = "PART[:ITEM,...]"
    parser.add_argument("--only", nargs="+", default=[], metavar=part, help="speed, one_read:grpo-bf16-151936-8192")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART")
    parser.add_argument("--save-cache", type=Path, metavar="FILE", help="what Triton has compiled, as a tar file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    options = parser.parse_args(arguments)
    chosen = runs(options.smoke)["gpu-more" if options.more else "gpu"]
    known = [part.name for part in chosen.parts]
    for word in (*options.only, *options.skip):
        if word.partition(":")[0] not in known:
            which = "second" if options.more else "first"
            parser.error(f"the {which} run has the parts {', '.join(known)}; got {word!r}")
    if options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="gspo-gpu-smoke-")) if options.smoke else FOLDER
    return options


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(KILLED)  # by way of every `finally`, so that no part runs on


if __name__ == "__main__":
    sys.exit(main())
