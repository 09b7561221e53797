"""Runs a loss over the head chunk by chunk, in the order that `schedule.py` plans.

Statistics of a chunk go to the token stage, which returns a coefficient for each row (dL/d of its statistics); the head
then computes the gradients of the rows from them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.layout import BatchShape, Layout
from ..losses import triton_stage
from ..losses.stats import SCALARS
from ..losses.token_stage import TokenInputs, TokenStage
from ..rows.types import RowStats, Upstream
from .head import Head, RowRange
from .schedule import ChunkSize, Step, plan
from .types import NeedsGrad, SelectedRows, can_synchronize


def run_chunks(head: Head, stage: TokenStage, inputs: TokenInputs, fused: bool) -> RowStats:
    """Statistics of the selected rows; afterwards the head has the gradients of the loss.

    `fused`: whether Triton's stage computes coefficients where it can.
    """
    rows = head.rows
    lengths = _selected_lengths(stage, inputs.batch, rows)
    stats = _empty_stats(head)
    coefficients = Coefficients(stage, inputs, rows, lengths, fused) if head.needs_grad.any() else None
    on_policy: Tensor | None = None
    if coefficients is not None and inputs.gradient_is_known():
        on_policy = coefficients.on_policy(head.sum_dtype)

    def upstream(step: Step) -> Upstream:
        if on_policy is not None:
            found = stats.logprobs[step.start : step.stop]
            return Upstream(torch.where(found.isnan(), torch.nan, on_policy[step.start : step.stop]))
        assert coefficients is not None
        return coefficients.of_step(step, RowStats(*(x[step.start : step.stop] for x in stats)))

    for step in plan_steps(inputs, stage.layout, lengths, head):
        parts = list(head.chunk_size.parts(step.start, step.stop))
        if step.mode == "statistics":
            _forward(head, stats, step.start, step.stop)
        elif step.mode == "single_pass":
            found = _forward(head, stats, step.start, step.stop)
            head.backward(found, upstream(step))
        elif step.mode == "deferred_scale":
            for start, stop in parts:
                found = _forward(head, stats, start, stop)
                head.backward(found, Upstream(torch.ones_like(found.logprobs)))
            head.finish_products()
            g_logprobs, _, _ = upstream(step).by_statistic()
            assert g_logprobs is not None
            for start, stop in parts:  # by parts, because scaling takes three times their memory
                head.scale_hidden(slice(start, stop), g_logprobs[start - step.start : stop - step.start])
        else:
            for start, stop in parts:
                _forward(head, stats, start, stop)
            backward_recomputed(head, step.start, stats, upstream(step))
    return stats


def statistics(head: Head) -> RowStats:
    """Statistics of the selected rows, without gradients."""
    stats = _empty_stats(head)
    for start, stop in head.chunk_size.parts(0, head.rows.count):
        _forward(head, stats, start, stop)
    return stats


def _forward(head: Head, stats: RowStats, start: int, stop: int) -> RowStats:
    """Loads rows [start, stop) and writes their statistics into `stats`; returns those of these rows."""
    head.load(slice(start, stop))
    found = head.statistics()
    for all_rows, of_chunk in zip(stats, found, strict=True):
        all_rows[start:stop] = of_chunk
    return found


def backward_recomputed(head: Head, first: int, stats: RowStats, upstream: Upstream) -> None:
    """Gradients of the rows from `first` on that `upstream` is about: the logits of active rows are computed again."""
    active = upstream.some()
    all_rows = torch.arange(len(active), device=active.device)
    rows = all_rows[active] if can_synchronize(active.device) else all_rows
    for start, stop in head.chunk_size.parts(0, rows.shape[0]):
        chosen: RowRange = rows[start:stop] + first
        head.load(chosen, recompute=True)
        head.backward(RowStats(*(x[chosen] for x in stats)), upstream.at(rows[start:stop]))


def propagate_nan(
    gradients: Sequence[Tensor], inputs: TokenInputs, stage: TokenStage, stats: RowStats, scalars: Tensor
) -> None:
    """Writes NaN into the gradients [N, ..] of rows, of all rows that share a ratio with a NaN row.

    On-policy, coefficients are known before any row has been computed, and do not depend on it. A CPU first checks
    whether there is any NaN. Under context parallelism every rank makes the same check and finds the same.
    """
    if not gradients or not inputs.gradient_is_known() or inputs.objective.depends_on == "token":
        return
    if scalars.device.type == "cpu" and not bool(scalars[SCALARS.index("approx_kl")].isnan()):
        return
    coefficients, _ = stage.gradient(stats.logprobs.reshape(-1), stats.entropy.reshape(-1))
    for gradient in gradients:
        gradient.masked_fill_(coefficients.isnan()[:, None], torch.nan)


def _empty_stats(head: Head) -> RowStats:
    dtypes = (head.sum_dtype, head.sum_dtype, torch.float64)
    return RowStats(*(torch.empty(head.rows.count, dtype=d, device=head.rows.hidden.device) for d in dtypes))


# ---- coefficients


class Coefficients:
    """dL/d of the statistics of selected rows: of whole sequences or, where tokens are independent, of any rows."""

    def __init__(
        self, stage: TokenStage, inputs: TokenInputs, rows: SelectedRows, lengths: list[int] | None, fused: bool
    ) -> None:
        self._mask, self._ranks = rows.mask, inputs.batch.ranks
        self._step_crosses_ranks = coefficients_depend_on(inputs) != "token"
        sequences, device = inputs.batch.sequences, rows.hidden.device
        # With unknown lengths, any row may belong to any sequence.
        self._ends = [0] * sequences + [rows.count] if lengths is None else [0, *itertools.accumulate(lengths)]
        if rows.mask is None:
            self._boundaries = torch.nn.functional.pad(stage.layout.local_lengths.long().cumsum(0), (1, 0))
        elif inputs.batch.cu_seqlens is not None:
            self._boundaries = inputs.batch.cu_seqlens.long()
        else:
            self._boundaries = torch.arange(sequences + 1, device=device) * inputs.batch.tokens[1]
        selected = BatchShape(torch.Size([rows.count]), sequences, device, rows.mask, self._boundaries, self._ranks)
        indices: Tensor | slice = slice(None) if rows.row_indices is None else rows.row_indices
        self.stage = stage.part(selected, indices, slice(None))
        self._fused: TokenInputs | None = None
        if fused:
            count = inputs.counted(stage.layout) if inputs.normalizer is None else inputs.normalizer
            self._fused = _part_of(inputs, selected, indices, slice(None))._replace(normalizer=count)

    def on_policy(self, dtype: torch.dtype) -> Tensor:
        """[rows], dL/dlogprob where the policy is the old policy: no statistics are needed."""
        return self.stage.gradient_on_policy().to(dtype)

    def of_step(self, step: Step, stats: RowStats) -> Upstream:
        tokens, sequences = slice(step.start, step.stop), slice(step.first, step.last)
        boundaries = self._boundaries[step.first : step.last + 1].clamp(step.start, step.stop) - step.start
        mask = None if self._mask is None else self._mask[tokens]
        batch = BatchShape(
            torch.Size([step.stop - step.start]), step.last - step.first, boundaries.device, mask, boundaries,
            self._ranks if self._step_crosses_ranks else None,
        )  # fmt: skip
        whole_sequences = self._ends[step.first] >= step.start and self._ends[step.last] <= step.stop
        if self._fused is not None and whole_sequences and mask is None:
            return triton_stage.gradient(_part_of(self._fused, batch, tokens, sequences), stats)
        return Upstream(*self.stage.part(batch, tokens, sequences).gradient(stats.logprobs, stats.entropy))


def _part_of(inputs: TokenInputs, batch: BatchShape, tokens: Tensor | slice, sequences: slice) -> TokenInputs:
    """The inputs of some of the tokens and sequences."""

    def part(values: Any, per_token: bool) -> Any:
        if values is None:
            return None
        return values.reshape(-1)[tokens] if per_token else values[sequences]

    return inputs._replace(
        batch=batch,
        advantages=part(inputs.advantages, inputs.advantages_per_token),
        old_logprobs=part(inputs.old_logprobs, True),
        ref_logprobs=part(inputs.ref_logprobs, True),
        rollout_logprobs=part(inputs.rollout_logprobs, True),
        importance_weights=part(inputs.importance_weights, inputs.importance_weights_per_token),
        group_tokens=part(inputs.group_tokens, False),
    )


# ---- the plan


def coefficients_depend_on(inputs: TokenInputs) -> str:
    """What a row's coefficient depends on: the "token" alone, its "sequence", or the "batch"."""
    return "token" if inputs.gradient_is_known() else inputs.objective.depends_on


