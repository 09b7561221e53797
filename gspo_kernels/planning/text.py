"""A plan as text: the table, how chunks run, and what to choose."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from ..linear.products import sum_dtype
from ..linear.schedule import row_stride
from .plan import Plan, Way

_HEADS = ("", "peak", "logits", "gradients", "other", "products", "TFLOP", "longest batch")
_WIDTH = 110


def render(plan: Plan) -> str:
    sentences = [_chunks(plan), *_choices(plan)]
    wrapped = [textwrap.fill(sentence, _WIDTH, subsequent_indent="  ") for sentence in sentences]
    return "\n".join([*_table([_HEADS, *(_row(way, plan) for way in plan.ways())]), "", *wrapped])


def size(count: float) -> str:
    """Three digits, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"


def _row(way: Way, plan: Plan) -> tuple[str, ...]:
    found = way.estimate
    logits = sum(bytes for name, bytes in found.held.items() if "logits" in name or "float32" in name)
    gradients = found.held.get("gradients", 0)
    tokens = way.responses * plan.length
    return (
        found.name,
        size(found.peak),
        size(logits),
        size(gradients),
        size(found.peak - logits - gradients),
        f"{found.products:.2f}" if found.products >= 0.01 else f"{found.products:.1g}",
        f"{found.operations / 1e12:,.4g}",
        f"{tokens:,} tokens" if tokens else f"not one response of {plan.length:,}",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *cells])


def _chunks(plan: Plan) -> str:
    estimate, dtype = plan.hidden.estimate, sum_dtype(plan.shape.dtype)
    assert estimate.chunk is not None
    head = estimate.head
    return (
        f"From hidden states: {head.chunks:,} chunks of up to {estimate.chunk.max_rows:,} rows of "
        f"{str(dtype).removeprefix('torch.')} logits. {head.forward:,} rows forward"
        f"{f', {head.recomputed:,} of them twice' if head.recomputed else ''}, {head.backward:,} backward."
    )


def _choices(plan: Plan) -> Iterator[str]:
    """What to choose, and why."""
    shape, plain, hidden = plan.shape, plan.plain.estimate, plan.hidden.estimate
    yield (
        f"- linear_gspo_loss(hidden, head, ...) takes {hidden.peak / plain.peak:.0%} of the memory of plain torch and "
        f"{hidden.products / plain.products:.0%} of its products: one chunk of logits exists at a time, masked rows "
        "are not multiplied, and rows without a gradient only once."
    )
    if hidden.head.recomputed and hidden.chunk is not None:
        longest = max(shape.batch.lengths)
        rows = -(-longest // hidden.chunk.multiple) * hidden.chunk.multiple
        bytes = rows * row_stride(shape.vocab, shape.device) * sum_dtype(shape.dtype).itemsize
        yield (
            f"  Responses of {longest:,} rows are longer than a chunk: the logits of {hidden.head.recomputed:,} rows "
            f"are computed twice. Chunks of {size(bytes)} (chunk_bytes={bytes}) hold one response, and nothing is."
        )
    yield (
        "- gspo_loss(logits, ..., overwrite_logits=True) where all logits are there anyway: the gradient is written "
        f"over them, which takes {size(plan.overwritten.estimate.peak)} instead of {size(plan.logits.estimate.peak)}."
    )
    if plan.kept is None:
        yield "- kept=KeptTokens(...) where top-p, top-k or min-p leave a few columns of a row: --kept plans for it."
    else:
        kept = plan.kept.estimate
        yield (
            f"- kept=KeptTokens(...) multiplies {shape.kept:,} of {shape.vocab:,} columns: "
            f"{size(kept.held.get('gradients', 0))} of its {size(kept.peak)} are the gradients that it returns."
        )
    yield (
        "The model's own weights, optimizer and activations are counted only as far as --reserved says. An allocator's "
        "rounding and fragments, and the workspaces of cuBLAS and MKL, are left out."
    )
