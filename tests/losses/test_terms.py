"""Objectives with a term in Triton: it computes what `terms` computes, and no subclass inherits a term by accident."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from modes import KERNELS, on_device
from torch import Tensor

from gspo_kernels import (
    GRPO,
    GSPO,
    PPO,
    GSPOToken,
    Objective,
    Terms,
    TokenBatch,
    explain,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logprobs,
)
from gspo_kernels.losses import fused_loss
from gspo_kernels.losses.objectives import at_most
from gspo_kernels.losses.triton_stage import stage_reason, unsupported_reason
from gspo_kernels.losses.triton_term import TritonTerm
from gspo_kernels.rows import cpu_rows, cuda_rows, triton_rows

if TYPE_CHECKING:
    import triton.language as tl

    from gspo_kernels.rows.triton_math import exp

triton_alone = pytest.mark.skipif(KERNELS != "triton", reason="Triton kernels alone: TRITON_INTERPRET=1, or a GPU")


@TritonTerm
def capped_term(  # type: ignore
    log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, eps, least, unused2, unused3
):
    ratio = exp(tl.where(log_ratio > max_log_ratio, max_log_ratio, log_ratio))
    high, low = ratio > 1.0 + eps, ratio < least
    weight = tl.where(high, 1.0 + eps, tl.where(low, least, ratio))
    return -weight * advantage * logprob, -weight * advantage, low, high


@dataclass(frozen=True)
class Capped(Objective):
    """-sg(max(least, min(1 + eps, ratio))) A logprob: the gradient comes through the log-probability alone."""

    eps: float = 0.1
    least: float | None = None
    depends_on: ClassVar[str] = "token"
    uses_logprobs: ClassVar[bool] = True
    triton_term = capped_term

    def terms(self, tokens: TokenBatch) -> Terms:
        ratio = at_most(tokens.log_ratio.detach(), tokens.max_log_ratio).exp()
        high, weight = ratio > 1.0 + self.eps, at_most(ratio, 1.0 + self.eps)
        low = ratio < self.least if self.least is not None else torch.zeros_like(high)
        weight = torch.where(low, 0.0 if self.least is None else self.least, weight)
        return Terms(-weight * tokens.advantages * tokens.logprobs, tokens.log_ratio, low, high)


@dataclass(frozen=True)
class InTorch(Capped):
    def terms(self, tokens: TokenBatch) -> Terms:
        return super().terms(tokens)


@dataclass(frozen=True)
class OtherDefaults(Capped):
    eps: float = 0.3
    aggregation: ClassVar[str] = "token_mean"


@dataclass(frozen=True)
class ManyFields(Capped):
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0


@dataclass(frozen=True)
class OfSequence(Capped):
    ratio_of: ClassVar[str] = "sequence"
    advantages_per_token: ClassVar[bool] = False
    triton_term = capped_term


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return on_device(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


IDS = on_device(torch.tensor([[1, 2, 3, 4], [4, 5, 6, 0]]))
MASK = on_device(torch.tensor([[True, True, True, False], [True, True, True, True]]))
ADVANTAGES = on_device(torch.tensor([1.5, -1.0]))


def logprobs_of(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(-1, IDS[..., None])[..., 0]


def old_logprobs(seed: int = 1) -> Tensor:
    return (logprobs_of(numbers(2, 4, 9)) + 0.3 * numbers(2, 4, seed=seed)).clamp(max=0).float()


def outcome(call: str, objective: Objective, old: Tensor | None, **options: Any) -> list[Tensor]:
    """loss, gradient, stats"""
    leaf = numbers(2, 4, 9).requires_grad_()
    if call == "logits":
        loss, stats = policy_loss(
            leaf, IDS, ADVANTAGES, old, objective=objective, mask=MASK, backend="triton", **options
        )
    elif call == "hidden":
        loss, stats = linear_policy_loss(
            leaf, on_device(torch.eye(9)), IDS, ADVANTAGES, old, objective=objective, mask=MASK, backend="triton",
            **options,
        )  # fmt: skip
    else:
        logprobs = logprobs_of(leaf).float()
        loss, stats = policy_loss_from_logprobs(
            logprobs, ADVANTAGES, old, objective=objective, mask=MASK, entropy=logprobs.square(), **options
        )
    (gradient,) = torch.autograd.grad(loss, leaf)
    scalars = {name: x for name, x in stats.as_dict().items() if not name.startswith("head")}
    return [loss.detach(), gradient, *scalars.values(), stats.log_ratio]


# --- a term of one's own ----------------------------------------------------------------------------------------------


@triton_alone
@pytest.mark.parametrize("call", ["logits", "hidden", "log-probabilities"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_term_computes_what_terms_compute(call: str, on_policy: bool) -> None:
    old = None if on_policy else old_logprobs()
    options: dict[str, Any] = {"ref_logprobs": old_logprobs(2), "beta": 0.1, "importance_weights": numbers(2, 4).abs()}
    for parameters in ((0.1, None), (0.2, 0.9)):
        found, expected = (outcome(call, kind(*parameters), old, **options) for kind in (Capped, InTorch))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-7)


def test_a_class_that_overrides_what_a_term_computes_inherits_none() -> None:
    class OtherTerms(GRPO):
        def terms(self, tokens: TokenBatch) -> Terms:
            return super().terms(tokens)

    class OtherRatio(GRPO):
        ratio_of: ClassVar[str] = "sequence"

    class Mixin:
        def terms(self, tokens: TokenBatch) -> Terms:
            return Terms(tokens.advantages, tokens.log_ratio)

    class ByMixin(Mixin, GRPO):
        pass

    class Further(ByMixin):
        pass

    for kind in (OtherTerms, OtherRatio, ByMixin, Further):
        assert kind.triton_term is None and kind().row_slope() is None
    for kind in (OtherTerms, ByMixin, Further):  # of which a token's term may depend on more
        assert kind.depends_on == "batch" and GRPO.depends_on == "token"
    for same in (GSPO, GSPOToken, GRPO, PPO):
        assert same.triton_term is GSPO.triton_term is not None
    assert OtherDefaults.triton_term is capped_term
    assert GRPO().row_slope() is not None and GSPO().row_slope() is None


def test_why_the_stage_runs_in_torch() -> None:
    @dataclass(frozen=True)
    class Local(OtherDefaults):
        pass

    reason = partial(unsupported_reason, context_parallel=False)
    assert all(reason(kind()) == "" for kind in (GSPO, GSPOToken, GRPO, PPO, Capped, OtherDefaults))
    assert "InTorch has no triton_term" in reason(InTorch())
    assert "Local is not a frozen dataclass at the top of a module" in reason(Local())
    assert "ManyFields has 5 fields" in reason(ManyFields())
    assert "OfSequence reads log-probabilities" in reason(OfSequence())
    assert "cp_group" in unsupported_reason(GSPO(), context_parallel=True)
    assert (
        stage_reason(GSPO(), triton_rows) == stage_reason(GSPO(), cuda_rows) == "token stage: Triton, in two launches"
    )
    assert "torch, because the rows are computed by native" in stage_reason(GSPO(), cpu_rows)
    assert "torch, because InTorch has no triton_term" in stage_reason(InTorch(), triton_rows)


@triton_alone
def test_explain_tells_which_stage_runs() -> None:
    logits, head = numbers(2, 4, 9), numbers(9, 9)
    for arguments in ((logits,), (logits, head)):
        assert "\ntoken stage: Triton" in explain(*arguments)
        assert "\ntoken stage: torch, because InTorch has no triton_term" in explain(*arguments, objective=InTorch())


# --- the stage from log-probabilities, and its inputs -----------------------------------------------------------------


@triton_alone
@pytest.mark.parametrize("objective", [GSPO(), GRPO()], ids=["gspo", "grpo"])
def test_from_log_probabilities_the_same_kernels_run(objective: Objective) -> None:
    """To the bit, wherever the log-probabilities came from."""
    logits = numbers(2, 4, 9).requires_grad_()
    loss, stats = policy_loss(logits, IDS, ADVANTAGES, old_logprobs(), objective=objective, mask=MASK, backend="triton")
    leaf = torch.where(MASK, stats.logprobs, torch.nan).requires_grad_()
    again, of_leaf = policy_loss_from_logprobs(leaf, ADVANTAGES, old_logprobs(), objective=objective, mask=MASK)
    assert torch.equal(loss, again) and torch.equal(stats.log_ratio, of_leaf.log_ratio)
    assert torch.equal(stats.clip_fraction, of_leaf.clip_fraction) and torch.equal(stats.logprobs, of_leaf.logprobs)
    (gradient,) = torch.autograd.grad(again, leaf)
    assert bool((gradient[~MASK] == 0).all()) and bool(gradient[MASK].isfinite().all())


@triton_alone
@pytest.mark.parametrize("objective", [GSPO(0.5, 0.5), GRPO(0.5, 0.5)], ids=["gspo", "grpo"])
def test_second_derivatives(objective: Objective) -> None:
    """Those of the stage in torch, at float64's precision of the loss."""
    found = []
    options: dict[str, Any] = {"ref_logprobs": old_logprobs(2), "beta": 0.1, "entropy_coef": 0.1, "mask": MASK}
    for dtype in (torch.float32, torch.float64):
        leaves = [old_logprobs(3).to(dtype).requires_grad_(), numbers(2, 4).to(dtype).requires_grad_()]
        loss, _ = policy_loss_from_logprobs(
            leaves[0], ADVANTAGES, old_logprobs(), objective=objective, entropy=leaves[1], **options
        )
        first = torch.autograd.grad(loss * loss, leaves, create_graph=True)
        second = torch.autograd.grad((first[0] * numbers(2, 4, seed=5)).sum() + first[1].sum(), leaves)
        found.append([*first, *second])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-7)


