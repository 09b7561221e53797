"""The torch operators of the hidden-state path: a loss, logits, the statistics of rows, and the gradient of these.

The gradients of all operands are complete when the loss's operator returns, and not yet rounded
(`Gradients`). Its backward multiplies them by the incoming gradient of the loss and rounds them to the dtypes of the
operands; it supports one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.autograd import edge_of, first_derivative, refuse_second_backward
from ..base.checks import watched
from ..base.devices import autocasts
from ..base.operators import Operator, save_values, saved_values
from ..base.torch_internals import autograd_inside_an_operator
from ..losses import triton_stage
from ..losses.objectives import carried
from ..losses.stats import SCALARS, HeadWork, Stats
from ..losses.token_stage import LossOutput, TokenInputs
from ..rows.dispatch import choose
from ..rows.operators import scale
from ..rows.types import RowStats, Upstream
from . import chunked_loss
from .head import Head, Work
from .head_term import low_rank_products, padded_rows, write_logits
from .products import products, sum_dtype
from .schedule import row_stride
from .types import Gradients, HeadArguments, NeedsGrad, Operands, select_rows, to_all_rows
from .weight_sums import Sums, empty_sums, rounded

_LOSS, _LOGPROBS = "linear_policy_loss", "linear_token_logprobs"  # for error messages


def linear_loss(arguments: HeadArguments, inputs: TokenInputs) -> LossOutput:
    if isinstance(inputs.normalizer, Tensor):
        inputs = inputs._replace(normalizer=inputs.normalizer.detach())
    with carried(inputs.objective):
        found = linear_loss_operator(arguments, arguments.operands().needs_grad(), inputs)
    with torch.no_grad():
        low, high = found.clipped.unbind(-1)
        stats = Stats(
            **dict(zip(SCALARS, found.scalars.detach().unbind(), strict=True)),
            logprobs=found.logprobs.detach(),
            log_ratio=found.log_ratio.detach(),
            clipped_low=low,
            clipped_high=high,
            ratio_of=inputs.objective.ratio_of,
            head=HeadWork(*found.head_work.detach().unbind()),
        )
    return LossOutput(found.loss, stats)


def linear_row_stats(arguments: HeadArguments) -> RowStats:
    """Statistics of each row [outer, inner], differentiable in all three. The backward computes the logits again."""
    return linear_row_stats_operator(arguments, arguments.operands().needs_grad())


@contextmanager
def _inside_an_operator(device: torch.device) -> Iterator[None]:
    """Enables autograd, which the token stage needs, and disables autocast, which would round products."""
    exact = torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
    with autograd_inside_an_operator(), torch.no_grad(), exact:
        yield


def _empty_gradients(arguments: HeadArguments, needs_grad: NeedsGrad) -> Gradients:
    weight, dtype = arguments.weight, sum_dtype(arguments.dtype)

    def empty(operand: Tensor | None, needed: bool) -> Tensor:
        if operand is None or not needed:
            return torch.empty(0, dtype=dtype, device=weight.device)
        shape = operand.shape if operand.ndim < 3 else operand.flatten(0, 1).shape
        return torch.empty(shape, dtype=dtype, device=weight.device)

    found = {name: empty(getattr(arguments, name), needed) for name, needed in needs_grad._asdict().items()}
    found["weight"], low = empty_sums(weight if needs_grad.weight else weight[:0], dtype)
    return Gradients(**found, weight_low=low)


# ---- a loss


class LinearLoss(NamedTuple):
    """What the operator returns; `loss` alone is differentiable."""

    loss: Tensor  # 0-d
    scalars: Tensor  # fp32, of the stats, in the order of `SCALARS`
    logprobs: Tensor  # of the stats: token layout
    log_ratio: Tensor  # of the stats: [sequences] or token layout
    clipped: Tensor  # bool, of the shape of log_ratio and a last dimension: clipped_low, clipped_high of the stats
    head_work: Tensor  # fp32, in the order of `HeadWork`
    hidden_gradient: Tensor  # this and all others: the fields of `Gradients`
    weight_gradient: Tensor
    bias_gradient: Tensor
    low_rank_hidden_gradient: Tensor
    low_rank_weight_gradient: Tensor
    weight_gradient_low: Tensor

    def gradients(self) -> Gradients:
        return Gradients(*self[-len(Gradients._fields) :])


def _linear_loss(arguments: HeadArguments, needs_grad: NeedsGrad, inputs: TokenInputs) -> LinearLoss:
    device, tokens = arguments.hidden.device, inputs.batch.tokens
    with _inside_an_operator(device):
        stage, rows = inputs.stage(), select_rows(arguments)
        head = Head(arguments, rows, needs_grad)
        fused = head.backend.runs_stage_in_triton and triton_stage.takes(inputs)
        selected = chunked_loss.run_chunks(head, stage, inputs, fused)
        gradients, work = head.gradients(), head.work
        stats = RowStats(*(to_all_rows(x, rows, tokens) for x in selected))
        if fused:
            loss, scalars, log_ratio, clipped = triton_stage.loss(inputs, stats)
            if inputs.objective.ratio_of == "token":
                log_ratio, clipped = log_ratio.reshape(tokens), clipped.reshape(*tokens, 2)
            logprobs = stats.logprobs
        else:
            loss, of_stage = stage.loss(stats.logprobs.reshape(-1), stats.entropy.reshape(-1))
            scalars = torch.stack([getattr(of_stage, name) for name in SCALARS])
            logprobs, log_ratio = of_stage.logprobs, of_stage.log_ratio
            clipped = torch.stack([of_stage.clipped_low, of_stage.clipped_high], dim=-1)
        of_rows = [x for x in (gradients.hidden, gradients.low_rank_hidden) if x.numel()]
        chunked_loss.propagate_nan(of_rows, inputs, stage, stats, scalars)
    return LinearLoss(loss, scalars, logprobs, log_ratio, clipped, as_tensor(work, device), *gradients)


def as_tensor(work: Work, device: torch.device) -> Tensor:
    """fp32, in the order of `HeadWork`."""
    counts = [float(getattr(work, name)) for name in HeadWork._fields]
    return torch.stack([torch.full((), n, dtype=torch.float32, device=device) for n in counts])


def _fake_linear_loss(arguments: HeadArguments, needs_grad: NeedsGrad, inputs: TokenInputs) -> LinearLoss:
    batch, device = inputs.batch, arguments.hidden.device

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    log_ratio = empty(batch.sequences) if inputs.objective.ratio_of == "sequence" else empty(*batch.tokens)
    clipped = log_ratio.new_empty((*log_ratio.shape, 2), dtype=torch.bool)
    loss = torch.empty((), dtype=sum_dtype(arguments.dtype), device=device)
    work, gradients = empty(len(HeadWork._fields)), _empty_gradients(arguments, needs_grad)
    return LinearLoss(loss, empty(len(SCALARS)), empty(*batch.tokens), log_ratio, clipped, work, *gradients)


def _save_linear_loss(
    ctx: Any, output: LinearLoss, arguments: HeadArguments, needs_grad: NeedsGrad, inputs: TokenInputs
) -> None:
    operands = arguments.operands()
    ctx.shapes_and_dtypes = [None if x is None else (x.shape, x.dtype) for x in operands]
    ctx.needs_grad = needs_grad
    differentiated = [x for x in operands if x is not None and x.requires_grad]
    ctx.edges = [] if watched(arguments.hidden) else [edge_of(x) for x in differentiated]
    ctx.save_for_backward(*output.gradients())


def _linear_loss_backward(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    refuse_second_backward(ctx, _LOSS)
    found: dict[str, Tensor | None] = {}
    gradients = Gradients(*ctx.saved_tensors)
    saved = zip(Operands._fields, ctx.needs_grad, gradients.of_operands(), ctx.shapes_and_dtypes, strict=True)
    for name, needed, gradient, shape_and_dtype in saved:
        if needed:
            with torch.no_grad():
                if name == "weight" and gradients.weight_low.numel():
                    scaled = rounded(Sums(gradient, gradients.weight_low), upstream)
                else:
                    scaled = _scaled(gradient, upstream, *shape_and_dtype)
            found[name] = first_derivative(scaled, _LOSS, *ctx.edges, upstream)
    return found


def _scaled(gradient: Tensor, upstream: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """gradient * upstream, multiplied in place and then rounded to the operand's dtype."""
    if type(gradient) is not Tensor:  # traced by a compiler, which decides itself what is done in place
        return (gradient * upstream).to(dtype).reshape(shape)
    rows = gradient[None] if gradient.ndim == 2 else gradient[None, None]
    scale(rows, upstream, choose(rows, None).name)  # returns at once where upstream is 1
    if gradient.dtype == dtype:
        return gradient.detach().reshape(shape)
    return gradient.to(dtype).reshape(shape)


