"""What a GPU is measured for, in two runs of one program: python -m benchmarks.gpu [--more]

    python -m benchmarks.gpu                            240 s: tests, profiles, our kernels, variants, counters
    python -m benchmarks.gpu --more                     390 s: peers, linear, other sizes, sanitizers; adds to the first
    python -m benchmarks.gpu --only one_read:grpo-bf16-151936-8192   one part, and one of its items
    python -m benchmarks.gpu --smoke                    no GPU: tiny shapes on the CPU; does the machinery itself work?
    python -m benchmarks.gpu_page [results.json]        fills the tables of docs/gpu.md and README.md
    python -m benchmarks.gpu_carried wheels|build|cache    prepares what a machine without a network lacks

The runs use the Python on PATH, need no network, and write gpu-<name of the GPU>.json and .log to benchmarks/results or
to --output. Each part is a process with a time limit (`gpu_parts.py`): a crash, a hang or a broken CUDA context loses
what that process was running and nothing else, and the results file is complete at any moment. `gpu_speed.py` checks
each answer before it times it. A peer that does not import is reported as absent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from . import gpu_carried
from .gpu_parts import REPOSITORY, Part, Report, Starter, run

NO_DEVICE, FAILED, KILLED = 2, 1, 143  # exit codes
AT_THE_END = 6.0  # seconds of a run for what comes after its parts: a saved cache, the tables
FOLDER = REPOSITORY / "benchmarks" / "results"

# ---- the table of both runs

ROWS, SMOKE_ROWS = 8_192, 16  # the pages show times at 8,192 rows
WORKS = ("gspo", "gspo_on_policy", "forward", "grpo", "gspo_inactive")
OWN, SHAPES = ("gspo_on_policy", "grpo", "ppo"), ("bf16-151936", "bf16-151937", "fp32-151936", "fp32-151937")
# The first six cases are at the sizes of the pages. Cases that share logits are neighbours: the logits are made once.
ONE_READ = (
    *(f"{work}-bf16-151936-{rows}" for rows in (8_192, 1_024) for work in OWN),
    *(f"{work}-{shape}-4096" for shape in SHAPES for work in OWN[:2]),
    *(f"{work}-bf16-151936-32768" for work in OWN),
)
SMOKE_ONE_READ = (*(f"{work}-bf16-100-16" for work in OWN), "grpo-fp32-101-16")
LINEAR = (
    "dense", "inactive", "frozen_head", "forward", "profile_dense", "profile_inactive", "products", "rows",
    "chunks_dense", "chunks_frozen_head", "chunks_forward",
)  # fmt: skip
CONTEXTS = ("2x32768", "1x1048576")
PROFILED = (
    "forward", "gspo", "gspo_on_policy", "gspo_on_policy_fresh", "gspo_on_policy_cuda", "grpo", "grpo_cuda", "ppo_cuda",
    "gspo_inactive", "gspo_fresh",
)  # fmt: skip
KERNELS = ("forward", "backward", "forward_backward", "one_read")
TESTS = (
    "test_rows.py", "test_triton_rows.py", "test_cuda_rows.py", "test_losses.py", "test_autograd.py", "test_kept.py",
    "test_triton_kept.py", "test_triton_sparse.py",
)  # fmt: skip
MORE_TESTS = (
    "test_row_independence.py", "test_linear_bits.py", "test_linear.py", "test_linear_precision.py",
    "test_vocab_size.py", "test_stats.py", "test_group_of_one.py", "test_nan.py", "test_inputs.py",
    "test_derivatives.py", "test_arguments.py", "test_objectives.py", "test_terms.py", "test_products.py",
    "test_linear_plans.py", "test_linear_logprobs.py", "test_linear_logits.py", "test_linear_work.py",
    "test_linear_errors.py", "test_linear_training.py", "test_errors.py", "test_fused_operators.py",
    "test_launches.py", "test_advantages.py", "test_rollout.py",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One command: its time limit, and its parts in order, the environment first, then the most valuable."""

    name: str
    seconds: float
    parts: tuple[Part, ...]


ENVIRONMENT = Part("environment", "gpu_meter.environment", limit=40.0, least=5.0, takes=10.0, patience=40.0)
EXTENSION = Part("extension", "gpu_carried.extension", limit=100.0, least=3.0, takes=3.0, patience=100.0, light=True)

