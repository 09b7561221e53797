"""Who runs on a GPU: this package in Triton and in CUDA C++, torch, a copy, and the two peers that start from logits.

A peer is imported when it is prepared. What each is given is what it asks for: Liger the whole buffer [B, T + 1, V],
contiguous, its gradient over it; TRL the view without the last position.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from gspo_kernels.rows import cuda_rows

from ..cases import Problem
from ..contestants import BY_NAME as AT_HOME
from ..contestants import Contestant, Run, answer, ours, torch_loss_of_logprobs
from ..exact import EPSILONS

LIGER = ("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
TRL = ("trl.kernels", "selective_log_softmax_and_entropy")


def _in_triton(problem: Problem, overwrite_logits: bool) -> Run:
    """On a GPU asked for by name, for where C++ is faster that runs unasked; on a CPU whatever runs there."""
    return ours(problem, overwrite_logits, "triton" if problem.logits.is_cuda else None)


def _in_cuda(problem: Problem, overwrite_logits: bool) -> Run:
    return ours(problem, overwrite_logits, "cuda")


def _liger(problem: Problem) -> Run:
    triton_grpo_loss = _find(*LIGER)
    case = problem.case
    whole = problem.sampled.working.view(case.sequences, -1, case.vocab).detach().requires_grad_()
    low, high = EPSILONS[case.work.objective]
    level = "sequence" if case.work.objective == "gspo" else "token"
    # A mean over all tokens, or over a sequence's and then over sequences.
    loss_type = "bnpo" if case.work.objective == "ppo" else "grpo"

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
            loss_type=loss_type,
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


def _both_ways(name: str, label: str, prepare: Callable[..., Run]) -> tuple[Contestant, Contestant]:
    over, fresh = (functools.partial(prepare, overwrite_logits=overwrite) for overwrite in (True, False))
    return (
        Contestant(name, f"{label}, gradient over the logits", over, overwrites=True),
        Contestant(f"{name}_fresh", f"{label}, fresh gradient", fresh, gradient_only=True),
    )


_TRITON = _both_ways("ours", "gspo-kernels", _in_triton)
_CUDA = _both_ways("ours_cuda", "gspo-kernels in CUDA C++", _in_cuda)
_TORCH = (AT_HOME["eager"], AT_HOME["compile"])
_THEIRS = (
    Contestant("liger", "Liger's triton_grpo_loss, gradient over the logits", _liger, overwrites=True, compiles=True),
    Contestant("trl", "TRL's fused log-probabilities, torch on top", _trl, compiles=True),
)
_FLOOR = Contestant("copy", "memory copy", _copy, overwrites=True)

CONTESTANTS = (*_TRITON, *_TORCH, *_THEIRS, _FLOOR)  # of `speed`
ONE_READ = (*_TRITON, *_CUDA, _FLOOR)  # of `one_read`
BY_NAME = {contestant.name: contestant for contestant in (*CONTESTANTS, *_CUDA)}
OURS = tuple(contestant.name for contestant in (*_TRITON, *_CUDA))
_PEERS = {"liger": LIGER, "trl": TRL}


def absent(contestant: Contestant, problem: Problem) -> str:
    """Why a contestant cannot take part here; empty if it can."""
    if contestant in _CUDA:
        if not problem.case.work.one_read:
            return "left to Triton: a row's coefficient depends on other rows"
        return "; ".join(cuda_rows.unsupported_reasons(problem.logits))
    try:
        if contestant.name in _PEERS:
            _find(*_PEERS[contestant.name])
    except Exception as error:  # a peer may fail in any way on a torch or Triton that it does not know
        return f"{type(error).__name__}: {error}"
    return ""


def units(contestant: Contestant, problem: Problem) -> float:
    """Passes over the logits that go through memory in the way that a contestant takes, or the fewest of all ways.

    Triton's kernels cannot clip before a row's sum is complete: with a ratio per token they read a second time.
    """
    if contestant is _FLOOR:
        return 2.0
    if contestant in _TRITON and problem.case.work.one_read and not problem.case.work.on_policy:
        return problem.visits + 1.0
    return problem.units