linear_loss_operator = Operator(
    "linear_loss", _linear_loss, fake=_fake_linear_loss, save=_save_linear_loss, backward=_linear_loss_backward,
    operands=Operands._fields, outputs=1,
)  # fmt: skip


# ---- logits alone


def _all_logits(operands: Operands, vocab: int, dtype: torch.dtype) -> Tensor:
    hidden, weight, bias, low_rank_hidden, low_rank_weight = operands
    with _inside_an_operator(hidden.device):
        terms, of_terms = [products(weight[:vocab], dtype)], [hidden.flatten(0, -2)]
        if low_rank_hidden is not None and low_rank_weight is not None:
            terms.append(low_rank_products(low_rank_weight[:vocab].to(sum_dtype(dtype)), terms[0]).of_logits)
            of_terms.append(low_rank_hidden.flatten(0, -2))
        count, stride = len(of_terms[0]), row_stride(vocab, hidden.device.type)
        padded = hidden.new_empty(padded_rows(terms, count), stride, dtype=sum_dtype(dtype))[:, :vocab]
        if count:
            write_logits(terms, of_terms, None if bias is None else bias[:vocab], padded)
        return padded[:count].view(*hidden.shape[:-1], vocab)


def _fake_logits(operands: Operands, vocab: int, dtype: torch.dtype) -> Tensor:
    hidden = operands.hidden
    stride = row_stride(vocab, hidden.device.type)
    return hidden.new_empty(*hidden.shape[:-1], stride, dtype=sum_dtype(dtype))[..., :vocab]


