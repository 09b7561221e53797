"""Log-probabilities and losses of other libraries, each by its own functions, set to GSPO or GRPO as in the papers.

A library is imported when its function is needed. It gets the settings that its own trainer gives it or that suit it
best. The trainer is left out; where a loss is a trainer's method (TRL), the method runs on a stand-in for it.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cases import EPSILONS, Problem
from .contestants import Run, Unfit, answer, torch_logprobs

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [B, T, D], weight [V, D], token_ids [B, T] -> [B, T]
PACKAGES = ("liger-kernel", "trl", "transformers", "cut-cross-entropy", "verl", "triton")
_LIGER_TOKENS = 2_048  # rows of a tile of Liger's: with fewer in a chunk its products are smaller than they could be
_TORCH_ROWS = 512  # about as much memory as this package takes for logits
_TRL_COLUMNS = 32_768  # of a tile: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, whose module needs many packages


# ---- log-probabilities from hidden states


def materialised() -> Logprobs:
    return lambda hidden, weight, token_ids: torch_logprobs((hidden, weight), token_ids)


def trl() -> Logprobs:
    return lambda hidden, weight, token_ids: _trl_chunked(hidden.flatten(0, 1), weight, token_ids.flatten()).view(
        token_ids.shape
    )


def _trl_chunked(hidden: Tensor, weight: Tensor, token_ids: Tensor, *outputs: str) -> Any:
    """[N, D], [V, D], [N] -> [N]; `outputs`: what is computed besides."""
    function = _find("trl.kernels", "ChunkedLogProbFunction")
    return function.apply(hidden, weight, None, token_ids, 1.0, _TRL_COLUMNS, None, 1.0, outputs)[0]


def torch_chunked() -> Logprobs:
    """Of torch 2.13 and later; without options it would hold all logits.

    Left to itself it takes D / V of the rows at a time, some 16 of 2,048, each a walk over the whole head: minutes.
    """
    function = _find("torch.nn.functional", "linear_cross_entropy")
    options = _find("torch.nn", "LinearCrossEntropyOptions")(batch_chunk_size=_TORCH_ROWS)
    return lambda hidden, weight, token_ids: (
        -function(hidden.flatten(0, 1), weight, token_ids.flatten(), reduction="none", options=options).view(
            token_ids.shape
        )
    )


def cut_cross_entropy() -> Logprobs:
    """By its own Triton kernels on a GPU, with the gradient filter that it has on by default; else by torch.compile."""
    function = _find("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, token_ids: (
        -function(hidden, weight, token_ids, reduction="none", impl="cce" if hidden.is_cuda else "torch_compile")
    )


def verl() -> Logprobs:
    function = _find("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()
    return lambda hidden, weight, token_ids: function(hidden, weight, token_ids)[0]


def liger() -> Logprobs:
    """The inside of its loss, which itself returns none."""
    base = _find("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")
    return lambda hidden, weight, token_ids: base.chunk_forward(hidden, weight, token_ids)


# ---- log-probabilities of a batch with a mask, as the trainers compute them


def trl_batch(problem: Problem) -> Any:
    """What its trainer's forward ends with, entropies included: on a GPU unmasked positions are scored, else all."""
    token_ids, mask = problem.token_ids, problem.mask
    if problem.case.from_logits:
        function = _find("trl.trainer.utils", "selective_log_softmax_and_entropy")
        return function(problem.logits, token_ids, entropy_requires_grad=False, row_mask=mask)[0]
    hidden, weight = problem.leaves
    if mask.is_cuda:
        found = _trl_chunked(hidden[mask], weight, token_ids[mask], "entropy")
        return found.new_zeros(mask.shape).masked_scatter(mask, found)
    found = _trl_chunked(hidden.flatten(0, 1), weight, token_ids.flatten(), "entropy")
    return found.view(mask.shape).masked_fill(~mask, 0)


def verl_batch(problem: Problem) -> Any:
    if not problem.case.from_logits:
        return verl()(*problem.leaves, problem.token_ids)
    return _find("verl.utils.torch_functional", "logprobs_from_logits")(problem.logits, problem.token_ids)


# ---- losses


