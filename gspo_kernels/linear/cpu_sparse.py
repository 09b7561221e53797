"""The three products of a sparse head in C++ (csrc/cpu/sparse.cpp), for CPU tensors; `torch_sparse` says what they are.

Operands are fp32, bf16 or fp16, in any pair, with any row stride; their columns are neighbours. Importing this module
raises ImportError where the extension is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gspo_kernels._native as _native

from ..rows.extension import KERNEL_DTYPES, address
from .types import Entries


def kept_logits(hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor, add: bool) -> None:
    """The logit of each entry -> `out` [E] float32, or added to it. Its bits depend on the two rows alone."""
    assert out.dtype == torch.float32 and out.is_contiguous() and len(out) == len(entries.ids)
    assert hidden.shape == (len(entries.offsets) - 1, weight.shape[1])
    _native.kept_logits(
        hidden=_matrix(hidden),
        weight=_matrix(weight),
        rounded_to=KERNEL_DTYPES[dtype],
        **_arguments(entries),
        out=out.data_ptr(),
        add=add,
        threads=torch.get_num_threads(),
    )


def hidden_gradient(gradient: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor) -> None:
    """The sum of gradient times weight over each row's entries -> `out` [N, D], rounded once."""
    _check_gradient(gradient, entries)
    assert out.shape == (len(entries.offsets) - 1, weight.shape[1])
    _native.hidden_gradient(
        gradient=gradient.data_ptr(),
        weight=_matrix(weight),
        rounded_to=KERNEL_DTYPES[dtype],
        **_arguments(entries),
        out=_matrix(out),
        threads=torch.get_num_threads(),
    )


def weight_gradient(
    gradient: Tensor,
    hidden: Tensor,
    entries: Entries,
    order: Tensor,
    destination: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """The sum of gradient times hidden states over the entries of each column -> rows of `out`, rounded once."""
    _check_gradient(gradient, entries)
    assert order.is_contiguous() and destination.is_contiguous() and out.shape[1] == hidden.shape[1]
    assert len(order) == len(destination) == len(gradient) and len(hidden) == len(entries.offsets) - 1
    _native.weight_gradient(
        gradient=gradient.data_ptr(),
        hidden=_matrix(hidden),
        rounded_to=KERNEL_DTYPES[dtype],
        **_arguments(entries),
        order=order.data_ptr(),
        destination=destination.data_ptr(),
        out=_matrix(out),
        threads=torch.get_num_threads(),
    )


def _check_gradient(gradient: Tensor, entries: Entries) -> None:
    assert gradient.dtype == torch.float32 and gradient.is_contiguous() and len(gradient) == len(entries.ids)


def _matrix(matrix: Tensor) -> tuple[str, int, int, int, int]:
    rows, columns = matrix.shape
    assert matrix.stride(1) == 1 or columns <= 1
    return KERNEL_DTYPES[matrix.dtype], matrix.data_ptr(), rows, columns, matrix.stride(0)


def _arguments(entries: Entries) -> dict[str, int]:
    ids, offsets, rows, active = entries
    assert all(x is None or x.is_contiguous() for x in entries)
    assert (ids.dtype, offsets.dtype, rows.dtype) == (torch.int32, torch.int64, torch.int64) and len(rows) == len(ids)
    assert active is None or (active.dtype == torch.bool and len(active) == len(offsets) - 1)
    return {
        "count": len(ids),
        "rows": len(offsets) - 1,
        "ids": ids.data_ptr(),
        "offsets": offsets.data_ptr(),
        "row_of": rows.data_ptr(),
        "active": address(active),
    }
