"""Checks of a caller's hidden states and head, which part of the head this rank has, and what ranks compare of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.agreement import Agreement
from ..base.autograd import refuse_forward_mode, refuse_vmap
from ..base.collectives import Ranks
from ..base.devices import autocasts
from ..rows.arguments import check_token_ids, check_vocab_size
from ..rows.dispatch import check_name, choose
from ..rows.kept import KeptTokens
from ..rows.vocab_shard import VocabShard, VocabularyShard, shard_of, tp_ranks
from .products import sum_dtype
from .schedule import chunk_size
from .types import Operands


def operands_of(hidden: Any, weight: Any, bias: Any, low_rank: Any) -> Operands:
    """A caller's operands, which `check_operands` checks."""
    if low_rank is None:
        return Operands(hidden, weight, bias, None, None)
    pair = isinstance(low_rank, (tuple, list))
    if not pair or len(low_rank) != 2 or all(x is None for x in low_rank):
        got = (
            f"{len(low_rank)} values: {', '.join(map(checks.describe, low_rank))}"
            if pair
            else checks.describe(low_rank)
        )
        raise TypeError(f"low_rank: expected (u, B), of which u @ B.T is added to the logits, or None; got {got}")
    return Operands(hidden, weight, bias, *low_rank)


def refuse_transforms(function: str, operands: Operands) -> None:
    refuse_forward_mode(function, **operands.by_name())
    refuse_vmap(function, **operands.by_name())


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


def shard_of_head(operands: Operands, vocabulary: VocabularyShard) -> tuple[Operands, VocabShard | None]:
    """Plain tensors, and which rows of the head this rank has.

    A DTensor weight is a sharded head only where the group or the hidden states say so. FSDP's parameter looks the same
    outside of its module's forward, but there every rank has other hidden states.
    """
    hidden, weight = operands.hidden, operands.weight
    if not checks.is_dtensor(weight):
        weight, shard = shard_of("weight", weight, 0, vocabulary)
        # Not `_replace`, which torch.compile cannot trace before torch 2.8.
        return Operands(hidden, weight, operands.bias, operands.low_rank_hidden, operands.low_rank_weight), shard
    if vocabulary.group is None and not _is_replicated(hidden, weight):
        return operands, None  # refused below
    local, shard = shard_of("weight", weight, 0, vocabulary)
    return Operands(
        _local_rows(hidden),
        local,
        _local_part("bias", operands.bias, weight, vocabulary),
        _local_rows(operands.low_rank_hidden),
        _local_part("low_rank[1]", operands.low_rank_weight, weight, vocabulary),
    ), shard


def _local_rows(values: Any) -> Any:
    """What is replicated on all ranks, as a plain tensor."""
    if checks.is_dtensor(values) and all(p.is_replicate() for p in values.placements):
        return values.to_local(grad_placements=values.placements)
    return values


def _local_part(name: str, values: Any, weight: Any, vocabulary: VocabularyShard) -> Any:
    """This rank's part of what is sharded like a weight that is a DTensor."""
    if values is None:
        return None
    if not (checks.is_dtensor(values) and values.device_mesh == weight.device_mesh):
        raise TypeError(f"{name}: expected a DTensor sharded like weight; got {checks.describe(values)}")
    return shard_of(name, values, 0, vocabulary)[0]


def agree_on_chunks(
    agreement: Agreement,
    operands: Operands,
    columns: int,
    chunk_bytes: int | None,
    backend: str | None,
    skip_zero_advantage: bool = False,
) -> None:
    """Ranks take chunks in step: the arguments that decide how many there are, and of which rows, are the same."""
    if not agreement.active:
        return
    hidden, low_rank = operands.hidden, operands.low_rank_hidden
    dtype = product_dtype(hidden, operands.weight)
    choose(hidden.new_empty((1, 1, 1), dtype=sum_dtype(dtype)), backend)  # refuses here, before other ranks go on
    work = {
        "hidden (how wide)": hidden.shape[-1],
        "low_rank (how many columns)": 0 if low_rank is None else low_rank.shape[-1],
        "dtype that hidden and weight are multiplied in": str(dtype),
        "chunk_bytes": chunk_bytes,
        "skip_zero_advantage": skip_zero_advantage,
        "requires_grad of hidden, weight, bias and low_rank": ", ".join(map(str, operands.needs_grad())),
    }
    agreement.same(work)
    agreement.same({"vocab_size": columns}, over="cp_group")  # a tensor-parallel group has compared it