def plan_for(inputs: TokenInputs, lengths: list[int], chunk: ChunkSize, needs_grad: NeedsGrad) -> list[Step]:
    return plan(
        lengths,
        chunk,
        depends_on=coefficients_depend_on(inputs),
        gradient=needs_grad.any(),
        # With an entropy bonus a row's gradient is no multiple of the gradient of its log-probability.
        deferred_scale=not needs_grad.sums_over_rows() and inputs.entropy_coef == 0.0,
    )


def plan_steps(inputs: TokenInputs, layout: Layout, lengths: list[int] | None, head: Head) -> list[Step]:
    """The plan; under context parallelism, where steps contain collectives, the same on all ranks."""
    ranks, device = inputs.batch.ranks, head.rows.hidden.device
    if not head.needs_grad.any() or coefficients_depend_on(inputs) == "token":
        ranks = None  # no step has a collective over them
    if lengths is None or (ranks is not None and not can_synchronize(device)):
        steps = plan_for(inputs, [head.rows.count], head.chunk_size, head.needs_grad)
        if ranks is not None and not steps:
            steps = [Step("single_pass", 0, 0, 0, 0)]  # without rows, to join the collectives of the other ranks
        return [step._replace(first=0, last=inputs.batch.sequences) for step in steps]
    if ranks is None:
        return plan_for(inputs, lengths, head.chunk_size, head.needs_grad)
    longest: list[int] = layout.longest_parts.long().tolist()
    ends = [0, *itertools.accumulate(lengths)]
    steps = plan_for(inputs, longest, head.chunk_size, head.needs_grad)
    return [step._replace(start=ends[step.first], stop=ends[step.last]) for step in steps]


def _selected_lengths(stage: TokenStage, batch: BatchShape, rows: SelectedRows) -> list[int] | None:
    """Selected rows of each sequence; None where the host cannot know them.

    On a GPU the host waits for the mask or the boundaries, which decide how much work there is.
    """
    if batch.cu_seqlens is None and (batch.mask is None or rows.mask is not None):
        return [batch.tokens[1]] * batch.tokens[0]
    if rows.mask is not None or not can_synchronize(batch.device):
        return None
    return stage.layout.lengths_on_host()
