"""The sparse head for rows that keep some columns and the full head for others, as one operator with one gradient.

Each operand's gradient is the sum of both heads', rounded once; there is one buffer for that of the weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.autograd import first_derivative
from ..base.operators import Operator, save_values, saved_values
from ..losses.stats import HeadWork
from ..rows.types import RowStats, Upstream
from . import operators, sparse_head
from .sparse_head import FUNCTION
from .types import Gradients, HeadArguments, KeptColumns, NeedsGrad, Operands, can_synchronize
from .weight_sums import Sums, rounded, to_float32


class BothOutputs(NamedTuple):
    kept_logits: Tensor  # [E], of the sparse head
    logprobs: Tensor  # this and the next two: `RowStats` of the full head's rows, [outer, inner]
    entropy: Tensor
    lse: Tensor
    head_work: Tensor  # of the full head: fp32, in the order of `HeadWork`; not differentiable

    def full_stats(self) -> RowStats:
        return RowStats(self.logprobs, self.entropy, self.lse)


def both_heads(arguments: HeadArguments, kept: KeptColumns, full: Tensor | None) -> BothOutputs:
    """The logits of kept columns, and statistics of the rows `full` (bool [outer, inner]; None: all); differentiable.

    Args:
        kept: its `sparse_weight_grad` is False.
    """
    return both_heads_operator(arguments, kept, full, arguments.operands().needs_grad())


def _both(arguments: HeadArguments, kept: KeptColumns, full: Tensor | None, needs_grad: NeedsGrad) -> BothOutputs:
    logits = sparse_head.multiply(arguments, kept, needs_grad)
    stats, work = operators.row_stats_and_work(replace(arguments, mask=full))
    return BothOutputs(logits, *stats, operators.as_tensor(work, logits.device))


def _empty(arguments: HeadArguments, kept: KeptColumns, full: Tensor | None, needs_grad: NeedsGrad) -> BothOutputs:
    stats = operators.empty_row_stats(arguments, needs_grad)
    work = torch.empty(len(HeadWork._fields), dtype=torch.float32, device=arguments.hidden.device)
    return BothOutputs(sparse_head.empty_logits(arguments, kept, needs_grad), *stats, work)


class _Outputs(NamedTuple):
    """The gradients of the operands; empty where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    low_rank_hidden: Tensor
    low_rank_weight: Tensor


def _gradient(
    arguments: HeadArguments,
    kept: KeptColumns,
    full: Tensor | None,
    needs_grad: NeedsGrad,
    stats: RowStats,
    of_logits: Tensor,
    upstream: Upstream,
) -> _Outputs:
    of_full = operators.row_gradient(replace(arguments, mask=full), needs_grad, stats, upstream)
    # A CUDA graph cannot know how many columns there are.
    kept = kept._replace(sparse_weight_grad=can_synchronize(of_logits.device))
    buffers = sparse_head.empty_gradients(arguments, kept, needs_grad, dtype=of_logits.dtype)
    of_kept = sparse_head.write_gradients(arguments, kept, needs_grad, of_logits, buffers)
    found = {}
    for name, operand in arguments.operands()._asdict().items():
        if operand is None or not getattr(needs_grad, name):
            found[name] = of_logits.new_empty(0)
        elif name == "weight" and kept.sparse_weight_grad:
            found[name] = _weight_gradient(of_full, of_kept.columns, of_kept.weight, operand.dtype)
        else:
            sums = getattr(of_full, name).view(operand.shape).add_(getattr(of_kept, name))
            found[name] = sums.to(operand.dtype)
    return _Outputs(**found)


def _weight_gradient(of_full: Gradients, columns: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds values to the full head's gradient in these columns, each of which is there once."""
    high, low = of_full.weight, of_full.weight_low
    if not low.numel():
        high[columns] += values
        return high.to(dtype)
    sums = to_float32(Sums(high[columns], low[columns])) + values
    found = rounded(Sums(high, low))
    found[columns] = sums.to(dtype)
    return found


def _empty_gradient(
    arguments: HeadArguments, kept: KeptColumns, full: Tensor | None, needs_grad: NeedsGrad, *rest: Any
) -> _Outputs:
    buffers = sparse_head.empty_gradients(arguments, kept, needs_grad)
    return _Outputs(*buffers[: len(_Outputs._fields)])


both_gradients_operator = Operator("linear_both_heads_gradient", _gradient, fake=_empty_gradient)


def _save(
    ctx: Any,
    output: BothOutputs,
    arguments: HeadArguments,
    kept: KeptColumns,
    full: Tensor | None,
    needs_grad: NeedsGrad,
) -> None:
    save_values(ctx, arguments=arguments, kept=kept, full=full, needs_grad=needs_grad, stats=output.full_stats())


def _backward(ctx: Any, of_logits: Tensor | None, *of_stats: Tensor | None) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    arguments, needs_grad = saved["arguments"], saved["needs_grad"]
    with torch.no_grad():
        if of_logits is None:
            of_logits = torch.zeros_like(sparse_head.empty_logits(arguments, saved["kept"], needs_grad))
        upstream = Upstream(*of_stats)
        if all(x is None for x in of_stats):
            upstream = Upstream(torch.zeros_like(saved["stats"].logprobs))
        found = both_gradients_operator(
            arguments, saved["kept"], saved["full"], needs_grad, saved["stats"], of_logits.contiguous(), upstream
        )
    connected = *arguments.operands(), of_logits, *of_stats
    return {
        name: first_derivative(getattr(found, name), FUNCTION, *connected)
        for name, needed in needs_grad._asdict().items()
        if needed
    }


both_heads_operator = Operator(
    "linear_both_heads", _both, fake=_empty, save=_save, backward=_backward, operands=Operands._fields, outputs=4
)
