"""A CUPTI profile of each work: each kernel's time, the bytes it must move, its share of the measured copy; the gaps.

Each call runs on a swept cache with the host ahead (`gpu_meter.py`), between two waits that show in the profile, so
that what restores the logits is not counted. Where CUPTI fails, the time of the whole work and the error are recorded.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cases import Problem
from .contestants import Run, Unfit
from .gpu_meter import CudaMeter, finish, idle_seconds, meter_of, on_device
from .gpu_parts import Context
from .gpu_speed import BY_NAME, build_on, problems, units
from .race import words
from .truth import WrongAnswer, check

CALLS, SMOKE_CALLS = 5, 2
_WAIT = "spin_kernel"  # of torch.cuda._sleep
# Bytes a row of the sequence and batch kernels: statistics, old log-probabilities and mask in, gradients out.
_STAGE_BYTES = 24


@dataclass(frozen=True)
class Event:
    """One kernel, copy or fill on the device; in seconds."""

    name: str
    start: float
    end: float


def run(context: Context) -> bool:
    """Arguments: rows, then the items.

    An item is a work: this package in Triton with the gradient over the logits. `<work>_fresh` has a fresh gradient;
    `<work>_cuda` and `<work>_cuda_fresh` run CUDA C++.
    """
    rows, *items = context.arguments
    good = True
    for item, problem in problems(
        context, items, lambda item: build_on(context.device, contestant_of(item)[0], int(rows))
    ):
        try:
            found = _profile(context, problem, item, contestant_of(item)[1])
            good &= not found["wrong"]
            context.put("profile", item, value=found)
            context.say(_line(item, found))
        except Unfit as reason:
            context.put("profile", item, value={"absent": str(reason)})
    return good


def contestant_of(item: str) -> tuple[str, str]:
    """gspo_on_policy_cuda -> (gspo_on_policy, ours_cuda)"""
    work, fresh = item.removesuffix("_fresh"), "_fresh" if item.endswith("_fresh") else ""
    cuda = "_cuda" if work.endswith("_cuda") else ""
    return work.removesuffix("_cuda"), f"ours{cuda}{fresh}"


def _profile(context: Context, problem: Problem, item: str, contestant: str) -> dict[str, Any]:
    meter, bandwidth = meter_of(context.device), _copy_speed(context, problem)
    run_once = BY_NAME[contestant].prepare(problem)
    calls = SMOKE_CALLS if context.smoke else CALLS
    context.at(f"{item}, first call")
    found: dict[str, Any] = {"contestant": contestant, "rows": problem.rows, "copy": bandwidth, "wrong": ""}
    try:
        answer = run_once()
        if answer is not None:
            check(problem, *answer)
        del answer
    except WrongAnswer as error:
        found["wrong"] = str(error)
    problem.restore()

    def each(measure: Callable[[Run], float]) -> list[float]:
        values = []
        for _ in range(calls):
            values.append(measure(run_once))
            problem.restore()
        return values

    context.at(f"{item}, whole calls")
    found["whole_seconds"] = statistics.median(each(meter.timed))
    found["idle_seconds"] = statistics.median(each(idle_seconds))
    context.put("profile", item, value={**found, "error": "the process ended under the profiler"})
    context.at(f"{item}, under the profiler")
    try:
        passes = units(BY_NAME[contestant], problem)
        found |= summary(traced(context, run_once, problem, calls), problem, passes, bandwidth)
    except Exception as error:  # the time of the whole call is known without a profile
        found["error"] = words(error)
    finish()
    return found


def traced(context: Context, run_once: Run, problem: Problem, calls: int) -> list[list[Event]]:
    """Each call's events."""
    return (_on_the_cpu if context.smoke else _on_the_gpu)(run_once, problem, calls)


