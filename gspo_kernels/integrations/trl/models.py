"""Which models `GSPOTrainer` can train; all others are refused by name when the trainer is created."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import linear_logits
from ...linear.model_head import Found, HeadTensors, head_of, head_tensors, run_at_head
from ..transformers import IGNORED, LOGIT_OPTIONS, LogitTransform, logit_transform_of

# Model types of transformers that cannot be trained, and why. The sweep in the tests finds no others.
REFUSED_TYPES = {
    "dory": "its LM head multiplies each logit by a learned factor of the token",
    "prophetnet": "its LM head predicts several tokens at once from one position",
    "xlm-prophetnet": "its LM head predicts several tokens at once from one position",
}
TOLERANCE = 2**-6  # of logits in bfloat16, of the largest


def transform_at_head(config: Any) -> LogitTransform:
    """What a model does to its head's output. What it does to hidden states before the head is done there already."""
    transform = logit_transform_of(config)
    if LOGIT_OPTIONS.get(config.model_type, IGNORED).on_hidden:
        transform["logit_scale"] = 1.0
    return transform


def check_model(model: Any, device: torch.device) -> None:
    """Raises a ValueError if the trainer would not compute this model's own log-probabilities.

    The classes of transformers are known. Any other class runs once, on two tokens, and so does a model whose head has
    hooks or a forward of its own. Its logits are compared with those that the trainer would compute; unless its
    parameters are not on `device` yet, as under FSDP2 and ZeRO-3.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(base)
    if base.config.model_type in REFUSED_TYPES:
        raise ValueError(
            f"model: expected an LM head of which logits are products with one weight; got {kind.__name__}: "
            f"{REFUSED_TYPES[base.config.model_type]}"
        )
    if not getattr(base.config, "return_dict", True):
        raise ValueError(
            f"config.return_dict: expected True, because the trainer reads a model's output by name; got False of "
            f"{kind.__name__}"
        )
    devices = set(map(str, (getattr(base, "hf_device_map", None) or {}).values()))
    if len(devices) > 1:
        raise ValueError(
            f"device_map: expected one device, on which the head and the batch are; got {', '.join(sorted(devices))}. "
            "Use FSDP2 or DeepSpeed for larger models"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model: expected a causal model with an LM head that get_output_embeddings() returns; got {kind.__name__}"
        )
    copies = getattr(head, "modules_to_save", None)
    for each in (head,) if copies is None else (head.original_module, *copies.values()):
        check_head(each)
    try:
        transform_at_head(base.config)
    except ValueError as error:
        raise ValueError(
            f"model: expected logits that are the head's output, scaled or capped in a known way; got {kind.__name__}: "
            f"{error}"
        ) from error
    whole = all(p.device == device and not hasattr(p, "ds_id") for p in base.parameters())  # ds_id: ZeRO-3's
    if whole and (is_changed(head_of(model)) or not kind.__module__.startswith("transformers.")):
        check_logits(model)


def check_router(model: Any) -> None:
    """Refuses the router's loss for a class that does not compute it: TRL has one of its own for some of them."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not returns_router_loss(type(base)):
        raise ValueError(
            "router_aux_loss_coef: expected 0.0, because the model's class returns no aux_loss; got a weight for "
            f"{type(base).__name__}"
        )


def returns_router_loss(kind: type) -> bool:
    """Whether a class of models computes its router's loss, as far as its source is there to tell."""
    try:
        source = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return True
    return "aux_loss" in source.replace("aux_loss=None", "")


def check_head(head: Any) -> None:
    """Refuses heads that are more than a product, a bias and LoRA."""
    base = getattr(head, "base_layer", head)
    if not _is_linear(base):
        raise ValueError(
            "model: expected an LM head that is a torch.nn.Linear, or one with LoRA or modules_to_save, not quantized; "
            f"got {type(base).__module__}.{type(base).__name__}"
        )
    if base is head:
        return
    parts = [*getattr(head, "lora_A", {}).values(), *getattr(head, "lora_B", {}).values()]
    is_lora = type(head).__name__ == "Linear" and bool(parts) and all(map(_is_linear, parts))
    if not is_lora or getattr(head, "lora_variant", None) or any(part.bias is not None for part in parts):
        variants = [type(x).__name__ for x in getattr(head, "lora_variant", {}).values()]
        found = ", ".join(variants) or ("lora_bias=True" if is_lora else type(head).__name__)
        raise ValueError(
            "peft_config: expected plain LoRA on the LM head (no DoRA, no lora_bias), modules_to_save=['lm_head'], or "
            f"no adapter there; got {found}"
        )


def is_changed(head: Any) -> bool:
    """Whether a head may compute something else than its class does."""
    return bool("forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


@torch.no_grad()
def check_logits(model: Any) -> None:
    """Compares a model's logits of two tokens with those that the trainer would compute."""
    name, head = type(model).__name__, head_of(model)
    weight = getattr(head, "base_layer", head).weight
    ids = torch.tensor([[1, 2]], device=weight.device) % weight.shape[0]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def job(hidden: Tensor, module: torch.nn.Module) -> Found:
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        return Found((_logits(hidden, head_tensors(module, hidden, torch.ones_like(ids)), model.config),))

    training = model.training
    model.eval()
    try:
        expected = model(**inputs).logits.float()
        found = run_at_head(model, model, job, inputs)[0].results[0]
    except Exception as error:
        raise ValueError(
            f"model: expected a model that runs with an LM head of which the trainer needs one token's logits; got "
            f"{name}, with {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(training)
    largest = expected.abs().max().item()
    apart = (found - expected).abs().max().item() if found.shape == expected.shape else float("nan")
    if not apart <= TOLERANCE * largest:
        raise ValueError(
            f"model: expected logits that are the LM head's output with {logit_transform_of(model.config)}; got "
            f"{name}, whose logits differ from that by {apart:.2g} where the largest is {largest:.2g}"
        )


def _logits(hidden: Tensor, head: HeadTensors, config: Any) -> Tensor:
    """All logits in float32."""
    transform, logits = transform_at_head(config), linear_logits(hidden, **head).float()
    scaled, softcap = transform["logit_scale"] * logits, transform["softcap"]
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


@contextmanager
def head_without_adapter(model: Any) -> Iterator[None]:
    """Within it, `model.get_output_embeddings()` returns the head without its adapter, which TRL refuses from 1.15 on.

    Of a model that is given by its name there is nothing yet: TRL creates it, and refuses the adapter.
    """
    if isinstance(model, str):
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.get_output_embeddings
    base.get_output_embeddings = lambda: getattr(own(), "base_layer", own())
    try:
        yield
    finally:
        del base.get_output_embeddings
