"""Logits from hidden states and a head, a chunk of rows at a time: never all of them exist.

`Head` computes a chunk (`load`), its statistics (`statistics`), and adds its rows' gradients to those of hidden states,
weight and bias (`backward`). It knows rows, statistics and upstream gradients; the caller decides the order of chunks.
Rows are numbered among the selected rows: masked rows are never multiplied by the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.collectives import all_reduce_
from ..rows.dispatch import Backend, choose
from ..rows.types import Rows, RowStats, Upstream
from ..rows.vocab_shard import VocabShard, merged, of_this_rank
from .gradient_rows import (
    CHUNKS_OF_GRADIENTS,
    ActiveCount,
    PendingProducts,
    doubling_ranges,
    fp16_exponent,
    order_in_place,
)
from .products import products
from .schedule import chunk_size, row_stride
from .types import Gradients, HeadArguments, NeedsGrad, SelectedRows
from .weight_sums import WeightSums

RowRange = slice | Tensor  # of selected rows: neighbours, or any [n] int64


@dataclass
class Work:
    """The numbers of `HeadWork`, counted on the host while chunks are computed."""

    forward_rows: int = 0
    recomputed_rows: int = 0
    backward_rows: int = 0
    chunks: int = 0


class Head:
    """One pass over the rows: `load` a chunk, `statistics`, `backward`, and so on; `gradients` at the end.

    With a vocabulary shard the weight is this rank's part of the head. All ranks then load the same rows at the same
    time, and statistics and the gradient of the hidden states are those of the whole head.
    """

    def __init__(self, arguments: HeadArguments, rows: SelectedRows, needs_grad: NeedsGrad) -> None:
        weight, bias, dtype, shard = arguments.weight, arguments.bias, arguments.dtype, arguments.shard
        columns = arguments.vocab_size if shard is None else shard.usual_columns
        vocab = arguments.vocab_size if shard is None else shard.columns
        self.rows, self.needs_grad, self.work, self.vocab, self.shard = rows, needs_grad, Work(), vocab, shard
        self._owns: Tensor | None = None  # [rows], whether this rank has the row's token
        self._token_ids = rows.token_ids
        if shard is not None:
            self._owns, self._token_ids = shard.local_ids(rows.token_ids)
        self._bias = None if bias is None else bias[:vocab]
        self._products = products(weight[:vocab], dtype)
        self.sum_dtype = self._products.sum_dtype  # of log-probabilities, and of gradients until they are returned
        device = weight.device
        self.chunk_size = chunk_size(arguments.chunk_bytes, columns, dtype, device.type, needs_grad.any())
        self._max_rows = max_rows = min(self.chunk_size.max_rows, max(rows.count, 1))
        self._stride = row_stride(vocab, device.type)
        buffer_rows = self._products.buffer_rows(max_rows)
        self._logits_buffer = torch.empty(buffer_rows * self._stride, dtype=self.sum_dtype, device=device)
        self.backend: Backend = choose(
            self._view(self._logits_buffer, 0, max_rows)[None], arguments.backend, rows.fields()
        )
        # Where one thread computes a whole row, it writes the gradient over the logits that it has read.
        self._in_place = device.type == "cpu" and not self.backend.runs_stage_in_triton
        self._gradient_buffer = self._logits_buffer.view(self._products.gradient_dtype)
        self._gradient_rows = max_rows  # of the buffer
        if needs_grad.any() and not self._in_place:
            dtype = self._products.gradient_dtype
            # fp16 gradients are scaled chunk by chunk. float32 products are so slow that their number does not matter.
            if needs_grad.weight and dtype == torch.bfloat16:
                self._gradient_rows = min(CHUNKS_OF_GRADIENTS * max_rows, max(rows.count, 1))
            self._gradient_buffer = torch.empty(self._gradient_rows * self._stride, dtype=dtype, device=device)

        def buffer(shape: tuple[int, ...], needed: bool) -> Tensor:
            return torch.empty(shape if needed else 0, dtype=self.sum_dtype, device=device)

        self._hidden_gradient = buffer(tuple(rows.hidden.shape), needs_grad.hidden).zero_()
        self._weight_sums = WeightSums(weight if needs_grad.weight else weight[:0], vocab, self.sum_dtype)
        self._bias_gradient = buffer((weight.shape[0],), needs_grad.bias).zero_()
        self._range: RowRange = slice(0, 0)  # the loaded rows
        self._logits = self._view(self._logits_buffer, 0, 0)
        self._pending: PendingProducts | None = None

    def load(self, rows: RowRange, recompute: bool = False) -> None:
        """Computes the logits of these rows, at most `chunk_size.max_rows`, over those of the last chunk."""
        hidden = self._hidden_states(rows)
        first, padded_rows = self._first_free_row(len(hidden)), self._products.padded_rows(len(hidden))
        padded = self._view(self._logits_buffer, first, padded_rows)
        self._range, self._logits = rows, padded[: len(hidden)]
        if hidden.shape[0] and self.vocab:
            self._products.logits(hidden, self._bias, padded)
        self.work.chunks += 1
        if recompute:
            self.work.recomputed_rows += hidden.shape[0]
        else:
            self.work.forward_rows += hidden.shape[0]
        if not self._in_place and self._pending is not None:  # queued behind the logits of this chunk
            self._pending = self._pending.counted()
            together = self._products.gradient_dtype != torch.float16
            if not together or self._pending_rows + len(hidden) > self._gradient_rows:
                self.finish_products()

    def statistics(self) -> RowStats:
        """Of the loaded rows, each [n]. With a shard, a collective."""
        found = None
        if self.vocab:
            rows = self._as_rows(self._row_arrays())
            found = RowStats(*(x.view(-1) for x in self.backend.forward(rows)))
        if self.shard is None:
            assert found is not None
            return found
        assert self._owns is not None
        mask = None if self.rows.mask is None else self._of_chunk(self.rows.mask)
        return merged(found, self._of_chunk(self._owns), mask, self.shard, self.sum_dtype)

    def backward(self, stats: RowStats, upstream: Upstream) -> None:
        """Adds the gradients of the loaded rows; `stats` and `upstream` [n]. Overwrites their logits."""
        if not self.needs_grad.any() or not self.vocab:
            return
        active = upstream.some()
        if self.rows.mask is not None:
            active = active & self._of_chunk(self.rows.mask)
        if self._owns is not None:
            local = self._as_rows(self._row_arrays())
            stats, upstream = of_this_rank(stats, upstream, self._of_chunk(self._owns), local, self.backend)
        if self._in_place:
            self._backward_in_place(active, stats, upstream)
            return
        count = ActiveCount(active, fp16_exponent(upstream) if self._products.gradient_dtype == torch.float16 else None)
        order = torch.argsort(active.logical_not().to(torch.uint8), stable=True)
        if order.numel():
            first = self._pending_rows
            gradient = self._view(self._gradient_buffer, 0, first + order.numel())
            self._write(gradient[first:], order, stats, upstream, count.exponent)
            indices, active = self._active_indices(order), active.index_select(0, order)
            if self._pending is not None:
                assert self._pending.active is not None
                indices = torch.cat([self._pending.hidden_indices, indices])
                active = torch.cat([self._pending.active, active])
            self._pending = PendingProducts(gradient, indices, active, count, first)

    def _backward_in_place(self, active: Tensor, stats: RowStats, upstream: Upstream) -> None:
        """Writes over the logits, behind pending gradients. Products run when the next logits need the memory."""
        count, pending_rows = int(active.sum()), self._pending_rows
        if count == 0:
            return
        half_width = self._products.gradient_dtype.itemsize < self.sum_dtype.itemsize
        order = active.nonzero()[:, 0] if half_width else order_in_place(active, count)
        gradient = self._view(self._gradient_buffer, 0, pending_rows + count)
        for start, stop in doubling_ranges(count) if half_width else [(0, count)]:
            self._write(gradient[pending_rows + start : pending_rows + stop], order[start:stop], stats, upstream)
        indices = self._active_indices(order)
        if self._pending is not None:
            indices = torch.cat([self._pending.hidden_indices, indices])
        self._pending = PendingProducts(gradient, indices, None)

    def _write(
        self, gradient: Tensor, order: Tensor, stats: RowStats, upstream: Upstream, exponent: Tensor | None = None
    ) -> None:
        """Writes the gradients of these rows of logits, times 2 to the exponent."""
        ordered = upstream.at(order)
        if exponent is not None:
            ordered = ordered._replace(factor=torch.exp2(exponent.float()))
        saved = RowStats(*(x.index_select(0, order)[None] for x in stats))
        rows = self._as_rows(self._row_arrays(order), order)
        self.backend.backward(rows, saved, ordered.rows(), gradient[None])

    def finish_products(self) -> None:
        """Multiplies the pending gradients of logits by the head and by the hidden states."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        gradient, indices, active, _, _, exponent = pending.counted()
        factor = 2.0**-exponent
        if len(indices) == 0:
            return
        self.work.backward_rows += len(indices)
        if self.needs_grad.hidden:
            self._hidden_gradient.index_copy_(0, indices, self._products.hidden_gradient(gradient, factor))
        if self.needs_grad.weight:
            hidden = self.rows.hidden.index_select(0, indices)
            if active is not None:  # hidden states of an inactive row may be NaN, and zero times NaN is NaN
                hidden = torch.where(active[:, None], hidden, 0.0)
            self._products.weight_gradient(gradient, hidden, self._weight_sums, factor)
        if self.needs_grad.bias:
            self._bias_gradient[: self.vocab].add_(gradient.sum(0, dtype=self.sum_dtype), alpha=factor)

    def scale_hidden(self, rows: RowRange, coefficients: Tensor) -> None:
        """Multiplies the gradient of each of these hidden states by its coefficient; a coefficient of 0 gives 0."""
        indices = self._hidden_indices(rows)
        gradient = self._hidden_gradient.index_select(0, indices)
        factor = coefficients[:, None]
        scaled = torch.where(factor != 0.0, gradient * factor.to(gradient.dtype), 0.0)
        self._hidden_gradient.index_copy_(0, indices, scaled)

    def gradients(self) -> Gradients:
        """The gradients of all chunks; ends the pass. With a shard, a collective."""
        self.finish_products()
        if self.shard is not None and self.needs_grad.hidden:
            self._sum_hidden_gradient(self.shard)
        high, low = self._weight_sums.finished()
        return Gradients(self._hidden_gradient, high, self._bias_gradient, low)

    def _sum_hidden_gradient(self, shard: VocabShard) -> None:
        """Over the ranks. Only selected rows are sent: the others are 0 on every rank."""
        indices = self.rows.row_indices
        if indices is None:
            all_reduce_(self._hidden_gradient, shard.ranks)
            return
        gradient = self._hidden_gradient.index_select(0, indices)
        all_reduce_(gradient, shard.ranks)
        self._hidden_gradient.index_copy_(0, indices, gradient)

    # ---- rows

    def _of_chunk(self, values: Tensor, order: Tensor | None = None) -> Tensor:
        """The entries of the loaded rows."""
        found = values[self._range]
        return found if order is None else found.index_select(0, order)

    def _row_arrays(self, order: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """token_ids, mask, temperature of the loaded rows."""
        mask = None if self.rows.mask is None else self._of_chunk(self.rows.mask, order)
        temperature = self.rows.temperature
        if temperature.ndim:
            temperature = self._of_chunk(temperature, order)
        return self._of_chunk(self._token_ids, order), mask, temperature

    def _as_rows(self, arrays: tuple[Tensor, Tensor | None, Tensor], row_indices: Tensor | None = None) -> Rows:
        token_ids, mask, temperature = (x if x is None or not x.ndim else x[None].contiguous() for x in arrays)
        assert token_ids is not None and temperature is not None
        return Rows(self._logits[None], token_ids, mask, temperature, self.vocab, row_indices, self.rows.tanh_scale)

    def _hidden_indices(self, rows: RowRange) -> Tensor:
        """Which rows of the hidden states these are."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.rows.hidden.device)
        return rows if self.rows.row_indices is None else self.rows.row_indices.index_select(0, rows)

    def _active_indices(self, order: Tensor) -> Tensor:
        """Which rows of the hidden states the loaded rows `order` are."""
        return self._hidden_indices(self._range).index_select(0, order)

    def _hidden_states(self, rows: RowRange) -> Tensor:
        if self.rows.row_indices is None and isinstance(rows, slice):
            return self.rows.hidden[rows]
        return self.rows.hidden.index_select(0, self._hidden_indices(rows))

    # ---- memory

    @property
    def _pending_rows(self) -> int:
        """Rows of pending gradients, which lie at the beginning of their buffer."""
        return 0 if self._pending is None else self._pending.hidden_indices.shape[0]

    def _first_free_row(self, rows: int) -> int:
        """Where the logits buffer has memory for `rows`: behind pending gradients, else at 0 once they are done."""
        if not self._in_place:
            return 0
        first = -(-self._pending_rows * self._products.gradient_dtype.itemsize // self.sum_dtype.itemsize)
        if first + rows <= self._max_rows:
            return first
        self.finish_products()
        return 0

    def _view(self, buffer: Tensor, first: int, rows: int) -> Tensor:
        """[rows, V] of a buffer, from row `first` on."""
        return buffer[first * self._stride :][: rows * self._stride].view(rows, self._stride)[:, : self.vocab]
