"""Who runs a case: this package, its bare matrix products, torch in two ways, and the peers of `peers.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import gspo_kernels

from ..contestants import torch_loss_of_logprobs
from ..exact import EPSILONS
from . import peers
from .cases import VOCABS, Case, Problem


class Answer(NamedTuple):
    value: Tensor  # the loss or, where no gradient is asked for, the log-probabilities
    hidden: Tensor | None = None  # gradients
    weight: Tensor | None = None

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.hidden, self.weight) if x is not None)


Run = Callable[[], Answer | None]


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    prepare: Callable[[Problem], Run]  # raises ImportError or AttributeError where a peer is not there
    compiles: bool = False  # its first call takes long
    loss_alone: bool = False  # gives no log-probabilities
    overwrites: bool = False  # none does: for `race.take_turns`


def _answering(problem: Problem, logprobs: Callable[[], Tensor], loss: Callable[[], Tensor]) -> Run:
    root = torch.ones((), device=problem.hidden.device)  # made once: without it every backward fills a tensor

    def forward() -> Answer:
        with torch.no_grad():
            return Answer(logprobs())

    def forward_backward() -> Answer:
        value = loss()
        value.backward(root)  # type: ignore[no-untyped-call]
        answer = Answer(value.detach(), problem.hidden.grad, problem.weight.grad)
        problem.restore()
        return answer

    return forward_backward if problem.case.work.gradient else forward


def ours(problem: Problem, chunk_bytes: int | None = None) -> Run:
    operands = problem.hidden, problem.weight, problem.token_ids
    low, high = EPSILONS["gspo"]

    def loss() -> Tensor:
        return gspo_kernels.linear_gspo_loss(
            *operands, problem.advantages, problem.old_logprobs, eps_low=low, eps_high=high, chunk_bytes=chunk_bytes
        ).loss

    return _answering(
        problem, lambda: gspo_kernels.linear_token_logprobs(*operands, chunk_bytes=chunk_bytes).logprobs, loss
    )


def _products(problem: Problem) -> Run:
    """The matrix products that any way needs, into memory that has been touched; the logits are all there."""
    hidden, weight = problem.inputs.hidden, problem.inputs.weight
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


def _gspo_on(find: Callable[[], peers.Logprobs]) -> Callable[[Problem], Run]:
    """Somebody's log-probabilities, and GSPO in torch on top."""

    def prepare(problem: Problem) -> Run:
        function = find()

        def logprobs() -> Tensor:
            return function(problem.hidden, problem.weight, problem.token_ids)

        def loss() -> Tensor:
            return torch_loss_of_logprobs(
                logprobs(), problem.advantages, problem.old_logprobs, problem.mask, None, "gspo"
            )

        return _answering(problem, logprobs, loss)

    return prepare


def _torch_loss(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, old_logprobs: Tensor, mask: Tensor
) -> Tensor:
    logprobs = peers.materialised(hidden, weight, token_ids)
    return torch_loss_of_logprobs(logprobs, advantages, old_logprobs, mask, None, "gspo")


def _compiled(problem: Problem) -> Run:
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    logprobs, loss = torch.compile(peers.materialised, **options), torch.compile(_torch_loss, **options)
    operands = problem.hidden, problem.weight, problem.token_ids
    others = problem.advantages, problem.old_logprobs, problem.mask
    return _answering(problem, lambda: logprobs(*operands), lambda: loss(*operands, *others))


def _liger(problem: Problem) -> Run:
    loss = peers.liger_loss(problem.token_ids.shape[1])
    inputs = problem.token_ids, problem.mask, problem.advantages, problem.old_logprobs

    def no_logprobs() -> Tensor:
        raise NotImplementedError

    return _answering(problem, no_logprobs, lambda: loss(problem.hidden, problem.weight, *inputs))


OURS = Contestant("ours", "gspo-kernels", ours)
PRODUCTS = Contestant("products", "bare matrix products", _products)
# The fast ones first: where time runs out, the slow ones are left out.
CONTESTANTS = (
    OURS,
    PRODUCTS,
    Contestant("eager", "torch eager, all logits", _gspo_on(lambda: peers.materialised)),
    Contestant("compile", "torch.compile, all logits", _compiled, compiles=True),
    Contestant("cce", "cut-cross-entropy, torch_compile", _gspo_on(peers.cut_cross_entropy), compiles=True),
    Contestant("liger", "Liger, fused linear GRPO", _liger, loss_alone=True),
    Contestant("trl", "TRL, chunked log-probabilities", _gspo_on(peers.trl)),
    Contestant("torch", "torch linear_cross_entropy, chunked", _gspo_on(peers.torch_chunked)),
)
BY_NAME = {contestant.name: contestant for contestant in CONTESTANTS}
PEERS = tuple(c.name for c in CONTESTANTS if c not in (OURS, PRODUCTS))


def left_out(contestant: Contestant, case: Case) -> str:
    """Why a contestant says nothing new in a case, or "": minutes are spent where something is to be learned."""
    large, dense = case.vocab == max(VOCABS), case.work.name == "dense"
    if contestant.loss_alone and not case.work.gradient:
        return "returns no log-probabilities"
    if contestant.name not in PEERS or dense:
        return ""
    if contestant.compiles and (large or case.work.gradient):
        return "compiled in the dense case alone, and at the small vocabulary for log-probabilities"
    if large and case.work.gradient:
        return "asked at the small vocabulary: no peer looks at coefficients"
    return ""