# `Part` says what the fields mean. The parts before one leave it its `least` seconds.
FIRST_RUN = Run(
    "gpu",
    240.0,
    (
        ENVIRONMENT,
        EXTENSION,
        Part("bandwidth", "gpu_meter.bandwidth", limit=20.0, least=5.0, takes=5.0, patience=20.0),
        Part("tests", "gpu_suite.run", limit=70.0, least=20.0, takes=65.0, patience=30.0, items=TESTS, light=True),
        Part("profile", "gpu_profile.run", limit=40.0, least=12.0, takes=15.0, patience=25.0, arguments=(str(ROWS),),
             items=PROFILED),
        Part("speed", "gpu_speed.speed", limit=42.0, least=15.0, takes=25.0, patience=25.0, arguments=(str(ROWS),),
             items=tuple(f"{work}:ours" for work in WORKS)),
        # A process of its own: a fault of these kernels loses no other number.
        Part("one_read", "gpu_speed.one_read", limit=40.0, least=12.0, takes=25.0, patience=25.0,
             items=ONE_READ[:6]),
        Part("variants", "gpu_variants.run", limit=48.0, least=15.0, takes=40.0, patience=30.0, items=KERNELS),
        Part("counters", "gpu_counters.run", limit=60.0, least=15.0, takes=40.0, patience=60.0,
             items=KERNELS),  # silent while ncu runs
    ),
)  # fmt: skip
SECOND_RUN = Run(
    "gpu-more",
    390.0,
    (
        ENVIRONMENT,
        EXTENSION,
        Part("peers", "gpu_speed.speed", limit=75.0, least=20.0, takes=68.0, patience=40.0, arguments=(str(ROWS),),
             items=WORKS, fallback=":ours"),
        Part("linear", "gpu_linear.run", limit=95.0, least=20.0, takes=79.0, patience=40.0, items=LINEAR,
             fallback=":ours"),
        Part("context", "context.on_gpu", limit=40.0, least=15.0, takes=15.0, patience=30.0, items=CONTEXTS),
        Part("speed-1024", "gpu_speed.speed", limit=35.0, least=10.0, takes=25.0, patience=20.0,
             arguments=("1024",), items=WORKS, fallback=":ours"),
        Part("speed-32768", "gpu_speed.speed", limit=45.0, least=15.0, takes=39.0, patience=25.0,
             arguments=("32768",), items=WORKS, fallback=":ours"),
        Part("one_read-more", "gpu_speed.one_read", limit=60.0, least=15.0, takes=33.0, patience=20.0,
             items=ONE_READ[6:]),
        Part("tests-more", "gpu_suite.run", limit=95.0, least=15.0, takes=60.0, patience=36.0, items=MORE_TESTS,
             light=True),
        Part("memcheck", "gpu_sanitizer.run", limit=60.0, least=14.0, takes=14.0, patience=60.0,
             arguments=("memcheck",), light=True),
        Part("racecheck", "gpu_sanitizer.run", limit=45.0, least=10.0, takes=35.0, patience=45.0,
             arguments=("racecheck",), light=True),
    ),
)  # fmt: skip

# In a smoke run: tiny shapes, and one item or two of each part, so that a run takes seconds.
_SMOKE_ITEMS = {
    "tests": ("test_advantages.py",),
    "tests-more": ("test_advantages.py",),
    "profile": ("gspo", "grpo_cuda"),
    "speed": ("gspo:ours", "forward:ours"),
    "peers": ("gspo", "gspo_on_policy"),
    "one_read": SMOKE_ONE_READ[:2],
    "one_read-more": SMOKE_ONE_READ[2:],
    "variants": ("forward", "one_read"),
    "counters": ("forward", "one_read"),
    "linear": ("dense", "profile_dense", "products"),
    "context": ("2x1024",),
    "speed-1024": ("grpo",),
    "speed-32768": ("gspo_inactive",),
}


def runs(smoke: bool = False) -> dict[str, Run]:
    """By name."""
    return {run.name: (_smoke(run) if smoke else run) for run in (FIRST_RUN, SECOND_RUN)}


def _smoke(run: Run) -> Run:
    def smoke(part: Part) -> Part:
        rows = {str(ROWS): SMOKE_ROWS, "1024": SMOKE_ROWS // 2, "32768": SMOKE_ROWS * 2}
        arguments = tuple(str(rows.get(argument, argument)) for argument in part.arguments)
        return replace(part, arguments=("--smoke", *arguments), items=_SMOKE_ITEMS.get(part.name, ()))

    return replace(run, parts=tuple(smoke(part) for part in run.parts))


# ---- a run


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    chosen: Run = runs(options.smoke)["gpu-more" if options.more else "gpu"]
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _terminated)
    environment = _environment(options.smoke)
    brought = {} if options.smoke else gpu_carried.use(environment)

    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output / "gpu-unnamed.json")
    log = report.path.with_suffix(".log")
    log.write_bytes(b"")
    report.put(("carried",), brought)
    starter = Starter(environment, log)
    try:
        return _run(options, chosen, report, began, starter)
    except BaseException:
        for part in (report.get("parts") or {}).values():
            if part.get("status") == "running":
                part |= {"status": "failed", "reason": f"the run was ended at {part.pop('at', '') or 'its start'}"}
        _put_run(report, chosen, began)
        raise
    finally:
        starter.close()


