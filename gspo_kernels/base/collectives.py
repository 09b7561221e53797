"""Collectives: a few numbers of each rank are gathered in the order of the ranks, so that all get the same bits.

The convention for every way of splitting a batch: **each rank returns its share of the loss, and shares add up.** A
rank's gradient is that of the sum of all shares, with respect to the rank's own tensors. Under `cp_group` and data
parallelism, a share is that of the rank's tokens. Under `tp_group` every rank holds part of the vocabulary, computes
the same loss of the same tokens, and the loss counts once.

Every rank of a group calls collectives in the same order, also a rank without tokens.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import checks
from .autograd import first_derivative
from .operators import Operator
from .torch_internals import process_group


class Ranks(NamedTuple):
    """A process group as plain values, which operators can take."""

    argument: str  # that the caller passed it as
    size: int
    rank: int  # of this process
    name: str  # in torch

    def group(self) -> dist.ProcessGroup:
        return process_group(self.name)


def ranks_of(argument: str, value: Any) -> Ranks | None:
    """Checks a process group, or a mesh of one dimension."""
    if value is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{argument}: expected None, because torch.distributed has no process group: see init_process_group; got "
            f"{value!r}"
        )
    if isinstance(value, DeviceMesh):
        if value.ndim != 1:
            raise ValueError(
                f"{argument}: expected a process group, or a mesh of one dimension, such as mesh['tp']; got a mesh of "
                f"{value.ndim}"
            )
        value = value.get_group()
    outside = value is dist.GroupMember.NON_GROUP_MEMBER  # what `new_group` returns on other ranks, a number
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{argument}: expected a torch.distributed process group that this rank is a member of, or a mesh of one "
            f"dimension; got {'GroupMember.NON_GROUP_MEMBER' if outside else checks.describe(value)}"
        )
    return Ranks(argument, value.size(), value.rank(), value.group_name)


def _gather(values: Tensor, ranks: Ranks) -> Tensor:
    found = values.new_empty(ranks.size, *values.shape)
    if values.numel():
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name
        gather(found.view(-1), values.contiguous().view(-1), group=ranks.group())
    return found


_gather_operator: Operator[Tensor] = Operator(
    "gather", _gather, fake=lambda values, ranks: values.new_empty(ranks.size, *values.shape)
)


def gather(values: Tensor, ranks: Ranks) -> Tensor:
    """[ranks, ...], in the order of the ranks. Not differentiable."""
    return _gather_operator(values.detach(), ranks)


def gather_objects(value: Any, ranks: Ranks, device: torch.device) -> list[Any]:
    """Small Python objects, in the order of the ranks; waits for the device. torch's own needs numpy."""
    data = pickle.dumps(value)
    sizes = gather(torch.tensor([len(data)], device=device), ranks).flatten().tolist()
    padded = torch.tensor(list(data.ljust(max(sizes))), dtype=torch.uint8, device=device)
    rows = gather(padded, ranks).tolist()
    return [pickle.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def _sum_over_ranks(values: Tensor, ranks: Ranks, crosses: bool) -> Tensor:
    return gather(values, ranks).sum(0)  # in a fixed order, unlike an all-reduce


def _save_ranks(ctx: Any, found: Tensor, values: Tensor, ranks: Ranks, crosses: bool) -> None:
    ctx.ranks, ctx.crosses = ranks, crosses


def _gradient_of_sum(ctx: Any, gradient: Tensor) -> dict[str, Tensor | None]:
    if ctx.crosses:
        return {"values": sum_over_ranks(gradient, ctx.ranks, crosses=True)}
    # It is the gradient of all ranks' shares already; a second derivative would be that of one rank's share.
    return {"values": first_derivative(gradient, "cp_group", gradient)}


_sum_operator: Operator[Tensor] = Operator(
    "sum_over_ranks",
    _sum_over_ranks,
    fake=lambda values, ranks, crosses: torch.empty_like(values),
    save=_save_ranks,
    backward=_gradient_of_sum,
    operands=("values",),
)


def sum_over_ranks(values: Tensor, ranks: Ranks, *, crosses: bool) -> Tensor:
    """The sum over ranks, the same bits on each.

    Args:
        crosses: whether the incoming gradient is that of this rank's share alone: the backward then sums it over ranks.
            Otherwise it is that of all ranks' shares already, and passes unchanged.
    """
    return _sum_operator(values, ranks, crosses)


def all_reduce_(values: Tensor, ranks: Ranks) -> None:
    """Sums over ranks in place by torch's all-reduce, for large arrays. Not differentiable."""
    if values.numel():
        dist.all_reduce(values, group=ranks.group())
