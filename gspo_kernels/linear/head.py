"""Logits from hidden states and a head, a chunk of rows at a time: never all of them exist.

`Head` computes a chunk (`load`), its statistics (`statistics`), and adds its rows' gradients to those of the operands
(`backward`). It knows rows, statistics and upstream gradients; the caller decides the order of chunks.
Rows are numbered among the selected rows: masked rows are never multiplied by the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows.dispatch import Backend, choose
from ..rows.types import Rows, RowStats, Upstream
from ..rows.vocab_shard import VocabShard, merged, of_this_rank
from .buffers import buffers_for
from .gradient_rows import (
    ActiveCount,
    PendingProducts,
    doubling_ranges,
    fp16_exponent,
    order_in_place,
)
from .head_term import HeadTerm, TermProducts, low_rank_products, padded_rows, write_logits
from .products import products
from .schedule import chunk_size, row_stride
from .types import Gradients, HeadArguments, NeedsGrad, SelectedRows

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
        self._terms = self._head_terms(arguments)
        device = weight.device
        self.chunk_size = chunk_size(arguments.chunk_bytes, columns, dtype, device.type, needs_grad.any())
        self._stride = row_stride(vocab, device.type)
        one_row = torch.empty(self._stride, dtype=self.sum_dtype, device=device)
        self.backend: Backend = choose(self._view(one_row, 0, 1)[None], arguments.backend, rows.fields())
        # Where one thread computes a whole row, it writes the gradient over the logits that it has read.
        self._in_place = device.type == "cpu" and not self.backend.runs_stage_in_triton
        of_logits = [term.of_logits for term in self._terms]
        self._buffers = buffers_for(rows.count, self.chunk_size, of_logits, needs_grad, self._in_place)
        self._logits_buffer = torch.empty(self._buffers.logits * self._stride, dtype=self.sum_dtype, device=device)
        self._gradient_buffer = self._logits_buffer.view(self._products.gradient_dtype)
        if self._buffers.gradients:
            rows_of_gradients, dtype = self._buffers.gradients, self._products.gradient_dtype
            self._gradient_buffer = torch.empty(rows_of_gradients * self._stride, dtype=dtype, device=device)
        bias_rows = weight.shape[0] if needs_grad.bias else 0
        self._bias_gradient = torch.zeros(bias_rows, dtype=self.sum_dtype, device=device)
        self._range: RowRange = slice(0, 0)  # the loaded rows
        self._logits = self._view(self._logits_buffer, 0, 0)
        self._pending: PendingProducts | None = None

    def _head_terms(self, arguments: HeadArguments) -> list[HeadTerm]:
        """The head, and the low-rank term if there is one."""
        needs_grad, of_head = self.needs_grad, TermProducts(self._products, self._products)
        terms = [
            HeadTerm(self.rows.hidden, arguments.weight, self.vocab, of_head, needs_grad.hidden, needs_grad.weight)
        ]
        if arguments.low_rank_hidden is not None and arguments.low_rank_weight is not None:
            hidden, weight = arguments.low_rank_hidden, arguments.low_rank_weight.to(self.sum_dtype)
            of_low_rank = low_rank_products(weight[: self.vocab], self._products)
            terms.append(
                HeadTerm(
                    hidden.reshape(-1, hidden.shape[-1]), weight, self.vocab, of_low_rank,
                    needs_grad.low_rank_hidden, needs_grad.low_rank_weight,
                )
            )  # fmt: skip
        return terms

    def load(self, rows: RowRange, recompute: bool = False) -> None:
        """Computes the logits of these rows, at most `chunk_size.max_rows`, over those of the last chunk."""
        operands, of_logits = self._operands(rows), [term.of_logits for term in self._terms]
        count = len(operands[0])
        padded = self._view(self._logits_buffer, self._first_free_row(count), padded_rows(of_logits, count))
        self._range, self._logits = rows, padded[:count]
        if count and self.vocab:
            write_logits(of_logits, operands, self._bias, padded)
        self.work.chunks += 1
        if recompute:
            self.work.recomputed_rows += count
        else:
            self.work.forward_rows += count
        if not self._in_place and self._pending is not None:  # queued behind the logits of this chunk
            self._pending = self._pending.counted()
            if not self._buffers.take(count, self._pending_rows):
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
        exponent = None
        if self._products.gradient_dtype == torch.float16:
            _, _, temperature = self._row_arrays()
            exponent = fp16_exponent(upstream, temperature, self.rows.tanh_scale)
        count = ActiveCount(active, exponent)
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
        """Multiplies the pending gradients of logits by the operands of each term."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        gradient, indices, active, _, _, exponent = pending.counted()
        factor = 2.0**-exponent
        if len(indices) == 0:
            return
        self.work.backward_rows += len(indices)
        for term in self._terms:
            term.add_gradients(gradient, indices, active, factor)
        if self.needs_grad.bias:
            self._bias_gradient[: self.vocab].add_(gradient.sum(0, dtype=self.sum_dtype), alpha=factor)

    def scale_hidden(self, rows: RowRange, coefficients: Tensor) -> None:
        """Multiplies the gradient of each of these rows of hidden states by its coefficient; 0 gives 0."""
        indices = self._hidden_indices(rows)
        for term in self._terms:
            term.scale_hidden_gradient(indices, coefficients)

    def gradients(self) -> Gradients:
        """The gradients of all chunks; ends the pass. With a shard, a collective for each term."""
        self.finish_products()
        if self.shard is not None:
            self._sum_hidden_gradient(self.shard)
        of_head, *others = self._terms
        high, low = of_head.weight_gradient()
        found = Gradients(of_head.hidden_gradient, high, self._bias_gradient, high.new_empty(0), high.new_empty(0), low)
        for of_low_rank in others:
            found = found._replace(
                low_rank_hidden=of_low_rank.hidden_gradient, low_rank_weight=of_low_rank.weight_gradient().high
            )
        return found

    def _sum_hidden_gradient(self, shard: VocabShard) -> None:
        """Over the ranks."""
        for term in self._terms:
            term.sum_hidden_gradient(self.rows.row_indices, shard.ranks)

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

    def _operands(self, rows: RowRange) -> list[Tensor]:
        """These rows of each term's hidden states."""
        if self.rows.row_indices is None and isinstance(rows, slice):
            return [term.hidden[rows] for term in self._terms]
        indices = self._hidden_indices(rows)
        return [term.hidden.index_select(0, indices) for term in self._terms]

    # ---- memory

    @property
    def _pending_rows(self) -> int:
        """Rows of pending gradients, which lie at the beginning of their buffer."""
        return 0 if self._pending is None else self._pending.hidden_indices.shape[0]

    def _first_free_row(self, rows: int) -> int:
        """Where the logits buffer has memory for `rows`: behind pending gradients, else at 0 once they are done."""
        if not self._in_place:
            return 0
        if not self._buffers.take(rows, self._pending_rows):
            self.finish_products()
        return self._buffers.first_row(self._pending_rows)

    def _view(self, buffer: Tensor, first: int, rows: int) -> Tensor:
        """[rows, V] of a buffer, from row `first` on."""
        return buffer[first * self._stride :][: rows * self._stride].view(rows, self._stride)[:, : self.vocab]
