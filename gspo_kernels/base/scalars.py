"""Hyper-parameters as run-time values: annealing one triggers no recompilation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FINITE = 1e30  # stands for an infinite log-probability, so that no inf - inf can arise


def run_time(value: float | Tensor, device: torch.device) -> Tensor:
    """`value` as a 0-d float64 tensor on `device`.

    Under `torch.compile` a Python float becomes a constant of the graph when an operator takes it that is not plain
    arithmetic (clamp, where, an operator of this package). Added to a tensor first, it stays an input.
    """
    if isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=torch.float64, device=device) + value
    return torch.full((), value, dtype=torch.float64, device=device)  # `torch.tensor` would wait for a GPU


def run_time_list(values: Sequence[float]) -> Tensor:
    """Several of them, [n] float64 on the CPU."""
    if torch.compiler.is_compiling() and values:
        return torch.stack([run_time(value, torch.device("cpu")) for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")  # whatever the default device is
