"""The walk of a loss over the head, in the order of `schedule.py`, with the token stage between halves of a chunk."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..collectives import Ranks, gather
from ..layout import BatchShape
from ..losses import triton_stage
from ..losses.stats import SCALARS
from ..losses.token_stage import TokenInputs, TokenStage
from ..rows.operators import check_ids_and_temperatures
from ..rows.types import RowStats, Upstream
from ..rows.vocab_shard import VocabShard
from .head import Asked, Head, Span, Wanted
from .schedule import ChunkRows, Step, pieces, plan


class HeadArguments(NamedTuple):
    """Hidden states and what they meet; checked."""

    hidden: Tensor  # [B, T, D] or [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    token_ids: Tensor  # [outer, inner], and mask and temperature like `Rows` has them
    mask: Tensor | None
    temperature: Tensor
    vocab_size: int
    dtype: torch.dtype  # what is multiplied
    chunk_bytes: int | None
    backend: str | None
    vocab_start: int  # of a head that is sharded over ranks
    tp: str | None  # these, as `Ranks` has it; then `weight` and `bias` are a shard

    def shard(self) -> VocabShard | None:
        if self.tp is None:
            return None
        return VocabShard(Ranks.read(self.tp), self.vocab_start, self.weight.shape[0], self.vocab_size)

    def wanted(self) -> Wanted:
        grad = torch.is_grad_enabled()
        return Wanted(*(grad and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)))

    def head(self, asked: Asked, wanted: Wanted) -> Head:
        return Head(
            asked, self.weight, self.bias, self.vocab_size, self.dtype, wanted, self.chunk_bytes, self.backend,
            self.shard(),
        )  # fmt: skip


def rows_asked(arguments: HeadArguments, mask: Tensor | None) -> Asked:
    """Rows that count. They are picked by a mask that is read: in a CUDA graph it cannot be, and all rows are taken."""
    hidden = arguments.hidden.reshape(-1, arguments.hidden.shape[-1])
    ids, temperature = arguments.token_ids.reshape(-1), arguments.temperature
    if temperature.ndim:
        temperature = temperature.reshape(-1)
    check_ids_and_temperatures(arguments.token_ids, arguments.mask, arguments.temperature, arguments.vocab_size)
    if mask is None or not may_wait(hidden.device):
        ids = ids if mask is None else torch.where(mask.reshape(-1), ids, 0)
        return Asked(hidden, None, ids, None if mask is None else mask.reshape(-1), temperature)
    live = mask.reshape(-1).nonzero()[:, 0]
    return Asked(hidden, live, ids[live], None, temperature[live] if temperature.ndim else temperature)


def may_wait(device: torch.device) -> bool:
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def rows_of_sequences(stage: TokenStage, batch: BatchShape, asked: Asked) -> list[int] | None:
    """Rows of each sequence. On a GPU this waits for the mask and the boundaries, which say how much work there is."""
    if batch.cu_seqlens is None and (batch.mask is None or asked.mask is not None):
        return [batch.tokens[1]] * batch.tokens[0]
    if asked.mask is not None or not may_wait(batch.device):
        return None
    return stage.layout.lengths_on_host()


class Coefficients:
    """dL/d of the statistics of live rows, by whole sequences or, where a token needs no other, by any part of them."""

    def __init__(
        self, stage: TokenStage, inputs: TokenInputs, asked: Asked, lengths: list[int] | None, fused: bool
    ) -> None:
        self._inputs, self._asked = inputs, asked
        self._by_steps_together = together(inputs) != "token"
        sequences, device = inputs.batch.sequences, asked.hidden.device
        # unknown lengths: the rows may be of any sequence
        self._ends = [0] * sequences + [asked.count] if lengths is None else [0, *itertools.accumulate(lengths)]
        if asked.mask is None:
            self._boundaries = torch.nn.functional.pad(stage.layout.local_lengths.long().cumsum(0), (1, 0))
        elif inputs.batch.cu_seqlens is not None:
            self._boundaries = inputs.batch.cu_seqlens.long()
        else:
            self._boundaries = torch.arange(sequences + 1, device=device) * inputs.batch.tokens[1]
        ranks = inputs.batch.ranks
        batch = BatchShape(torch.Size([asked.count]), sequences, device, asked.mask, self._boundaries, ranks)
        chosen: Tensor | slice = slice(None) if asked.live is None else asked.live
        self.stage = stage.part(batch, chosen, slice(None))
        self._fused: TokenInputs | None = None
        if fused:
            layout = stage.layout

            def live(values: Tensor | None, per_token: bool = True) -> Tensor | None:
                return values.reshape(-1)[chosen] if values is not None and per_token else values

            advantages = live(inputs.advantages, inputs.advantages_per_token)
            assert advantages is not None
            count = layout.num_tokens if inputs.aggregation == "token_mean" else layout.num_sequences
            normalizer = count if inputs.normalizer is None else inputs.normalizer
            self._fused = replace(
                inputs, batch=batch, normalizer=normalizer, advantages=advantages,
                old_logprobs=live(inputs.old_logprobs), ref_logprobs=live(inputs.ref_logprobs),
                importance_weights=live(inputs.importance_weights, inputs.importance_weights_per_token),
            )  # fmt: skip

    def on_policy(self, dtype: torch.dtype) -> Tensor:
        """[rows], where no statistics are needed."""
        return self.stage.gradient_on_policy().to(dtype)

    def of(self, step: Step, stats: RowStats) -> Upstream:
        tokens, sequences = slice(step.start, step.stop), slice(step.first, step.last)
        boundaries = self._boundaries[step.first : step.last + 1].clamp(step.start, step.stop) - step.start
        mask = None if self._asked.mask is None else self._asked.mask[tokens]
        batch = BatchShape(
            torch.Size([step.stop - step.start]), step.last - step.first, boundaries.device, mask, boundaries,
            self._inputs.batch.ranks if self._by_steps_together else None,
        )  # fmt: skip
        whole = self._ends[step.first] >= step.start and self._ends[step.last] <= step.stop
        if self._fused is None or not whole or mask is not None:
            return Upstream(*self.stage.part(batch, tokens, sequences).gradient(stats.logprobs, stats.entropy))
        inputs = self._fused

        def cut(values: Tensor | None, per_token: bool) -> Tensor | None:
            return None if values is None else values[tokens if per_token else sequences]

        advantages = cut(inputs.advantages, inputs.advantages_per_token)
        assert advantages is not None
        part = replace(
            inputs, batch=batch, advantages=advantages, old_logprobs=cut(inputs.old_logprobs, True),
            ref_logprobs=cut(inputs.ref_logprobs, True),
            importance_weights=cut(inputs.importance_weights, inputs.importance_weights_per_token),
        )  # fmt: skip
        return triton_stage.gradient(part, stats)


def walk(head: Head, asked: Asked, stage: TokenStage, inputs: TokenInputs, fused: bool) -> RowStats:
    """Statistics of the live rows; the head has the gradients of the loss."""
    wanted = head.wanted
    lengths = rows_of_sequences(stage, inputs.batch, asked)
    steps = _steps(inputs, asked.count, lengths, head, asked.hidden.device)
    shape, device = (asked.count,), asked.hidden.device
    stats = RowStats(*(torch.empty(shape, dtype=d, device=device) for d in (head.sums, head.sums, torch.float64)))
    coefficients = Coefficients(stage, inputs, asked, lengths, fused) if wanted.any() else None
    known = None
    if coefficients is not None and inputs.depends_on_log_ratio_alone():
        known = coefficients.on_policy(head.sums)

    def measure(start: int, stop: int) -> RowStats:
        head.load(slice(start, stop))
        found = head.statistics()
        for all_rows, of_chunk in zip(stats, found, strict=True):
            all_rows[start:stop] = of_chunk
        return found

    def upstream(step: Step) -> Upstream:
        if known is not None:
            found = stats.logprobs[step.start : step.stop]
            return Upstream(torch.where(found.isnan(), torch.nan, known[step.start : step.stop]))
        assert coefficients is not None
        return coefficients.of(step, RowStats(*(x[step.start : step.stop] for x in stats)))

    for step in steps:
        if step.way in ("at_once", "statistics"):
            found = measure(step.start, step.stop)
            if step.way == "at_once":
                head.backward(found, upstream(step))
        elif step.way == "unscaled":
            for start, stop in pieces(step.start, step.stop, head.at_a_time.usual):
                found = measure(start, stop)
                head.backward(found, Upstream(torch.ones_like(found.logprobs)))
            head.finish_products()
            g, _, _ = upstream(step).by_statistic()
            assert g is not None
            head.scale_hidden(slice(step.start, step.stop), g)
        else:
            for start, stop in pieces(step.start, step.stop, head.at_a_time.usual):
                measure(start, stop)
            second_phase(head, step, stats, upstream(step))
    return stats


def spread_nan(gradient: Tensor, inputs: TokenInputs, stage: TokenStage, stats: RowStats, scalars: Tensor) -> None:
    """NaN into the hidden states' gradient [N, D] of all rows that share a ratio with a NaN row.

    On-policy, coefficients are known before any row has been seen. A CPU looks whether there is a NaN at all; so does
    each of the ranks that share out sequences, and finds the same.
    """
    if not inputs.depends_on_log_ratio_alone() or inputs.objective.depends_on == "token":
        return
    if gradient.device.type == "cpu" and not bool(scalars[SCALARS.index("approx_kl")].isnan()):
        return
    coefficients, _ = stage.gradient(stats.logprobs.reshape(-1), stats.entropy.reshape(-1))
    gradient.masked_fill_(coefficients.isnan()[:, None], torch.nan)


def second_phase(head: Head, step: Step, stats: RowStats, upstream: Upstream) -> None:
    """Gradients of rows [start, stop), whose logits are made again if the row has one."""
    active = upstream.some()
    rows = active.nonzero()[:, 0] if may_wait(active.device) else torch.arange(len(active), device=active.device)
    for start, stop in pieces(0, rows.shape[0], head.at_a_time.usual):
        places = rows[start:stop]
        chosen: Span = places + step.start
        head.load(chosen, again=True)
        head.backward(RowStats(*(x[chosen] for x in stats)), upstream.at(places))


def together(inputs: TokenInputs) -> str:
    """What must have been seen before a coefficient is known."""
    return "token" if inputs.depends_on_log_ratio_alone() else inputs.objective.depends_on


def plan_of(inputs: TokenInputs, lengths: list[int], rows: ChunkRows, wanted: Wanted) -> list[Step]:
    return plan(
        lengths,
        rows,
        together=together(inputs),
        gradient=wanted.any(),
        unscaled=not (wanted.weight or wanted.bias) and inputs.entropy_coef == 0.0,
    )


def _steps(inputs: TokenInputs, count: int, lengths: list[int] | None, head: Head, device: torch.device) -> list[Step]:
    """The plan; under context parallelism, where sequences matter, one that is the same on all ranks."""
    ranks = inputs.batch.ranks
    if not head.wanted.any() or together(inputs) == "token":
        ranks = None  # no step has a collective over them
    if lengths is None or (ranks is not None and not may_wait(device)):
        steps = plan_of(inputs, [count], head.at_a_time, head.wanted)
        if ranks is not None and not steps:
            steps = [Step("at_once", 0, 0, 0, 0)]  # of no rows, beside the one of other ranks
        return [step._replace(first=0, last=inputs.batch.sequences) for step in steps]
    if ranks is None:
        return plan_of(inputs, lengths, head.at_a_time, head.wanted)
    of_ranks = gather(torch.tensor(lengths, dtype=torch.float64, device=device), ranks)
    longest: list[int] = of_ranks.amax(0).long().tolist()
    ends = [0, *itertools.accumulate(lengths)]
    steps = plan_of(inputs, longest, head.at_a_time, head.wanted)
    return [step._replace(start=ends[step.first], stop=ends[step.last]) for step in steps]


def to_all_rows(values: Tensor, asked: Asked, tokens: list[int]) -> Tensor:
    """Live rows -> the caller's token layout, 0 elsewhere."""
    if asked.live is None:
        return values.reshape(tokens)
    return values.new_zeros(asked.hidden.shape[0]).index_copy_(0, asked.live, values).reshape(tokens)
