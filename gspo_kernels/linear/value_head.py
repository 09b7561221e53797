"""Values, and the loss of a value model, from hidden states and a value head: `hidden @ weight + bias` in float64.

Hidden states are converted a chunk of rows at a time, so that no wider copy of them exists. The sum over D products is
rounded once, to the values' dtype, and so is the weight's gradient, which is summed over the chunks in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.autograd import first_derivative, refuse_forward_mode, refuse_vmap
from ..base.devices import check_float64
from ..base.layout import as_bool, batch_shape
from ..base.operators import Operator, save_values, saved_values
from ..losses.value_loss import ValueLossOutput, value_inputs
from .types import needs_grad

_CHUNK_BYTES, _CHUNK_BYTES_ELSEWHERE = 8 << 20, 64 << 20  # in float64; on a CPU a chunk stays in the cache
_LOSS, _VALUES = "linear_value_loss", "linear_values"  # for error messages
_INSTEAD = "value_loss, of values made by torch's own operators, supports it"


def linear_values(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The values `hidden @ weight + bias` of a value head, differentiable: for `gae`, under `torch.no_grad()`.

    Computed in float64 and rounded once, without a wider copy of the hidden states. `linear_value_loss` computes the
    same values, and returns them in its stats.

    Args:
        hidden: [B, T, D] or packed [N, D], bfloat16, float16, float32 or float64: the value model's last hidden states.
        weight: [D], or [1, D] as in `torch.nn.Linear(D, 1)`; any of these dtypes.
        bias: one number, [] or [1].
        mask: one per token. Masked rows have value 0, and what is there, NaN included, has no effect.

    Returns: [B, T] or [N] float32; float64 if `hidden` or `weight` is.
    """
    return _values(_VALUES, hidden, weight, bias, mask)


