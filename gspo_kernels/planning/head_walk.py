"""Walks through the chunks of a loss from hidden states as `run_chunks` and `Head` do, in numbers of rows.

The steps are those of `plan_for`, and the sizes those of `chunk_size` and `buffers_for`: what runs decides.
"""

from __future__ import annotations

import itertools

import torch

from ..base.layout import BatchShape
from ..linear.buffers import buffers_for
from ..linear.chunked_loss import plan_for
from ..linear.gradient_rows import multiplied_rows
from ..linear.products import planned_products
from ..linear.schedule import Step, chunk_size, row_stride
from ..losses.token_stage import TokenInputs
from .estimate import HeadRows
from .shape import Shape


class Pass:
    """What one pass over the rows of a batch would do."""

    def __init__(self, shape: Shape) -> None:
        self.shape, needs_grad, device = shape, shape.needs_grad, shape.device
        weight = torch.empty(shape.vocab, shape.width, dtype=shape.dtype, device="meta")
        self.of = planned_products(weight, shape.dtype, device)
        self.stride = row_stride(shape.vocab, device)
        self.chunk = chunk_size(shape.chunk_bytes, shape.vocab, shape.dtype, device, needs_grad.any())
        self.buffers = buffers_for(shape.batch.rows, self.chunk, [self.of], needs_grad, in_place=device == "cpu")
        # Rows that are loaded at a time, and whether their hidden states are copied.
        self.loads: set[tuple[int, bool]] = set()
        # Rows of a product of gradients, and rows of which `load` holds a copy meanwhile.
        self.gradient_products: set[tuple[int, int]] = set()
        self.additions = 0  # to the gradient of the head: products of gradients
        self.scaled = 0  # the most rows of hidden states whose gradient is scaled at a time
        self._begins = [0, *itertools.accumulate(shape.batch.lengths)]
        self._forward = self._recomputed = self._backward = self._chunks = self._pending = 0
        for step in plan_for(inputs_of(shape), list(shape.batch.lengths), self.chunk, needs_grad):
            self._run(step)
        self._finish(0)

    @property
    def rows(self) -> HeadRows:
        return HeadRows(self._forward, self._recomputed, self._backward, self._chunks)

    def _run(self, step: Step) -> None:
        parts = [stop - start for start, stop in self.chunk.parts(step.start, step.stop)]
        copied = self.shape.batch.mask
        if step.mode == "deferred_scale":
            for rows in parts:
                self._load(rows, copied)
                self._write_gradients(rows, rows)
            self._finish(0)
            self.scaled = max(self.scaled, *parts)
        elif step.mode == "recompute":
            for rows in parts:
                self._load(rows, copied)
            for start, stop in self.chunk.parts(0, self._active_rows(step)):
                self._load(stop - start, True, recompute=True)
                self._write_gradients(stop - start, stop - start)
        else:
            self._load(step.stop - step.start, copied)
            if step.mode == "single_pass":
                self._write_gradients(self._active_rows(step), step.stop - step.start)

    def _active_rows(self, step: Step) -> int:
        """Of a step. In a response that a step cuts, they are taken to be spread evenly."""
        batch, found, end = self.shape.batch, 0, self._begins[step.first]
        for length, active in zip(
            batch.lengths[step.first : step.last], batch.active[step.first : step.last], strict=True
        ):
            begin, end = end, end + length
            if length:
                first, last = max(begin, step.start) - begin, min(end, step.stop) - begin
                found += active * last // length - active * first // length
        return found

    def _load(self, rows: int, copied: bool, recompute: bool = False) -> None:
        """`Head.load`."""
        self.loads.add((rows, copied))
        self._chunks += 1
        if recompute:
            self._recomputed += rows
        else:
            self._forward += rows
        if not self.buffers.take(rows, self._pending):
            self._finish(rows if copied else 0)

    def _write_gradients(self, active: int, rows: int) -> None:
        """`Head.backward`."""
        self._pending += multiplied_rows(active, rows, self.shape.device)

    def _finish(self, copied: int) -> None:
        """`Head.finish_products`."""
        if self._pending:
            self.gradient_products.add((self._pending, copied))
            self.additions += 1
            self._backward += self._pending
            self._pending = 0


def inputs_of(shape: Shape) -> TokenInputs:
    """Arguments of the loss, on a device without memory."""
    batch, device = shape.batch, torch.device("meta")

    def numbers(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float32, device=device)

    return TokenInputs(
        batch=BatchShape(torch.Size([batch.tokens]), len(batch.lengths), device, None, None, None),
        objective=shape.objective,
        advantages=numbers(len(batch.lengths)),
        advantages_per_token=False,
        old_logprobs=None if shape.on_policy else numbers(batch.tokens),
        ref_logprobs=None, rollout_logprobs=None, importance_weights=None, importance_weights_per_token=False,
        aggregation=shape.objective.aggregation, group_tokens=None, normalizer=None, beta=0.0, kl_estimator="k3",
        kl_weighting="none", entropy_coef=0.0, entropy_bonus=False, max_log_ratio=20.0,
    )  # fmt: skip
