"""The CUDA C++ row kernel (csrc/cuda/): statistics and gradient in one read of the logits, on NVIDIA GPUs.

It runs where the gradient of a row depends on no other row: for on-policy losses, and off-policy for losses with a
`TokenSlope` (GRPO, PPO, CISPO, DPPO, TOPR by token, DRO). For everything else this backend calls the Triton kernels,
which are bound by memory there as well.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..base.torch_internals import constant_while_compiling
from . import cpu_rows, triton_rows
from .extension import address, row_arguments, stats_addresses, view
from .triton_rows import backward as backward
from .triton_rows import forward as forward
from .triton_rows import scale as scale
from .triton_rows import scaled_logits as scaled_logits
from .types import Rows, RowStats, TokenSlope, Upstream, empty_stats

try:
    _native: ModuleType | None = importlib.import_module("gspo_kernels._native")
except ImportError:
    _native = None

name = "cuda"
honours: frozenset[str] = frozenset({"row_indices", "tanh_scale"})  # row_indices in `backward`, which is Triton's
has_kernels = True
runs_stage_in_triton = True
computes_slopes = True

# GPUs on which `make gpu` measured it to be faster than Triton in every one-read case: there it is the default. The
# results are in benchmarks/results/; a test checks that this set agrees with them.
FASTER_ON: frozenset[str] = frozenset({"NVIDIA H100 80GB HBM3", "NVIDIA H200"})


def unsupported_reasons(logits: Tensor) -> list[str]:
    if not is_built():
        if cpu_rows.unavailable_reason():
            return ["the CUDA kernels are part of the C++ extension, which is missing: see native"]
        return ["the CUDA kernels were not built; reinstall with nvcc on PATH (GSPO_KERNELS_CUDA=1 tells what fails)"]
    if not _serves(logits.device):
        return [f"logits are on {logits.device}, these kernels run on NVIDIA GPUs"]
    reasons = triton_rows.unsupported_reasons(logits)
    unavailable = unavailable_reason(logits.device)
    return [unavailable, *reasons] if unavailable else reasons


def describe() -> str:
    return f"CUDA C++, {_native.cuda_release()}" if _native is not None and is_built() else "CUDA C++, not built"


@constant_while_compiling
def unavailable_reason(device: torch.device) -> str:
    """Why kernels that were built cannot run on a GPU; empty if they can."""
    return _unavailable_reason(device.index or 0) if is_built() and _serves(device) else ""


def reason_not_default(logits: Tensor) -> str:
    unmeasured: str = _unmeasured(logits.device)
    if unmeasured or torch.compiler.is_compiling() or _aligned(logits):  # compiled losses do not take one pass
        return unmeasured
    return (
        "could run; not all rows begin on 16-byte boundaries. There a row's bits would depend on its position in the "
        "batch; with Triton they never do (backend='cuda' runs it)"
    )


def forward_backward(rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None) -> RowStats:
    if gradient.dtype != rows.logits.dtype:
        assert slope is None
        return triton_rows.forward_backward(rows, upstream, gradient)
    stats, counts = empty_stats(rows), upstream.counts
    assert _native is not None and upstream.logprobs is not None
    tickets = upstream.tickets
    if tickets is None or tickets.numel() == 0:  # empty in a batch without sequences
        tickets = torch.zeros(1, dtype=torch.int32, device=rows.logits.device)
    with triton_rows.on_device(rows.logits):
        _native.cuda_one_read(
            **row_arguments(rows),
            **stats_addresses(stats),
            grad_logprobs=upstream.logprobs.data_ptr(),
            factor=address(upstream.factor),
            counts=address(counts),
            count_size=0 if counts is None else counts.numel(),
            **_slope(slope),
            gradient=view(gradient),
            tickets=tickets.data_ptr(),
            device=rows.logits.device.index or 0,
            stream=torch.cuda.current_stream(rows.logits.device).cuda_stream if rows.logits.is_cuda else 0,
        )
    return stats


def _slope(slope: TokenSlope | None) -> dict[str, Any]:
    if slope is None:
        return {}
    return {
        "old_logprobs": slope.old_logprobs.data_ptr(),
        "advantages": slope.advantages.data_ptr(),
        "rollout_logprobs": address(slope.rollout_logprobs),
        "positive": tuple(map(float, slope.positive)),  # an own loss may give numbers of numpy
        "negative": tuple(map(float, slope.negative)),
        "hold": slope.outside == "hold",
        "measure": slope.measure,
        "max_weight": float(slope.max_weight),
        "penalty": float(slope.penalty),
        "max_log_ratio": slope.max_log_ratio,
    }


def is_built() -> bool:
    """Whether the extension has them."""
    return hasattr(_native, "cuda_one_read")


@constant_while_compiling
def _unmeasured(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's threads"
    if gpu in FASTER_ON:
        return ""
    return f"could run; not measured to be faster than Triton on {gpu} (backend='cuda' runs it, `make gpu` compares)"


def _aligned(logits: Tensor) -> bool:
    """Whether rows begin on 16-byte boundaries, for any number of rows: the answer is the same for a batch of one."""
    elements = (logits.storage_offset(), *logits.stride()[:-1])
    return all(count * logits.element_size() % 16 == 0 for count in elements)


def _serves(device: torch.device) -> bool:
    """NVIDIA GPUs; the CPU where tests run the kernels as threads of it (tests/support/gpu_on_host)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia or hasattr(_native, "latest_launch")


@functools.cache
def _unavailable_reason(device: int) -> str:
    assert _native is not None
    restored = torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()
    with restored:  # the query makes the device the current one
        found: str = _native.cuda_unavailable_reason(device=device)
    return found
