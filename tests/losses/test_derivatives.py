"""What autograd cannot do here raises, and says so; what it can do is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from linear import chunk_of
from modes import NOT_INTERPRETED, on_device
from torch import Tensor
from torch.autograd import forward_ad, graph

from gspo_kernels import (
    GRPO,
    GSPO,
    GSPOToken,
    Objective,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    policy_loss_from_logprobs,
    token_logprobs,
)

B, T, V, D = 2, 3, 11, 5
Case = tuple[Callable[[Tensor], Tensor], Tensor]  # a function, and what it is a function of


def made(*shape: int, seed: int = 0) -> Tensor:
    return on_device(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


IDS = on_device(torch.arange(B * T).reshape(B, T))
ADVANTAGES, OLD = on_device(torch.tensor([1.0, -0.5])), -3.0 + 0.1 * made(B, T, seed=1)
HEAD = made(V, D, seed=4).requires_grad_()
BOUNDARIES = on_device(torch.tensor([0, 2, B * T]))


def logits() -> Tensor:
    return made(B, T, V, seed=2).requires_grad_()


def hidden() -> Tensor:
    return made(B, T, D, seed=3).requires_grad_()


def wide(objective: Objective = GSPO(5.0, 5.0)) -> dict[str, Any]:
    return {"objective": objective}  # in which nothing is clipped


FROM_LOGITS: dict[str, Callable[..., Tensor]] = {
    "off-policy": lambda x, **k: policy_loss(x, IDS, ADVANTAGES, OLD, **wide(), **k)[0],
    "on-policy": lambda x, **k: policy_loss(x, IDS, ADVANTAGES, **k)[0],
    "tokens": lambda x, **k: policy_loss(x, IDS, ADVANTAGES, OLD, **wide(GRPO(5.0, 5.0)), **k)[0],
    "entropy": lambda x, **k: policy_loss(x, IDS, ADVANTAGES, OLD, **wide(), entropy_coef=0.1, **k)[0],
    "log-probabilities": lambda x, **k: token_logprobs(x, IDS, **k).logprobs.square().sum(),
}
FROM_HIDDEN: dict[str, Callable[..., Tensor]] = {
    "hidden, off-policy": lambda x, **k: linear_policy_loss(x, HEAD, IDS, ADVANTAGES, OLD, **wide(), **k)[0],
    "hidden, on-policy": lambda x, **k: linear_policy_loss(x, HEAD, IDS, ADVANTAGES, **k)[0],
    "hidden, log-probabilities": lambda x, **k: linear_token_logprobs(x, HEAD, IDS, **k).logprobs.square().sum(),
}
KERNELS = {**FROM_LOGITS, **FROM_HIDDEN}
ONE_BACKWARD = [name for name in KERNELS if "on-policy" in name or name == "hidden, off-policy"]


def leaf_of(name: str) -> Tensor:
    return hidden() if name in FROM_HIDDEN else logits()


def of_logprobs(layout: str, objective: Objective) -> Case:
    leaf = (OLD.double() + 0.05 * made(B, T, seed=5)).requires_grad_()
    ref = OLD + 0.1
    keywords: dict[str, Any] = {"ref_logprobs": ref, "beta": 0.1}
    if layout == "padded":
        return lambda x: policy_loss_from_logprobs(x, ADVANTAGES, OLD, **wide(objective), **keywords)[0], leaf
    keywords |= {"ref_logprobs": ref.reshape(-1), "cu_seqlens": BOUNDARIES}
    return (
        lambda x: policy_loss_from_logprobs(x, ADVANTAGES, OLD.reshape(-1), **wide(objective), **keywords)[0],
        leaf.detach().reshape(-1).requires_grad_(),
    )


# --- second derivatives -----------------------------------------------------------------------------------------------


def refused_twice(function: Callable[[Tensor], Tensor], leaf: Tensor) -> None:
    """A penalty on the gradient is refused, and the gradient itself is right with create_graph=True.

    Then the gradient by log-probabilities is torch's, and not that of the stage in Triton: their last digits differ.
    """
    given = leaf * 1
    (plain,) = torch.autograd.grad(function(leaf * 1), leaf)
    loss = function(given)
    (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
    torch.testing.assert_close(gradient.detach(), plain, rtol=1e-6, atol=1e-8)
    penalised = gradient.square().sum() + leaf.sum()  # another way to the leaf: without its own, it is dropped
    with pytest.raises(RuntimeError, match="second derivative is not supported"):
        torch.autograd.grad(penalised, leaf)


@pytest.mark.parametrize("name", KERNELS)
def test_a_second_derivative_is_refused(name: str) -> None:
    refused_twice(KERNELS[name], leaf_of(name))


@pytest.mark.parametrize("name", ["off-policy", "on-policy"])
def test_a_second_derivative_is_refused_of_overwritten_logits(name: str) -> None:
    refused_twice(lambda x: FROM_LOGITS[name](x, overwrite_logits=True), logits())


@NOT_INTERPRETED
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_a_second_derivative_is_refused_of_shards(name: str, group_of_one: dist.ProcessGroup | None) -> None:
    if group_of_one is None:
        pytest.skip("needs torch with gloo, or with NCCL on a GPU")
    refused_twice(lambda x: FROM_LOGITS[name](x, tp_group=group_of_one), logits())


@NOT_INTERPRETED
def test_a_second_derivative_by_the_head_is_refused() -> None:
    weight = HEAD.detach().requires_grad_()
    loss, _ = linear_policy_loss(hidden().detach(), weight, IDS, ADVANTAGES, OLD, **wide())
    (gradient,) = torch.autograd.grad(loss * 3.0, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not supported"):
        (gradient.square().sum() + weight.sum()).backward()


def test_a_second_derivative_by_a_factor_is_refused() -> None:
    """The gradient is linear in what comes from above; that derivative would be dropped, too."""
    factor, leaf = on_device(torch.tensor(2.0)).requires_grad_(), logits()
    (gradient,) = torch.autograd.grad(FROM_LOGITS["on-policy"](leaf) * factor, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not supported"):
        torch.autograd.grad(gradient.sum() + factor, factor)


@NOT_INTERPRETED
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("objective", [GSPO(5.0, 5.0), GRPO(5.0, 5.0)], ids=["GSPO", "GRPO"])
def test_second_derivatives_from_logprobs(layout: str, objective: Objective) -> None:
    function, leaf = of_logprobs(layout, objective)
    assert torch.autograd.gradgradcheck(function, (leaf,))


# --- forward mode, torch.func -----------------------------------------------------------------------------------------


@NOT_INTERPRETED
@pytest.mark.parametrize("name", KERNELS)
def test_forward_mode_is_refused(name: str) -> None:
    leaf = leaf_of(name).detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        KERNELS[name](forward_ad.make_dual(leaf, torch.ones_like(leaf)))
    with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        torch.func.jvp(KERNELS[name], (leaf,), (torch.ones_like(leaf),))
    with pytest.raises(RuntimeError, match=r"torch.func.grad is not supported"):
        torch.func.grad(KERNELS[name])(leaf)


@NOT_INTERPRETED
def test_a_tangent_of_a_constant_is_refused_by_name() -> None:
    with forward_ad.dual_level():
        old = forward_ad.make_dual(OLD, torch.ones_like(OLD))
        for call in (
            lambda: policy_loss(logits(), IDS, ADVANTAGES, old),
            lambda: linear_policy_loss(hidden(), HEAD, IDS, ADVANTAGES, old),
            lambda: policy_loss_from_logprobs(OLD, ADVANTAGES, old),
        ):
            with pytest.raises(RuntimeError, match="old_logprobs has a tangent"):
                call()


@NOT_INTERPRETED
@pytest.mark.parametrize("objective", [GSPO(5.0, 5.0), GSPOToken(5.0, 5.0), GRPO(5.0, 5.0)], ids=str)
def test_forward_mode_from_logprobs(objective: Objective) -> None:
    """Right where it goes through torch's own operators, refused where it does not."""
    function, leaf = of_logprobs("padded", objective)
    direction = made(B, T, seed=6).double()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    _, tangent = torch.func.jvp(function, (leaf.detach(),), (direction,))
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    function, leaf = of_logprobs("packed", objective)
    with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
        torch.func.jvp(function, (leaf.detach(),), (direction.reshape(-1),))


