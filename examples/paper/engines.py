"""Copies of a policy in lower precision, which stand for an inference engine, and rollouts of such a copy.

- fp32: the same weights; token by token with a key-value cache, where the trainer has one forward pass;
- bf16: weights, activations and logits in bfloat16;
- int8: the layers' weights in 8 bits, symmetric, a scale per output channel; embeddings, norms and head unchanged.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import lab
import torch
from arithmetic import Rollout, Settings, generate, grade, sample
from torch import Tensor, nn
from transformers import PreTrainedModel

from gspo_kernels import group_advantages, token_logprobs

PRECISIONS = ("fp32", "bf16", "int8")


class Int8Weight(NamedTuple):
    """Symmetric, a scale per output channel: weight = codes * scales."""

    codes: Tensor  # int8 [out, in], from -127 to 127
    scales: Tensor  # [out, 1]

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scales = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scales.where(scales > 0, 1.0)).round().to(torch.int8), scales)

    def weight(self) -> Tensor:
        return self.codes * self.scales


@torch.no_grad()
def copy_of(policy: PreTrainedModel, precision: str) -> PreTrainedModel:
    """A copy of the policy as an inference engine would load it."""
    engine = copy.deepcopy(policy)
    if precision == "bf16":
        for parameter in engine.parameters():  # buffers stay: engines keep the rotary frequencies in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    elif precision == "int8":
        for layer in engine.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(Int8Weight.of(layer.weight).weight())
    return engine


@dataclass
class Sampler:
    """Draws tokens at temperature 1, and keeps their log-probabilities."""

    logprobs: list[Tensor] = field(default_factory=list)  # [B, 1] each

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        logits = logits.float()
        tokens = sample(logits, position)
        self.logprobs.append(logits.log_softmax(-1).gather(-1, tokens))
        return tokens


def roll_out(
    engine: PreTrainedModel, policy: PreTrainedModel, learner: lab.Learner, settings: Settings
) -> tuple[Rollout, Tensor]:
    """(a rollout of the engine with its own log-probabilities as old ones, those that the policy recomputes)"""
    problems = [p for p in learner.problems.draw(settings.groups) for _ in range(settings.samples)]
    sampler = Sampler()
    batch, responses = generate(engine, learner.tokenizer, problems, sampler, max_response=settings.max_response)
    rewards = grade(problems, responses).to(policy.device)
    token_ids, mask = batch.targets()
    direct = torch.zeros(mask.shape, device=policy.device)
    drawn = torch.cat(sampler.logprobs, dim=1)
    direct[:, -1 - drawn.shape[1] : -1] = drawn  # row t predicts token t + 1
    with torch.no_grad():
        recomputed = token_logprobs(batch.logits(policy), token_ids, mask=mask).logprobs
    return Rollout(batch, rewards, group_advantages(rewards, group_size=settings.samples), direct), recomputed
