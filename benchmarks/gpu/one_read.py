"""CUDA C++ beside Triton and a copy, in the cases that one read of the logits is enough for, and its launches' layout.

Those at a model's size carry goals; the others ask whether it is ahead everywhere, on rows that lie badly as well: then
it shall run unasked (`FASTER_ON` in gspo_kernels/rows/cuda_rows.py).
"""

from __future__ import annotations

import gc

import torch

import gspo_kernels
from gspo_kernels.rows import cuda_rows

from ..cases import Problem
from .contestants import ONE_READ
from .context import Context
from .speed import measure
from .works import build_one_read


def run(context: Context) -> bool:
    """Arguments: bytes per second of a copy (0: unknown, the case's own copy counts), then the items."""
    good = True
    logits = torch.zeros(1, 1, 8, dtype=torch.bfloat16, device=context.device)
    context.put("one_read", "explain", value=gspo_kernels.explain(logits).splitlines())
    for item in context.arguments[1:]:
        context.at(f"{item}, building its inputs")
        problem = build_one_read(context.device, item)
        if not cuda_rows.unsupported_reasons(problem.logits):
            context.put("one_read", "layouts", item, value=_layout(problem))
        good &= measure(context, problem, ONE_READ, float(context.arguments[0]), ("one_read", "cases", item))
        context.finished(item)
        del problem
        gc.collect()
    return good


def _layout(problem: Problem) -> dict[str, object]:
    """Clusters of blocks that hold a row in shared memory, or a block that reads it again; for as many rows."""
    logits, native = problem.logits, cuda_rows._native
    assert native is not None
    found: dict[str, object] = native.cuda_layout(
        dtype=str(logits.dtype).removeprefix("torch."),
        vocab=problem.case.vocab,
        rows=problem.rows,
        device=logits.device.index or 0,
    )
    return found
