"""Launches the Triton row kernels: fp32, bf16 and fp16 logits on a GPU, or on the CPU in Triton's interpreter.

Triton is imported by the first launch, so that a machine without a GPU does not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.torch_internals import constant_while_compiling
from . import types
from .types import Rows, RowStats, TokenSlope, Upstream, empty_stats

name = "triton"
honours: frozenset[str] = frozenset({"row_indices", "tanh_scale", "kept"})
has_kernels = True
runs_stage_in_triton = True
computes_slopes = False

_LOG2_E = 1.0 / math.log(2.0)
_EXACT_FROM = 2.0**29  # nats; from here on the kernels' lse is that of the exact temperature
_OLDEST = (3, 4)  # Triton 3.3 compiles `scale` alone: it knows no width of a dtype in a condition
_NOTHING = contextlib.nullcontext()


class Launch(NamedTuple):
    """How a kernel is compiled: blocks of `elements` columns, summed or written by `num_warps` warps."""

    num_warps: int
    elements: int
    # For 16-bit logits only; the first two for forward_backward only.
    prefetch: int = 0  # blocks brought to the L2 cache ahead of the first read, on NVIDIA
    kept: int = 0  # blocks that stay in registers and are not read again; 0 or a power of two
    max_registers: int | None = None  # per thread, on NVIDIA; None: the compiler decides


class NanSource(NamedTuple):
    """Which rows make the loss NaN. A gradient that was written before the loss was known is then set to NaN there."""

    loss: Tensor | None  # 0-d; None: no row is set to NaN
    numbers: Tensor | None  # fp32, one per row: NaN where the row makes the loss NaN
    mask: Tensor | None  # uint8
    cu_seqlens: Tensor | None
    whole_sequences: bool  # NaN of a row propagates to all rows of its sequence


# 2026-11-26, an H200, Triton 3.6.0: whole losses at 8,192 rows of 151,936 bf16 logits. forward 0.588 ms (0.596 without
# a limit of registers), backward 1.839 ms (1.856), forward_backward 1.530 ms over the logits and 1.586 ms into a fresh
# gradient: 1.603 and 1.652 with nothing kept, 1.584 over the logits with one block kept, 1.574 or more with blocks of
# 8,192. Its second read should hit the L2 cache: with 16 warps a multiprocessor has one row at a time.
LAUNCH = {
    "forward": Launch(num_warps=4, elements=4096, max_registers=96),
    "backward": Launch(num_warps=4, elements=4096, max_registers=128),
    "forward_backward": Launch(num_warps=16, elements=16384, prefetch=2, kept=2),
    "scale": Launch(num_warps=4, elements=4096),
    # One warp a row: most rows have a few entries, and every warp would repeat the row's scalars. A gradient is written
    # as `backward` writes zeros.
    "kept_forward": Launch(num_warps=1, elements=512),
    "kept_backward": Launch(num_warps=4, elements=4096),
    "kept_forward_backward": Launch(num_warps=4, elements=4096),
}
MOST_ENTRIES = 512  # of a row, summed at a time
MOST_SCALE_PROGRAMS = 1024  # usually the factor is 1, and most of the time is spent on starting programs
# Small blocks, so that short rows, which are cheap, have several of them.
INTERPRETED_LAUNCH = Launch(num_warps=1, elements=256, kept=2)


# Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unsupported_reasons(logits: Tensor) -> list[str]:
    reasons = []
    if reason := unavailable_reason():
        reasons.append(reason)
    if logits.device.type == "cpu" and not INTERPRETED:
        reasons.append("logits are on the CPU, these kernels run on a GPU (or under TRITON_INTERPRET=1)")
    elif logits.device.type not in ("cpu", "cuda"):
        reasons.append(f"logits are on {logits.device}, these kernels run on NVIDIA and AMD GPUs")
    elif logits.device.type == "cuda" and _too_old(logits.device):
        reasons.append("this GPU is too old: these kernels need compute capability 8.0")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"logits are {logits.dtype}, these kernels take float32, bfloat16 and float16")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        reasons.append(f"the vocabulary dimension has stride {logits.stride(-1)}, these kernels need 1")
    return reasons


def reason_not_default(logits: Tensor) -> str:
    return ""


def describe() -> str:
    if _VERSION is None:
        return "Triton, not installed"
    return f"Triton {_VERSION}, interpreted" if INTERPRETED else f"Triton {_VERSION}"


def unavailable_reason() -> str:
    """Why Triton cannot be used on any logits; empty if it can."""
    if _VERSION is None:
        return "Triton is not installed; torch for CUDA or ROCm brings it"
    if tuple(map(int, _VERSION.split(".", 2)[:2])) < _OLDEST:
        return f"Triton is {_VERSION}, these kernels need 3.4 or newer: install torch 2.8 or newer, which brings it"
    return ""


def version() -> str | None:
    """Of the Triton that is installed; None if none is."""
    return _VERSION


def _version() -> str | None:
    for package in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package).split("+")[0]
    return None


_VERSION = _version()


@constant_while_compiling
def _too_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def forward(rows: Rows) -> RowStats:
    stats = empty_stats(rows)
    _launch_rows("forward", rows, rows.logits, _of_stats(stats))
    return stats


def backward(rows: Rows, stats: RowStats, upstream: Upstream, gradient: Tensor) -> None:
    arguments = {
        **_of_stats(stats),
        **_of_logprobs(upstream),
        "g_entropies": upstream.entropy,
        "g_lses": None if upstream.lse is None else upstream.lse.float(),
        "factor": upstream.factor,
        **_of_gradient(gradient),
    }
    _launch_rows("backward", rows, gradient, arguments)


def forward_backward(rows: Rows, upstream: Upstream, gradient: Tensor, slope: TokenSlope | None = None) -> RowStats:
    assert slope is None
    stats = empty_stats(rows)
    arguments = {**_of_stats(stats), **_of_logprobs(upstream), **_of_gradient(gradient)}
    _launch_rows("forward_backward", rows, rows.logits, arguments)
    return stats


def _launch_rows(kernel: str, rows: Rows, aligned: Tensor, arguments: dict[str, Any]) -> None:
    """One program a row: rows with all columns, then rows with entries. Each launch leaves the others' rows alone."""
    arguments |= _of_rows(rows)
    programs, form = rows.token_ids.numel(), rows.kept_form
    if form in (None, "some"):
        placed = {"row_indices": rows.row_indices} if kernel == "backward" else {}
        _launch(kernel, programs, aligned, {**arguments, **placed})
    if rows.kept_ids is not None:
        arguments["kept_ids"] = rows.kept_ids
        if "gradient" in arguments:
            gradient, size = arguments["gradient"], rows.kept_ids.shape
            arguments["by_entry"] = gradient if form == "gathered" else gradient.new_empty(size)
        _launch(f"kept_{kernel}", programs, aligned, arguments, form)


