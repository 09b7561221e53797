"""A reciprocal that is as inaccurate as that of an NVIDIA GPU may be, for kernels that run in Triton's interpreter."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def off_by_a_unit(x, PTX: tl.constexpr):
    """1 / x but for a unit in the last place, up or down by x's last bit."""
    unit = (x.to(tl.int32, bitcast=True) & 1) * 2 - 1
    return ((1.0 / x).to(tl.int32, bitcast=True) + unit).to(tl.float32, bitcast=True)
