"""Who runs a case: this package, torch, and what bounds both: a memory copy, or the bare matrix products.

`libraries.py` has the functions of other libraries. test_speed.py takes `CONTESTANTS`; linear.py and peers.py have
lists of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspo_kernels

from .cases import EPSILONS, Problem, Work


class Unfit(Exception):
    """Why a contestant cannot take part."""


class Answer(NamedTuple):
    value: Tensor  # the loss; from hidden states without a gradient, the log-probabilities
    gradients: tuple[Tensor, ...] = ()  # of the leaves that need one


Run = Callable[[], Answer | None]
Loss = Callable[[Problem, Tensor], Tensor]  # of the log-probabilities


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    prepare: Callable[[Problem], Run]  # whatever is done once, before the first call; raises Unfit
    gradient_only: bool = False  # says nothing new where no gradient is computed
    overwrites: bool = False  # its gradient replaces the logits
    compiles: bool = False  # the first call takes seconds

    def label_in(self, work: str) -> str:
        """The label, without the word on where the gradient goes where there is none."""
        return self.label.split(",")[0] if work == "forward" else self.label


def answer(
    problem: Problem,
    loss: Callable[[], Tensor],
    logprobs: Callable[[], Tensor] | None = None,
    leaf: Tensor | None = None,
) -> Run:
    """Loss and gradients. If the work has no gradient: the loss, from hidden states `logprobs`, under `no_grad`.

    `leaf`: what the loss starts from where that is not the logits but a buffer that they are the beginning of. The
    gradient of the loss by itself is made here, once: `autograd.grad` without one fills a tensor in every call, a
    kernel that would count against every contestant.
    """
    root = torch.ones((), device=problem.token_ids.device)
    leaves = [x for x in problem.leaves if x.requires_grad] if leaf is None else [leaf]
    value = loss if logprobs is None or problem.case.from_logits else logprobs

    def forward() -> Answer:
        with torch.no_grad():
            return Answer(value())

    def forward_backward() -> Answer:
        found = loss()
        gradients = torch.autograd.grad(found, leaves, root)
        if leaf is not None:
            gradients = (gradients[0][:, : problem.logits.shape[1]],)
        return Answer(found.detach(), gradients)

    return forward_backward if problem.case.work.gradient else forward


# ---- this package


def ours(
    problem: Problem, overwrite_logits: bool = False, backend: str | None = None, chunk_bytes: int | None = None
) -> Run:
    objective, from_logits = problem.case.work.objective, problem.case.from_logits
    function = getattr(gspo_kernels, f"{'' if from_logits else 'linear_'}{objective}_loss")
    low, high = EPSILONS[objective]
    options: dict[str, Any] = {"mask": problem.mask, "cu_seqlens": problem.cu_seqlens, "eps_low": low, "eps_high": high}
    if from_logits:
        options |= {"overwrite_logits": overwrite_logits, "backend": backend, "kept": problem.kept}
    else:
        options |= {"chunk_bytes": chunk_bytes}
    inputs = *problem.leaves, problem.token_ids

    def logprobs() -> Tensor:
        return gspo_kernels.linear_token_logprobs(*inputs, chunk_bytes=chunk_bytes).logprobs

    def loss() -> Tensor:
        found: Tensor = function(*inputs, problem.advantages, problem.old_logprobs, **options).loss
        return found

    return answer(problem, loss, logprobs)


# ---- torch


def torch_logprobs(operands: tuple[Tensor, ...], token_ids: Tensor) -> Tensor:
    """From logits, or from hidden states and a head, whose logits are all in memory."""
    logits = operands[0] if len(operands) == 1 else torch.nn.functional.linear(*operands)
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def _eager_logprobs(problem: Problem) -> Tensor:
    kept = problem.sampled.kept
    if kept is None:
        return torch_logprobs(problem.leaves, problem.token_ids)
    columns = problem.logits.gather(-1, kept.view(*problem.token_ids.shape, -1))
    return torch.log_softmax(columns.float(), dim=-1)[..., 0]


def torch_loss_of_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    sequence_of: Tensor | None,
    objective: str,
) -> Tensor:
    """The loss as trainers write it in torch; `sequence_of` [rows] for packed batches."""
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


def torch_loss(problem: Problem, logprobs: Tensor) -> Tensor:
    sequence_of = None if problem.cu_seqlens is None else problem.sequence_of
    return torch_loss_of_logprobs(
        logprobs, problem.advantages, problem.old_logprobs, problem.mask, sequence_of, problem.case.work.objective
    )


def on_logprobs(logprobs: Callable[[Problem], Tensor], loss: Loss = torch_loss) -> Callable[[Problem], Run]:
    """What prepares a contestant that has its own log-probabilities, and a loss on top of them."""

    def prepare(problem: Problem) -> Run:
        if loss is torch_loss:
            _refuse_advantages_by_token(problem)
        return answer(problem, lambda: loss(problem, logprobs(problem)), lambda: logprobs(problem))

    return prepare


def _refuse_advantages_by_token(problem: Problem) -> None:
    if problem.advantages.ndim == 2:
        raise Unfit("one advantage a response")


def _compiled(problem: Problem) -> Run:
    _refuse_advantages_by_token(problem)
    torch.compiler.reset()  # one shape at a time: the next case compiles afresh instead of generalising this one
    sequence_of = None if problem.cu_seqlens is None else problem.sequence_of
    objective = problem.case.work.objective

    def whole(operands: tuple[Tensor, ...], token_ids: Tensor, *inputs: Any) -> Tensor:
        return torch_loss_of_logprobs(torch_logprobs(operands, token_ids), *inputs, objective)

    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    loss, logprobs = torch.compile(whole, **options), torch.compile(torch_logprobs, **options)
    operands, inputs = (problem.leaves, problem.token_ids), (problem.advantages, problem.old_logprobs, problem.mask)
    return answer(problem, lambda: loss(*operands, *inputs, sequence_of), lambda: logprobs(*operands))


# ---- what bounds them


def _copy(problem: Problem) -> Run:
    """Reads the logits once and writes as many bytes into memory that has been touched: two units."""

    def copy() -> None:
        problem.restore()

    return copy


def _yardstick(problem: Problem) -> Run:
    """Reads and writes the same bytes, does arithmetic of the same kind, and takes about as long as a fused loss."""
    logits, out = problem.sampled.pristine[0], problem.sampled.working[0].detach()

    def exponentiate() -> None:
        torch.exp(logits, out=out)

    return exponentiate


def _products(problem: Problem) -> Run:
    """The matrix products that any way needs, into memory that has been touched; the logits are all there."""
    hidden, weight = problem.sampled.pristine
    logits = torch.zeros(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    of_hidden, of_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    work = problem.case.work

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if work.gradient:
            torch.mm(logits, weight, out=of_hidden)
        if work.gradient and not work.frozen_head:
            torch.mm(logits.T, hidden, out=of_weight)

    return products


OVERWRITES = functools.partial(ours, overwrite_logits=True)
EAGER = Contestant("eager", "torch eager", on_logprobs(_eager_logprobs))
COMPILED = Contestant("compile", "torch.compile", _compiled, compiles=True)
PRODUCTS = Contestant("products", "bare matrix products", _products)
CONTESTANTS = (
    Contestant("ours", "gspo-kernels, gradient over the logits", OVERWRITES, overwrites=True),
    Contestant("ours_fresh", "gspo-kernels, fresh gradient", ours, gradient_only=True),
    EAGER,
    COMPILED,
    Contestant("copy", "memory copy", _copy),
)
# Of `pytest benchmarks --gate`: whose time is compared, and what it is a multiple of.
GATED = ("ours", "ours_fresh")
YARDSTICK = Contestant("exp", "torch.exp of the same logits", _yardstick, overwrites=True)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


def contestants_of(work: Work) -> list[Contestant]:
    candidates = [c for c in CONTESTANTS if not (work.kept and c.compiles)]  # what gathers a few columns gains nothing
    return [c for c in candidates if work.gradient or not c.gradient_only]
