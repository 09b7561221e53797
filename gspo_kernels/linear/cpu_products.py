"""Which products multiply on a CPU, and those of the C++ extension.

bf16 operands are multiplied by the processor's units for them, with sums in float32: by MKL on AMX, or by the extension
on AVX512-BF16. Everything else is multiplied as float32. MKL is fast for that on Intel's processors; on those of other
vendors the extension is, and it converts bf16 and fp16 in registers. GSPO_KERNELS_CPU_PRODUCTS selects one of these.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.torch_internals import mkl_gemm
from ..rows import cpu_rows

if not cpu_rows.unavailable_reason():
    import gspo_kernels._native as _native

VARIABLE = "GSPO_KERNELS_CPU_PRODUCTS"
_NAMES = ("mkl", "native", "float32")
_UNITS = "avx512bf16"  # the extension's instruction set whose products of bf16 are fast
# Of the extension's products.
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class CpuProducts(NamedTuple):
    name: str  # "mkl", "native", or "float32": in float32, float64 operands in float64
    reason: str  # for `explain`


def cpu_products(dtype: torch.dtype) -> CpuProducts:
    """Which products multiply operands of this dtype on this CPU. Raises ValueError if the requested ones cannot."""
    requested = os.environ.get(VARIABLE, "")
    _check(requested)
    because = f"{VARIABLE}={requested}"
    if dtype == torch.float64:
        return CpuProducts("float32", "torch multiplies float64")
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "float32")
    if dtype == torch.bfloat16:
        if requested == "mkl" or (not requested and has_amx() and mkl_gemm() is not None):
            return CpuProducts("mkl", f"MKL multiplies bf16 with float32 sums ({because if requested else 'AMX'})")
        if not requested and has_avx512_bf16() and native_is_right(dtype):
            return CpuProducts("native", "the C++ extension multiplies bf16 with float32 sums (AVX512-BF16)")
    if requested == "native" or (not requested and beats_mkl() and native_is_right(dtype)):
        how = "" if dtype == torch.float32 else " as float32" if left_dtype(dtype) != dtype else " with float32 sums"
        why = because if requested else "this processor is not Intel's"
        return CpuProducts("native", f"the C++ extension multiplies {name}{how} ({why})")
    if dtype == torch.float32:
        return CpuProducts("float32", "torch multiplies float32")
    missing = because if requested else f"there is no faster product of {name} on this processor"
    return CpuProducts("float32", f"{name} operands are converted to float32 ({missing})")


def _check(requested: str) -> None:
    if requested not in ("", *_NAMES):
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(_NAMES)}; got {requested!r}")
    if requested == "mkl" and mkl_gemm() is None:
        raise ValueError(
            f"{VARIABLE}: expected native or float32, because this torch has no bf16 product of MKL; got 'mkl'"
        )
    if requested == "native" and (missing := cpu_rows.unavailable_reason()):
        raise ValueError(f"{VARIABLE}: expected mkl or float32, because {missing}; got 'native'")


def has_amx() -> bool:
    """Whether this processor has tile units for bf16."""
    return not cpu_rows.unavailable_reason() and bool(_native.has_amx_bfloat16())


def has_avx512_bf16() -> bool:
    """Whether this processor, and the compiler of the extension, have instructions for products of bf16."""
    return not cpu_rows.unavailable_reason() and product_instructions() == _UNITS


def product_instructions() -> str:
    """The instruction set of the extension's products."""
    name: str = _native.product_instructions()
    return name


def beats_mkl() -> bool:
    """Whether the extension multiplies float32 faster than MKL, which runs slower code on others' processors."""
    return not cpu_rows.unavailable_reason() and not _native.is_intel() and product_instructions() != "baseline"


def left_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the left operand in a product of the extension whose right operand has this dtype."""
    return dtype if dtype == torch.bfloat16 and _native.multiplies_bfloat16() else torch.float32


def multiply(
    a: Tensor, b: Tensor, out: Tensor, add: bool = False, factor: float = 1.0, bias: Tensor | None = None
) -> None:
    """`out` = a b times a factor, added to `out` if `add`, or to a float32 bias [columns]. All three may be strided.

    `a` has the dtype `left_dtype(b.dtype)`.
    """
    assert a.dtype == left_dtype(b.dtype)
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    if not a.numel() or not b.numel():
        if not add:
            out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return
    assert out.stride(1) == 1 or out.shape[1] == 1
    _native.multiply(
        dtype=_DTYPES[b.dtype],
        rows=a.shape[0],
        columns=b.shape[1],
        depth=a.shape[1],
        left=a.data_ptr(),
        left_row_stride=a.stride(0),
        left_depth_stride=a.stride(1),
        right=b.data_ptr(),
        right_depth_stride=b.stride(0),
        right_column_stride=b.stride(1),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        bias=0 if bias is None else bias.data_ptr(),
        add=add,
        factor=factor,
        threads=torch.get_num_threads(),
    )


def workspace_bytes(rows: int, columns: int, depth: int, dtype: torch.dtype) -> int:
    """Memory that a product of the extension [rows, depth] x [depth, columns] takes: csrc/cpu/products.cpp packs the
    operand with fewer lines, in words of 4 bytes, up to 16 MB at a time. A thread's 256 KB are left out.

    Args:
        dtype: of the left operand.
    """
    lines, words = min(rows, columns), -(-depth * dtype.itemsize // 4)
    if not lines or not words:
        return 0
    block = -(-words // -(-words // 512))
    return 4 * lines * min(words, max(1, (4 << 20) // (lines * block)) * block)


@functools.cache
def native_is_right(dtype: torch.dtype) -> bool:
    """Multiplies small integers, of which every sum is exact."""
    on_cpu = functools.partial(torch.arange, dtype=torch.float32, device="cpu")  # whatever the defaults are
    a, b = (on_cpu(n * 5).view(n, 5).remainder(13) for n in (7, 67))
    out, transposed = (a @ b.t(), a.t() @ a)
    found, other = (torch.full_like(x, -1.0) for x in (out, transposed))
    left, a, b = a.to(left_dtype(dtype)), a.to(dtype), b.to(dtype)
    multiply(left, b.t(), found)
    multiply(left.t(), a, other)
    multiply(left.t(), a, other, add=True, factor=2.0)
    return torch.equal(found, out) and torch.equal(other, 3 * transposed)
