"""Every use of torch's private interfaces, in one file: tests/project/test_torch_internals.py tries each of them.

torch may change these in any release. A release where one is gone fails that test with the name of what is missing.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

# ---- transforms, tracing and forward mode


def transforms_are_active() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap) is running."""
    return bool(torch._C._are_functorch_transforms_active())


def transforms_of(values: Tensor) -> set[str]:
    """By which transforms of torch.func these numbers are differentiated or batched: "Grad", "Jvp", "Vmap".

    The tangent of the innermost jvp is that of `forward_ad.unpack_dual`, and is not found here.
    """
    functorch = torch._C._functorch
    names = {each.level(): each.key().name for each in functorch.get_interpreter_stack() or []}
    found = set()
    while functorch.is_functorch_wrapped_tensor(values):
        name, inside = names.get(functorch.maybe_get_level(values), ""), functorch.get_unwrapped(values)
        constant = (name == "Grad" and not values.requires_grad) or (
            name == "Jvp" and forward_ad.unpack_dual(inside, level=0).tangent is None
        )
        if not constant:
            found.add(name)
        values = inside
    return found


def is_traced() -> bool:
    """Whether make_fx records operators, as torch.export and AOTAutograd do."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def forward_mode_is_on() -> bool:
    """Whether this code runs inside torch.autograd.forward_ad.dual_level."""
    return forward_ad._current_level >= 0


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_while_compiling(function: Function) -> Function:
    """Lets torch.compile call a function while it traces, and treat the result as a constant.

    `torch.compiler.assume_constant_result` sets the same attribute, but imports torch._dynamo first, which takes longer
    than this whole package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# ---- the dispatcher


@contextmanager
def autograd_inside_an_operator() -> Iterator[None]:
    """Lets autograd record what the body of a custom operator computes; operators run with autograd switched off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


# ---- process groups


def process_group(name: str) -> dist.ProcessGroup:
    """The group of this name. Operators take text, not groups."""
    found: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore
    return found


def device_types_of(group: dist.ProcessGroup) -> set[str]:
    """Where the group's collectives run: "cpu", "cuda"."""
    return {device.type for device in group._device_types}


# ---- MKL


class MklGemm:
    """out = factor a b (+ out) by MKL's `gemm_bf16bf16f32`, called as Fortran calls it: everything by reference."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
        self._function = library.GEMM_BF16BF16F32_64

    def __call__(self, a: Tensor, b: Tensor, out: Tensor, add: bool, factor: float = 1.0) -> None:
        # Fortran's matrices are the transposes of ours: out^T = b^T a^T.
        (left, left_width), (right, right_width) = self._layout(b), self._layout(a)
        integers = [ctypes.c_int64(x) for x in (out.shape[1], out.shape[0], a.shape[1])]
        strides = [ctypes.c_int64(x) for x in (left_width, right_width, max(out.stride(0), 1))]
        alpha, beta = ctypes.c_float(factor), ctypes.c_float(1.0 if add else 0.0)
        self._function(
            left, right, *(ctypes.byref(x) for x in integers), ctypes.byref(alpha),
            ctypes.c_void_p(b.data_ptr()), ctypes.byref(strides[0]),
            ctypes.c_void_p(a.data_ptr()), ctypes.byref(strides[1]), ctypes.byref(beta),
            ctypes.c_void_p(out.data_ptr()), ctypes.byref(strides[2]),
        )  # fmt: skip

    @staticmethod
    def _layout(matrix: Tensor) -> tuple[bytes, int]:
        """Whether it lies transposed, and how far its rows (or then columns) are apart."""
        if matrix.stride(1) == 1:
            return b"N", max(matrix.stride(0), matrix.shape[1], 1)
        assert matrix.stride(0) == 1
        return b"T", max(matrix.stride(1), matrix.shape[0], 1)


@functools.cache
def mkl_gemm() -> MklGemm | None:
    """None where torch contains no MKL, or where a first product is wrong. Slow on processors without bf16 units."""
    try:
        gemm = MklGemm()
    except (OSError, AttributeError):
        return None
    on_cpu = functools.partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever the defaults are
    a, b = (torch.arange(n, device="cpu").view(-1, 3).bfloat16() for n in (6, 12))
    b, both = b.t() - 5, on_cpu(2, 4).fill_(1)
    gemm(a, b, both, True)
    transposed = on_cpu(3, 3)
    gemm(a.t(), a, transposed, False)
    right = torch.equal(both, a.float() @ b.float() + 1) and torch.equal(transposed, a.float().t() @ a.float())
    return gemm if right else None
