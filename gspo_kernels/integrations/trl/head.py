"""An LM head that can apply a given function to its hidden states instead of computing logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Options of a model's config that change logits between head and softmax
LOGIT_OPTIONS = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class JobHead(torch.nn.Linear):
    """An LM head that applies `job` to the hidden states, or computes logits where it has no job.

    `become` changes the class of the model's own head, as `fully_shard` does: parameters, name and hooks stay.
    """

    job: Callable[[Tensor], Any] | None = None

    @classmethod
    def become(cls, model: Any) -> None:
        """Turns the model's LM head into a `JobHead`; refuses models that change logits after it."""
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(head) is not torch.nn.Linear:
            raise ValueError(
                "model: expected an LM head that is a torch.nn.Linear, without adapter or quantization; got "
                f"{type(head).__name__}"
            )
        for name in LOGIT_OPTIONS:
            value = getattr(config, name, None)
            if value not in (None, 1.0):
                raise ValueError(f"{name}: expected a model whose logits are its head's output; got {value}")
        head.__class__ = cls

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden) if self.job is None else self.job(hidden)


class Opaque:
    """Hides tensors in a model's output from FSDP2, which rounds those that it finds to bf16."""

    def __init__(self, value: Any) -> None:
        self.value = value
