"""A loss in four launches: rows, the two of the token stage in Triton, gradient.

Off-policy: rows -> sequences -> batch, and the gradient in the backward. On-policy, where the gradient by each
log-probability is known beforehand: sequences -> rows and gradient -> batch, and a factor in the backward. For an
objective with a `row_slope` a backend that computes slopes does the same off-policy; the batch kernel then sums up the
loss, as it does on-policy for terms that depend on log-probabilities.
From log-probabilities there are the stage's two launches alone.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.autograd import beyond_reverse_mode, edge_of, first_derivative, refuse_second_backward
from ..base.operators import Operator, save_values, saved_values
from ..rows import triton_rows
from ..rows.dispatch import Backend, by_name
from ..rows.operators import FROM_LOGITS, check_values, gradient_buffer, row_gradient, zero_padding
from ..rows.types import RowOptions, Rows, RowStats, Upstream, empty_stats
from .stats import PARTIALS, SCALARS, Stats
from .token_stage import LossOutput, TokenInputs
from .triton_stage import TritonStage, unsupported_reason


def takes_rows_of(backend: Backend, inputs: TokenInputs) -> bool:
    """Whether the stage in Triton computes this loss beside the backend of the rows."""
    if not backend.runs_stage_in_triton:
        return False
    reason = unsupported_reason(inputs.objective, inputs.batch.ranks is not None)
    _warn_on_gpu(inputs, reason)
    return not reason


def _warn_on_gpu(inputs: TokenInputs, reason: str) -> None:
    """Once for each reason. That context-parallel losses take the stage in torch is documented and needs no warning."""
    batch = inputs.batch
    if reason and batch.device.type == "cuda" and batch.ranks is None and not torch.compiler.is_compiling():
        _warn(reason)


@functools.cache
def _warn(reason: str) -> None:
    message = "gspo_kernels computes the loss from log-probabilities in torch, which is slower on a GPU"
    warnings.warn(f"{message}: {reason}", stacklevel=2)


def takes_logprobs(inputs: TokenInputs, logprobs: Tensor) -> bool:
    """Whether the loss of these log-probabilities runs here: differentiated in reverse mode, once or more often."""
    reason = unsupported_reason(inputs.objective, inputs.batch.ranks is not None)
    if logprobs.dtype != torch.float32:
        reason = reason or f"the log-probabilities are {logprobs.dtype}"
    _warn_on_gpu(inputs, reason)
    return not reason and not beyond_reverse_mode() and not triton_rows.unsupported_reasons(logprobs[..., None])


def has_row_slopes(inputs: TokenInputs, backend: Backend) -> bool:
    """Whether the gradient of a loss that runs here can be had in one pass although the ratios are not 1."""
    alone = inputs.beta == 0.0 and not inputs.entropy_bonus
    arrays = (inputs.old_logprobs, inputs.rollout_logprobs)
    of_float32 = all(x is None or x.dtype == torch.float32 for x in arrays)
    slopes = inputs.old_logprobs is not None and backend.computes_slopes and inputs.objective.row_slope() is not None
    return alone and of_float32 and slopes


def policy_loss(rows: Rows, inputs: TokenInputs, options: RowOptions, one_pass: bool) -> LossOutput:
    """For a backend beside which the stage in Triton runs."""
    if one_pass:
        return _output(inputs, *_OnePass.apply(rows.logits, rows, inputs, options))
    found = fused_loss(rows, inputs, options)
    return _output(inputs, found.loss, found.scalars, found.log_ratios, found.clipped, found.logprobs)


def loss_of_rows(inputs: TokenInputs, logprobs: Tensor, entropy: Tensor | None) -> LossOutput:
    """From log-probabilities and entropies that came from elsewhere, in the caller's token layout; differentiable."""
    if len(inputs.batch.tokens) == 1:
        logprobs, entropy = logprobs.reshape(1, -1), None if entropy is None else entropy.reshape(1, -1)
    found = fused_stage(logprobs, entropy, inputs)
    of_stats, mask = logprobs.detach(), inputs.batch.mask
    # In memory of their own: the caller may write to the log-probabilities afterwards.
    of_stats = of_stats.clone() if mask is None else torch.where(mask.reshape(of_stats.shape), of_stats, 0.0)
    return _output(inputs, found.loss, found.scalars, found.log_ratios, found.clipped, of_stats)


