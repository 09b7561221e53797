"""One tolerance table for the whole suite, by the dtype of the logits.

Whatever the logits are, the statistics and coefficients are fp32 or better: bf16 and fp16 differ from fp32 only in how
the gradient is stored. Every bound is relative to the size of the thing itself; `checks.py` says to which size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    number: float  # relative error of a statistic, a ratio, a coefficient
    argument: float  # what a rounded argument x adds to the relative error of exp(x), per unit of |x|
    store: float  # half a unit in the last place of a stored gradient
    tiny: float  # below this a stored gradient may be flushed to zero (or, in fp16, is a subnormal)


TOLERANCES = {
    torch.float64: Tolerance(number=1e-12, argument=2**-51, store=2**-53, tiny=2.0**-126),
    torch.float32: Tolerance(number=1e-6, argument=2**-23, store=2**-24, tiny=2.0**-126),
    torch.bfloat16: Tolerance(number=1e-6, argument=2**-23, store=2**-8, tiny=2.0**-126),
    torch.float16: Tolerance(number=1e-6, argument=2**-23, store=2**-11, tiny=2.0**-25 * 1.01),
}

# What a gradient may lose to the subtraction z - lse, relative to lse, where log p and H themselves are near 0: the
# C++ kernels take it in float64; the Triton kernels in float32, whose error times the error of that error it is.
LSE_DIGITS = {"native": 1e-15, "triton": 2.0**-46}