def scale(values: Tensor, factor: Tensor, nan_source: NanSource | None = None) -> None:
    outer, inner, columns = values.shape
    outer_stride, inner_stride, _ = values.stride()
    rows, source = outer * inner, nan_source or NanSource(None, None, None, None, False)
    arguments = {
        "values": values,
        "outer_stride": outer_stride,
        "inner_stride": inner_stride,
        "inner": inner,
        "vocab": columns,
        "rows": rows,
        "factor": factor,
        "loss": source.loss,
        "numbers": source.numbers,
        "mask": source.mask,
        "cu_seqlens": source.cu_seqlens,
        "sequences": 0 if source.cu_seqlens is None else source.cu_seqlens.shape[0] - 1,
        "WHOLE": source.whole_sequences,
    }
    _launch("scale", min(rows, MOST_SCALE_PROGRAMS), values, arguments)


def scaled_logits(rows: Rows, logits: Tensor) -> Tensor:
    """The kernels' lse is that of a rounded scale, but for large logits."""
    exact = types.scaled_logits(rows, logits)
    rounded_scale = (_LOG2_E / rows.temperature.double()).float().double() * math.log(2.0)
    return torch.where(exact.abs() < _EXACT_FROM, types.capped(rows, logits) * rounded_scale, exact)


def compiled_variants() -> int:
    """How many row kernels this process has compiled so far."""
    return count_variants(kernels().values())


def count_variants(kernels: Iterable[Any]) -> int:
    return sum(len(cache[0]) for kernel in kernels for cache in getattr(kernel, "device_caches", {}).values())


# ---- values as arguments of the kernels


def _of_rows(rows: Rows) -> dict[str, Any]:
    per_row = rows.temperature.ndim > 0
    outer_stride, inner_stride, _ = rows.logits.stride()
    # Reading a CPU tensor waits for nothing.
    scale, scale_error = _scale(1.0 if per_row else float(rows.temperature))
    tanh_hi, tanh_lo = (None, None) if rows.tanh_scale is None else _exponents(float(rows.tanh_scale))
    return {
        "logits": rows.logits,
        "outer_stride": outer_stride,
        "inner_stride": inner_stride,
        "inner": rows.token_ids.shape[1],
        "vocab": rows.vocab_size,
        "token_ids": rows.token_ids,
        "mask": None if rows.mask is None else rows.mask.view(torch.uint8),
        "temperature": rows.temperature if per_row else None,
        "scale": scale,
        "scale_error": scale_error,
        "tanh_hi": tanh_hi,
        "tanh_lo": tanh_lo,
        "kept_offsets": rows.kept_offsets,
        "entries": 0 if rows.kept_ids is None else rows.kept_ids.shape[0],
    }


def _of_stats(stats: RowStats) -> dict[str, Tensor]:
    return {"logprobs": stats.logprobs, "entropies": stats.entropy, "lses": stats.lse.view(torch.int64)}


def _of_logprobs(upstream: Upstream) -> dict[str, Any]:
    """The part of the upstream gradient that every kernel takes."""
    counts = upstream.counts
    size = 0 if counts is None else counts.numel()
    return {"g_logprobs": upstream.logprobs, "counts": counts, "counts_size": size}


