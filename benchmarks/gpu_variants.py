"""Launch variants of each row kernel, timed: the best entry of `LAUNCH`, and the best prebuilt CUDA kernel.

Every time is of a whole call in which one kernel varies and the others stay as the package has them. Child processes
compile and check every variant beforehand, on few rows and several at a time: one that crashes, hangs or returns a
wrong answer is recorded and not timed. Each variant is recorded once it is timed: the package's own first, and once
more at the end. The difference of those two is noise.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from gspo_kernels.rows import cuda_rows, triton_rows
from gspo_kernels.rows.triton_rows import LAUNCH, Launch

from .cases import Problem
from .contestants import Run, Unfit
from .gpu_meter import finish, meter_of
from .gpu_parts import REPOSITORY, Context
from .gpu_speed import BY_NAME, build_on
from .race import words
from .truth import check

# What shows a kernel: works and contestants. The first decides which variant is the best.
SHOWN_BY = {
    "forward": (("forward", "ours"),),
    "backward": (("gspo", "ours"),),
    "forward_backward": (("gspo_on_policy", "ours"), ("gspo_on_policy", "ours_fresh")),
    "one_read": (("gspo_on_policy", "ours_cuda"), ("gspo_on_policy", "ours_cuda_fresh"), ("grpo", "ours_cuda")),
}
# Changes of the package's launch sizes that were close on an H200, or that may suit another GPU.
CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "forward": ({"num_warps": 2, "elements": 2_048}, {"num_warps": 8, "elements": 8_192}, {"max_registers": None}),
    "backward": (
        {"max_registers": None},
        {"max_registers": 168},
        {"num_warps": 8, "elements": 8_192},
        {"num_warps": 2, "elements": 2_048},
    ),
    "forward_backward": (
        {"prefetch": 1},
        {"prefetch": 3},
        {"kept": 1},
        {"kept": 0},
        {"num_warps": 8, "elements": 8_192, "prefetch": 4, "kept": 8},  # one program a multiprocessor, too
    ),
}
MOST, SMOKE_MOST = 12, 2  # of a kernel
ROWS, SMOKE_ROWS, COMPILED_ROWS, REPEATS = 8_192, 16, 1_024, 8
_PATIENCE = 30.0  # seconds for the child processes, at most half of what is left

Use = Callable[[], None]  # makes the package launch a variant


def run(context: Context) -> bool:
    """Arguments: the items, which are kernels."""
    tried = _tried_by_children(context, context.arguments)
    for kernel in context.arguments:
        missing = _missing(context.device, kernel)
        if missing:
            context.put("variants", kernel, value={"absent": missing})
        else:
            _measure_all(context, kernel, tried)
        context.finished(kernel)
    return True


def variants_of(kernel: str, most: int = MOST) -> dict[str, Use]:
    """By name; the first is the package's own."""
    if kernel == "one_read":
        native: Any = cuda_rows._native
        return {name: functools.partial(native.cuda_use_variant, name=name) for name in _cuda_variants()[:most]}
    return {
        name_of(launch): functools.partial(LAUNCH.__setitem__, kernel, launch) for launch in launches_of(kernel)[:most]
    }


def launches_of(kernel: str) -> list[Launch]:
    """The package's own launch, then changes of it. Each compiles differently."""
    current = LAUNCH[kernel]
    found: dict[str, Launch] = {}
    for changes in ({}, *CHANGES[kernel]):
        launch = current._replace(**changes)
        found.setdefault(_compiled(kernel, launch), launch)
    return list(found.values())


def _compiled(kernel: str, launch: Launch) -> str:
    """What Triton compiles: the same for launches that differ in a field that the kernel does not use."""
    return repr((triton_rows.sizes(kernel, launch, 2, 32), triton_rows.compiler_options(launch, 2, True)))


def name_of(launch: Launch) -> str:
    """The sizes, and other fields that differ from their defaults."""
    words = [f"{launch.num_warps} warps", f"{launch.elements} elements"]
    for name, default in Launch._field_defaults.items():
        value = getattr(launch, name)
        if value != default:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join(words)


def _most(context: Context) -> int:
    return SMOKE_MOST if context.smoke else MOST


def _cuda_variants() -> list[str]:
    """The prebuilt variants, the package's own first; none where the extension was built without them."""
    find = getattr(cuda_rows._native, "cuda_variants", None)
    return [] if find is None else list(find())


@contextmanager
def _restored(variants: dict[str, Use]) -> Iterator[None]:
    """Restores the package's own variant at the end."""
    try:
        yield
    finally:
        next(iter(variants.values()))()


