"""A Triton kernel of the tests: imported only where Triton runs."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gspo_kernels.rows.triton_math import float64_bits


@triton.jit
def store_float64_bits(hi, lo, out):
    tl.store(out, float64_bits(tl.load(hi), tl.load(lo)))
