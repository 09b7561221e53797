"""The values that a loss from hidden states passes around: its operands, its rows, and which gradients are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rows.operators import check_ids_and_temperatures
from ..rows.vocab_shard import VocabShard


class Operands(NamedTuple):
    """What is differentiable. logits = hidden @ weight.T + low_rank_hidden @ low_rank_weight.T + bias."""

    hidden: Tensor  # [B, T, D] or [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    low_rank_hidden: Tensor | None  # [B, T, r] or [N, r]; both of these are None, or neither is
    low_rank_weight: Tensor | None  # [V, r]

    def by_name(self) -> dict[str, Any]:
        """As a caller calls them, for error messages."""
        names = ("hidden", "weight", "bias", "low_rank[0]", "low_rank[1]")
        return dict(zip(names, self, strict=True))

    def needs_grad(self) -> NeedsGrad:
        return NeedsGrad(*needs_grad(*self))


class NeedsGrad(NamedTuple):
    """Which of the `Operands` need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    low_rank_hidden: bool = False
    low_rank_weight: bool = False

    def any(self) -> bool:
        return True in self

    def sums_over_rows(self) -> bool:
        """Whether a gradient is needed that is a sum over rows, and not one of each row."""
        return self.weight or self.bias or self.low_rank_weight


def needs_grad(*operands: Tensor | None) -> list[bool]:
    """Of each operand."""
    grad = torch.is_grad_enabled()
    return [grad and x is not None and x.requires_grad for x in operands]


class Gradients(NamedTuple):
    """In float32 (float64 for float64), whatever the dtype of the operands; empty where not needed.

    The gradient of a bf16 head on a CPU is a sum in 24 bits: `weight` in bf16 has the first 16, `weight_low` the rest.
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    low_rank_hidden: Tensor  # [N, r]
    low_rank_weight: Tensor  # [V, r]
    weight_low: Tensor  # uint8 [V, D]; empty where `weight` is the whole sum

    def of_operands(self) -> tuple[Tensor, ...]:
        """In the order of `Operands`."""
        return self[: len(Operands._fields)]


@dataclass(frozen=True)
class HeadArguments:
    """Hidden states, a head and one target per row; checked."""

    hidden: Tensor  # this and the next four: `Operands`
    weight: Tensor
    bias: Tensor | None
    low_rank_hidden: Tensor | None
    low_rank_weight: Tensor | None
    token_ids: Tensor  # [outer, inner]; mask and temperature as in `Rows`
    mask: Tensor | None
    temperature: Tensor
    tanh_scale: Tensor | None
    vocab_size: int  # rows of the weight from there on are padding
    dtype: torch.dtype  # of the operands of the products
    chunk_bytes: int | None
    backend: str | None
    shard: VocabShard | None  # of a head that is sharded over ranks: weights and bias are this rank's part

    def operands(self) -> Operands:
        return Operands(self.hidden, self.weight, self.bias, self.low_rank_hidden, self.low_rank_weight)


class Entries(NamedTuple):
    """Which logits a sparse head computes: entry e is that of row rows[e] in column ids[e]."""

    ids: Tensor  # int32 [E]; ABSENT: the column is on another rank
    offsets: Tensor  # int64 [N + 1]: row i of the hidden states has the entries from offsets[i] to offsets[i + 1]
    rows: Tensor  # int64 [E]
    active: Tensor | None  # bool [N]; rows that are False are not read. None: all are active


class KeptColumns(NamedTuple):
    """Which columns rows keep, and how the sparse head computes them."""

    ids: Tensor  # int32 [E], of the whole vocabulary
    offsets: Tensor  # int64 [N + 1]
    backend: str  # the name of the one that was chosen for their rows
    sparse_weight_grad: bool  # whether the weight's gradient is a sparse tensor of the columns that have entries


def entries_of(arguments: HeadArguments, kept: KeptColumns) -> Entries:
    """The entries of this rank's head; in bounds whatever the offsets are, which a GPU does not check."""
    ids = kept.ids if arguments.shard is None else arguments.shard.local_kept(kept.ids)
    last = max(arguments.token_ids.numel() - 1, 0)
    rows = torch.searchsorted(kept.offsets, torch.arange(ids.shape[0], device=ids.device), right=True) - 1
    mask = arguments.mask
    return Entries(ids, kept.offsets, rows.clamp(0, last), None if mask is None else mask.reshape(-1))


@dataclass(frozen=True)
class SelectedRows:
    """The rows of the hidden states that are multiplied by the head; the arrays have an entry for each of them."""

    hidden: Tensor  # [N, D], all rows
    row_indices: Tensor | None  # [rows] int64, the selected rows of `hidden`; None: all
    token_ids: Tensor  # [rows] int64
    mask: Tensor | None  # [rows] bool, where masked rows are selected as well; None: no selected row is masked
    temperature: Tensor  # [rows] fp32, or 0-d fp64 on the CPU
    tanh_scale: Tensor | None  # as in `Rows`

    @property
    def count(self) -> int:
        return self.token_ids.shape[0]

    def fields(self) -> list[str]:
        """Optional fields of `Rows` that a backend must honour for them."""
        return ["row_indices"] if self.tanh_scale is None else ["row_indices", "tanh_scale"]


def select_rows(arguments: HeadArguments) -> SelectedRows:
    """The unmasked rows. In a CUDA graph the mask cannot be read by the host: all rows are selected there."""
    hidden = arguments.hidden.reshape(-1, arguments.hidden.shape[-1])
    ids, mask, temperature = arguments.token_ids.reshape(-1), arguments.mask, arguments.temperature
    if temperature.ndim:
        temperature = temperature.reshape(-1)
    check_ids_and_temperatures(arguments.token_ids, mask, arguments.temperature, arguments.vocab_size)
    if mask is None or not can_synchronize(hidden.device):
        ids = ids if mask is None else torch.where(mask.reshape(-1), ids, 0)
        return SelectedRows(
            hidden, None, ids, None if mask is None else mask.reshape(-1), temperature, arguments.tanh_scale
        )
    row_indices = mask.reshape(-1).nonzero()[:, 0]
    temperature = temperature[row_indices] if temperature.ndim else temperature
    return SelectedRows(hidden, row_indices, ids[row_indices], None, temperature, arguments.tanh_scale)


def to_all_rows(values: Tensor, rows: SelectedRows, shape: torch.Size) -> Tensor:
    """An array with an entry per selected row -> the caller's token layout, 0 at the other rows."""
    if rows.row_indices is None:
        return values.reshape(shape)
    return values.new_zeros(rows.hidden.shape[0]).index_copy_(0, rows.row_indices, values).reshape(shape)


def can_synchronize(device: torch.device) -> bool:
    """Whether the host may wait for the device: not while a CUDA graph is captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