def _output(
    inputs: TokenInputs, loss: Tensor, scalars: Tensor, log_ratios: Tensor, clipped: Tensor, logprobs: Tensor
) -> LossOutput:
    """Of tensors of which the loss alone is differentiable."""
    tokens, ratio_of = inputs.batch.tokens, inputs.objective.ratio_of
    of_batch: dict[str, Any] = dict(zip(SCALARS, scalars.unbind(), strict=True))
    low, high = clipped.unbind(-1)
    if ratio_of == "token" and log_ratios.shape != tokens:
        log_ratios, low, high = log_ratios.reshape(tokens), low.reshape(tokens), high.reshape(tokens)
    stats = Stats(
        **of_batch,
        logprobs=logprobs if logprobs.shape == tokens else logprobs.reshape(tokens),
        log_ratio=log_ratios,
        clipped_low=low,
        clipped_high=high,
        ratio_of=ratio_of,
    )
    return LossOutput(loss, stats)


# ---- the stage alone


class FusedStage(NamedTuple):
    """`loss` alone is differentiable. Gradients have to be divided by the sum of the counts in `partials`."""

    loss: Tensor  # 0-d
    scalars: Tensor  # in the order of SCALARS
    log_ratios: Tensor  # [sequences] or [tokens]
    clipped: Tensor  # bool, [sequences, 2] or [tokens, 2]: at a lower bound, at an upper one
    grad_logprobs: Tensor  # [outer, inner]
    grad_entropy: Tensor  # the same, or empty without an entropy bonus
    partials: Tensor  # [PARTIALS, sequences]


def _fused_stage(logprobs: Tensor, entropy: Tensor | None, inputs: TokenInputs) -> FusedStage:
    stage = TritonStage(logprobs.shape, inputs)
    stage.sequences(logprobs.contiguous(), None if entropy is None else entropy.contiguous())
    return _results(stage)


def _results(stage: TritonStage) -> FusedStage:
    """Of a stage whose sequences have seen the statistics."""
    bonus = stage.partials.new_empty(0) if stage.grad_entropy is None else stage.grad_entropy
    return FusedStage(*stage.batch(None), stage.log_ratios, stage.clipped, stage.grad_logprobs, bonus, stage.partials)


def _empty_results(shape: Sequence[int], inputs: TokenInputs) -> FusedStage:
    outer, inner = shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=inputs.batch.device)

    sequences = inputs.batch.sequences
    log_ratios = empty(sequences if inputs.objective.ratio_of == "sequence" else outer * inner)
    clipped = log_ratios.new_empty((*log_ratios.shape, 2), dtype=torch.bool)
    bonus = empty(outer, inner) if inputs.entropy_bonus else empty(0)
    return FusedStage(
        empty(), empty(len(SCALARS)), log_ratios, clipped, empty(outer, inner), bonus, empty(len(PARTIALS), sequences)
    )


class StageGradient(NamedTuple):
    """Of a `FusedStage`, what its backward needs."""

    grad_logprobs: Tensor
    grad_entropy: Tensor | None
    partials: Tensor

    def upstream(self, factor: Tensor) -> Upstream:
        counts = self.partials[PARTIALS.index("count")]
        return Upstream(self.grad_logprobs, self.grad_entropy, factor=factor, counts=counts)


def _stage_gradient(found: FusedStage | FusedLoss, inputs: TokenInputs) -> StageGradient:
    return StageGradient(found.grad_logprobs, found.grad_entropy if inputs.entropy_bonus else None, found.partials)


def _save_stage(ctx: Any, found: FusedStage, logprobs: Tensor, entropy: Tensor | None, inputs: TokenInputs) -> None:
    save_values(ctx, stage=_stage_gradient(found, inputs), logprobs=logprobs, entropy=entropy)
    ctx.inputs = None
    if not math.isnan(inputs.max_log_ratio):  # numbers are unknown while a compiler traces this
        ctx.inputs, ctx.versions = inputs, inputs.versions()  # not saved: they may have come from inference_mode


def _gradient_of_stage(ctx: Any, factor: Tensor) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    logprobs, entropy = saved["logprobs"], saved["entropy"]
    if torch.is_grad_enabled() and ctx.inputs is not None:
        if ctx.inputs.versions() != ctx.versions:
            raise RuntimeError("policy_loss_from_logprobs: an argument was written to before its second derivative")
        return ctx.inputs.stage().differentiable_gradient(logprobs, entropy, factor)  # type: ignore[no-any-return]
    with torch.no_grad():
        found = saved["stage"].upstream(factor).by_statistic()
    g_logprobs, g_entropy = (
        None if g is None else first_derivative(g, FROM_LOGITS, logprobs, entropy, factor) for g in found[:2]
    )
    return {"logprobs": g_logprobs, "entropy": g_entropy}


