"""Checks of a caller's hidden states and head, which part of the head this rank has, and what ranks compare of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.agreement import Agreement
from ..base.collectives import Ranks
from ..base.devices import autocasts
from ..rows.arguments import check_token_ids, check_vocab_size
from ..rows.dispatch import check_name, choose
from ..rows.vocab_shard import VocabShard, VocabularyShard, shard_of, tp_ranks
from .products import sum_dtype
from .schedule import chunk_size
from .types import needs_grad


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that hidden states and the head are multiplied in: autocast's, else the wider one."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    if wide != torch.float64 and autocasts(hidden.device):
        return torch.get_autocast_dtype(hidden.device.type)
    return wide


def head_ranks(hidden: Any, weight: Any, vocabulary: VocabularyShard) -> Ranks | None:
    """The ranks that share the head; None where nothing says that it is sharded, as `shard_of_head` explains."""
    if checks.is_dtensor(weight) and vocabulary.group is None and not _is_replicated(hidden, weight):
        return None
    return tp_ranks(weight, 0, vocabulary)


def _is_replicated(hidden: Any, weight: Any) -> bool:
    """Whether hidden states are replicated on the mesh of a weight that is a DTensor."""
    replicated = checks.is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements)
    return replicated and bool(hidden.device_mesh == weight.device_mesh)


def shard_of_head(
    hidden: Any, weight: Any, bias: Any, vocabulary: VocabularyShard
) -> tuple[Any, Any, Any, VocabShard | None]:
    """Plain tensors, and which rows of the head this rank has.

    A DTensor weight is a sharded head only where the group or the hidden states say so. FSDP's parameter looks the same
    outside of its module's forward, but there every rank has other hidden states.
    """
    if not checks.is_dtensor(weight):
        weight, shard = shard_of("weight", weight, 0, vocabulary)
        return hidden, weight, bias, shard
    if vocabulary.group is None and not _is_replicated(hidden, weight):
        return hidden, weight, bias, None  # refused below
    if bias is not None and not (checks.is_dtensor(bias) and bias.device_mesh == weight.device_mesh):
        raise TypeError(f"bias: expected a DTensor sharded like weight; got {checks.describe(bias)}")
    local, shard = shard_of("weight", weight, 0, vocabulary)
    if bias is not None:
        bias, _ = shard_of("bias", bias, 0, vocabulary)
    if checks.is_dtensor(hidden) and all(p.is_replicate() for p in hidden.placements):
        hidden = hidden.to_local(grad_placements=hidden.placements)
    return hidden, local, bias, shard


def agree_on_chunks(
    agreement: Agreement,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    chunk_bytes: int | None,
    backend: str | None,
    skip_zero_advantage: bool = False,
) -> None:
    """Ranks take chunks in step: the arguments that decide how many there are, and of which rows, are the same."""
    if not agreement.active:
        return
    dtype = product_dtype(hidden, weight)
    choose(hidden.new_empty((1, 1, 1), dtype=sum_dtype(dtype)), backend)  # refuses here, before other ranks go on
    work = {
        "hidden (how wide)": hidden.shape[-1],
        "dtype that hidden and weight are multiplied in": str(dtype),
        "chunk_bytes": chunk_bytes,
        "skip_zero_advantage": skip_zero_advantage,
        "requires_grad of hidden, weight and bias": ", ".join(map(str, needs_grad(hidden, weight, bias))),
    }
    agreement.same(work)
    agreement.same({"vocab_size": columns}, over="cp_group")  # a tensor-parallel group has compared it


def check_operands(hidden: Any, weight: Any, bias: Any, shard: VocabShard | None = None) -> None:
    for name, value, meaning in (
        ("hidden", hidden, "the model's last hidden states [.., D]"),
        ("weight", weight, "the LM head [V, D]"),
        ("bias", bias, "the LM head's bias [V]"),
    ):
        if name == "bias" and value is None:
            continue
        if checks.is_dtensor(value):
            raise TypeError(
                f"{name}: expected a plain tensor; got a DTensor, of which this rank holds a part. If it is FSDP's, "
                "call the loss where FSDP has gathered it (in the forward of the sharded module), or pass its "
                "full_tensor(). If the head is sharded over the vocabulary, pass hidden as a replicated DTensor on its "
                "mesh, or tp_group"
            )
        checks.operand(name, checks.tensor(name, value, meaning), meaning)
    if hidden.ndim not in (2, 3):
        raise ValueError(
            f"hidden: expected [sequences, tokens, D] (padded) or [tokens, D] (packed); got {list(hidden.shape)}"
        )
    if (
        weight.ndim != 2
        or (weight.shape[0] == 0 and shard is None)
        or weight.shape[1] == 0
        or weight.shape[1] != hidden.shape[-1]
    ):
        raise ValueError(
            f"weight: expected [V, {hidden.shape[-1]}], a row for each token of the vocabulary, as wide as hidden "
            f"states, and neither of them 0; got {list(weight.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],), "one per row of weight")
        checks.same_device("bias", bias, hidden.device)


def check_head(
    hidden: Any,
    weight: Any,
    bias: Any,
    token_ids: Any,
    vocab_size: Any,
    chunk_bytes: Any,
    backend: Any,
    shard: VocabShard | None,
) -> tuple[int, int | None]:
    """Returns the size of the vocabulary, and `chunk_bytes` as Python's own number."""
    check_operands(hidden, weight, bias, shard)
    check_token_ids(token_ids, hidden.shape[:-1], hidden.device, "row of hidden")
    columns = check_vocab_size(vocab_size, weight.shape[0]) if shard is None else shard.vocab_size
    check_name(backend)
    if chunk_bytes is None:  # the default is chosen where products are: a compiler cannot trace how it depends on them
        return columns, None
    dtype = product_dtype(hidden, weight)
    chunk_size(chunk_bytes, shard.usual_columns if shard else columns, dtype, hidden.device.type, gradient=False)
    return columns, int(chunk_bytes)
