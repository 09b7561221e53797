"""Checks of a caller's arguments. An error names the argument, what was expected and what came.

Most checks read no tensor's values, so none waits for a device. Values (token ids, `cu_seqlens`, temperatures,
log-probabilities) are read where that is free: on the CPU, outside of traced code.
"""

from __future__ import annotations

import math
import numbers as abstract
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .torch_internals import is_traced, transforms_are_active

OPERANDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # logits, hidden states, head and bias
FLOATS = (torch.float32, torch.float64)  # all other real numbers
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)
HIGHEST_LOGPROB = 1e-3  # a probability of 1 may be rounded up; a larger number is no log-probability


def describe(value: Any) -> str:
    """A value in a few words, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # numpy's
        if value.shape == ():
            return f"{type(value).__name__} {value.item()!r}"
        return f"{type(value).__name__} of shape {list(value.shape)}, {value.dtype}"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def is_dtensor(value: Any) -> bool:
    return type(value).__name__ == "DTensor"  # by name: the module is heavy to import


def tensor(name: str, value: Any, meaning: str, *, sharded: bool = False) -> Tensor:
    """A plain, dense tensor; with `sharded`, a DTensor too."""
    if not isinstance(value, Tensor):
        remedy = "; torch.as_tensor makes one of it" if isinstance(value, list) or hasattr(value, "__array__") else ""
        for attribute in ("logits", "weight", name):  # what a model returns, an LM head, and an output of this package
            if isinstance(getattr(value, attribute, None), Tensor):
                remedy = f"; pass its {attribute}"
        raise TypeError(f"{name}: expected {meaning}, a torch.Tensor; got {describe(value)}{remedy}")
    if is_dtensor(value) and not sharded:
        raise TypeError(
            f"{name}: expected {meaning}, a plain tensor; got a DTensor, of which this rank holds a part. Pass its "
            "full_tensor(), or its to_local() where that is what belongs to this rank's rows"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        remedy = "its values() as a packed batch, with cu_seqlens" if value.is_nested else "its to_dense()"
        raise TypeError(f"{name}: expected {meaning}, a dense tensor; got a {kind} one. Pass {remedy}")
    return value


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device}, where the other arguments are; got one on {value.device}"
        )


def shape(name: str, value: Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({meaning}); got {list(value.shape)}")


def operand(name: str, value: Tensor, meaning: str) -> None:
    """Refuses the dtypes that logits, hidden states and heads cannot have."""
    if value.dtype not in OPERANDS:
        remedy = ". Dequantize them first" if value.is_floating_point() else ""
        raise TypeError(
            f"{name}: expected {meaning} in bfloat16, float16, float32 or float64; got {value.dtype}{remedy}"
        )


def numbers(name: str, value: Tensor) -> None:
    """Refuses dtypes other than float32, float64 and integers."""
    if value.dtype not in FLOATS and value.dtype not in INTEGERS:
        cast = ". Where rounding does not matter, pass their float()" if value.is_floating_point() else ""
        raise TypeError(f"{name}: expected float32, float64 or an integer dtype; got {_why(value)}{cast}")


def floats(name: str, value: Tensor) -> None:
    """Refuses dtypes other than float32 and float64."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32 or float64; got {_why(value)}")


def digits(name: str, value: Tensor) -> None:
    """`floats` for log-probabilities, whose differences are ratios."""
    if value.dtype not in FLOATS:
        reason = "because near 1 a step of bfloat16 is twenty times GSPO's clip range"
        raise TypeError(f"{name}: expected float32 or float64, {reason}; got {_why(value)}")


def _why(value: Tensor) -> str:
    """A dtype that is refused, why, and what to do."""
    if value.dtype == torch.bool:
        return f"{value.dtype}. Where 0 and 1 are meant, pass its float()"
    if value.dtype.is_floating_point:
        return (
            f"{value.dtype}. A cast does not restore the digits: do not round them in the first place. FSDP2 rounds "
            "what passes through a module, unless it has MixedPrecisionPolicy(cast_forward_inputs=False)"
        )
    return str(value.dtype)