def _run(options: argparse.Namespace, chosen: Run, report: Report, began: float, starter: Starter) -> int:
    deadline = began + (options.seconds or chosen.seconds) - AT_THE_END
    first, *parts = selected(chosen, options.only, options.skip)
    statuses = {first.name: run(first, report, deadline, starter)}
    if statuses[first.name] == "absent":
        print(f"benchmarks.gpu needs a CUDA device: {report.get('parts', first.name, 'reason')}", file=sys.stderr)
        print("(--smoke tries the machinery on the CPU)", file=sys.stderr)
        for path in (report.path, report.path.with_suffix(".log")):
            path.unlink(missing_ok=True)
        return NO_DEVICE
    _name(options, report)
    starter.log = report.path.with_suffix(".log")
    print(f"results: {report.path}", flush=True)
    _put_run(report, chosen, began)
    for name, said in (report.get("carried") or {}).items():
        print(f"  {name}: {said}", flush=True)

    for number, part in enumerate(parts):
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
        folder = Path(starter.environment.get("TRITON_CACHE_DIR", os.devnull))
        print(gpu_carried.save_cache(folder, options.save_cache), flush=True)
    if not options.smoke:
        from . import gpu_page

        print(gpu_page.tables([report.content]), gpu_page.ahead(report.content), sep="\n")
    return FAILED if {"failed", "timed out"} & set(statuses.values()) else 0


def selected(chosen: Run, only: Sequence[str], skip: Sequence[str]) -> list[Part]:
    """The environment, and the other parts that --only and --skip leave, each with the items that --only names."""
    first, *others = chosen.parts
    named: dict[str, list[str]] = {}
    for word in only:
        name, _, items = word.partition(":")
        named.setdefault(name, []).extend(filter(None, items.split(",")))
    found = [first]
    for part in others:
        if part.name not in skip and (not only or part.name in named):
            # An item may be named without its suffix (gspo for gspo:ours). An unknown one is tried as it is.
            full = {item.partition(":")[0]: item for item in part.items} | {item: item for item in part.items}
            chosen_items = tuple(full.get(name, name) for name in named.get(part.name, []))
            found.append(replace(part, items=chosen_items or part.items))
    return found


def _name(options: argparse.Namespace, report: Report) -> None:
    """Names the results after the GPU. --only and --more add to the results that are there."""
    gpu = (report.content.get("machine") or {}).get("gpu") or "unknown"
    path = options.output / f"gpu-{slug(str(gpu))}.json"
    new, log = report.path.with_suffix(".log"), path.with_suffix(".log")
    add = (options.only or options.more) and path.exists()
    if add:
        with contextlib.suppress(ValueError):
            report.content = _merged(json.loads(path.read_text()), report.content)
    report.path.unlink(missing_ok=True)
    report.path = path
    with log.open("ab" if add else "wb") as file:
        file.write(new.read_bytes())
    new.unlink()
    report.save()


def _merged(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Cases, parts and runs of both; where both have one, the new one."""
    found = {**earlier, **now}
    for key in now.keys() & earlier.keys() - {"machine"}:
        if isinstance(now[key], dict) and isinstance(earlier[key], dict):
            found[key] = {**earlier[key], **now[key]}
    return found


def _put_run(report: Report, chosen: Run, began: float, **more: Any) -> None:
    seconds = round(time.monotonic() - began, 1)
    report.put(("runs", chosen.name), {"limit": chosen.seconds, "seconds": seconds, "finished": False, **more})
    report.save()


def _environment(smoke: bool) -> dict[str, str]:
    """Without the variables that change the package or the meaning of a time."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What a GPU is measured for.")
    parser.add_argument("--more", action="store_true", help="the second run: peers, linear, other sizes, sanitizers")
    parser.add_argument("--seconds", type=float, help="for everything (default: the run's own limit)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results; smoke: a new one")
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
    raise SystemExit(KILLED)  # runs every `finally`, so that no part continues


if __name__ == "__main__":
    sys.exit(main())
