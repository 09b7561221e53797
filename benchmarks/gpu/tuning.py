"""A sweep of warps and block sizes, a kernel at a time, at the size that carries the goals; answers are checked.

Every time is of a whole call whose other kernels stay as they are: forward of a loss alone, backward of an off-policy
one, forward_backward of an on-policy one. The best entries are for `LAUNCH` in gspo_kernels/logprobs/triton_rows.py.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..cases import Problem
from ..contestants import Run
from ..truth import check
from . import works
from .contestants import BY_NAME as CONTESTANTS
from .context import Absent, Context
from .meter import finish, meter_of
from .speed import words

WORK_OF = {"forward": "forward", "backward": "gspo", "forward_backward": "gspo_on_policy"}
WARPS, ELEMENTS = (4, 8, 16, 32), (2_048, 4_096, 8_192, 16_384)
ROWS, REPEATS = 8_192, 10


@contextmanager
def launched_with(kernel: str, num_warps: int, elements: int) -> Iterator[None]:
    """The one place that knows where the package keeps its launch sizes: that kernel's, replaced for a while."""
    from gspo_kernels.logprobs.triton_rows import LAUNCH

    before = LAUNCH[kernel]
    LAUNCH[kernel] = dataclasses.replace(before, num_warps=num_warps, elements=elements)
    try:
        yield
    finally:
        LAUNCH[kernel] = before


def run(context: Context) -> bool:
    """Arguments: kernels to sweep, the items."""
    try:
        from gspo_kernels.logprobs.triton_rows import LAUNCH
    except ImportError as error:
        raise Absent(f"no table of launch sizes: {error}") from error
    rows, warps, elements = (16, WARPS[:1], ELEMENTS[:1]) if context.smoke else (ROWS, WARPS, ELEMENTS)
    for kernel in context.arguments:
        found: dict[str, dict[str, Any]] = {}
        problem = works.build_on(context.device, works.BY_NAME[WORK_OF[kernel]], rows)
        run_once = CONTESTANTS["ours"].prepare(problem)
        width = 16 // problem.logits.element_size()
        before = LAUNCH[kernel]
        sizes = [(before.num_warps, before.elements)]
        sizes += [(w, e) for w in warps for e in elements if e >= 32 * w * width and (w, e) != sizes[0]]
        for num_warps, count in sizes:  # what stands in the table comes first
            name = f"{num_warps} warps, {count} elements"
            context.at(f"{kernel}: {name}")
            with launched_with(kernel, num_warps, count):
                found[name] = _measure(context, problem, run_once)
            context.put("tuning", kernel, value=_ranked(found, f"{before.num_warps} warps, {before.elements} elements"))
            finish()
        best = next(iter(_ranked(found, "")["tried"]))
        context.say(f"{kernel}: {best} {found[best].get('median', float('nan')) * 1e3:.3f} ms")
        context.finished(kernel)
    return True


def _measure(context: Context, problem: Problem, run_once: Run) -> dict[str, Any]:
    meter = meter_of(context.device)
    timed: Callable[[Run], float] = meter.timed
    try:
        answer = run_once()
        if answer is not None:
            check(problem, *answer)
        del answer
        seconds = []
        for _ in range(1 if context.smoke else REPEATS):
            problem.restore()
            seconds.append(timed(run_once))
    except Exception as error:  # too many registers, too little shared memory: the other sizes may do
        meter.forget()
        return {"error": words(error)}
    finally:
        problem.restore()
    return {"median": statistics.median(seconds), "min": min(seconds)}


def _ranked(found: dict[str, dict[str, Any]], current: str) -> dict[str, Any]:
    """Fastest first."""
    return {"in_table": current, "tried": dict(sorted(found.items(), key=lambda item: item[1].get("median", 1e9)))}
