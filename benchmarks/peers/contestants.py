"""Who answers: each by its own log-probabilities and its own loss, set to GSPO or GRPO as in the papers.

A peer is imported when it is prepared. Its trainer is left out, and where a loss is a trainer's method (TRL), the
method runs on a stand-in that has what it reads.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import gspo_kernels

from ..contestants import torch_loss_of_logprobs
from ..exact import EPSILONS
from ..linear import peers as from_hidden
from .inputs import Inputs

Answer = tuple[Tensor, tuple[Tensor, ...]]  # the loss, and the gradient of each leaf
Run = Callable[[], Answer]
Logprobs = Callable[[Inputs], tuple[Tensor, Tensor | None]]  # [B, T], and entropies where they come with them
Loss = Callable[[Inputs, Tensor, Tensor | None], Tensor]


class Unfit(Exception):
    """Why a contestant cannot take part."""


@dataclass(frozen=True)
class Contestant:
    name: str
    label: str
    start: str  # "logits" or "hidden"
    prepare: Callable[[Inputs], Run]
    overwrites: bool = False
    compiles: bool = False


# --- log-probabilities ------------------------------------------------------------------------------------------------


def _trl_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    function = _find("trl.trainer.utils", "selective_log_softmax_and_entropy")
    logprobs, entropies = function(
        inputs.leaves[0], inputs.token_ids, entropy_requires_grad=False, row_mask=inputs.mask
    )
    return logprobs, entropies


def _trl_hidden(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What its trainer's forward ends with: on a GPU unmasked positions are scored, elsewhere all, then masked."""
    (hidden, weight), mask, compact = inputs.leaves, inputs.mask, inputs.mask.is_cuda
    found = _find("trl.kernels", "ChunkedLogProbFunction").apply(
        hidden[mask] if compact else hidden.flatten(0, 1),
        weight,
        None,
        inputs.token_ids[mask] if compact else inputs.token_ids.flatten(),
        1.0,
        _find("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE"),
        None,
        1.0,
        ("entropy",),
    )[:2]
    if compact:
        logprobs, entropies = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
    else:
        logprobs, entropies = (x.view(mask.shape).masked_fill(~mask, 0) for x in found)
    return logprobs, entropies


def _verl_logits(inputs: Inputs) -> tuple[Tensor, None]:
    return _find("verl.utils.torch_functional", "logprobs_from_logits")(inputs.leaves[0], inputs.token_ids), None


def _verl_hidden(inputs: Inputs) -> tuple[Tensor, None]:
    return from_hidden.verl()(*inputs.leaves, inputs.token_ids), None


def _torch_logits(inputs: Inputs) -> tuple[Tensor, None]:
    logits = inputs.leaves[0].float()
    return logits.log_softmax(-1).gather(-1, inputs.token_ids[..., None])[..., 0], None


def _torch_hidden(inputs: Inputs) -> tuple[Tensor, None]:
    return from_hidden.materialised(*inputs.leaves, inputs.token_ids), None


# --- losses -----------------------------------------------------------------------------------------------------------


def _trl_loss(inputs: Inputs, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    low, high = EPSILONS[_clip_of(inputs)]
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        importance_sampling_level="token" if inputs.objective == "grpo" else "sequence",
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
        "prompt_ids": inputs.token_ids[:, :0],
        "prompt_mask": inputs.mask[:, :0].long(),
        "completion_ids": inputs.token_ids,
        "completion_mask": inputs.mask.long(),
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logprobs,
    }
    found: Tensor = _find("trl", "GRPOTrainer")._compute_loss(trainer, None, batch)
    return found