def _on_the_gpu(run_once: Run, problem: Problem, calls: int) -> list[list[Event]]:
    """Each call's events. One more call is made first, in which CUPTI initialises."""
    meter = CudaMeter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls + 1):
            finish()
            meter.get_ready()
            answer = run_once()
            torch.cuda._sleep(1)
            finish()
            del answer
            problem.restore()
        finish()
    found = [Event(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in on_device(profile)]
    return between_waits(found)[1:]


def between_waits(events: list[Event]) -> list[list[Event]]:
    """The events between the first and the second wait, the third and the fourth, and so on."""
    waits = [i for i, event in enumerate(events) if _WAIT in event.name]
    if len(waits) < 4 or len(waits) % 2:
        raise RuntimeError(f"the profile shows {len(waits)} waits among {len(events)} events: expected two a call")
    return [events[begin + 1 : end] for begin, end in zip(waits[::2], waits[1::2], strict=True)]


def _on_the_cpu(run_once: Run, problem: Problem, calls: int) -> list[list[Event]]:
    """Operators instead of kernels, for a smoke run."""
    traces = []
    for _ in range(calls):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run_once()
        problem.restore()
        events = [e for e in profile.events() or [] if e.cpu_parent is None]
        traces.append([Event(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events])
    return traces


def summary(traces: list[list[Event]], problem: Problem, passes: float, bandwidth: float) -> dict[str, Any]:
    """`medians`, with each kernel's bytes and share of the copy, which is one of bytes per second.

    `passes`: over the logits, of all kernels.
    """
    found = medians(traces)
    for kernel in found["kernels"]:
        moved = bytes_of(kernel["name"], problem)
        kernel |= {"name": short(kernel["name"]), "bytes": moved}
        if moved is not None and kernel["seconds"] > 0:
            kernel["share_of_copy"] = moved * kernel["launches"] / kernel["seconds"] / bandwidth
    return {**found, "share_of_copy": passes * problem.logits_bytes / found["span_seconds"] / bandwidth}


def medians(traces: list[list[Event]]) -> dict[str, Any]:
    """Over the calls: of each kernel, by its name, in the order of the first call; and of all kernels."""
    names = list(dict.fromkeys(event.name for event in traces[0]))
    if not names:
        raise RuntimeError("the profile shows no kernels")
    kernels = []
    for name in names:
        times = [sum(e.end - e.start for e in trace if e.name == name) for trace in traces]
        count = sum(event.name == name for event in traces[0])
        kernels.append({"name": name, "launches": count, "seconds": statistics.median(times)})
    busy = [sum(e.end - e.start for e in trace) for trace in traces]
    spans = [max(e.end for e in trace) - min(e.start for e in trace) for trace in traces]
    return {
        "kernels": kernels,
        "launches": len(traces[0]),
        "longest_gaps": _gaps(traces[0]),
        "device_seconds": statistics.median(busy),
        "span_seconds": statistics.median(spans),
        "gap_seconds": statistics.median(s - b for s, b in zip(spans, busy, strict=True)),
    }


def _gaps(trace: list[Event]) -> list[dict[str, Any]]:
    """The longest times in which the device waited: between which kernels, and how long after the first one began."""
    found, end = [], trace[0].end
    for before, after in itertools.pairwise(trace):
        end = max(end, before.end)
        if after.start > end:
            between = [short(before.name), short(after.name)]
            found.append({"seconds": after.start - end, "at": end - trace[0].start, "between": between})
    return sorted(found, key=lambda gap: -gap["seconds"])[:8]


def bytes_of(name: str, problem: Problem) -> float | None:
    """What one launch of a kernel must read and write; None for kernels that are not this package's.

    A second read of a row does not count: it should come from a cache.
    """
    if "at::native" in name or name.startswith(("Memcpy", "Memset")):
        return None
    name = short(name)
    unmasked, active = problem.read_once, problem.share * problem.active
    both = unmasked + 1.0
    needed = {"forward_backward": both, "one_read": both, "backward": active + 1.0, "forward": unmasked}
    for word, passes in needed.items():
        if word in name:
            return passes * problem.logits_bytes
    if "sequence" in name or "batch" in name:
        return float(_STAGE_BYTES * problem.rows)
    return 4.0 if "scale" in name else None  # with a factor of 1 it returns at once


def short(name: str) -> str:
    """A kernel's name without template arguments, and with the functor of torch's element-wise kernels."""
    plain = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    functor = re.search(r"\w*Functor\w*", plain.partition("<")[2])
    return " ".join([plain.partition("<")[0].partition("(")[0].strip(), *([functor[0]] if functor else [])])[:80]


def _copy_speed(context: Context, problem: Problem) -> float:
    meter, copy = meter_of(context.device), BY_NAME["copy"].prepare(problem)
    copy()
    return 2 * problem.logits_bytes / statistics.median(meter.timed(copy) for _ in range(9))


def _line(item: str, found: dict[str, Any]) -> str:
    whole = f"{item}: {found['whole_seconds'] * 1e3:.3f} ms, from idle to idle {found['idle_seconds'] * 1e3:.3f} ms"
    if "error" in found:
        return f"{whole}; no profile: {found['error'].splitlines()[0][:120]}"
    return f"{whole}; {kernels_of(found)}"


def kernels_of(found: dict[str, Any]) -> str:
    """Of `medians`, or a `summary`: the kernels that take a hundredth of the time or more."""
    kernels = [
        f"{kernel['name']} {kernel['seconds'] * 1e3:.3f} ms"
        + (f" ({kernel['share_of_copy']:.0%})" if kernel.get("share_of_copy", 0) >= 0.01 else "")
        for kernel in found["kernels"]
        if kernel["seconds"] >= 0.01 * found["device_seconds"]
    ]
    return f"{found['launches']} launches, gaps {found['gap_seconds'] * 1e6:.0f} us: {', '.join(kernels)}"