def _of_gradient(gradient: Tensor) -> dict[str, Any]:
    outer_stride, inner_stride, _ = gradient.stride()
    return {"gradient": gradient, "gradient_outer_stride": outer_stride, "gradient_inner_stride": inner_stride}


@functools.lru_cache(maxsize=64)
def _scale(temperature: float) -> tuple[float, float]:
    """log2(e) / temperature rounded to float32, and its relative rounding error."""
    scale = _LOG2_E / temperature
    rounded: float = struct.unpack("f", struct.pack("f", scale))[0]
    return rounded, (scale - rounded) / scale


@functools.lru_cache(maxsize=64)
def _exponents(tanh_scale: float) -> tuple[float, float]:
    """2 tanh_scale log2(e) as a pair of float32."""
    exponent = 2.0 * tanh_scale * _LOG2_E
    rounded: float = struct.unpack("f", struct.pack("f", exponent))[0]
    return rounded, exponent - rounded


def sizes(kernel: str, layout: Launch, element_size: int, warp_size: int) -> dict[str, int]:
    """A kernel's compile-time arguments: 16 bytes per access, one lane per thread."""
    width = 16 // element_size
    if kernel == "scale":
        return {"BLOCK": layout.elements, "WIDTH": width}
    lanes = warp_size * layout.num_warps
    if kernel.startswith("kept"):
        of_sums = {} if kernel == "kept_backward" else {"REPEAT": max(1, min(layout.elements, MOST_ENTRIES) // lanes)}
        of_writes = {} if kernel == "kept_forward" else {"BLOCK": layout.elements, "WIDTH": width}
        return {"LANES": lanes, **of_sums, **of_writes}
    repeat = max(1, layout.elements // (lanes * width))
    found = {"REPEAT": repeat, "LANES": lanes, "WIDTH": width}
    if kernel == "forward_backward":
        narrow = element_size == 2
        found |= {"PREFETCH": layout.prefetch if narrow else 0, "KEPT": layout.kept if narrow else 0}
    return found


def for_cap(layout: Launch) -> Launch:
    """The launch of rows with a cap. Arithmetic bounds their time, so registers are worth more than a second read.

    Blocks of more than 8192 columns would spill registers on AMD.
    """
    return layout._replace(kept=0, elements=min(layout.elements, 8192))


def for_form(layout: Launch, form: str | None) -> Launch:
    """Gathered, no row is written: entries alone are work for one warp."""
    return layout._replace(num_warps=1) if form == "gathered" else layout


def compiler_options(layout: Launch, element_size: int, nvidia: bool) -> dict[str, Any]:
    """Options of Triton's compiler. Seven instructions per column need multiply and add to be fused."""
    limited = layout.max_registers is not None and element_size == 2 and nvidia
    registers = {"maxnreg": layout.max_registers} if limited else {}
    return {"num_warps": layout.num_warps, "enable_fp_fusion": True, **registers}


def _launch(kernel: str, programs: int, aligned: Tensor, arguments: dict[str, Any], form: str | None = None) -> None:
    """The kernel moves 16 bytes of `aligned` at a time."""
    if programs == 0:
        return
    layout = for_form(INTERPRETED_LAUNCH if INTERPRETED else LAUNCH[kernel], form)
    if arguments.get("tanh_hi") is not None:
        layout = for_cap(layout)
    constants, options = _compile_time(kernel, layout, aligned.element_size(), form)
    with on_device(aligned):
        kernels()[kernel][(programs,)](**arguments, **constants, **options)


@functools.cache
def _compile_time(
    kernel: str, layout: Launch, element_size: int, form: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A kernel's constants, and the options of the compiler."""
    nvidia = torch.version.hip is None
    constants: dict[str, Any] = sizes(kernel, layout, element_size, 32 if nvidia else 64)
    if kernel != "scale":
        constants["PTX"] = not INTERPRETED and nvidia
    if form is not None:
        constants["FORM"] = form
    return constants, compiler_options(layout, element_size, nvidia)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one: Triton launches there, and autograd's thread may be elsewhere."""
    device = tensor.device
    return torch.cuda.device(device.index) if device.type == "cuda" else _NOTHING


@functools.cache
def kernels() -> dict[str, Any]:
    """The row kernels by the names of `LAUNCH`. All launches look them up here."""
    from .triton_backward import backward_kernel
    from .triton_forward import forward_kernel
    from .triton_forward_backward import forward_backward_kernel
    from .triton_kept import kept_backward_kernel, kept_forward_backward_kernel, kept_forward_kernel
    from .triton_scale import scale_kernel

    return {
        "forward": forward_kernel,
        "backward": backward_kernel,
        "forward_backward": forward_backward_kernel,
        "scale": scale_kernel,
        "kept_forward": kept_forward_kernel,
        "kept_backward": kept_backward_kernel,
        "kept_forward_backward": kept_forward_backward_kernel,
    }