def _verl_loss(inputs: Inputs, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    low, high = EPSILONS[_clip_of(inputs)]
    config = _find("verl.workers.config", "ActorConfig")(
        strategy="fsdp",
        rollout_n=len(inputs.mask),
        ppo_micro_batch_size_per_gpu=len(inputs.mask),
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e6,  # no dual clip, which it has by default
    )
    advantages = inputs.advantages if inputs.advantages.ndim == 2 else inputs.advantages[:, None]
    function = _find("verl.trainer.ppo.core_algos", "get_policy_loss_fn")(
        "vanilla" if inputs.objective == "grpo" else "gspo"
    )
    found: Tensor = function(
        old_log_prob=inputs.old_logprobs,
        log_prob=logprobs,
        advantages=advantages.expand_as(logprobs),
        response_mask=inputs.mask,
        loss_agg_mode="seq-mean-token-mean",
        config=config,
    )[0]
    return found


def _torch_loss(inputs: Inputs, logprobs: Tensor, entropies: Tensor | None) -> Tensor:
    if inputs.objective == "gspo_token":
        raise Unfit("one advantage a response")
    return torch_loss_of_logprobs(logprobs, inputs.advantages, inputs.old_logprobs, inputs.mask, None, inputs.objective)


# --- both together ----------------------------------------------------------------------------------------------------


def _of(logprobs: Logprobs, loss: Loss) -> Callable[[Inputs], Run]:
    return lambda inputs: _answering(inputs, lambda: loss(inputs, *logprobs(inputs)))


def _compiled(logprobs: Logprobs) -> Callable[[Inputs], Run]:
    def prepare(inputs: Inputs) -> Run:
        if inputs.objective == "gspo_token":
            raise Unfit("one advantage a response")
        torch.compiler.reset()

        def whole(*leaves: Tensor) -> Tensor:
            given = Inputs(
                inputs.objective, (), leaves, inputs.token_ids, inputs.mask, inputs.old_logprobs, inputs.advantages
            )
            return _torch_loss(given, *logprobs(given))

        function = torch.compile(whole, dynamic=False, fullgraph=True)
        return _answering(inputs, lambda: function(*inputs.leaves))

    return prepare


def _ours(inputs: Inputs) -> Run:
    prefix = "" if inputs.from_logits else "linear_"
    function = getattr(gspo_kernels, f"{prefix}{inputs.objective}_loss")
    low, high = EPSILONS[_clip_of(inputs)]
    options: dict[str, Any] = {"mask": inputs.mask, "eps_low": low, "eps_high": high}
    if inputs.from_logits:
        options["overwrite_logits"] = True
    others = inputs.token_ids, inputs.advantages, inputs.old_logprobs
    return _answering(inputs, lambda: function(*inputs.leaves, *others, **options).loss)


def _liger_logits(inputs: Inputs) -> Run:
    """It wants a row after each response, [B, T + 1, V], which stands for the last token's prediction."""
    if not inputs.leaves[0].is_cuda:
        raise Unfit("its kernel needs a GPU")
    function = _find("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
    low, high = EPSILONS[_clip_of(inputs)]
    whole = torch.nn.functional.pad(inputs.pristine[0], (0, 0, 0, 1)).requires_grad_()

    def loss() -> Tensor:
        found: Tensor = function(
            whole,
            inputs.old_logprobs,
            None,
            inputs.token_ids,
            inputs.advantages,
            completion_mask=inputs.mask,
            temperature=1.0,
            beta=0.0,
            eps_low=low,
            eps_high=high,
            inplace=False,
            loss_type="grpo",
            importance_sampling_level="token" if inputs.objective == "grpo" else "sequence",
            reduce=True,
        )[0]
        return found

    def run() -> Answer:
        value = loss()
        return value.detach(), (torch.autograd.grad(value, whole)[0][:, :-1],)

    return run


def _liger_hidden(inputs: Inputs) -> Run:
    loss = from_hidden.liger_loss(inputs.mask.shape[1], _clip_of(inputs))
    others = inputs.token_ids, inputs.mask, inputs.advantages, inputs.old_logprobs
    return _answering(inputs, lambda: loss(*inputs.leaves, *others))


def _answering(inputs: Inputs, loss: Callable[[], Tensor]) -> Run:
    def run() -> Answer:
        value = loss()
        return value.detach(), torch.autograd.grad(value, inputs.leaves)

    return run


def _clip_of(inputs: Inputs) -> str:
    return "grpo" if inputs.objective == "grpo" else "gspo"


def _find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


CONTESTANTS = (
    Contestant("ours", "gspo-kernels", "logits", _ours, overwrites=True),
    Contestant("trl", "TRL", "logits", _of(_trl_logits, _trl_loss)),
    Contestant("verl", "verl", "logits", _of(_verl_logits, _verl_loss)),
    Contestant("liger", "Liger", "logits", _liger_logits),
    Contestant("eager", "torch eager", "logits", _of(_torch_logits, _torch_loss)),
    Contestant("compile", "torch.compile", "logits", _compiled(_torch_logits), compiles=True),
    Contestant("ours", "gspo-kernels", "hidden", _ours),
    Contestant("trl", "TRL", "hidden", _of(_trl_hidden, _trl_loss)),
    Contestant("verl", "verl", "hidden", _of(_verl_hidden, _verl_loss)),
    Contestant("liger", "Liger", "hidden", _liger_hidden),
    Contestant("eager", "torch eager", "hidden", _of(_torch_hidden, _torch_loss)),
    Contestant("compile", "torch.compile", "hidden", _compiled(_torch_hidden), compiles=True),
)


def starting_from(start: str) -> list[Contestant]:
    return [contestant for contestant in CONTESTANTS if contestant.start == start]