def trl_loss(problem: Problem, logprobs: Tensor) -> Any:
    low, high = EPSILONS[problem.case.work.objective]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, logprobs.detach(), None),  # entropies: logged
        importance_sampling_level=_level(problem),
        loss_type="grpo",  # a mean over tokens, then over responses
        epsilon_low=low,
        epsilon_high=high,
        beta=0.0,
        args=SimpleNamespace(delta=None),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(
            gather=lambda values: values, reduce=lambda values, reduction: values, sync_gradients=False
        ),
    )
    batch = {
        "prompt_ids": problem.token_ids[:, :0],
        "prompt_mask": problem.mask[:, :0].long(),
        "completion_ids": problem.token_ids,
        "completion_mask": problem.mask.long(),
        "advantages": problem.advantages,
        "old_per_token_logps": problem.old_logprobs,
    }
    return _find("trl", "GRPOTrainer")._compute_loss(trainer, None, batch)


def verl_loss(problem: Problem, logprobs: Tensor) -> Any:
    low, high = EPSILONS[problem.case.work.objective]
    config = _find("verl.workers.config", "ActorConfig")(
        strategy="fsdp",
        rollout_n=len(problem.mask),
        ppo_micro_batch_size_per_gpu=len(problem.mask),
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e6,  # no dual clip, which it has by default
    )
    advantages = problem.advantages if problem.advantages.ndim == 2 else problem.advantages[:, None]
    function = _find("verl.trainer.ppo.core_algos", "get_policy_loss_fn")(
        "vanilla" if problem.case.work.objective == "grpo" else "gspo"
    )
    return function(
        old_log_prob=problem.old_logprobs,
        log_prob=logprobs,
        advantages=advantages.expand_as(logprobs),
        response_mask=problem.mask,
        loss_agg_mode="seq-mean-token-mean",
        config=config,
    )[0]


def liger_from_hidden(problem: Problem) -> Run:
    if not problem.case.work.gradient:
        raise Unfit("returns no log-probabilities")
    low, high = EPSILONS[problem.case.work.objective]
    module = _find("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0,
        compiled=False,  # it compiles what follows the log-probabilities alone, [B, T] numbers
        use_ref_model=False,
        chunk_size=max(1, _LIGER_TOKENS // problem.token_ids.shape[1]),
        epsilon_low=low,
        epsilon_high=high,
        loss_type="grpo",  # mean over tokens, then over sequences
        importance_sampling_level=_level(problem),
    )
    inputs = *problem.leaves, problem.token_ids, problem.mask, problem.advantages
    return answer(problem, lambda: module(*inputs, old_per_token_logps=problem.old_logprobs)[0])


def trl_from_logits(problem: Problem) -> Any:
    """Its fused kernel, without a mask."""
    function = _find("trl.kernels", "selective_log_softmax_and_entropy")
    return function(problem.logits, problem.token_ids, temperature=1.0)[0]


def liger_from_logits(problem: Problem, inplace: bool = False) -> Run:
    """It needs a row after each response, [B, T + 1, V], which stands for the last token's prediction.

    `inplace`: the gradient replaces the logits, whose buffer has that row (`Case.spare`).
    """
    function = _find("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    if not problem.logits.is_cuda:
        raise Unfit("its kernel needs a GPU")
    case = problem.case
    low, high = EPSILONS[case.work.objective]
    loss_type = "bnpo" if case.work.objective == "ppo" else "grpo"  # a mean over all tokens, or over each sequence's
    if inplace:
        whole = problem.sampled.working[0].view(case.sequences, -1, case.vocab).detach().requires_grad_()
    else:
        whole = torch.nn.functional.pad(problem.logits.detach(), (0, 0, 0, 1)).requires_grad_()

    options: dict[str, Any] = {
        "completion_mask": problem.mask,
        "temperature": 1.0,
        "beta": 0.0,
        "eps_low": low,
        "eps_high": high,
        "inplace": inplace,
        "loss_type": loss_type,
        "importance_sampling_level": _level(problem),
        "reduce": True,
    }
    inputs = whole, problem.old_logprobs, None, problem.token_ids, problem.advantages
    return answer(problem, lambda: function(*inputs, **options)[0], leaf=whole)


def _level(problem: Problem) -> str:
    return "token" if problem.case.work.objective in ("grpo", "ppo") else "sequence"


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a library may fail in any way on versions that it does not know
        raise Unfit(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from error
