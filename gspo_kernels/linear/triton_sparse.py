"""The products of the sparse head in Triton: some rows of the head for each row of hidden states, by `Entries`.

    kept_logits        x[e] = hidden[row(e)] . weight[id(e)]                a program for a few entries
    hidden_gradient    sum over a row's entries of g[e] weight[id(e)]       a program for a row and a part of D
    weight_gradient    sum over the entries of an id of g[e] hidden[row(e)] a program for an entry and a part of D; it
                       returns where its entry, in the order of ids, is not the first of its id

Sums are in float32. The order of a sum depends on its own entries alone: equal inputs give equal bits, in any batch.
Nothing is read where an id is ABSENT or no row of the head, where a row is not active, or where a gradient is 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rows.triton_rows import INTERPRETED, on_device
from .types import Entries

_ACCESS = 16  # bytes of the widest load


class Launch(NamedTuple):
    """How a kernel is compiled. A thread loads 16 bytes of each of `entries` rows at a time."""

    num_warps: int
    entries: int


# Never measured on a GPU. In kept_logits the sum over D ends within a warp.
LAUNCH = {
    "kept_logits": Launch(num_warps=1, entries=8),
    "hidden_gradient": Launch(num_warps=4, entries=8),
    "weight_gradient": Launch(num_warps=4, entries=8),
}
_INTERPRETED_LAUNCH = Launch(num_warps=1, entries=4)  # small, so that rows of a few entries have several blocks


def kept_logits(hidden: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor, add: bool) -> None:
    """Writes or adds each entry's logit to `out` [entries], fp32; -inf where the id is ABSENT, 0 in rows not active.

    Args:
        hidden: [N, D].
        weight: [V, D].
        dtype: what the operands are rounded to first.
    """
    arguments = {
        **_of_rows(hidden=hidden, weight=weight),
        **_of_entries(entries, "ids", "rows"),
        "out": out,
        "ADD": add,
    }
    programs = -(-len(entries.ids) // _layout("kept_logits").entries)
    _launch("kept_logits", programs, False, (hidden, weight), dtype, arguments)


def hidden_gradient(gradient: Tensor, weight: Tensor, entries: Entries, dtype: torch.dtype, out: Tensor) -> None:
    """Writes the gradient of every row of hidden states to `out` [N, D], from that of the logits [entries], fp32."""
    arguments = {
        "gradient": gradient,
        **_of_rows(weight=weight, out=out),
        **_of_entries(entries, "ids", "offsets"),
    }
    del arguments["out_rows"]
    _launch("hidden_gradient", len(out), True, (weight,), dtype, arguments)


def weight_gradient(
    gradient: Tensor,
    hidden: Tensor,
    entries: Entries,
    order: Tensor,
    destination: Tensor,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Writes the gradient of the head's rows to rows of `out`, which is zero before.

    Args:
        gradient: of the logits, [entries], fp32.
        hidden: [N, D].
        order: the entries sorted by id, equal ids in the order of the entries, int64.
        destination: for the first of each id in this order: the row of `out`, int64 [entries].
    """
    arguments = {
        "gradient": gradient,
        **_of_rows(hidden=hidden, out=out),
        **_of_entries(entries, "ids", "rows"),
        "order": order,
        "destination": destination,
    }
    _launch("weight_gradient", len(entries.ids), True, (hidden,), dtype, arguments)


def _of_entries(entries: Entries, *names: str) -> dict[str, Any]:
    active = None if entries.active is None else entries.active.view(torch.uint8)
    arrays = entries._asdict()
    return {**{name: arrays[name] for name in names}, "active": active, "entries": len(entries.ids)}


def _of_rows(**matrices: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, x in matrices.items():
        found |= {name: x, f"{name}_stride": x.stride(0), f"{name}_rows": x.shape[0]}
    return found


def _layout(kernel: str) -> Launch:
    return _INTERPRETED_LAUNCH if INTERPRETED else LAUNCH[kernel]


def _launch(
    kernel: str,
    programs: int,
    in_parts: bool,
    operands: tuple[Tensor, ...],
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> None:
    """`operands`: the matrices that are read. `in_parts`: each part of D is the work of other programs."""
    depth = operands[0].shape[1]
    if programs == 0 or depth == 0:
        return
    width = _ACCESS // min(x.element_size() for x in operands)
    matrices = [x for x in (*operands, arguments["out"]) if x.ndim == 2]
    aligned = depth % width == 0 and all(map(_rows_are_aligned, matrices))
    constants, options = _compile_time(_layout(kernel), width, dtype)
    parts = -(-depth // constants["BLOCK"]) if in_parts else 1
    with on_device(operands[0]):
        kernels()[kernel][(programs, parts)](**arguments, depth=depth, ALIGNED=aligned, **constants, **options)


def _rows_are_aligned(x: Tensor) -> bool:
    """Whether each row starts on a 16-byte boundary."""
    return x.stride(0) * x.element_size() % _ACCESS == 0 and x.data_ptr() % _ACCESS == 0


@functools.cache
def _compile_time(layout: Launch, width: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """A kernel's constants, and the options of the compiler."""
    nvidia = torch.version.hip is None
    return sizes(layout, width, dtype, 32 if nvidia else 64), {"num_warps": layout.num_warps, "enable_fp_fusion": True}


def sizes(layout: Launch, width: int, dtype: torch.dtype, warp_size: int) -> dict[str, Any]:
    from .triton_sparse_kernels import DTYPES

    block = warp_size * layout.num_warps * width
    return {"ENTRIES": layout.entries, "BLOCK": block, "WIDTH": width, "DTYPE": DTYPES[dtype]}


@functools.cache
def kernels() -> dict[str, Any]:
    """By the names of `LAUNCH`."""
    from .triton_sparse_kernels import hidden_gradient_kernel, kept_logits_kernel, weight_gradient_kernel

    return {
        "kept_logits": kept_logits_kernel,
        "hidden_gradient": hidden_gradient_kernel,
        "weight_gradient": weight_gradient_kernel,
    }
