"""Routing replay, GRPO's remedy in section 5.3 of the GSPO paper: the old policy's experts, forced on the new one.

The routers' choices are recorded with a rollout, and its batch replays them in every later forward pass. `look`
measures what updates have changed: choices, and log ratios with the model's own choices and with replayed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from gspo_kernels import GRPO, token_logprobs

GROUPS = {  # of log ratios; a token is rerouted if some of its experts have changed
    "tokens": "tokens",
    "tokens_replayed": "tokens, experts replayed",
    "rerouted": "rerouted tokens",
    "rerouted_replayed": "rerouted tokens, experts replayed",
    "kept": "tokens of unchanged experts",
    "kept_replayed": "tokens of unchanged experts, experts replayed",
    "sequences": "sequences",
    "sequences_replayed": "sequences, experts replayed",
}
SIZES = torch.logspace(-4, 1, 41)  # of log ratios, at which their distribution is recorded


class RoutingReplay:
    """The experts that a model's routers choose: recorded in one forward pass, forced in another.

    A forced router still computes the experts' weights, by its own softmax over them, so it gets a gradient.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = [(i, module) for i, layer in enumerate(model.model.layers) for module in layer.modules()]
        found = [(i, module) for i, module in modules if isinstance(module, Qwen3MoeTopKRouter)]
        self.layers, self.routers = [i for i, _ in found], [router for _, router in found]

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """-> a list that a forward pass fills by layer: its choices [B * T, k], most likely expert first"""
        choices: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(self.routers)

        def write(layer: int, router: Qwen3MoeTopKRouter, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            choices[layer] = output[2]

        with self._hooked(write):
            yield choices

    @contextmanager
    def replay(self, experts: Tensor) -> Iterator[None]:
        """`experts`: [B * T, layers, k] of the tokens of the next forward pass, of any integer dtype, in any order.

        Where they are -1 the model chooses itself: an engine returns none for a response's last token. The layers are
        those that have routers, or all layers of the model, as vLLM counts them.
        """
        columns = range(len(self.routers)) if experts.shape[1] == len(self.routers) else self.layers

        def force(
            layer: int, router: Qwen3MoeTopKRouter, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, own = output
            given = experts[:, columns[layer]].to(own.dtype)
            chosen = given.where(given >= 0, own)
            weights = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)
            if router.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), chosen

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
    """A batch whose tokens keep the experts that they had in the rollout, whatever the model's weights."""

    experts: Tensor  # [B, T, layers, k]

    def chunk(self, count: int) -> Iterator[Batch]:
        parts = zip(super().chunk(count), self.experts.chunk(count), strict=True)
        return (RoutedBatch(**vars(part), experts=experts) for part, experts in parts)

    def logits(self, model: PreTrainedModel) -> Tensor:
        with RoutingReplay(model).replay(self.experts.flatten(0, 1)):
            return super().logits(model)


def roll_out_routed(learner: Learner, settings: Settings) -> tuple[Rollout, RoutedBatch]:
    """-> a rollout, and its batch with the experts that gave the old log-probabilities"""
    with RoutingReplay(learner.model).record() as choices:
        rollout = roll_out(learner.model, learner.tokenizer, learner.problems, settings)
    experts = torch.stack(choices, dim=1).unflatten(
        0, rollout.batch.input_ids.shape
    )  # the last forward pass had all tokens
    return rollout, RoutedBatch(**vars(rollout.batch), experts=experts)


def changed(new: Tensor, old: Tensor) -> Tensor:
    """The choices [..., k] of the new policy that are not among those of the old one, in any order."""
    return (new[..., :, None] != old[..., None, :]).all(-1)


# --- what updates have changed ----------------------------------------------------------------------------------------

Sums = dict[str, Tensor]


@torch.no_grad()
def look(model: PreTrainedModel, rollout: Rollout, routed: RoutedBatch) -> Sums:
    """Changed choices and log ratios of all response tokens under the model's current weights, as sums over tokens.

    The ratios are computed twice with these weights: with the model's own choices, and with the rollout's replayed.
    """
    token_ids, mask = routed.targets()
    response, lengths = mask.bool(), mask.sum(1)
    plain = Batch(routed.input_ids, routed.attention_mask, routed.response_mask)

    def log_ratios(batch: Batch) -> tuple[Tensor, Tensor]:
        ratios = token_logprobs(batch.logits(model), token_ids, mask=mask).logprobs - rollout.old_logprobs
        ratios = ratios.where(response, 0.0)
        return ratios[response], ratios.sum(1) / lengths

    with RoutingReplay(model).record() as choices:
        own, own_sequences = log_ratios(plain)
    forced, forced_sequences = log_ratios(routed)
    moved = changed(torch.stack(choices, dim=1), routed.experts.flatten(0, 1))
    moved = moved[response.flatten()]  # [tokens, layers, k]
    rerouted = moved.flatten(1).any(1)
    of_tokens = (own, forced, own[rerouted], forced[rerouted], own[~rerouted], forced[~rerouted])
    groups = dict(zip(GROUPS, (*of_tokens, own_sequences, forced_sequences), strict=True))
    return {
        "moved": moved.float().mean(2).sum(0),
        "count": torch.tensor([len(group) for group in groups.values()]),
        "squares": torch.stack([group.double().square().sum() for group in groups.values()]),
        "outside": torch.stack([_outside(group) for group in groups.values()]),
        "larger": torch.stack([(group.abs() > size).sum() for group in groups.values() for size in SIZES]),
    }


def _outside(log_ratios: Tensor) -> Tensor:
    """How many ratios are outside GRPO's clip range."""
    ratios = log_ratios.exp()
    return ((ratios < 1 - GRPO.eps_low) | (ratios > 1 + GRPO.eps_high)).sum()


def add(some: Sums | None, more: Sums) -> Sums:
    return more if some is None else {name: some[name] + more[name] for name in some}
