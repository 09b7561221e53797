"""The CUDA C++ row kernel (csrc/cuda/): statistics and gradient in one read of the logits, on NVIDIA GPUs.

It serves where a row's coefficient depends on no other row: on-policy losses, and losses with a ratio per token (GRPO,
PPO). All else is Triton's, which is bound by memory there as well.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import cpu_rows, triton_rows
from .triton_rows import backward, forward, scale
from .types import KERNEL_DTYPES, Rows, RowStats, TokenClip, Upstream, address, empty_stats

__all__ = [
    "about", "backward", "clips_rows", "forward", "forward_backward", "missing", "name", "runs_stage_in_triton", "scale",
    "unsupported_reasons",
]  # fmt: skip

try:
    _native: ModuleType | None = importlib.import_module("gspo_kernels._native")
except ImportError:
    _native = None

name = "cuda"
runs_stage_in_triton = True
clips_rows = True

# GPUs on which `make gpu` found it ahead of Triton in every one-read case: there it runs unasked. The results are in
# benchmarks/results/, and a test holds the two together.
FASTER_ON: frozenset[str] = frozenset({"NVIDIA H100 80GB HBM3", "NVIDIA H200"})


def unsupported_reasons(logits: Tensor) -> list[str]:
    if not _built():
        if cpu_rows.missing():
            return ["the CUDA kernels are part of the C++ extension, which is missing: see native"]
        return ["the CUDA kernels were not built; reinstall with nvcc on PATH (GSPO_KERNELS_CUDA=1 tells what fails)"]
    if not _serves(logits.device):
        return [f"logits are on {logits.device}, these kernels run on NVIDIA GPUs"]
    reasons = triton_rows.unsupported_reasons(logits)
    return [missing(logits.device), *reasons] if missing(logits.device) else reasons


def about() -> str:
    return f"CUDA C++, {_native.cuda_release()}" if _native is not None and _built() else "CUDA C++, not built"


@torch.compiler.assume_constant_result
def missing(device: torch.device) -> str:
    """Why kernels that were built cannot run on a GPU; empty if they can."""
    return _missing(device.index or 0) if _built() and _serves(device) else ""


def not_preferred(logits: Tensor) -> str:
    """Why it does not run unless it is named; empty if it does."""
    unmeasured: str = _unmeasured(logits.device)
    if unmeasured or torch.compiler.is_compiling() or _aligned(logits):  # compiled losses do not take one pass
        return unmeasured
    return (
        "could run; not all rows begin on 16-byte boundaries, where alone a row has the same bits in every batch; by "
        "Triton it always has (backend='cuda' runs it)"
    )


def forward_backward(rows: Rows, upstream: Upstream, gradient: Tensor, clip: TokenClip | None = None) -> RowStats:
    if gradient.dtype != rows.logits.dtype:
        assert clip is None
        return triton_rows.forward_backward(rows, upstream, gradient)
    stats, counts = empty_stats(rows.logits), upstream.counts
    assert _native is not None and upstream.logprobs is not None
    tickets = upstream.tickets
    if tickets is None or tickets.numel() == 0:  # a batch of no sequences has none to spare
        tickets = torch.zeros(1, dtype=torch.int32, device=rows.logits.device)
    per_row = rows.temperature.ndim > 0
    with triton_rows.on_device(rows.logits):
        _native.cuda_one_read(
            dtype=KERNEL_DTYPES[rows.logits.dtype],
            logits=_view(rows.logits),
            outer=rows.token_ids.shape[0],
            inner=rows.token_ids.shape[1],
            vocab=rows.logits.shape[2],
            token_ids=rows.token_ids.data_ptr(),
            mask=address(rows.mask),
            temperature=1.0 if per_row else float(rows.temperature),
            row_temperature=address(rows.temperature if per_row else None),
            logprobs=stats.logprobs.data_ptr(),
            entropy=stats.entropy.data_ptr(),
            lse=stats.lse.data_ptr(),
            grad_logprobs=upstream.logprobs.data_ptr(),
            factor=address(upstream.factor),
            counts=address(counts),
            count_size=0 if counts is None else counts.numel(),
            clip=_clip(clip),
            gradient=_view(gradient),
            tickets=tickets.data_ptr(),
            device=rows.logits.device.index or 0,
            stream=torch.cuda.current_stream(rows.logits.device).cuda_stream if rows.logits.is_cuda else 0,
        )
    return stats


def _clip(clip: TokenClip | None) -> object:
    assert _native is not None
    if clip is None:
        return _native.TokenClip()
    return _native.TokenClip(
        old_logprobs=clip.old_logprobs.data_ptr(),
        advantages=clip.advantages.data_ptr(),
        eps_low=clip.eps_low,
        eps_high=clip.eps_high,
        dual_clip=clip.dual_clip,
        max_log_ratio=clip.max_log_ratio,
    )


def _view(numbers: Tensor) -> object:
    assert _native is not None
    return _native.View(numbers.data_ptr(), *numbers.stride()[:2])


def _built() -> bool:
    return hasattr(_native, "cuda_one_read")


@torch.compiler.assume_constant_result
def _unmeasured(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's threads"
    if gpu in FASTER_ON:
        return ""
    return f"could run; not measured to be faster than Triton on {gpu} (backend='cuda' runs it, `make gpu` compares)"


def _aligned(logits: Tensor) -> bool:
    """Whether rows begin on 16-byte boundaries, whatever their number: a batch of one row is like all others."""
    places = (logits.storage_offset(), *logits.stride()[:-1])
    return all(place * logits.element_size() % 16 == 0 for place in places)


def _serves(device: torch.device) -> bool:
    """GPUs; this machine, where tests have the kernels run as threads of it (tests/support/gpu_on_host)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia or hasattr(_native, "latest_launch")


@functools.cache
def _missing(device: int) -> str:
    assert _native is not None
    with (
        torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()
    ):  # asking makes it current
        found: str = _native.cuda_missing(device)
    return found