fused_stage = Operator(
    "fused_stage",
    _fused_stage,
    fake=lambda logprobs, entropy, inputs: _empty_results(logprobs.shape, inputs),
    save=_save_stage,
    backward=_gradient_of_stage,
    operands=("logprobs", "entropy"),
    outputs=1,
    direct=True,
)


# ---- two passes over the logits


class FusedLoss(NamedTuple):
    """A `FusedStage`, and the statistics of the rows."""

    loss: Tensor
    scalars: Tensor
    log_ratios: Tensor
    clipped: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor
    partials: Tensor
    logprobs: Tensor
    entropy: Tensor
    lse: Tensor


def _fused_loss(rows: Rows, inputs: TokenInputs, options: RowOptions) -> FusedLoss:
    stage = TritonStage(rows.token_ids.shape, inputs)
    check_values(rows)
    stats = by_name(options.backend).forward(rows)
    stage.sequences(stats.logprobs, stats.entropy)
    return FusedLoss(*_results(stage), *stats)


def _save_loss(ctx: Any, found: FusedLoss, rows: Rows, inputs: TokenInputs, options: RowOptions) -> None:
    stats = RowStats(found.logprobs, found.entropy, found.lse)
    save_values(ctx, rows=rows, stats=stats, stage=_stage_gradient(found, inputs), options=options)


def _gradient_of_loss(ctx: Any, factor: Tensor) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    rows, options, upstream = saved["rows"], saved["options"], saved["stage"].upstream(factor)
    if options.overwrite_logits:
        refuse_second_backward(ctx, FROM_LOGITS)
    gradient = gradient_buffer(rows.logits, options.overwrite_logits)
    row_gradient(rows, saved["stats"], upstream, gradient, options.backend)
    return {"logits": first_derivative(gradient, FROM_LOGITS, rows.logits, factor)}


fused_loss = Operator(
    "fused_loss",
    _fused_loss,
    fake=lambda rows, inputs, options: FusedLoss(*_empty_results(rows.token_ids.shape, inputs), *empty_stats(rows)),
    save=_save_loss,
    backward=_gradient_of_loss,
    operands=("logits",),
    outputs=1,
    direct=True,
)


# ---- one pass


class _OnePass(torch.autograd.Function):
    """Where no gradient needs the batch: it is written by the forward, while each row was in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Rows,
        inputs: TokenInputs,
        options: RowOptions,
    ) -> Any:
        stage = TritonStage(rows.token_ids.shape, inputs)
        check_values(rows)
        off_policy = inputs.old_logprobs is not None
        if off_policy or inputs.objective.uses_logprobs:
            stage.keep_terms_for_batch()
        stage.sequences(None, None)
        gradient = gradient_buffer(logits, options.overwrite_logits)
        zero_padding(gradient, rows.vocab_size)
        coefficients = stage.token_weights if off_policy else stage.grad_logprobs
        upstream = Upstream(coefficients, counts=stage.counts, tickets=stage.zero)
        slope = stage.slope() if off_policy else None
        stats = by_name(options.backend).forward_backward(rows, upstream, gradient, slope)
        loss, scalars = stage.batch(stats)
        if options.overwrite_logits:
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(gradient)
        ctx.edge = edge_of(logits)
        ctx.vocab_size = rows.vocab_size
        ctx.nan_source = stage.nan_source(loss, stats)
        ctx.mark_non_differentiable(scalars, stage.log_ratios, stage.clipped, stats.logprobs)
        ctx.set_materialize_grads(False)
        return loss, scalars, stage.log_ratios, stage.clipped, stats.logprobs

    @staticmethod
    def backward(ctx: Any, factor: Tensor | None, *_: Tensor | None) -> Any:
        if factor is None:
            return None, None, None, None
        refuse_second_backward(ctx, FROM_LOGITS)
        (gradient,) = ctx.saved_tensors
        with torch.no_grad():
            # Returns at once where the factor is 1 and the loss no NaN.
            triton_rows.scale(gradient[..., : ctx.vocab_size], factor, ctx.nan_source)
            torch.autograd.graph.increment_version(gradient)
        return first_derivative(gradient, FROM_LOGITS, ctx.edge, factor), None, None, None
