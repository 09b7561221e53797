"""Who runs on a GPU: this package, torch eager and compiled, a copy, and the two peers that start from logits.

A peer is imported when it is prepared. What each is given is what it asks for: Liger the whole buffer [B, T + 1, V],
contiguous, its gradient over it; TRL the view without the last position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Problem
from ..contestants import BY_NAME, Contestant, Run, answer, torch_loss_of_logprobs
from ..exact import EPSILONS

LIGER = ("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
TRL = ("trl.kernels", "selective_log_softmax_and_entropy")


def _liger(problem: Problem) -> Run:
    triton_grpo_loss = _find(*LIGER)
    case = problem.case
    whole = problem.sampled.working.view(case.sequences, -1, case.vocab).detach().requires_grad_()
    low, high = EPSILONS[case.work.objective]
    level = "sequence" if case.work.objective == "gspo" else "token"

    def loss() -> Tensor:
        value, _ = triton_grpo_loss(
            whole,
            problem.old_logprobs,
            None,
            problem.token_ids,
            problem.advantages,
            completion_mask=problem.mask,
            temperature=1.0,
            beta=0.0,
            eps_low=low,
            eps_high=high,
            inplace=True,
            loss_type="grpo",  # mean over tokens, then over sequences
            importance_sampling_level=level,
            reduce=True,
        )
        found: Tensor = value
        return found

    return answer(problem, loss, leaf=whole)


def _trl(problem: Problem) -> Run:
    fused = _find(*TRL)
    inputs = problem.advantages, problem.old_logprobs, problem.mask, None, problem.case.work.objective

    def loss() -> Tensor:
        logprobs, _ = fused(problem.logits, problem.token_ids, temperature=1.0)
        return torch_loss_of_logprobs(logprobs, *inputs)

    return answer(problem, loss)


def _copy(problem: Problem) -> Run:
    """As many bytes as the logits have, read and written: two units."""
    elements = problem.logits.numel()
    source, target = (x.view(-1)[:elements] for x in (problem.sampled.pristine, problem.sampled.working))

    def copy() -> None:
        with torch.no_grad():
            target.copy_(source)

    return copy


def _find(module: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    found: Callable[..., tuple[Tensor, Tensor]] = getattr(importlib.import_module(module), name)
    return found


CONTESTANTS = (
    *(BY_NAME[name] for name in ("ours", "ours_fresh", "eager", "compile")),
    Contestant("liger", "Liger's triton_grpo_loss, gradient over the logits", _liger, overwrites=True, compiles=True),
    Contestant("trl", "TRL's fused log-probabilities, torch on top", _trl, compiles=True),
    Contestant("copy", "memory copy", _copy, overwrites=True),
)
OURS = ("ours", "ours_fresh")
_PEERS = {"liger": LIGER, "trl": TRL}


def absent(name: str) -> str | None:
    """Why a contestant cannot take part here; None if it can."""
    try:
        if name in _PEERS:
            _find(*_PEERS[name])
    except Exception as error:  # a peer may fail in any way on a torch or Triton that it does not know
        return f"{type(error).__name__}: {error}"
    return None