def linear_value_loss(
    hidden: Tensor,
    weight: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    clip_range: float | None = 0.2,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token_mean",
    group_tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> ValueLossOutput:
    """`value_loss` of the values `hidden @ weight + bias`, from the value model's hidden states and its head.

    Args:
        hidden, weight, bias: as in `linear_values`; each is differentiable, and one that needs no gradient costs none.
        returns, old_values, clip_range, mask, cu_seqlens, aggregation, group_tokens, normalizer: as in `value_loss`.

    Returns: `ValueLossOutput(loss, stats)`; `stats.values` are the values, as `linear_values` computes them. Gradients
        have the dtypes of their operands; second derivatives raise.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_hidden(hidden)
    batch = batch_shape(hidden.shape[:-1], mask, cu_seqlens, hidden.device)
    inputs = value_inputs(batch, returns, old_values, clip_range, aggregation, group_tokens, normalizer)
    return inputs.loss(_values(_LOSS, hidden, weight, bias, batch.mask))


def _values(function: str, hidden: Any, weight: Any, bias: Any, mask: Any) -> Tensor:
    _check_hidden(hidden)
    checks.operand("weight", checks.tensor("weight", weight, "the value head's weight, [D]"), "the value head's weight")
    width = hidden.shape[-1]
    if weight.shape not in ((width,), (1, width)):
        raise ValueError(
            f"weight: expected {[width]} or {[1, width]}, one number per column of hidden; got {list(weight.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        checks.operand("bias", checks.tensor("bias", bias, "the value head's bias, [1]"), "the value head's bias")
        if bias.shape not in ((), (1,)):
            raise ValueError(f"bias: expected one number, [] or [1]; got {list(bias.shape)}")
        checks.same_device("bias", bias, hidden.device)
        bias = bias.reshape(())
    if mask is not None:
        checks.shape("mask", checks.tensor("mask", mask, "True where a token counts"), hidden.shape[:-1], "one per row")
        checks.same_device("mask", mask, hidden.device)
        mask = as_bool("mask", mask).detach()
    refuse_forward_mode(function, instead=_INSTEAD, hidden=hidden, weight=weight, bias=bias)
    refuse_vmap(function, hidden=hidden, weight=weight, bias=bias)
    head = _ValueHead(hidden, weight.reshape(width), bias, mask)
    return _values_operator(head, _NeedsGrad(*needs_grad(hidden, weight, bias)))


def _check_hidden(hidden: Any) -> None:
    meaning = "the value model's last hidden states [.., D]"
    checks.operand("hidden", checks.tensor("hidden", hidden, meaning), meaning)
    check_float64(hidden.device)
    if hidden.ndim not in (2, 3) or hidden.shape[-1] == 0:
        raise ValueError(
            f"hidden: expected [sequences, tokens, D] (padded) or [tokens, D] (packed); got {list(hidden.shape)}"
        )


class _ValueHead(NamedTuple):
    hidden: Tensor  # [B, T, D] or [N, D]
    weight: Tensor  # [D]
    bias: Tensor | None  # []
    mask: Tensor | None  # bool, one per row

    def dtype(self) -> torch.dtype:
        """Of the values."""
        wide = torch.float64 in (self.hidden.dtype, self.weight.dtype)
        return torch.float64 if wide else torch.float32

    def rows(self) -> Tensor:
        """[outer, inner, D], a view; of one outer row where memory allows it."""
        if self.hidden.ndim == 2 or self.hidden.is_contiguous():
            return self.hidden.view(1, -1, self.hidden.shape[-1])
        return self.hidden


class _NeedsGrad(NamedTuple):
    """Which operands need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


def _chunks(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of the first two dimensions of [outer, inner, D]."""
    outer, inner, width = rows.shape
    size = max(1, (_CHUNK_BYTES if rows.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE) // (8 * width))
    return ((i, slice(start, min(start + size, inner))) for i in range(outer) for start in range(0, inner, size))


def _linear_values(head: _ValueHead, needs: _NeedsGrad) -> Tensor:
    rows, weight = head.rows(), head.weight.double()
    values = torch.zeros(rows.shape[:-1], dtype=torch.float64, device=rows.device)
    for where in _chunks(rows):
        torch.mv(rows[where].double(), weight, out=values[where])
    if head.bias is not None:
        values = values + head.bias.double()
    values = values.to(head.dtype()).view(head.hidden.shape[:-1])
    return values if head.mask is None else values.masked_fill(~head.mask, 0.0)


class _Gradients(NamedTuple):
    """In the dtypes of the operands; empty where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def _values_gradient(head: _ValueHead, needs: _NeedsGrad, gradient: Tensor) -> _Gradients:
    """A row whose gradient is 0 is not added up, whatever is there."""
    rows, dtype = head.rows(), head.dtype()
    upstream = gradient if head.mask is None else gradient.masked_fill(~head.mask, 0.0)
    upstream = upstream.reshape(rows.shape[:-1])
    found = _empty_gradients(head, needs, gradient)
    if needs.hidden:
        of_rows, weight = found.hidden.view(rows.shape), head.weight.to(dtype)
        for where in _chunks(rows):
            torch.mul(upstream[where][:, None], weight, out=of_rows[where])
    if needs.weight:
        exact, no_gradient = upstream.double(), (upstream == 0)[..., None]
        of_weight = torch.zeros_like(head.weight, dtype=torch.float64)
        for where in _chunks(rows):
            chunk = rows[where].to(torch.float64, copy=True).masked_fill_(no_gradient[where], 0.0)
            of_weight += exact[where] @ chunk
        found.weight.copy_(of_weight)
    if needs.bias:
        found.bias.copy_(upstream.sum(dtype=torch.float64))
    return found


def _empty_gradients(head: _ValueHead, needs: _NeedsGrad, gradient: Tensor) -> _Gradients:
    """`hidden` is contiguous."""
    operands = (head.hidden, head.weight, head.weight if head.bias is None else head.bias)
    return _Gradients(*[x.new_empty(x.shape if needed else (0,)) for x, needed in zip(operands, needs, strict=True)])


_gradient_operator = Operator("linear_values_gradient", _values_gradient, fake=_empty_gradients)


def _save(ctx: Any, values: Tensor, head: _ValueHead, needs: _NeedsGrad) -> None:
    save_values(ctx, head=head, needs=needs)


def _backward(ctx: Any, gradient: Tensor) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    head, needs = saved["head"], saved["needs"]
    with torch.no_grad():
        found = _gradient_operator(head, needs, gradient)
    connected = (head.hidden, head.weight, head.bias, gradient)
    return {
        name: first_derivative(x, _LOSS, *connected, instead=_INSTEAD)
        for name, x, needed in zip(_NeedsGrad._fields, found, needs, strict=True)
        if needed
    }


_values_operator: Operator[Tensor] = Operator(
    "linear_values",
    _linear_values,
    fake=lambda head, needs: torch.empty(head.hidden.shape[:-1], dtype=head.dtype(), device=head.hidden.device),
    save=_save,
    backward=_backward,
    operands=_NeedsGrad._fields,
)
