"""The C++ row kernels (csrc/): fp32, bf16 and fp16 logits on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .extension import KERNEL_DTYPES, address, row_arguments, stats_addresses, view, why_missing
from .types import Rows, RowStats, TokenSlope, Upstream, empty_stats
from .types import scaled_logits as scaled_logits

try:
    import gspo_kernels._native as _native

    _unavailable_reason = ""
except ImportError as error:
    _unavailable_reason = why_missing(error)

name = "native"
honours: frozenset[str] = frozenset({"row_indices", "tanh_scale", "kept"})
has_kernels = True
runs_stage_in_triton = False
computes_slopes = False


def unsupported_reasons(logits: Tensor) -> list[str]:
    reasons = []
    if _unavailable_reason:
        reasons.append(_unavailable_reason)
    if logits.device.type != "cpu":
        reasons.append(f"logits are on {logits.device}, these kernels run on the CPU")
    if logits.dtype not in KERNEL_DTYPES:
        reasons.append(f"logits are {logits.dtype}, these kernels take float32, bfloat16 and float16")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        reasons.append(f"the vocabulary dimension has stride {logits.stride(-1)}, these kernels need 1")
    return reasons


def reason_not_default(logits: Tensor) -> str:
    return ""


def describe() -> str:
    return "C++, not installed" if _unavailable_reason else f"C++, {instruction_set()}"


def instruction_set() -> str:
    """The one that the kernels run. Raises ValueError where GSPO_KERNELS_ISA names none that this processor has."""
    name: str = _native.instruction_set()
    return name


def unavailable_reason() -> str:
    """Why the extension cannot be used on any logits; empty if it can."""
    return _unavailable_reason


def forward(rows: Rows) -> RowStats:
    stats = empty_stats(rows)
    _native.forward(**_arguments(rows), **stats_addresses(stats))
    return stats


def backward(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
    if gradient.dtype not in (rows.logits.dtype, torch.bfloat16):
        raise ValueError(f"gradient: expected {rows.logits.dtype} or bfloat16; got {gradient.dtype}")
    if gradient.data_ptr() != rows.logits.data_ptr():
        request_huge_pages(gradient)
    grad_logprobs, grad_entropy, grad_lse = upstream.by_statistic()
    grad_lse = None if grad_lse is None else grad_lse.double()
    _native.backward(
        **_arguments(rows),
        **stats_addresses(stats),
        grad_logprobs=address(grad_logprobs),
        grad_entropy=address(grad_entropy),
        grad_lse=address(grad_lse),
        gradient=view(gradient),
        gradient_is_bfloat16=gradient.dtype == torch.bfloat16,
    )


def forward_backward(rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None) -> RowStats:
    assert slope is None
    stats = empty_stats(rows)
    request_huge_pages(gradient)
    grad_logprobs, _, _ = upstream.by_statistic()
    _native.forward_backward(
        **_arguments(rows),
        **stats_addresses(stats),
        grad_logprobs=address(grad_logprobs),
        gradient=view(gradient),
    )
    return stats


def scale(values: Tensor, factor: Tensor) -> None:
    outer, inner, vocab = values.shape
    _native.scale(
        dtype=KERNEL_DTYPES[values.dtype],
        outer=outer,
        inner=inner,
        vocab=vocab,
        logits=view(values),
        factor=float(factor),  # a CPU tensor: reading it waits for nothing
        threads=torch.get_num_threads(),
    )


def _arguments(rows: Rows) -> dict[str, Any]:
    """The rows as the kernels take them."""
    return {
        **row_arguments(rows),
        "row_indices": address(rows.row_indices),
        **_kept(rows),
        "threads": torch.get_num_threads(),
    }


def _kept(rows: Rows) -> dict[str, Any]:
    """The columns that rows keep."""
    if rows.kept_ids is None:
        return {}
    assert rows.kept_offsets is not None and rows.kept_ids.is_contiguous() and rows.kept_offsets.is_contiguous()
    assert rows.kept_ids.dtype == torch.int32 and len(rows.kept_offsets) == rows.token_ids.numel() + 1
    return {
        "kept_form": rows.kept_form,
        "kept_ids": rows.kept_ids.data_ptr(),
        "kept_offsets": rows.kept_offsets.data_ptr(),
        "kept_entries": rows.kept_ids.numel(),
    }


def request_huge_pages(gradient: Tensor) -> None:
    """Page faults on a newly allocated gradient cost more than the arithmetic."""
    storage = gradient.untyped_storage()
    _native.request_huge_pages(address=storage.data_ptr(), bytes=storage.nbytes())


# ---- sums in 24 bits


def add_to_sums(high: Tensor, low: Tensor, product: Tensor, first: int, pass_number: int) -> None:
    """Adds a product to contiguous sums from number `first` on; in pass 0 writes it."""
    assert high.is_contiguous() and low.is_contiguous() and product.is_contiguous()
    assert high.shape == low.shape and 0 <= first <= first + product.numel() <= high.numel()
    _native.add_to_sums(
        high=high.data_ptr(), low=low.data_ptr(), first=first, product=product.data_ptr(), count=product.numel(),
        pass_number=pass_number, threads=torch.get_num_threads(),
    )  # fmt: skip


def round_sums(high: Tensor, low: Tensor, factor: float) -> None:
    """Sums times a factor, rounded to bf16 in place of `high`."""
    _native.round_sums(
        high=high.data_ptr(), low=low.data_ptr(), count=high.numel(), factor=factor, threads=torch.get_num_threads()
    )
