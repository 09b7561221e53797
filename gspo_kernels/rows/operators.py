"""The vocabulary-sized work as torch operators: log-probability, entropy and logsumexp of each row, differentiable.

The layers above call `row_stats` or, where the gradient is known before a logit is read, `row_stats_and_gradient`.
Both run operators of `torch.library`, so torch's dispatcher, `torch.compile` and CUDA graphs see them; the operators
run on the backend that was chosen before, by its name. Values that have to be read to be checked (token ids,
temperatures) are checked here: always on the CPU, on a GPU under GSPO_KERNELS_DEBUG=1, and before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base.autograd import edge_of, first_derivative, refuse_second_backward
from ..base.checks import may_read
from ..base.operators import Operator, save_values, saved_values
from .dispatch import by_name
from .types import RowOptions, Rows, RowStats, Upstream, empty_stats

FROM_LOGITS = "policy_loss or token_logprobs"  # whose derivatives these are, for error messages


# ---- statistics


def _row_stats(rows: Rows, options: RowOptions) -> RowStats:
    check_values(rows)
    return by_name(options.backend).forward(rows)


def _save(ctx: Any, stats: RowStats, rows: Rows, options: RowOptions) -> None:
    save_values(ctx, rows=rows, options=options, stats=stats)


def _gradient_of_stats(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    rows, options = saved["rows"], saved["options"]
    if options.overwrite_logits:
        refuse_second_backward(ctx, FROM_LOGITS)
    gradient = gradient_buffer(rows.logits, options.overwrite_logits)
    row_gradient(rows, saved["stats"], Upstream(grad_logprobs, grad_entropy, grad_lse), gradient, options.backend)
    return {"logits": first_derivative(gradient, FROM_LOGITS, rows.logits, grad_logprobs, grad_entropy, grad_lse)}


row_stats = Operator(
    "row_stats",
    _row_stats,
    fake=lambda rows, options: empty_stats(rows),
    save=_save,
    backward=_gradient_of_stats,
    operands=("logits",),
    direct=True,
)


# ---- gradient


def _row_gradient(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor, backend: str) -> None:
    zero_padding(gradient, rows.vocab_size)
    by_name(backend).backward(rows, stats, upstream.contiguous(), gradient)


# Writes the gradient of all columns; those of the padding are zero. Not differentiable.
row_gradient = Operator("row_gradient_", _row_gradient, fake=lambda *values: None, mutates=("gradient",), direct=True)


def gradient_buffer(logits: Tensor, overwrite: bool) -> Tensor:
    if overwrite:
        return logits.detach()  # shares the version counter: autograd then knows that the logits were overwritten
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def zero_padding(gradient: Tensor, vocab_size: int) -> None:
    """Sets the columns from `vocab_size` on to zero."""
    if vocab_size != gradient.shape[-1]:
        gradient[..., vocab_size:].zero_()


# ---- both in one pass


def _row_stats_and_gradient(rows: Rows, upstream: Upstream, gradient: Tensor, backend: str) -> RowStats:
    check_values(rows)
    zero_padding(gradient, rows.vocab_size)
    return by_name(backend).forward_backward(rows, upstream.contiguous(), gradient)


_row_stats_and_gradient_ = Operator(
    "row_stats_and_gradient_",
    _row_stats_and_gradient,
    fake=lambda rows, upstream, gradient, backend: empty_stats(rows),
    mutates=("gradient",),
    direct=True,
)


@torch.no_grad()
def row_stats_and_gradient(rows: Rows, upstream: Upstream, options: RowOptions) -> tuple[RowStats, Tensor]:
    """Statistics, and the gradient of the logits if `upstream` is that of log p. One pass; not differentiable."""
    assert upstream.logprobs is not None
    gradient = gradient_buffer(rows.logits, options.overwrite_logits)
    return _row_stats_and_gradient_(rows, upstream, gradient, options.backend), gradient


def _scale(values: Tensor, factor: Tensor, backend: str) -> None:
    by_name(backend).scale(values, factor)


scale = Operator("scale_", _scale, fake=lambda values, factor, backend: None, mutates=("values",), direct=True)


def link_of(logits: Tensor) -> Tensor:
    """Has the shape of the logits, and passes its gradient on to them, but has no memory.

    Made before logits are overwritten. Afterwards autograd would reach a view by `as_strided`, whose backward copies
    the gradient into new memory.
    """
    found: Tensor = _Link.apply(logits)
    return found


class _Link(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.new_empty(()).expand(logits.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def with_gradient(value: Tensor, link: Tensor, gradient: Tensor, backend: str) -> Tensor:
    """`value`, with this gradient by the logits: [1, N, V] where their link is [N, V], else [B, T, V] as it is.

    The gradient is scaled in place, handed over without a copy, and supports one backward pass.
    """
    found: Tensor = _KnownGradient.apply(link, value, gradient, backend)
    return found


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, value: Tensor, gradient: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.edge, ctx.backend, ctx.shape = edge_of(link), backend, link.shape
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        of_link = None
        if upstream is not None:
            refuse_second_backward(ctx, FROM_LOGITS)
            (gradient,) = ctx.saved_tensors
            with torch.no_grad():
                scale(gradient, upstream, ctx.backend)  # returns at once where upstream is 1
            # Of another shape, autograd would sum it up to the link's shape, in new memory.
            of_link = first_derivative(gradient.reshape(ctx.shape), FROM_LOGITS, ctx.edge, upstream)
        return of_link, None, None, None


# ---- checks that read


def check_values(rows: Rows) -> None:
    if rows.kept_form == "gathered":  # whose ids were checked where they were gathered
        return
    check_ids_and_temperatures(rows.token_ids, rows.mask, rows.temperature, rows.vocab_size)
    if rows.kept_ids is not None and rows.kept_offsets is not None:
        check_kept(rows.token_ids, rows.mask, rows.kept_ids, rows.kept_offsets, rows.vocab_size)


def check_kept(token_ids: Tensor, mask: Tensor | None, ids: Tensor, offsets: Tensor, vocab_size: int) -> None:
    """Kept ids are columns, and an unmasked row with entries has its token among them."""
    if not may_read(ids):
        return
    counts = offsets.diff()
    row_of = torch.arange(counts.shape[0], device=ids.device).repeat_interleave(counts)
    bad = ((ids < 0) | (ids >= vocab_size)).nonzero()[:1, 0].tolist()
    if bad:
        raise ValueError(
            f"kept: expected ids from 0 to {vocab_size - 1} (the logits have {vocab_size} columns); got "
            f"{int(ids[bad[0]])} in row {int(row_of[bad[0]])}"
        )
    flat = token_ids.reshape(-1)
    found = torch.zeros_like(flat, dtype=torch.bool)
    found[row_of[ids == flat[row_of]]] = True
    missing = ~found & (counts > 0)
    if mask is not None:
        missing &= mask.reshape(-1)
    if bool(missing.any()):
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"kept: expected the sampled token among the ids that its row keeps, where the mask is set; got token "
            f"{int(flat[row])} in row {row}, which keeps {int(counts[row])} and not this one. Are the rows of kept "
            "those of the logits? Row t predicts token t (see next_token_targets)"
        )


def check_ids_and_temperatures(token_ids: Tensor, mask: Tensor | None, temperature: Tensor, vocab_size: int) -> None:
    """Arrays [outer, inner], but for a temperature of one number."""
    if not may_read(token_ids):
        return
    bad = (token_ids < 0) | (token_ids >= vocab_size)
    expected = f"ids from 0 to {vocab_size - 1} (the logits have {vocab_size} columns) where the mask is set"
    _refuse(bad, mask, token_ids, "token_ids", expected)
    if temperature.ndim:
        bad = ~((temperature >= 1e-6) & (temperature <= 1e6))
        expected = "numbers from 1e-6 to 1e6 where the mask is set, also divided by softcap or logit_scale"
        _refuse(bad, mask, temperature, "temperature", expected)


def _refuse(bad: Tensor, mask: Tensor | None, values: Tensor, name: str, expected: str) -> None:
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        position = f"position [{row}, {column}]" if values.shape[0] > 1 else f"position {column}"
        raise ValueError(f"{name}: expected {expected}; got {values[row, column]:g} at {position}")
