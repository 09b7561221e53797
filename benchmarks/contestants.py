"""Who runs a case: this package in its two ways, torch eager, torch.compile of the same function, and a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import gspo_kernels

from .cases import EPS_HIGH, EPS_LOW, SEQUENCES, Problem, Work

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


def _gspo_loss(overwrite_logits: bool) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        def loss() -> Tensor:
            return gspo_kernels.gspo_loss(
                problem.logits,
                problem.token_ids,
                problem.advantages,
                problem.old_logprobs,
                mask=problem.mask,
                cu_seqlens=problem.cu_seqlens,
                eps_low=EPS_LOW,
                eps_high=EPS_HIGH,
                overwrite_logits=overwrite_logits,
            ).loss

        return _answer(problem, loss)

    return prepare


def eager_gspo(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor,
    sequence_of: Tensor | None,
) -> Tensor:
    """GSPO as trainers write it in torch; `sequence_of` [rows] for packed batches."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    weights = mask.float()
    log_ratio = (logprobs - old) * weights
    if sequence_of is None:
        means = log_ratio.sum(-1) / weights.sum(-1)
    else:
        zeros = logprobs.new_zeros(SEQUENCES)
        means = zeros.index_add(0, sequence_of, log_ratio) / zeros.index_add(0, sequence_of, weights)
    ratio = means.exp()
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def _eager(problem: Problem) -> Run:
    return _torch_gspo(problem, eager_gspo)


def _compiled(problem: Problem) -> Run:
    torch.compiler.reset()  # one shape at a time: the next case compiles afresh instead of generalising this one
    return _torch_gspo(problem, torch.compile(eager_gspo, dynamic=False, fullgraph=True))


def _torch_gspo(problem: Problem, gspo: Callable[..., Tensor]) -> Run:
    sequence_of = None if problem.cu_seqlens is None else problem.sequence_of
    inputs = problem.token_ids, problem.advantages, problem.old_logprobs, problem.mask, sequence_of
    return _answer(problem, lambda: gspo(problem.logits, *inputs))


def _answer(problem: Problem, loss: Callable[[], Tensor]) -> Run:
    def forward() -> Answer:
        with torch.no_grad():
            return loss(), None

    def forward_backward() -> Answer:
        value = loss()
        return value.detach(), torch.autograd.grad(value, problem.logits)[0]

    return forward_backward if problem.case.work.gradient else forward


def _copy(problem: Problem) -> Run:
    """Reads the logits once and writes as many bytes into memory that has been touched: two units."""

    def copy() -> None:
        problem.restore()

    return copy


CONTESTANTS = (
    Contestant("ours", "gspo-kernels, gradient over the logits", _gspo_loss(True), overwrites=True),
    Contestant("ours_fresh", "gspo-kernels, fresh gradient", _gspo_loss(False), gradient_only=True),
    Contestant("eager", "torch eager", _eager),
    Contestant("compile", "torch.compile", _compiled, compiles=True),
    Contestant("copy", "memory copy", _copy),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}


def contestants_of(work: Work) -> list[Contestant]:
    return [c for c in CONTESTANTS if work.gradient or not c.gradient_only]
