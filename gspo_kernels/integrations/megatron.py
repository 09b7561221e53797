"""Losses from hidden states in Megatron-Core: a loss takes the place of a GPTModel's output layer, without logits.

    loss, stats = loss_from_hidden(model, lambda hidden, weight, **head: linear_gspo_loss(
        hidden, weight, token_ids, advantages, old_logprobs, mask=mask, **head), token_ids, position_ids, None)

Megatron-Core 0.18 has a hook for it, `output_processor`. For older versions see `loss_from_hidden`. Losses from logits
need no code: see docs/megatron.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["loss_from_hidden"]

Found = TypeVar("Found")

REFUSED = {  # options of Megatron's configuration, and what of them needs the output layer
    "mtp_num_layers": "the loss of multi-token prediction is computed from logits",
    "defer_embedding_wgrad_compute": "the deferred gradient is that of the output layer's own product",
}


def loss_from_hidden(model: Any, loss: Callable[..., Found], *inputs: Any, **keywords: Any) -> Found:
    """Runs the model up to its output layer and returns `loss(hidden, weight, bias=..., tp_group=..., ...)`.

    Hidden states that sequence parallelism splits are gathered once. The loss sums their gradient over the
    tensor-parallel group; the output layer and its collectives do not run. The gradient of the head is a gradient like
    any other: Megatron's `DistributedDataParallel` adds it to `main_grad`, also with `gradient_accumulation_fusion`.

    Args:
        model: Megatron's `GPTModel`, or `Float16Module` and `DistributedDataParallel` around one. Its forward takes
            `output_processor` (Megatron-Core 0.18), or it has the `post_process` flag of earlier versions, which is
            False during this forward; another thread must not run the model at that time.
        loss: called once, with this rank's operands of a `linear_*` loss. hidden [b, s, h], the output of the final
            norm, of all s tokens of this context-parallel rank; [t, h] with `packed_seq_params`. weight [V / tp, h],
            tied or not. By keyword: `bias`, `tp_group` (None for one rank) and `logit_scale` (that of muP, or 1). What
            else the loss needs (`vocab_size` of a padded vocabulary, `cp_group`, `normalizer`) is the caller's.
        inputs, keywords: of the model's forward: `input_ids, position_ids, attention_mask, packed_seq_params=...`.

    Returns:
        What `loss` returns. On a pipeline stage without an output layer, what the model returns.

    Raises:
        NotImplementedError: with `mtp_num_layers` or `defer_embedding_wgrad_compute`, which need the output layer.
        TypeError: if no `GPTModel` is inside.
    """
    gpt = _unwrapped(model)
    if not gpt.post_process:
        return model(*inputs, **keywords)  # type: ignore[no-any-return]
    for name, reason in REFUSED.items():
        if getattr(gpt.config, name, None):
            raise NotImplementedError(
                f"{name}: expected it off with a loss from hidden states, because {reason}; "
                f"got {getattr(gpt.config, name)!r}"
            )
    packed = keywords.get("packed_seq_params") is not None

    def of(hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any) -> Found:
        """The arguments are those of `output_processor`; hidden_states [s or s / tp, b, h]."""
        group, hidden = output_layer.tp_group, hidden_states
        if output_layer.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            # The loss returns the same, complete gradient on every rank: the backward splits it, and sums nothing.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=group)
        hidden = hidden.squeeze(1) if packed else hidden.transpose(0, 1)
        return loss(
            hidden,
            output_layer.weight if output_weight is None else output_weight,
            bias=output_layer.bias,
            tp_group=group if group.size() > 1 else None,
            logit_scale=float(gpt.config.mup_output_mult) if getattr(gpt.config, "use_mup", False) else 1.0,
        )

    if _takes(model, "fp32_output"):  # Float16Module would return a copy in float32
        keywords["fp32_output"] = False
    if "output_processor" in inspect.signature(gpt.forward).parameters:
        return model(*inputs, output_processor=of, **keywords)  # type: ignore[no-any-return]
    tied = gpt.shared_embedding_or_output_weight() if gpt.share_embeddings_and_output_weights else None
    with _without_output_layer(gpt):
        hidden_states = model(*inputs, **keywords)
    return of(hidden_states, gpt.output_layer, tied)


@contextmanager
def _without_output_layer(gpt: Any) -> Iterator[None]:
    """The flag of a pipeline stage that is not the last: its forward returns hidden states. The final norm stays."""
    gpt.post_process = False
    try:
        yield
    finally:
        gpt.post_process = True


def _modules(model: Any) -> Iterator[Any]:
    """The model, what it wraps, and so on."""
    while model is not None:
        yield model
        model = getattr(model, "module", None)


def _takes(model: Any, name: str) -> bool:
    """Whether a wrapper's forward has this argument."""
    return any(name in inspect.signature(each.forward).parameters for each in _modules(model))


def _unwrapped(model: Any) -> Any:
    for each in _modules(model):
        if hasattr(each, "post_process") and hasattr(each, "share_embeddings_and_output_weights"):
            return each
    raise TypeError(f"model: expected Megatron's GPTModel, or modules around one; got {type(model).__name__}")
