"""What ranks tell each other: a few numbers each, gathered in the order of the ranks, so that all add them up alike.

The convention, for every way of splitting a batch: **each rank returns its share of the loss, and shares add up.** The
gradient that a rank computes is that of the sum, by what the rank holds. Under `cp_group` and data parallelism a share
is that of the rank's tokens. Under `tp_group` every rank computes the same loss, of the same tokens; what it holds is a
part of the vocabulary, and the loss counts once.

Collectives are called in one order on every rank of a group, also by a rank that has no tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import checks
from .autograd import first_derivative
from .torch_internals import process_group


class Ranks(NamedTuple):
    """A process group as plain values; operators, which take no groups, take it as a text."""

    argument: str  # the caller's name for it
    size: int
    rank: int  # of this process
    name: str  # torch's

    def text(self) -> str:
        return f"{self.argument} {self.size} {self.rank} {self.name}"

    @classmethod
    def read(cls, text: str) -> Ranks:
        argument, size, rank, name = text.split(" ", 3)
        return cls(argument, int(size), int(rank), name)

    def group(self) -> dist.ProcessGroup:
        return process_group(self.name)


def ranks_of(argument: str, value: Any) -> Ranks | None:
    """Of a process group or a mesh of one dimension."""
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
    outside = value is dist.GroupMember.NON_GROUP_MEMBER  # what `new_group` gives to other ranks, a number
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{argument}: expected a torch.distributed process group that this rank is a member of, or a mesh of one "
            f"dimension; got {'GroupMember.NON_GROUP_MEMBER' if outside else checks.describe(value)}"
        )
    return Ranks(argument, value.size(), value.rank(), value.group_name)


@torch.library.custom_op("gspo_kernels::gather", mutates_args=())
def _gather(values: Tensor, ranks: str) -> Tensor:
    of = Ranks.read(ranks)
    found = values.new_empty(of.size, *values.shape)
    if values.numel():
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name
        gather(found.view(-1), values.contiguous().view(-1), group=of.group())
    return found


@_gather.register_fake
def _(values: Tensor, ranks: str) -> Tensor:
    return values.new_empty(Ranks.read(ranks).size, *values.shape)


def gather(values: Tensor, ranks: Ranks) -> Tensor:
    """[ranks, ...], in the order of the ranks. Not differentiable."""
    found: Tensor = _gather(values.detach(), ranks.text())
    return found


@torch.library.custom_op("gspo_kernels::sum_over_ranks", mutates_args=())
def _sum_over_ranks(values: Tensor, ranks: str, crosses: bool) -> Tensor:
    found: Tensor = _gather(values, ranks).sum(0)  # in this order, whatever a library's all-reduce does
    return found


@_sum_over_ranks.register_fake
def _(values: Tensor, ranks: str, crosses: bool) -> Tensor:
    return torch.empty_like(values)


def _gradient_of_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    if ctx.crosses:
        return _sum_over_ranks(gradient, ctx.ranks, True), None, None
    # That of all ranks' shares already; a second derivative would be that of one rank's share.
    return first_derivative(gradient, "cp_group", gradient), None, None


def _remember_ranks(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.ranks, ctx.crosses = inputs


_sum_over_ranks.register_autograd(_gradient_of_sum, setup_context=_remember_ranks)


def sum_over_ranks(values: Tensor, ranks: Ranks, *, crosses: bool) -> Tensor:
    """The sum of what the ranks have, the same bits on each.

    Args:
        crosses: whether the gradient that comes back is that of this rank's share alone, and is therefore summed over
            ranks on its way. Without, it is that of all ranks' shares already, and passes as it is.
    """
    found: Tensor = _sum_over_ranks(values, ranks.text(), crosses)
    return found


def add_up_(values: Tensor, ranks: Ranks) -> None:
    """In place, by the library's own all-reduce: for what is large. Not differentiable."""
    if values.numel():
        dist.all_reduce(values, group=ranks.group())