@triton_alone
def test_a_second_derivative_of_overwritten_arguments_is_refused() -> None:
    leaf, old = old_logprobs(3).requires_grad_(), old_logprobs()
    loss, _ = policy_loss_from_logprobs(leaf, ADVANTAGES, old, objective=GRPO())
    old.add_(1.0)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="written to before its second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@triton_alone
def test_advantages_and_weights_of_other_dtypes_are_cast() -> None:
    weights = on_device(torch.tensor([2, 3]))
    calls = [
        policy_loss(
            numbers(2, 4, 9), IDS, (2 * ADVANTAGES).to(dtype), old_logprobs(), objective=GRPO(),
            importance_weights=weights.to(dtype), backend="triton",
        ).loss
        for dtype in (torch.float32, torch.float64, torch.int64)
    ]  # fmt: skip
    assert torch.equal(calls[0], calls[1]) and torch.equal(calls[0], calls[2])


@triton_alone
@pytest.mark.parametrize("objective", [GSPO(), GRPO()], ids=["gspo", "grpo"])
def test_log_probabilities_of_float64_keep_their_digits(objective: Objective) -> None:
    """Old ones a billionth below the current ones; reference ones that a float32 would make equal to them."""
    logits = numbers(2, 4, 9)
    logprobs = policy_loss(logits, IDS, ADVANTAGES, backend="triton").stats.logprobs.double()
    _, stats = policy_loss(
        logits, IDS, ADVANTAGES, logprobs - 1e-9, objective=objective, ref_logprobs=logprobs + 1e-9, beta=0.1,
        kl_estimator="k1", backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(stats.log_ratio, torch.full_like(stats.log_ratio, 1e-9), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(stats.ref_kl, torch.full_like(stats.ref_kl, -1e-9), rtol=1e-5, atol=0.0)
    infinite = torch.full_like(logprobs, -torch.inf)
    assert bool(policy_loss(logits, IDS, ADVANTAGES, infinite, objective=objective, backend="triton").loss.isfinite())


def test_a_slower_stage_on_a_gpu_warns_once() -> None:
    inputs: Any = SimpleNamespace(batch=SimpleNamespace(device=torch.device("cuda"), ranks=None))
    with pytest.warns(UserWarning, match="slower on a GPU: it has no term"):
        fused_loss._warn_on_gpu(inputs, "it has no term")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_loss._warn_on_gpu(inputs, "it has no term")
        fused_loss._warn_on_gpu(inputs, "")
        inputs.batch.device = torch.device("cpu")
        fused_loss._warn_on_gpu(inputs, "on a CPU")
