"""Runs a job on the hidden states that enter a model's LM head, within the model's own forward.

There the head's parameters are whole, whoever shards them. The head itself returns the logits of one token per
sequence. These are real logits, which the model may scale, cap, cast or copy as it always does; nobody reads their
values. The job's results do not pass through the model: they are tied to its output by autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor


class HeadTensors(TypedDict):
    """The arguments of a loss from hidden states that describe the head."""

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


class Found(NamedTuple):
    """What a job returns."""

    results: tuple[Tensor, ...]  # may be differentiated
    constants: Any = None


Job = Callable[[Tensor, torch.nn.Module], Found]  # of the hidden states and the head's module


def head_of(model: Any) -> Any:
    """The module that computes logits now: with PEFT's `modules_to_save`, the active copy of the head."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    active = [] if head.disable_adapters else [name for name in head.active_adapters if name in copies]
    return copies[active[0]] if active else head.original_module


def adapters_of(head: Any) -> list[str]:
    """The LoRA adapters that the head adds to its own product now."""
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return []
    return [name for name in head.active_adapters if name in head.lora_A]


def head_tensors(head: Any, hidden: Tensor, mask: Tensor) -> HeadTensors:
    """The head's parameters and, with LoRA, (u, B) of all active adapters, beside each other.

    Args:
        hidden: [B, T, D], undefined where `mask` [B, T] is 0.
    """
    base = getattr(head, "base_layer", head)
    left, right = list[Tensor](), list[Tensor]()
    for name in adapters_of(head):
        first = head.lora_A[name]
        rows = hidden.masked_fill(mask[..., None] == 0, 0.0).to(first.weight.dtype)
        left.append(first(head.lora_dropout[name](rows)) * head.scaling[name])
        right.append(head.lora_B[name].weight)
    low_rank = (torch.cat(left, -1), torch.cat(right, -1)) if left else None
    return {"weight": base.weight, "bias": base.bias, "low_rank": low_rank}


def run_at_head(model: Any, causal_model: Any, job: Job, inputs: dict[str, Any]) -> tuple[Found, Any]:
    """(what `job` returned for the head's input, the model's output for `inputs`).

    Args:
        model: what is called, such as a DistributedDataParallel of `causal_model`.
        causal_model: the model whose head it is.
    """
    head, passage, found = head_of(causal_model), _Passage(), list[Found]()

    def before(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        hidden = args[0] if args else next(iter(options.values()))
        found.append(job(hidden, module))
        one = hidden.detach()[:, :1]
        return ((one, *args[1:]), options) if args else ((), {**options, next(iter(options)): one})

    def after(module: Any, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        entered: Tensor = _Enter.apply(passage, logits.detach(), *found[-1].results)
        return entered

    hooks = (  # FSDP2 and DeepSpeed gather parameters before the first, and look for gradients after the second
        head.register_forward_pre_hook(before, with_kwargs=True),
        head.register_forward_hook(after, prepend=True),
    )
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != 1:
        raise RuntimeError(
            f"model: expected {type(causal_model).__name__} to call its LM head once in a forward; got {len(found)} "
            "calls"
        )
    if any(x.requires_grad for x in found[0].results) and not output.logits.requires_grad:
        raise RuntimeError(
            f"model: expected {type(causal_model).__name__} to return logits that are differentiable in its LM head's "
            "output; got constants"
        )
    results = _Leave.apply(passage, output.logits, *(x.detach() for x in found[0].results))
    return Found(results, found[0].constants), output


# The results enter the graph of the model's output at the head and leave it behind the model, so that the backward
# reaches the model's output first, then the head's, then the job: the order that FSDP2, DDP and DeepSpeed expect.
# On the way the gradient of the logits is zero; that of the results is handed over in `_Passage`.


class _Passage:
    gradients: tuple[Tensor | None, ...] = ()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: _Passage, logits: Tensor, *results: Tensor) -> Tensor:
        ctx.passage = passage
        return logits.clone()  # and no view, so that the model may change it in place

    @staticmethod
    def backward(ctx: Any, *of_logits: Any) -> Any:
        return None, None, *ctx.passage.gradients


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passage: _Passage, logits: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.passage, ctx.zeros = passage, logits.new_zeros(()).expand(logits.shape)
        return tuple(x.view_as(x) for x in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.passage.gradients = gradients
        return None, ctx.zeros, *(None for _ in gradients)