def _missing(device: str, kernel: str) -> str:
    if kernel != "one_read":
        return triton_rows.unavailable_reason() if device == "cuda" else ""
    if not _cuda_variants():
        return "the extension has no prebuilt variants"
    try:
        BY_NAME["ours_cuda"].prepare(build_on(device, "grpo", COMPILED_ROWS if device == "cuda" else SMOKE_ROWS))
    except Unfit as reason:
        return str(reason)
    return ""


def _measure_all(context: Context, kernel: str, tried: dict[str, str]) -> None:
    rows, variants = SMOKE_ROWS if context.smoke else ROWS, variants_of(kernel, _most(context))
    current = next(iter(variants))
    context.at(f"{kernel}: building its inputs")
    problems = {work: build_on(context.device, work, rows) for work, _ in SHOWN_BY[kernel]}
    runs = {
        f"{work}, {contestant}": (problems[work], BY_NAME[contestant].prepare(problems[work]))
        for work, contestant in SHOWN_BY[kernel]
    }
    context.put("variants", kernel, value={"in_package": current, "rows": rows, "tried": {}})
    found: dict[str, float] = {}
    with _restored(variants):
        for name, use in (*variants.items(), (f"{current}, again", variants[current])):
            reason = tried.get(f"{kernel}:{name.removesuffix(', again')}", "no child process finished it in time")
            measured: dict[str, Any] = {"error": reason}
            if not reason:
                context.at(f"{kernel}: {name}")
                use()
                measured = {shown: _measure(context, *pair) for shown, pair in runs.items()}
                found[name] = measured[next(iter(runs))].get("median", float("inf"))
            context.put("variants", kernel, "tried", name, value=measured)
            finish()
    if found:
        best = min(found, key=lambda name: found[name])
        context.put("variants", kernel, "best", value=best.removesuffix(", again"))
        own = found.get(current, float("nan"))
        context.say(f"{kernel}: {best} {found[best] * 1e3:.3f} ms; in the package {current} {own * 1e3:.3f} ms")


def _measure(context: Context, problem: Problem, run_once: Run) -> dict[str, Any]:
    meter = meter_of(context.device)
    try:
        _check(problem, run_once)
        seconds = []
        for _ in range(1 if context.smoke else REPEATS):
            problem.restore()
            seconds.append(meter.timed(run_once))
    except Exception as error:  # too many registers, too little shared memory, a wrong answer: others may do
        meter.forget()
        return {"error": words(error)}
    finally:
        problem.restore()
    return {"median": statistics.median(seconds), "min": min(seconds)}


def _check(problem: Problem, run_once: Run) -> None:
    answer = run_once()
    if answer is not None:
        check(problem, *answer)


# ---- child processes, which compile, run and check


def _tried_by_children(context: Context, kernels: list[str]) -> dict[str, str]:
    """<kernel>:<variant> -> its error, or "", for the variants that a child finished in time."""
    jobs = [f"{kernel}:{name}" for kernel in kernels for name in variants_of(kernel, _most(context))]
    count = 1 if context.smoke else max(1, min(8, (os.cpu_count() or 2) // 2, len(jobs)))
    command = [sys.executable, "-m", "benchmarks.gpu_variants", *(["--smoke"] if context.smoke else [])]
    limit = min(_PATIENCE, context.left() / 2)
    context.at(f"compiling {len(jobs)} variants")

    def child(own: list[str]) -> list[tuple[str, str]]:
        try:
            output = subprocess.run([*command, *own], cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=limit).stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
        *lines, _ = output.decode(errors="replace").split("\n")  # the last one may be incomplete
        return [tuple(json.loads(line)) for line in lines if line.startswith("[")]

    with ThreadPoolExecutor(count) as threads:
        return dict(
            tried for of_child in threads.map(child, (jobs[i::count] for i in range(count))) for tried in of_child
        )


def main(arguments: list[str]) -> None:
    """Arguments: [--smoke] <kernel>:<variant>, ... Prints a line of JSON for each when it has run."""
    smoke = arguments[:1] == ["--smoke"]
    device, rows = ("cpu", SMOKE_ROWS) if smoke else ("cuda", COMPILED_ROWS)
    for job in arguments[smoke:]:
        kernel, _, name = job.partition(":")
        reason = ""
        try:
            variants = variants_of(kernel)
            with _restored(variants):
                variants[name]()
                for work, contestant in SHOWN_BY[kernel]:
                    problem = build_on(device, work, rows)
                    try:
                        _check(problem, BY_NAME[contestant].prepare(problem))
                        finish()
                    finally:
                        problem.restore()
        except Exception as error:
            reason = words(error)
        print(json.dumps([job, reason]), flush=True)
        finish()  # raises after an illegal access: this process can run nothing else


if __name__ == "__main__":
    main(sys.argv[1:])