# All logits [.., V] of the first `vocab` rows of the weight, multiplied in `dtype`.
linear_logits_operator = Operator("linear_logits", _all_logits, fake=_fake_logits)


# ---- statistics of rows alone


def row_gradient(arguments: HeadArguments, needs_grad: NeedsGrad, stats: RowStats, upstream: Upstream) -> Gradients:
    with _inside_an_operator(arguments.hidden.device):
        rows = select_rows(arguments)
        head = Head(arguments, rows, needs_grad)
        indices: slice | Tensor = slice(None) if rows.row_indices is None else rows.row_indices

        def selected(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[indices]

        of_rows = RowStats(*(x.reshape(-1)[indices] for x in stats))
        arrays = Upstream(selected(upstream.logprobs), selected(upstream.entropy), selected(upstream.lse))
        chunked_loss.backward_recomputed(head, 0, of_rows, arrays)
        return head.gradients()


linear_row_gradient_operator = Operator(
    "linear_row_gradient", row_gradient,
    fake=lambda arguments, needs_grad, stats, upstream: _empty_gradients(arguments, needs_grad),
)  # fmt: skip


def row_stats(arguments: HeadArguments, needs_grad: NeedsGrad) -> RowStats:
    return row_stats_and_work(arguments)[0]


def row_stats_and_work(arguments: HeadArguments) -> tuple[RowStats, Work]:
    with _inside_an_operator(arguments.hidden.device):
        rows = select_rows(arguments)
        head = Head(arguments, rows, NeedsGrad(False, False, False))
        found = chunked_loss.statistics(head)
        return RowStats(*(to_all_rows(x, rows, arguments.token_ids.shape) for x in found)), head.work


def empty_row_stats(arguments: HeadArguments, needs_grad: NeedsGrad) -> RowStats:
    ids, dtype = arguments.token_ids, sum_dtype(arguments.dtype)
    return RowStats(*(torch.empty(ids.shape, dtype=d, device=ids.device) for d in (dtype, dtype, torch.float64)))


def _save_linear_row_stats(ctx: Any, output: RowStats, arguments: HeadArguments, needs_grad: NeedsGrad) -> None:
    save_values(ctx, arguments=arguments, needs_grad=needs_grad, stats=output)


def _linear_row_stats_backward(ctx: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    arguments, needs_grad = saved["arguments"], saved["needs_grad"]
    operands = arguments.operands()
    found: dict[str, Tensor | None] = {}
    with torch.no_grad():
        gradients = linear_row_gradient_operator(arguments, needs_grad, saved["stats"], Upstream(*upstream))
    differentiated = zip(Operands._fields, needs_grad, gradients.of_operands(), operands, strict=True)
    for name, needed, gradient, operand in differentiated:
        if needed:
            with torch.no_grad():
                if name == "weight" and gradients.weight_low.numel():
                    of_operand = rounded(Sums(gradient, gradients.weight_low))
                else:
                    of_operand = gradient.to(operand.dtype).reshape(operand.shape)
            found[name] = first_derivative(of_operand, _LOGPROBS, *operands, *upstream)
    return found


linear_row_stats_operator = Operator(
    "linear_row_stats", row_stats, fake=empty_row_stats, save=_save_linear_row_stats,
    backward=_linear_row_stats_backward, operands=Operands._fields,
)  # fmt: skip
