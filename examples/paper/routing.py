"""Routing replay, GRPO's remedy in section 5.3 of the GSPO paper: the old policy's experts, forced on the new one.

A router's choices are written down when a rollout is made, and its batch brings them to every later forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from arithmetic import Batch, Rollout, Settings, roll_out
from lab import Learner
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter


class RoutingReplay:
    """The experts that a model's routers choose: written down in one forward pass, forced in another.

    A forced router still weighs: by its own softmax, normalised over the experts it is given, so it gets a gradient.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """-> a list to be filled by layer: the last pass's choices [B * T, k], most likely expert first"""
        choices: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(self.routers)

        def write(layer: int, router: Qwen3MoeTopKRouter, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            choices[layer] = output[2]

        with self._hooked(write):
            yield choices

    @contextmanager
    def replay(self, choices: Sequence[Tensor]) -> Iterator[None]:
        """`choices`: [B * T, k] for each layer, of the tokens of the pass to come."""

        def force(
            layer: int, router: Qwen3MoeTopKRouter, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, _ = output
            weights = logits.softmax(-1, dtype=torch.float32).gather(-1, choices[layer])
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), choices[layer]

        with self._hooked(force):
            yield

    @contextmanager
    def _hooked(self, hook: Any) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            handles += (router.register_forward_hook(partial(hook, layer)) for layer, router in enumerate(self.routers))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class RoutedBatch(Batch):
    """A batch whose tokens keep the experts that they had when it was rolled out, whatever the model's weights."""

    experts: Tensor  # [B, T, layers, k]

    def chunk(self, count: int) -> Iterator[Batch]:
        parts = zip(super().chunk(count), self.experts.chunk(count), strict=True)
        return (RoutedBatch(**vars(part), experts=experts) for part, experts in parts)

    def logits(self, model: PreTrainedModel) -> Tensor:
        with RoutingReplay(model).replay(self.experts.flatten(0, 1).unbind(1)):
            return super().logits(model)


def roll_out_routed(learner: Learner, settings: Settings) -> tuple[Rollout, RoutedBatch]:
    """-> a rollout, and its batch with the experts that gave the old log-probabilities"""
    with RoutingReplay(learner.model).record() as choices:
        rollout = roll_out(learner.model, learner.tokenizer, learner.problems, settings)
    experts = torch.stack(choices, dim=1).unflatten(0, rollout.batch.input_ids.shape)  # the last pass was that of all
    return rollout, RoutedBatch(**vars(rollout.batch), experts=experts)


def changed(new: Tensor, old: Tensor) -> Tensor:
    """Which choices [..., k] of the new policy are not among those of the old one, in whatever order."""
    return (new[..., :, None] != old[..., None, :]).all(-1)
