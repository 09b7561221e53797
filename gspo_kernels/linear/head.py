"""Rows of logits that are made from hidden states and a head, a chunk at a time, and never all there.

`Head` is one walk: bring in a chunk (`load`), take its statistics, and give its rows their gradients, which are those
of hidden states, weight and bias. It knows rows, statistics and upstream gradients; who calls decides in which order.
Rows are counted in the order of `live`, the rows that somebody asks about: the others never meet the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..collectives import add_up_
from ..rows.dispatch import Backend, choose
from ..rows.types import Rows, RowStats, Upstream
from ..rows.vocab_shard import VocabShard, merged, of_this_rank
from .products import keeps_gradients, products, usual_chunk_bytes
from .schedule import row_stride, rows_per_chunk

_ROUND_ON_GPU = 128  # rows of a gradient product: few shapes, and the kernels for them run full


class Wanted(NamedTuple):
    """Which of the operands want a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


class Gradients(NamedTuple):
    """In float32 (float64), whatever the operands are; empty where not wanted."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]


@dataclass
class Work:
    """Rows that met the head so far."""

    forward_rows: int = 0
    recomputed_rows: int = 0
    backward_rows: int = 0
    chunks: int = 0


@dataclass(frozen=True)
class Asked:
    """What is asked about rows [N, D] of hidden states; `live` None: about all of them. Arrays are in live order."""

    hidden: Tensor  # [N, D]
    live: Tensor | None  # [rows] int64, which rows of `hidden`
    token_ids: Tensor  # [rows] int64
    mask: Tensor | None  # [rows] bool; for when rows that do not count could not be left out
    temperature: Tensor  # [rows] fp32, or 0-d fp64 on the CPU

    @property
    def count(self) -> int:
        return self.token_ids.shape[0]


Span = slice | Tensor  # of rows: neighbours, or any [n] int64


class Head:
    """The walk: `load` a chunk, `statistics`, `backward`, and so on; `gradients` at the end."""

    def __init__(
        self,
        asked: Asked,
        weight: Tensor,
        bias: Tensor | None,
        vocab_size: int,
        dtype: torch.dtype,
        wanted: Wanted,
        chunk_bytes: int | None,
        backend: str | None,
        shard: VocabShard | None = None,
    ) -> None:
        """`dtype`: what hidden states and weight are multiplied in. `weight` from row `vocab_size` on is padding.

        With `shard` the weight is this rank's part of the head. Ranks then load the same rows at the same time, and
        statistics and the gradient of hidden states are those of the whole head.
        """
        columns = vocab_size if shard is None else shard.usual_columns
        vocab_size = vocab_size if shard is None else shard.columns
        self.asked, self.wanted, self.work, self.vocab, self.shard = asked, wanted, Work(), vocab_size, shard
        self._owns: Tensor | None = None
        self._token_ids = asked.token_ids
        if shard is not None:
            self._owns, self._token_ids = shard.local_ids(asked.token_ids)
        self._bias = None if bias is None else bias[:vocab_size]
        self._products = products(weight[:vocab_size], dtype)
        self.sums = sums = self._products.sums  # the dtype of log-probabilities, and of gradients until the end
        device = weight.device
        usual = usual_chunk_bytes(device.type, dtype, wanted.any())
        keeps = wanted.any() and keeps_gradients(device.type, dtype)
        self.at_a_time = rows_per_chunk(chunk_bytes, columns, sums.itemsize, device.type, usual, keeps)
        self._most = rows = min(self.at_a_time.most, max(asked.count, 1))
        self._stride = row_stride(vocab_size, device.type)
        self._room = torch.empty((rows + self._products.most_padding) * self._stride, dtype=sums, device=device)
        self.backend: Backend = choose(self._chunk(self._room, 0, rows)[None], backend, ["row_indices"])
        # Where a row is walked by one thread, its gradient is written behind the reading: over the logits.
        self._in_place = device.type == "cpu" and not self.backend.runs_stage_in_triton
        self._gradient_room = self._room.view(self._products.gradient)
        if wanted.any() and not self._in_place:
            self._gradient_room = torch.empty(rows * self._stride, dtype=self._products.gradient, device=device)

        def room(shape: tuple[int, ...], wanted: bool) -> Tensor:
            return torch.empty(shape if wanted else 0, dtype=sums, device=device)

        self._hidden = room(tuple(asked.hidden.shape), wanted.hidden).zero_()
        self._weight = room(tuple(weight.shape), wanted.weight)
        self._bias_gradient = room((weight.shape[0],), wanted.bias).zero_()
        self._weight_is_written = False
        self._span: Span = slice(0, 0)
        self._logits = self._chunk(self._room, 0, 0)
        self._pending: _Pending | None = None

    def load(self, span: Span, again: bool = False) -> None:
        """Logits of these rows, at most `at_a_time.most`, in the place of the last ones."""
        hidden = self._hidden_rows(span)
        padded = self._chunk(self._room, self._free(len(hidden)), self._products.padded(len(hidden)))
        self._span, self._logits = span, padded[: len(hidden)]
        if hidden.shape[0] and self.vocab:
            self._products.logits(hidden, self._bias, padded)
        self.work.chunks += 1
        if again:
            self.work.recomputed_rows += hidden.shape[0]
        else:
            self.work.forward_rows += hidden.shape[0]
        if not self._in_place:
            self.finish_products()  # those of the last chunk, queued behind the logits of this one

    def statistics(self) -> RowStats:
        """Of the rows that were loaded, each [n]. With a shard, a collective."""
        found = None
        if self.vocab:
            found = RowStats(*(x.view(-1) for x in self.backend.forward(self._rows(self._logits, self._take_all()))))
        if self.shard is None:
            assert found is not None
            return found
        assert self._owns is not None
        mask = None if self.asked.mask is None else self._take(self.asked.mask)
        return merged(found, self._take(self._owns), mask, self.shard, self.sums)

    def backward(self, stats: RowStats, upstream: Upstream) -> None:
        """Gives the rows that were loaded their gradients; `stats` and `upstream` [n]. Their logits are gone then."""
        if not self.wanted.any() or not self.vocab:
            return
        active = upstream.some()
        if self.asked.mask is not None:
            active = active & self._take(self.asked.mask)
        if self._owns is not None:
            local = self._rows(self._logits, self._take_all())
            stats, upstream = of_this_rank(stats, upstream, self._take(self._owns), local, self.backend)
        if self._in_place:
            self._backward_in_place(active, stats, upstream)
            return
        exponent = _exponent(upstream) if self._products.gradient == torch.float16 else None
        news = _News(active, exponent)
        order = torch.argsort(active.logical_not().to(torch.uint8), stable=True)
        if order.numel():
            gradient = self._gradient_chunk(order.numel())
            self._write(gradient, order, stats, upstream, news.exponent)
            self._pending = _Pending(gradient, self._place(order), active.index_select(0, order), news)

    def _backward_in_place(self, active: Tensor, stats: RowStats, upstream: Upstream) -> None:
        """Over the logits, next to the gradients that are kept: products wait until the next logits need the room."""
        count, kept = int(active.sum()), self._kept
        if count == 0:
            return
        narrow = self._products.gradient.itemsize < self.sums.itemsize
        order = active.nonzero()[:, 0] if narrow else _order_in_place(active, count)
        gradient = self._gradient_chunk(kept + count)
        for start, stop in _doubling(count) if narrow else [(0, count)]:
            self._write(gradient[kept + start : kept + stop], order[start:stop], stats, upstream)
        places = self._place(order)
        if self._pending is not None:
            places = torch.cat([self._pending.places, places])
        self._pending = _Pending(gradient, places, None, None)

    def _write(
        self, gradient: Tensor, order: Tensor, stats: RowStats, upstream: Upstream, exponent: Tensor | None = None
    ) -> None:
        """The gradients of these rows of logits, lifted by a power of two."""
        ordered = upstream.at(order)
        if exponent is not None:
            ordered = ordered._replace(factor=torch.exp2(exponent.float()))
        saved = RowStats(*(x.index_select(0, order)[None] for x in stats))
        rows = self._rows(self._logits, self._take_all(order), order)
        self.backend.backward(rows, saved, ordered.rows(), gradient[None])

    def finish_products(self) -> None:
        """The products of gradients that were written, if they have not run yet."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        rows, exponent = (pending.places.shape[0], 0) if pending.news is None else pending.news.wait()
        if rows == 0:
            return
        self.work.backward_rows += rows
        gradient, places, factor = pending.gradient[:rows], pending.places[:rows], 2.0**-exponent
        if self.wanted.hidden:
            self._hidden.index_copy_(0, places, self._products.hidden_gradient(gradient, factor))
        if self.wanted.weight:
            hidden = self.asked.hidden.index_select(0, places)
            if pending.active is not None:  # what a row without a gradient holds may be NaN, and zero times NaN is NaN
                hidden = torch.where(pending.active[:rows, None], hidden, 0.0)
            into = self._weight[: self.vocab]
            self._products.weight_gradient(gradient, hidden, into, self._weight_is_written, factor)
            self._weight_is_written = True
        if self.wanted.bias:
            self._bias_gradient[: self.vocab].add_(gradient.sum(0, dtype=self.sums), alpha=factor)

    def scale_hidden(self, span: Span, coefficients: Tensor) -> None:
        """Multiplies the gradients of these hidden states by one number each; by zero, it is zero whatever it was."""
        places = self._places(span)
        rows = self._hidden.index_select(0, places)
        scaled = torch.where(coefficients[:, None] != 0.0, rows * coefficients[:, None].to(rows.dtype), 0.0)
        self._hidden.index_copy_(0, places, scaled)

    def gradients(self) -> Gradients:
        """All there is; nothing may be asked afterwards. With a shard, a collective."""
        self.finish_products()
        if self.shard is not None and self.wanted.hidden:
            self._add_up_hidden(self.shard)
        if self.wanted.weight:
            (self._weight[self.vocab :] if self._weight_is_written else self._weight).zero_()
        return Gradients(self._hidden, self._weight, self._bias_gradient)

    def _add_up_hidden(self, shard: VocabShard) -> None:
        """The gradients of hidden states over the ranks, of the rows that have one: no bytes for the others."""
        live = self.asked.live
        if live is None:
            add_up_(self._hidden, shard.ranks)
            return
        rows = self._hidden.index_select(0, live)
        add_up_(rows, shard.ranks)
        self._hidden.index_copy_(0, live, rows)

    # ---- rows

    def _take(self, values: Tensor, order: Tensor | None = None) -> Tensor:
        taken = values[self._span]
        return taken if order is None else taken.index_select(0, order)

    def _take_all(self, order: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """token_ids, mask, temperature of the rows that were loaded."""
        asked = self.asked
        mask = None if asked.mask is None else self._take(asked.mask, order)
        temperature = self._take(asked.temperature, order) if asked.temperature.ndim else asked.temperature
        return self._take(self._token_ids, order), mask, temperature

    def _rows(self, logits: Tensor, arrays: tuple[Tensor, Tensor | None, Tensor], places: Tensor | None = None) -> Rows:
        token_ids, mask, temperature = (x if x is None or not x.ndim else x[None].contiguous() for x in arrays)
        assert token_ids is not None and temperature is not None
        return Rows(logits[None], token_ids, mask, temperature, self.vocab, row_indices=places)

    def _places(self, span: Span) -> Tensor:
        """Which rows of the hidden states these are."""
        if isinstance(span, slice):
            span = torch.arange(span.start, span.stop, device=self.asked.hidden.device)
        return span if self.asked.live is None else self.asked.live.index_select(0, span)

    def _place(self, order: Tensor) -> Tensor:
        return self._places(self._span).index_select(0, order)

    def _hidden_rows(self, span: Span) -> Tensor:
        if self.asked.live is None and isinstance(span, slice):
            return self.asked.hidden[span]
        return self.asked.hidden.index_select(0, self._places(span))

    # ---- memory

    @property
    def _kept(self) -> int:
        """Rows of gradients that lie in the memory of the logits."""
        return 0 if not self._in_place or self._pending is None else self._pending.places.shape[0]

    def _free(self, rows: int) -> int:
        """Where so many rows of logits have room: behind the gradients that are kept, or else in their place."""
        first = -(-self._kept * self._products.gradient.itemsize // self.sums.itemsize)
        if first + rows <= self._most:
            return first
        self.finish_products()
        return 0

    def _chunk(self, room: Tensor, first: int, rows: int) -> Tensor:
        return room[first * self._stride :][: rows * self._stride].view(rows, self._stride)[:, : self.vocab]

    def _gradient_chunk(self, rows: int) -> Tensor:
        """Of the dtype that the products take."""
        return self._chunk(self._gradient_room, 0, rows)


class _Pending(NamedTuple):
    gradient: Tensor  # [n, V], rows that have one first
    places: Tensor  # [n], the rows of the hidden states they belong to
    active: Tensor | None  # [n], which have a gradient; None: all
    news: _News | None  # None: all


class _News:
    """How many rows have a gradient, and by which power of two it was lifted. On a GPU the numbers are on their way,
    and awaited when there is other work to do there; in a CUDA graph, where nothing is awaited, all rows are taken."""

    def __init__(self, active: Tensor, exponent: Tensor | None) -> None:
        self._rows, self._event = active.shape[0], None
        self._numbers: Tensor | None = None
        if active.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.exponent = None
            return
        self.exponent = exponent  # 0-d int64; None where nothing is lifted
        count = active.sum()
        numbers = torch.stack([count, torch.zeros_like(count) if exponent is None else exponent])
        if active.device.type == "cuda":
            self._numbers = torch.empty(2, dtype=torch.int64, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._numbers = numbers

    def wait(self) -> tuple[int, int]:
        """(rows, exponent); rows rounded up on a GPU."""
        if self._numbers is None:
            return self._rows, 0
        if self._event is not None:
            self._event.synchronize()
        count, exponent = self._numbers.tolist()
        if self._event is not None:
            count = min(-(-count // _ROUND_ON_GPU) * _ROUND_ON_GPU, self._rows)
        return count, exponent


def _exponent(upstream: Upstream) -> Tensor:
    """0-d, the power of two that brings the largest gradient by a statistic to between 2^13 and 2^14.

    In fp16, which ends at 65,504 and at 6e-8, the gradients of most logits would else vanish: they are smaller by p.
    """
    arrays = Upstream(*upstream.by_statistic())
    sizes = [x.abs().nan_to_num(0.0).amax().float() for x in arrays[:3] if x is not None and x.numel()]
    if not sizes:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    largest = torch.stack(sizes).amax()
    sound = torch.isfinite(largest) & (largest > 0.0)
    return (13 - torch.floor(torch.log2(torch.where(sound, largest, 1.0)))).clamp(-60, 60).to(torch.int64)


def _doubling(count: int) -> Iterator[tuple[int, int]]:
    """[0, 1), [1, 2), [2, 4), [4, 8), ...: a row that is written at half its size, in the order of the reading, lies
    over rows that were read in an earlier turn."""
    start, stop = 0, 1
    while start < count:
        yield start, min(stop, count)
        start, stop = stop, 2 * stop


def _order_in_place(active: Tensor, count: int) -> Tensor:
    """[count]: which row's gradient goes where. Rows stay where they are, or come from behind into the place of one
    without a gradient: no place is written that another row still has to read."""
    order = torch.arange(count, device=active.device)
    order[~active[:count]] = active[count:].nonzero()[:, 0] + count
    return order