@NOT_INTERPRETED
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_vmap_is_right_from_logits(name: str) -> None:
    function = FROM_LOGITS[name]
    several = torch.stack([logits().detach(), made(B, T, V, seed=7)]).requires_grad_()
    with _quiet():
        batched = torch.func.vmap(function)(several)
    (found,) = torch.autograd.grad(batched.sum(), several)
    one_by_one = torch.stack([function(x) for x in several])
    (expected,) = torch.autograd.grad(one_by_one.sum(), several)
    torch.testing.assert_close(batched, one_by_one)
    torch.testing.assert_close(found, expected)


@NOT_INTERPRETED
@pytest.mark.parametrize("name", FROM_HIDDEN)
def test_vmap_is_refused_from_hidden_states(name: str) -> None:
    """Its operator does not see that a batched tensor wants a gradient."""
    with pytest.raises(RuntimeError, match=r"torch.func.vmap is not supported, and hidden is batched"):
        torch.func.vmap(FROM_HIDDEN[name])(torch.stack([hidden(), hidden()]))


@contextmanager
def _quiet() -> Iterator[None]:
    """vmap says of each operator without a batching rule that it loops over it."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)


# --- a second backward ------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[], Any]] = {
    "none": lambda: graph.saved_tensors_hooks(lambda x: x, lambda x: x),  # as save_on_cpu is, for what is there already
    "save_on_cpu": graph.save_on_cpu,
    "copies": lambda: graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x.clone()),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", ONE_BACKWARD)
def test_a_second_backward_is_refused_under_saved_tensor_hooks(name: str, hooks: str) -> None:
    leaf = leaf_of(name)
    (expected,) = torch.autograd.grad(KERNELS[name](leaf) * 3.0, leaf)
    with HOOKS[hooks]():
        loss = KERNELS[name](leaf) * 3.0
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, expected)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        torch.autograd.grad(loss, leaf)
    assert torch.equal(first, expected), "what was handed over has changed"


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_a_second_backward_of_overwritten_logits_is_refused(name: str, hooks: str) -> None:
    """Where the logits were, there is a gradient now, and hooks keep that from autograd."""
    leaf = logits()
    with HOOKS[hooks]():
        loss = FROM_LOGITS[name](leaf * 1, overwrite_logits=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        loss.backward()


@NOT_INTERPRETED
@pytest.mark.parametrize("name", FROM_LOGITS)
def test_a_second_backward_of_overwritten_shards_is_refused(name: str, group_of_one: dist.ProcessGroup | None) -> None:
    if group_of_one is None:
        pytest.skip("needs torch with gloo, or with NCCL on a GPU")
    with HOOKS["none"]():
        loss = FROM_LOGITS[name](logits() * 1, overwrite_logits=True, tp_group=group_of_one)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        loss.backward()


@pytest.mark.parametrize("name", ONE_BACKWARD)
def test_a_second_backward_by_1_is_refused(name: str) -> None:
    """Nothing is scaled then, but what was handed over may have been written to since."""
    leaf = leaf_of(name)
    loss = KERNELS[name](leaf)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        loss.backward()


@NOT_INTERPRETED
def test_a_loss_may_be_changed_in_place() -> None:
    """`loss /= steps` is what trainers write."""
    leaf = logits()
    loss = FROM_LOGITS["on-policy"](leaf)
    loss /= 2
    (halved,) = torch.autograd.grad(loss, leaf)
    (whole,) = torch.autograd.grad(FROM_LOGITS["on-policy"](leaf), leaf)
    assert torch.equal(halved, whole / 2)


@NOT_INTERPRETED
def test_chunks_of_a_head_do_not_matter_to_a_second_backward() -> None:
    leaf = hidden()
    loss = FROM_HIDDEN["hidden, off-policy"](leaf, chunk_bytes=chunk_of(2, V))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss: supports one backward pass"):
        loss.backward()


@pytest.mark.parametrize("log_ratio", [-10.0, -30.0, -60.0])
def test_the_gradient_of_a_small_ratio_keeps_its_digits(log_ratio: float) -> None:
    """The derivative of s is s, however small."""
    new = on_device(torch.full((1, 1), -70.0, dtype=torch.float64)).requires_grad_()
    loss, _ = policy_loss_from_logprobs(new, on_device(torch.ones(1)), new.detach() - log_ratio, **wide())
    (gradient,) = torch.autograd.grad(loss, new)
    assert float(gradient) == pytest.approx(-math.exp(log_ratio), rel=1e-9, abs=0.0)