_MEANINGS = {
    "hidden": "the model's last hidden states [.., D]",
    "weight": "the LM head [V, D]",
    "bias": "the LM head's bias [V]",
    "low_rank[0]": "u [.., r], a row for each row of hidden",
    "low_rank[1]": "B [V, r], a row for each row of weight",
}


def check_operands(operands: Operands, shard: VocabShard | None = None) -> None:
    optional = ["bias"]
    if operands.low_rank_hidden is None and operands.low_rank_weight is None:
        optional += ["low_rank[0]", "low_rank[1]"]
    for name, value in operands.by_name().items():
        if name in optional and value is None:
            continue
        if checks.is_dtensor(value):
            raise TypeError(
                f"{name}: expected a plain tensor; got a DTensor, of which this rank holds a part. If it is FSDP's, "
                "call the loss where FSDP has gathered it (in the forward of the sharded module), or pass its "
                "full_tensor(). If the head is sharded over the vocabulary, pass hidden as a replicated DTensor on its "
                "mesh, or tp_group"
            )
        checks.operand(name, checks.tensor(name, value, _MEANINGS[name]), _MEANINGS[name])
    hidden, weight, bias, low_rank_hidden, low_rank_weight = operands
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
    if low_rank_hidden is None or low_rank_weight is None:
        return
    rows, rank = list(hidden.shape[:-1]), low_rank_hidden.shape[-1] if low_rank_hidden.ndim else 0
    if list(low_rank_hidden.shape[:-1]) != rows or rank == 0:
        expected = ", ".join(map(str, [*rows, "r"]))
        raise ValueError(
            f"low_rank[0]: expected [{expected}], a row for each row of hidden, and r above 0; got "
            f"{list(low_rank_hidden.shape)}"
        )
    checks.shape("low_rank[1]", low_rank_weight, (weight.shape[0], rank), "a row for each of weight, r columns")
    checks.same_device("low_rank[0]", low_rank_hidden, hidden.device)
    checks.same_device("low_rank[1]", low_rank_weight, hidden.device)


def check_head(
    operands: Operands,
    token_ids: Any,
    vocab_size: Any,
    chunk_bytes: Any,
    backend: Any,
    shard: VocabShard | None,
) -> tuple[int, int | None]:
    """Returns the size of the vocabulary, and `chunk_bytes` as Python's own number."""
    check_operands(operands, shard)
    hidden, weight = operands.hidden, operands.weight
    check_token_ids(token_ids, hidden.shape[:-1], hidden.device, "row of hidden")
    columns = check_vocab_size(vocab_size, weight.shape[0]) if shard is None else shard.vocab_size
    check_name(backend)
    if chunk_bytes is None:  # the default is chosen where products are: a compiler cannot trace how it depends on them
        return columns, None
    dtype = product_dtype(hidden, weight)
    chunk_size(chunk_bytes, shard.usual_columns if shard else columns, dtype, hidden.device.type, gradient=False)
    return columns, int(chunk_bytes)


def check_sparse_weight_grad(
    given: Any, kept: KeptTokens | None, mask: Tensor | None, weight: Any, full_distribution: bool = False
) -> None:
    """Refuses a sparse gradient where the gradient is not sparse, or could not be taken as one. May read rows."""
    checks.flag("sparse_weight_grad", given, "whether the weight's gradient is a sparse tensor")
    if not given:
        return
    reason = ""
    if kept is None:
        reason = "because kept= is None, and all columns have a gradient"
    elif full_distribution:
        reason = "because full_distribution=True gives all columns a gradient"
    elif torch.compiler.is_compiling():
        reason = "under torch.compile, which takes no sparse gradient"
    elif checks.is_dtensor(weight):
        reason = "because weight is a DTensor, which takes no sparse gradient"
    elif kept.every_row is not True:
        whole = kept.counts == 0 if mask is None else (kept.counts == 0) & mask.reshape(-1)
        if count := int(whole.sum()):
            reason = f"because rows keep all columns, {count} of {len(kept)}, and their gradient is dense"
    if reason:
        raise ValueError(f"sparse_weight_grad: expected False, {reason}; got True")
