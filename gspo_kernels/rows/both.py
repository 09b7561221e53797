"""Statistics of rows over the columns they keep and over all columns, from one read; one gradient through both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.autograd import first_derivative, refuse_second_backward
from ..base.operators import Operator, save_values, saved_values
from .dispatch import by_name
from .operators import FROM_LOGITS, check_values, gradient_buffer, zero_padding
from .types import RowOptions, Rows, RowStats, Upstream, empty_stats


class BothStats(NamedTuple):
    """As in `RowStats`."""

    logprobs: Tensor  # this and the next two: over the kept columns
    entropy: Tensor
    lse: Tensor
    full_logprobs: Tensor  # over all columns
    full_entropy: Tensor
    full_lse: Tensor

    def both(self) -> tuple[RowStats, RowStats]:
        return RowStats(*self[:3]), RowStats(*self[3:])


def row_stats_of_both(rows: Rows, options: RowOptions) -> tuple[RowStats, RowStats]:
    """Over the kept columns, and over all; differentiable."""
    return _both(rows, options).both()


def gathered(rows: Rows) -> Rows:
    """The same rows with a copy of their entries' logits alone, in float32 (float64)."""
    assert rows.kept_ids is not None
    dtype = torch.float64 if rows.logits.dtype == torch.float64 else torch.float32
    logits = rows.logits[_positions(rows)].to(dtype)
    return rows._replace(logits=logits[None, None], vocab_size=logits.shape[0], kept_form="gathered")


def _positions(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Where the logits of the entries are. Ids that are no columns, which are not checked on a GPU, become columns."""
    assert rows.kept_ids is not None and rows.kept_offsets is not None
    counts, entries, inner = rows.kept_offsets.diff(), rows.kept_ids.shape[0], rows.token_ids.shape[1]
    row_of = torch.arange(counts.shape[0], device=counts.device).repeat_interleave(counts, output_size=entries)
    return row_of // inner, row_of % inner, rows.kept_ids.clamp(0, rows.vocab_size - 1).long()


def _forward(rows: Rows, options: RowOptions) -> BothStats:
    check_values(rows)
    backend, has_entries = by_name(options.backend), rows.has_entries()
    full = backend.forward(rows.whole())
    # Rows without entries have been read.
    mask = has_entries if rows.mask is None else has_entries & rows.mask
    kept = backend.forward(rows._replace(mask=mask, kept_form="every"))
    merged = RowStats(*(torch.where(has_entries, x, y) for x, y in zip(kept, full, strict=True)))
    return BothStats(*merged, *full)


def _save(ctx: Any, found: BothStats, rows: Rows, options: RowOptions) -> None:
    save_values(ctx, rows=rows, options=options, found=found)


def _backward(ctx: Any, *upstream: Tensor | None) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    rows, options = saved["rows"], saved["options"]
    if options.overwrite_logits:
        refuse_second_backward(ctx, FROM_LOGITS)
    gradient = gradient_buffer(rows.logits, options.overwrite_logits)
    _gradient_of_both(rows, saved["found"], Upstream(*upstream[:3]), Upstream(*upstream[3:]), gradient, options.backend)
    return {"logits": first_derivative(gradient, FROM_LOGITS, rows.logits, *upstream)}


_both = Operator(
    "row_stats_of_both",
    _forward,
    fake=lambda rows, options: BothStats(*empty_stats(rows), *empty_stats(rows)),
    save=_save,
    backward=_backward,
    operands=("logits",),
    direct=True,
)


def _gradient(
    rows: Rows, found: BothStats, kept_upstream: Upstream, full_upstream: Upstream, gradient: Tensor, backend: str
) -> None:
    """At the entries both gradients are added before they are rounded."""
    of, has_entries = by_name(backend), rows.has_entries()
    kept, full = found.both()
    entries, values = gathered(rows), []
    for stats, upstream in ((kept, kept_upstream), (full, full_upstream)):  # for the second, a part of their rows
        if any(x is not None for x in upstream[:3]):
            values.append(torch.empty_like(entries.logits))
            of.backward(entries, stats, upstream.contiguous(), values[-1])
    pairs = zip(kept_upstream[:3], full_upstream[:3], strict=True)
    of_whole = Upstream(*(_of_whole_rows(has_entries, x, y) for x, y in pairs))
    zero_padding(gradient, rows.vocab_size)
    of.backward(rows.whole(), full, of_whole.contiguous(), gradient)
    gradient[_positions(rows)] = sum(values[1:], values[0])[0, 0].to(gradient.dtype)


def _of_whole_rows(has_entries: Tensor, kept: Tensor | None, full: Tensor | None) -> Tensor | None:
    """A row without entries keeps all columns: both gradients are those of its whole distribution."""
    if kept is None:
        return full
    of_kept = torch.where(has_entries, 0.0, kept)
    return of_kept if full is None else of_kept + full


_gradient_of_both = Operator(
    "row_gradient_of_both_", _gradient, fake=lambda *values: None, mutates=("gradient",), direct=True
)
