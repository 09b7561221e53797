"""Who runs a case: this package in its two ways, torch eager, torch.compile of the same function, and a plain copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gspo_kernels

from .cases import Problem, Work
from .exact import EPSILONS

Answer = tuple[Tensor, Tensor | None]  # loss, gradient of the logits
Run = Callable[[], Answer | None]


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    prepare: Callable[[Problem], Run]  # whatever may be done once, before the first call
    gradient_only: bool = False  # says nothing new where no gradient is asked for
    overwrites: bool = False  # its gradient stands where the logits were
    compiles: bool = False  # the first call takes seconds

    def label_in(self, work: str) -> str:
        """The label, without the word on where the gradient goes where there is none."""
        return self.label.split(",")[0] if work == "forward" else self.label


_OF_PACKAGE = {"gspo": gspo_kernels.gspo_loss, "grpo": gspo_kernels.grpo_loss, "ppo": gspo_kernels.ppo_loss}


def ours(problem: Problem, overwrite_logits: bool, backend: str | None = None) -> Run:
    objective = problem.case.work.objective
    eps_low, eps_high = EPSILONS[objective]

    def loss() -> Tensor:
        return _OF_PACKAGE[objective](
            problem.logits,
            problem.token_ids,
            problem.advantages,
            problem.old_logprobs,
            mask=problem.mask,
            cu_seqlens=problem.cu_seqlens,
            eps_low=eps_low,
            eps_high=eps_high,
            overwrite_logits=overwrite_logits,
            backend=backend,
        ).loss

    return answer(problem, loss)


def torch_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    sequence_of: Tensor | None,
    objective: str,
) -> Tensor:
    """The loss as trainers write it in torch; `sequence_of` [rows] for packed batches."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return torch_loss_of_logprobs(logprobs, advantages, old_logprobs, mask, sequence_of, objective)


def torch_loss_of_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    sequence_of: Tensor | None,
    objective: str,
) -> Tensor:
    low, high = EPSILONS[objective]
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    weights = mask.float()

    def mean(values: Tensor) -> Tensor:
        if sequence_of is None:
            return (values * weights).sum(-1) / weights.sum(-1).clamp(min=1.0)
        zeros = torch.zeros_like(advantages)
        return zeros.index_add(0, sequence_of, values * weights) / zeros.index_add(0, sequence_of, weights)

    if objective == "gspo":
        ratio = mean(logprobs - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).mean()
    ratio = (logprobs - old).exp()
    of_tokens = advantages.unsqueeze(-1) if sequence_of is None else advantages[sequence_of]
    surrogate = torch.minimum(ratio * of_tokens, ratio.clamp(1 - low, 1 + high) * of_tokens)
    return -((surrogate * weights).sum() / weights.sum() if objective == "ppo" else mean(surrogate).mean())


def _eager(problem: Problem) -> Run:
    return _in_torch(problem, torch_loss)


def _compiled(problem: Problem) -> Run:
    torch.compiler.reset()  # one shape at a time: the next case compiles afresh instead of generalising this one
    return _in_torch(problem, torch.compile(torch_loss, dynamic=False, fullgraph=True))


def _in_torch(problem: Problem, loss: Callable[..., Tensor]) -> Run:
    sequence_of = None if problem.cu_seqlens is None else problem.sequence_of
    inputs = problem.token_ids, problem.advantages, problem.old_logprobs, problem.mask, sequence_of
    return answer(problem, lambda: loss(problem.logits, *inputs, problem.case.work.objective))


def answer(problem: Problem, loss: Callable[[], Tensor], leaf: Tensor | None = None) -> Run:
    """Loss and gradient, or under `no_grad` the loss alone, according to the work.

    `leaf`: what the loss starts from where that is not the logits but a buffer that they are the beginning of. The
    gradient of the loss by itself is made here, once: `autograd.grad` without one fills a tensor in every call, a
    kernel that would count against every contestant.
    """
    root = torch.ones((), device=problem.logits.device)

    def forward() -> Answer:
        with torch.no_grad():
            return loss(), None

    def forward_backward() -> Answer:
        value = loss()
        if leaf is None:
            return value.detach(), torch.autograd.grad(value, problem.logits, root)[0]
        return value.detach(), torch.autograd.grad(value, leaf, root)[0][:, : problem.logits.shape[1]]

    return forward_backward if problem.case.work.gradient else forward


def _copy(problem: Problem) -> Run:
    """Reads the logits once and writes as many bytes into memory that has been touched: two units."""

    def copy() -> None:
        problem.restore()

    return copy


CONTESTANTS = (
    Contestant(
        "ours",
        "gspo-kernels, gradient over the logits",
        functools.partial(ours, overwrite_logits=True),
        overwrites=True,
    ),
    Contestant(
        "ours_fresh",
        "gspo-kernels, fresh gradient",
        functools.partial(ours, overwrite_logits=False),
        gradient_only=True,
    ),
    Contestant("eager", "torch eager", _eager),
    Contestant("compile", "torch.compile", _compiled, compiles=True),
    Contestant("copy", "memory copy", _copy),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


def contestants_of(work: Work) -> list[Contestant]:
    return [c for c in CONTESTANTS if work.gradient or not c.gradient_only]
