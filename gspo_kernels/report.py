"""`explain`: what would run for these arguments, in words."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .base import checks
from .linear.from_hidden import linear_gspo_loss
from .linear.plan_text import explain_plan
from .losses.clipped import GSPO
from .losses.from_logits import gspo_loss
from .losses.objectives import check_objective
from .losses.triton_stage import stage_reason
from .rows.dispatch import check_name, choose, compare
from .rows.types import OPTIONAL_FIELDS


def explain(logits: Tensor, *arguments: Any, backend: str | None = None, **options: Any) -> str:
    """Which backend runs for these inputs and why not the others; from hidden states, also the plan of chunks.

    It takes the arguments of a loss, in the same order. From logits the answer depends on `logits`, `backend`,
    `objective`, `kept` and `cp_group` alone; the others may be left out. From hidden states (`hidden, weight, ...`) the
    plan depends on the others too, and mask and boundaries are read. `objective` is GSPO by default.

    Returns:
        A few lines of text, the chosen backend first; then which token stage runs, and why if it is the slower one.
    """
    meaning = "logits [.., vocabulary], or hidden states and then a head"
    checks.operand("logits", checks.tensor("logits", logits, meaning, sharded=True), meaning)
    check_name(backend)
    known = {"objective", *inspect.signature(gspo_loss).parameters, *inspect.signature(linear_gspo_loss).parameters}
    unknown = sorted(options.keys() - known - set(OPTIONAL_FIELDS))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: expected the arguments of a loss; got a name that no loss has")
    objective = options.get("objective", GSPO())
    check_objective(objective)
    context_parallel = options.get("cp_group") is not None
    fields = [name for name in OPTIONAL_FIELDS if options.get(name) is not None]
    fields += [] if options.get("softcap") is None else ["tanh_scale"]
    head, *others = arguments or (options.pop("weight", None),)
    if not (isinstance(head, Tensor) and head.is_floating_point()):
        stage = stage_reason(objective, choose(logits, backend, fields, warn=False), context_parallel=context_parallel)
        return f"{compare(logits, backend, fields)}\n{stage}"
    wide = torch.float64 if torch.float64 in (logits.dtype, head.dtype) else torch.float32
    chunk = torch.empty(1, 1, 1, dtype=wide, device=logits.device)
    stage = stage_reason(objective, choose(chunk, backend, fields, warn=False), context_parallel=context_parallel)
    return f"{compare(chunk, backend, fields)}\n{stage}\n{explain_plan(logits, head, *others, **options)}"
