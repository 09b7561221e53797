"""The sparse head: a few logits of each row, from hidden states and the rows of the head that belong to them.

With kept sets a loss reads a few columns of each row. `kept_logits` multiplies these alone: N K D operations for N rows
of K columns, in place of N V D. It is one operator, differentiable in all operands. What follows, up to the loss, is
that of logits (`Rows.kept_form` "gathered").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..base.autograd import first_derivative
from ..base.collectives import all_reduce_
from ..base.operators import Operator, save_values, saved_values
from ..rows import cpu_rows
from ..rows.operators import check_ids_and_temperatures, check_kept
from . import torch_sparse, triton_sparse
from .products import sum_dtype
from .types import Entries, HeadArguments, KeptColumns, NeedsGrad, Operands, entries_of

FUNCTION = "linear_policy_loss or linear_token_logprobs"  # for error messages


class SparseProducts(Protocol):
    """One implementation of the three products: a module with these names. `torch_sparse` says what they compute."""

    __name__: str

    def kept_logits(
        self, hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor, add: bool
    ) -> None: ...

    def hidden_gradient(
        self, gradient: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor
    ) -> None: ...

    def weight_gradient(
        self,
        gradient: Tensor,
        hidden: Tensor,
        entries: Entries,
        order: Tensor,
        destination: Tensor,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None: ...


def sparse_products(backend: str | None, *operands: Tensor) -> SparseProducts:
    """The products that run beside a backend of the rows, for these operands and results."""
    if any(x.stride(-1) != 1 or x.dtype == torch.float64 for x in operands):
        return torch_sparse
    if backend == "native":
        from . import cpu_sparse  # needs the extension

        return cpu_sparse
    return triton_sparse if backend in ("triton", "cuda") else torch_sparse


def kept_logits(arguments: HeadArguments, kept: KeptColumns) -> Tensor:
    """[E], the logit of each kept column, in the dtype of sums; differentiable in the operands. -inf on other ranks."""
    return kept_logits_operator(arguments, kept, arguments.operands().needs_grad())


# ---- forward


def multiply(arguments: HeadArguments, kept: KeptColumns, needs_grad: NeedsGrad) -> Tensor:
    token_ids, mask, vocab = arguments.token_ids, arguments.mask, arguments.vocab_size
    check_ids_and_temperatures(token_ids, mask, arguments.temperature, vocab)
    check_kept(token_ids, mask, kept.ids, kept.offsets, vocab)
    entries, out = entries_of(arguments, kept), empty_logits(arguments, kept, needs_grad)
    hidden, weight, bias, low_rank_hidden, low_rank_weight = matrices(arguments)
    products = sparse_products(kept.backend, hidden, weight, out)
    products.kept_logits(hidden, weight, entries, arguments.dtype, out, False)
    if low_rank_hidden is not None and low_rank_weight is not None:
        products = sparse_products(kept.backend, low_rank_hidden, low_rank_weight, out)
        products.kept_logits(low_rank_hidden, low_rank_weight, entries, out.dtype, out, True)
    if bias is not None and len(bias):
        of_entries = bias.index_select(0, entries.ids.clamp(0, len(bias) - 1)).to(out.dtype)
        if entries.active is not None:
            of_entries = torch.where(entries.active[entries.rows], of_entries, 0.0)
        out += of_entries  # -inf stays -inf
    return out


def empty_logits(arguments: HeadArguments, kept: KeptColumns, needs_grad: NeedsGrad) -> Tensor:
    return torch.empty(kept.ids.shape[0], dtype=sum_dtype(arguments.dtype), device=kept.ids.device)


def matrices(arguments: HeadArguments) -> Operands:
    """With hidden states as [N, D]."""
    hidden, weight, bias, low_rank_hidden, low_rank_weight = arguments.operands()
    if low_rank_hidden is not None:
        low_rank_hidden = low_rank_hidden.reshape(-1, low_rank_hidden.shape[-1])
    return Operands(hidden.reshape(-1, hidden.shape[-1]), weight, bias, low_rank_hidden, low_rank_weight)


# ---- backward


class KeptGradients(NamedTuple):
    """In the shapes and dtypes of the operands; empty where not needed."""

    hidden: Tensor
    weight: Tensor  # where the gradient is sparse, the rows of `columns` alone
    bias: Tensor
    low_rank_hidden: Tensor
    low_rank_weight: Tensor
    columns: Tensor  # int64, in ascending order


def _gradients(arguments: HeadArguments, kept: KeptColumns, needs_grad: NeedsGrad, gradient: Tensor) -> KeptGradients:
    found = empty_gradients(arguments, kept, needs_grad, zeros=_zeros_in_huge_pages)
    return write_gradients(arguments, kept, needs_grad, gradient, found)


def write_gradients(
    arguments: HeadArguments, kept: KeptColumns, needs_grad: NeedsGrad, gradient: Tensor, found: KeptGradients
) -> KeptGradients:
    """From that of the logits [E]. `found` are buffers, as `empty_gradients` makes them."""
    entries, dtype = entries_of(arguments, kept), gradient.dtype
    hidden, weight, _, low_rank_hidden, low_rank_weight = matrices(arguments)
    if needs_grad.hidden:
        _hidden_gradient(arguments, kept, gradient, weight, entries, arguments.dtype, found.hidden)
    if needs_grad.low_rank_hidden:
        assert low_rank_weight is not None
        _hidden_gradient(arguments, kept, gradient, low_rank_weight, entries, dtype, found.low_rank_hidden)
    if not needs_grad.sums_over_rows():
        return found
    ids, order = torch.sort(entries.ids, stable=True)

    def sum_by_column(of_rows: Tensor, destination: Tensor, rounded_to: torch.dtype, out: Tensor) -> None:
        products = sparse_products(kept.backend, of_rows, out)
        products.weight_gradient(gradient, of_rows, entries, order, destination, rounded_to, out)

    if needs_grad.weight and kept.sparse_weight_grad:
        inside = (ids >= 0) & (ids < len(weight))  # an id that is no column, which a GPU does not refuse, has no row
        begins = torch.cat([ids.new_ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])[: len(ids)] & inside
        columns = ids[begins].long()  # waits for a GPU
        found = found._replace(columns=columns, weight=found.weight.new_zeros(len(columns), weight.shape[1]))
        destination = torch.where(inside, begins.cumsum(0) - 1, len(ids))
        sum_by_column(hidden, destination, arguments.dtype, found.weight)
    elif needs_grad.weight:
        sum_by_column(hidden, ids.long(), arguments.dtype, found.weight)
    if needs_grad.bias:
        ones = torch.ones(len(hidden), 1, dtype=dtype, device=hidden.device)
        sum_by_column(ones, ids.long(), dtype, found.bias[:, None])
    if needs_grad.low_rank_weight:
        assert low_rank_hidden is not None
        sum_by_column(low_rank_hidden, ids.long(), dtype, found.low_rank_weight)
    return found


def _hidden_gradient(
    arguments: HeadArguments,
    kept: KeptColumns,
    gradient: Tensor,
    weight: Tensor,
    entries: Entries,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Of one term. Over the ranks of a shard it is summed before it is rounded."""
    out, shard = out.view(-1, out.shape[-1]), arguments.shard
    sums = out if shard is None else torch.empty_like(out, dtype=gradient.dtype)
    sparse_products(kept.backend, weight, sums).hidden_gradient(gradient, weight, entries, dtype, sums)
    if shard is not None:
        all_reduce_(sums, shard.ranks)
        out.copy_(sums)


