"""Refusals of what autograd cannot do with these functions: second derivatives, forward mode, a second backward.

Kernels write the first derivative, and autograd cannot see into them. Each function here raises where a derivative
would otherwise be dropped silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .torch_internals import forward_mode_is_on, transforms_are_active, transforms_of

_PLAIN = "policy_loss_from_logprobs, of log-probabilities made by torch's own operators, supports it"


def refuse_forward_mode(function: str, reverse: bool = True, instead: str = _PLAIN, **arguments: Any) -> None:
    """Raises if an argument carries a tangent or, with `reverse`, is being differentiated by `torch.func.grad`.

    `instead` says which function supports it.

    torch.func.grad needs autograd functions of another form than the operators of this package have.
    """
    if torch.compiler.is_compiling():
        if forward_mode_is_on():  # a compiler sees no tangents
            raise RuntimeError(
                f"{function}: forward-mode AD is not supported under torch.compile. Call it outside of dual_level, or "
                "use reverse mode"
            )
        return
    transforms = transforms_are_active()
    if not transforms and not forward_mode_is_on():
        return
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        found = transforms_of(value) if transforms else set()
        if "Grad" in found and reverse:
            raise RuntimeError(
                f"{function}: torch.func.grad is not supported; {name} is being differentiated by it (or by vjp, "
                f"jacrev, hessian). Use backward() or torch.autograd.grad. {instead}"
            )
        if "Jvp" in found or (forward_mode_is_on() and forward_ad.unpack_dual(value).tangent is not None):
            raise RuntimeError(
                f"{function}: forward-mode AD is not supported, and {name} has a tangent, which would be lost. Use "
                f"reverse mode (backward, torch.autograd.grad), or detach {name}. {instead} in padded layout"
            )


def beyond_reverse_mode() -> bool:
    """Whether a torch.func transform or forward-mode AD is active; under torch.compile neither is supported."""
    if torch.compiler.is_compiling():
        return False
    return transforms_are_active() or forward_mode_is_on()


def refuse_vmap(function: str, **arguments: Any) -> None:
    """For operators that compute a gradient where requires_grad is True: of a batched tensor it is False."""
    if torch.compiler.is_compiling() or not transforms_are_active():
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and "Vmap" in transforms_of(value):
            raise RuntimeError(
                f"{function}: torch.func.vmap is not supported, and {name} is batched by it: its gradient would be "
                "lost. Add the batched dimension to the sequences, or loop over it"
            )


def refuse_second_backward(ctx: Any, function: str) -> None:
    """For a backward that overwrites its saved tensors. Under saved-tensor hooks version counters do not catch that."""
    if getattr(ctx, "backward_has_run", False):
        raise RuntimeError(
            f"{function}: supports one backward pass, which hands over its gradient buffer; a second one was tried "
            "(retain_graph=True). Compute the loss again, or add losses up and call backward once"
        )
    ctx.backward_has_run = True


def edge_of(operand: Tensor) -> Tensor:
    """An empty scalar that connects `first_derivative` to the operand's graph, without keeping its memory alive."""
    with torch.enable_grad():
        edge: Tensor = _Edge.apply(operand)
    return edge


def first_derivative(gradient: Tensor, function: str, *connected: Tensor | None, instead: str = _PLAIN) -> Tensor:
    """`gradient`, which raises when differentiated again with respect to the `connected` tensors."""
    if not torch.is_grad_enabled() or all(x is None or not x.requires_grad for x in connected):
        return gradient
    found: Tensor = _FirstDerivative.apply([gradient], function, instead, *connected)
    return found


class _Edge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operand: Tensor) -> Tensor:
        return torch.empty((), device=operand.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise AssertionError("an edge is connected to `_FirstDerivative` alone, which raises")


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: list[Tensor], function: str, instead: str, *connected: Tensor | None) -> Tensor:
        ctx.function, ctx.instead = function, instead
        return gradient[0]  # in a list it is no input, so the output need not be a view

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.function}: a second derivative is not supported; the gradient of a gradient (create_graph=True) was "
            f"tried. {ctx.instead} in reverse mode"
        )