def values_of_tokens(name: str, value: Any) -> None:
    """Refuses what is no padded or packed array of a value model's outputs."""
    floats(name, tensor(name, value, "the value model's outputs per token"))
    if value.ndim not in (1, 2):
        remedy = f". Pass {name}[..., 0]" if value.ndim and value.shape[-1] == 1 else ""
        raise ValueError(f"{name}: expected [sequences, tokens] or, packed, [tokens]; got {list(value.shape)}{remedy}")


def log_probabilities(name: str, value: Tensor, mask: Tensor | None) -> None:
    """Refuses positive ones where the mask is set, if values may be read; NaN and -inf pass. Shapes must agree."""
    if not may_read(value) or watched(value):
        return
    bad = value > HIGHEST_LOGPROB
    if not bool(bad.any()):
        return
    if mask is not None:
        bad = bad & mask
    if bool(bad.any()):
        found = value.detach()[bad]
        raise ValueError(
            f"{name}: expected log-probabilities, at most 0 where the mask is set; got {found.numel()} above, the "
            f"first {float(found[0]):g}. Got probabilities or negative log-likelihoods?"
        )


def integers(name: str, value: Tensor, meaning: str) -> None:
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected {meaning} in an integer dtype; got {value.dtype}")


def number(
    name: str,
    value: Any,
    meaning: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    or_infinite: bool = False,
) -> float:
    """Returns Python's own number, also for one of numpy."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        if isinstance(value, (bool, Tensor)) or not isinstance(value, abstract.Real):
            raise TypeError(f"{name}: expected {meaning}, a number; got {describe(value)}")
        value = float(value)
    if isinstance(value, int) and abs(value) > 2**1023:
        raise ValueError(
            f"{name}: expected {meaning}, a number that a float can hold; got an int of {value.bit_length()} bits"
        )
    finite = -math.inf < value < math.inf or (or_infinite and value == math.inf)
    if not (value > above and value >= at_least and value <= at_most and finite):
        bound = (
            f" above {above:g}" if above > -math.inf else f" of at least {at_least:g}" if at_least > -math.inf else ""
        )
        bound += f" and at most {at_most:g}" if at_most < math.inf else ""
        kind = "a number" if or_infinite else "a finite number"
        bound += ", or infinity" if or_infinite else ""
        raise ValueError(f"{name}: expected {meaning}, {kind}{bound}; got {value}")
    return value if type(value) in (int, float) else float(value)


def whole(name: str, value: Any, meaning: str, *, at_least: float = -math.inf) -> int:
    """Returns Python's own int, also for one of numpy."""
    try:
        if isinstance(value, (bool, Tensor)):
            raise TypeError
        found = value if type(value) is int else int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name}: expected {meaning}, a whole number; got {describe(value)}") from None
    if found < at_least:
        raise ValueError(f"{name}: expected {meaning}, at least {at_least:g}; got {found}")
    if found >= 2**63:
        raise ValueError(f"{name}: expected {meaning}, less than 2**63; got an int of {found.bit_length()} bits")
    return found


def flag(name: str, value: Any, meaning: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, {meaning}; got {describe(value)}")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        shown = repr(value) if isinstance(value, str) else describe(value)
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}; got {shown}")


def overlaps(value: Tensor) -> bool:
    """Whether two of its elements may share memory, by sizes and strides alone.

    In the order of strides, each stride must step over the span of the dimensions before it. That refuses a few
    harmless views of interleaved dimensions, and none that is sliced, transposed or permuted.
    """
    span = 0  # from the first element to the last, over the dimensions so far
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return value.numel() > 0
            span += (size - 1) * stride
    return False


def may_read(tensor: Tensor) -> bool:
    """Whether a check may read values: on the CPU, and on a GPU, which it waits for, under GSPO_KERNELS_DEBUG=1."""
    return tensor.device.type == "cpu" or os.environ.get("GSPO_KERNELS_DEBUG", "0") not in ("", "0")


def watched(tensor: Tensor) -> bool:
    """Whether a compiler, a transform or a fake tensor traces the work on it: no branch may depend on a value then."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or transforms_are_active()
        or is_traced()
    )