def empty_gradients(
    arguments: HeadArguments,
    kept: KeptColumns,
    needs_grad: NeedsGrad,
    dtype: torch.dtype | None = None,
    zeros: Callable[..., Tensor] = torch.zeros,
) -> KeptGradients:
    """Sums over rows are zeros: the rows of columns without entries are not written.

    Args:
        dtype: of all gradients; None: each has that of its operand.
    """
    device, found = arguments.hidden.device, {}
    for name, needed in needs_grad._asdict().items():
        operand = getattr(arguments, name)
        make = torch.empty if name in ("hidden", "low_rank_hidden") else zeros
        if operand is None or not needed or (name == "weight" and kept.sparse_weight_grad):
            found[name] = torch.empty(0, dtype=dtype or arguments.weight.dtype, device=device)
        else:
            found[name] = make(operand.shape, dtype=dtype or operand.dtype, device=device)
    return KeptGradients(**found, columns=torch.empty(0, dtype=torch.int64, device=device))


def _zeros_in_huge_pages(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Most of the time of a dense gradient is that of its page faults."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and not cpu_rows.unavailable_reason():
        cpu_rows.request_huge_pages(out)
    return out.zero_()


kept_gradient_operator = Operator(
    "linear_kept_logits_gradient", _gradients,
    fake=lambda arguments, kept, needs_grad, gradient: empty_gradients(arguments, kept, needs_grad),
)  # fmt: skip


def _save(ctx: Any, output: Tensor, arguments: HeadArguments, kept: KeptColumns, needs_grad: NeedsGrad) -> None:
    save_values(ctx, arguments=arguments, kept=kept, needs_grad=needs_grad)


def _backward(ctx: Any, upstream: Tensor) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    arguments, kept, needs_grad = saved["arguments"], saved["kept"], saved["needs_grad"]
    with torch.no_grad():
        gradients = kept_gradient_operator(arguments, kept, needs_grad, upstream.contiguous())
    found: dict[str, Tensor | None] = {}
    for name, needed in needs_grad._asdict().items():
        if needed:
            gradient = getattr(gradients, name)
            if name == "weight" and kept.sparse_weight_grad:
                gradient = _as_sparse(gradients.columns, gradient, arguments.weight.shape)
            found[name] = first_derivative(gradient, FUNCTION, *arguments.operands(), upstream)
    return found


@torch.no_grad()
def _as_sparse(columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(columns[None], values, shape, is_coalesced=True, check_invariants=False)


kept_logits_operator: Operator[Tensor] = Operator(
    "linear_kept_logits", multiply, fake=empty_logits, save=_save, backward=_backward, operands=Operands._fields
)
