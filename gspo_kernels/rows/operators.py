"""The vocabulary-sized work as torch operators: log-probability, entropy and logsumexp of each row, differentiable.

Everything above calls `row_stats` or, where the gradient is known before a logit is read, `row_stats_and_gradient`.
Both run operators of `torch.library`, so torch's dispatcher, `torch.compile` and CUDA graphs see them; the operators
pick a backend. Values that only a read can check (token ids, temperatures) are checked here: always on the CPU, on a
GPU under GSPO_KERNELS_DEBUG=1, and before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import edge_of, first_derivative, refuse_second_backward
from ..checks import may_read, watched
from .dispatch import choose
from .types import Rows, RowStats, Upstream, empty_stats

FROM_LOGITS = "policy_loss or token_logprobs"  # whose derivatives these are, for error messages

# Row arrays are [outer, inner]. Columns of the logits from `vocab_size` on are padding: not read, gradient 0.


@torch.library.custom_op("gspo_kernels::row_stats", mutates_args=())
def _row_stats(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    overwrite_logits: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(logits, token_ids, mask, temperature, vocab_size)
    check_values(rows)
    return choose(logits, backend).forward(rows)


@_row_stats.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    overwrite_logits: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_stats(logits)


def _write_gradient(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    factor: Tensor | None,
    counts: Tensor | None,
    gradient: Tensor,
    backend: str | None,
) -> None:
    rows = rows_of(logits, token_ids, mask, temperature, vocab_size)
    g_l, g_h, g_lse = (None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy, grad_lse))
    stats, upstream = RowStats(logprobs, entropy, lse), Upstream(g_l, g_h, g_lse, factor, counts)
    choose(logits, backend).backward(rows, stats, upstream, unpadded(gradient, vocab_size))


_row_gradient = torch.library.custom_op("gspo_kernels::row_gradient_", _write_gradient, mutates_args=("gradient",))


@_row_gradient.register_fake
def _(*args: Any, **kwargs: Any) -> None:
    return None


def row_gradient(*arguments: Any) -> None:
    """`_write_gradient` as an operator, or called directly in a backward that nothing traces."""
    logits, gradient = arguments[0], arguments[-2]
    with torch.no_grad():
        if needs_operators(logits):
            _row_gradient(*arguments)
        else:
            _write_gradient(*arguments)
            torch.autograd.graph.increment_version(gradient)


@torch.library.custom_op("gspo_kernels::row_stats_and_gradient_", mutates_args=("gradient",))
def _row_stats_and_gradient(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    grad_logprobs: Tensor,
    counts: Tensor | None,
    gradient: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rows_of(logits, token_ids, mask, temperature, vocab_size)
    check_values(rows)
    upstream = Upstream(grad_logprobs.contiguous(), counts=counts)
    return choose(logits, backend).forward_backward(rows, upstream, unpadded(gradient, vocab_size))


@_row_stats_and_gradient.register_fake
def _(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab_size: int,
    grad_logprobs: Tensor,
    counts: Tensor | None,
    gradient: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_stats(logits)


@torch.library.custom_op("gspo_kernels::scale_", mutates_args=("values",))
def scale(values: Tensor, factor: Tensor, backend: str | None) -> None:
    choose(values, backend).scale(values, factor)


@scale.register_fake
def _(values: Tensor, factor: Tensor, backend: str | None) -> None:
    return None


def rows_of(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: Tensor, vocab_size: int) -> Rows:
    """Without the columns of the padding."""
    columns = logits if vocab_size == logits.shape[-1] else logits[..., :vocab_size]
    return Rows(columns, token_ids, mask, temperature)


def unpadded(gradient: Tensor, vocab_size: int) -> Tensor:
    """The columns of the vocabulary; those of the padding are set to zero."""
    if vocab_size == gradient.shape[-1]:
        return gradient
    gradient[..., vocab_size:].zero_()
    return gradient[..., :vocab_size]


def needs_operators(logits: Tensor) -> bool:
    """Whether work on these logits has to run as an operator: a compiler, a transform or a fake tensor watches it.

    Elsewhere it is called directly: the dispatcher and its wrappers in Python take 0.1 ms of the host's time.
    """
    return watched(logits)


# ---- autograd


def room_for_gradient(logits: Tensor, overwrite: bool) -> Tensor:
    if overwrite:
        return logits.detach()  # shares their version counter: writing here tells autograd that the logits are gone
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, token_ids, mask, temperature, ctx.vocab_size, ctx.overwrite_logits, ctx.backend = inputs
    ctx.save_for_backward(logits, token_ids, mask, temperature, *output)
    ctx.set_materialize_grads(False)


def _gradient_of_logits(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None and grad_entropy is None and grad_lse is None:
        return (None,) * 7
    logits, token_ids, mask, temperature, logprobs, entropy, lse = ctx.saved_tensors
    if ctx.overwrite_logits:
        refuse_second_backward(ctx, FROM_LOGITS)
    gradient = room_for_gradient(logits, ctx.overwrite_logits)
    row_gradient(
        logits, token_ids, mask, temperature, ctx.vocab_size, logprobs, entropy, lse,
        grad_logprobs, grad_entropy, grad_lse, None, None, gradient, ctx.backend,
    )  # fmt: skip
    gradient = first_derivative(gradient, FROM_LOGITS, logits, grad_logprobs, grad_entropy, grad_lse)
    return gradient, None, None, None, None, None, None


_row_stats.register_autograd(_gradient_of_logits, setup_context=_save_for_gradient)


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient with respect to the logits has been written already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor, backend: str | None) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.edge, ctx.backend = edge_of(logits), backend
        ctx.set_materialize_grads(False)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        if upstream is None:
            return (None,) * 4
        refuse_second_backward(ctx, FROM_LOGITS)
        (gradient,) = ctx.saved_tensors
        with torch.no_grad():
            scale(gradient, upstream, ctx.backend)  # returns at once where upstream is 1
        return first_derivative(gradient, FROM_LOGITS, ctx.edge, upstream), None, None, None


# ---- what the layers above call


def row_stats(rows: Rows, *, vocab_size: int, overwrite_logits: bool = False, backend: str | None = None) -> RowStats:
    """Statistics of each row, differentiable in all three."""
    return RowStats(
        *_row_stats(rows.logits, rows.token_ids, rows.mask, rows.temperature, vocab_size, overwrite_logits, backend)
    )


@torch.no_grad()
def row_stats_and_gradient(
    rows: Rows, upstream: Upstream, *, vocab_size: int, overwrite_logits: bool, backend: str | None
) -> tuple[RowStats, Tensor]:
    """Statistics, and the gradient of the logits if `upstream` is that of log p. One pass; not differentiable."""
    assert upstream.logprobs is not None
    gradient = room_for_gradient(rows.logits, overwrite_logits)
    found = _row_stats_and_gradient(
        rows.logits, rows.token_ids, rows.mask, rows.temperature, vocab_size, upstream.logprobs, upstream.counts,
        gradient, backend,
    )  # fmt: skip
    return RowStats(*found), gradient


def with_gradient(value: Tensor, logits: Tensor, gradient: Tensor, backend: str | None) -> Tensor:
    """`value`, whose gradient by the logits is this one: scaled in place by the backward, which can run once."""
    found: Tensor = _KnownGradient.apply(logits, value, gradient, backend)
    return found


# ---- checks that read


def check_values(rows: Rows) -> None:
    check_ids_and_temperatures(rows.token_ids, rows.mask, rows.temperature, rows.logits.shape[-1])


def check_ids_and_temperatures(token_ids: Tensor, mask: Tensor | None, temperature: Tensor, vocab: int) -> None:
    """Arrays [outer, inner], but for a temperature of one number."""
    if not may_read(token_ids):
        return
    bad = (token_ids < 0) | (token_ids >= vocab)
    expected = f"ids from 0 to {vocab - 1} (the logits have {vocab} columns) where the mask is set"
    _refuse(bad, mask, token_ids, "token_ids", expected)
    if temperature.ndim:
        bad = ~((temperature >= 1e-6) & (temperature <= 1e6))
        _refuse(bad, mask, temperature, "temperature", "numbers from 1e-6 to 1e6 where the mask is set")


def _refuse(bad: Tensor, mask: Tensor | None, values: Tensor, name: str, expected: str) -> None:
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        place = f"position [{row}, {column}]" if values.shape[0] > 1 else f"position {column}"
        raise ValueError(f"{name}: expected {expected}; got {values[row, column]:g} at {place}")
