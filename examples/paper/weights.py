"""Weights of tokens: what GRPO and GSPO make of each token of one batch, as in section 4.2 of the GSPO paper.

The gradient of either loss is a sum over tokens of `weight * advantage / length * grad log pi`. The weight is the
token's own ratio in GRPO, the response's in GSPO, and 0 where clipped. Here it is computed from the gradients of both
losses for one mini-batch, the last of the four of a rollout, after a few steps of GRPO.

    python examples/paper/weights.py                     # a minute
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import lab
import torch
from arithmetic import QUICK, Settings, build_optimizer, roll_out
from lab import COLORS, NAMES
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from gspo_kernels import GRPO, GSPO, Objective, grpo_loss, policy_loss_from_logprobs

SETTINGS = Settings(steps=10, groups=64)
SMOKE = replace(QUICK, steps=2)
LOSSES: dict[str, Objective] = {"grpo": GRPO(), "gspo": GSPO()}
LABELS = {"grpo": "of a token, $w_{i,t}$: GRPO's weight", "gspo": "of the response, $s_i$: GSPO's weight"}


def token_weights(
    objective: Objective, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """The weight of each token [B, T] in a loss: its gradient is `-weight * advantage / length`, times the mean's 1/B.

    The weight is the ratio, or 0 where clipped; NaN where the gradient is always 0: masked tokens, advantage 0.
    """
    logprobs = logprobs.detach().clone().requires_grad_()
    loss, _ = policy_loss_from_logprobs(
        logprobs, advantages, old_logprobs, objective=objective, mask=mask, aggregation="sequence_mean", normalizer=1.0
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    weights = -gradient * mask.sum(1, keepdim=True) / advantages[:, None]
    return torch.where(mask.bool() & (advantages[:, None] != 0), weights, torch.nan)


def measure(settings: Settings, device: str) -> list[dict[str, Any]]:
    """For each response of the mini-batch with an advantage other than 0: its tokens, their ratios and weights."""
    learner = lab.warmed_up(0, settings, device)
    torch.manual_seed(0)
    optimizer = build_optimizer(learner.model)
    for _ in range(settings.steps):
        rollout = roll_out(learner.model, learner.tokenizer, learner.problems, settings)
        *_, last = lab.learn(learner.model, optimizer, rollout, settings, settings.learning_rate, grpo_loss)
        lab.tick()
    part, stats, _ = last  # the stats are from before the update
    token_ids, mask = part.batch.targets()
    weights = {
        name: token_weights(loss, stats.logprobs, part.old_logprobs, part.advantages, mask)
        for name, loss in LOSSES.items()
    }
    ratio = (stats.logprobs - part.old_logprobs).exp()
    responses = []
    for i in part.advantages.nonzero().flatten().tolist():
        here = mask[i].bool()
        responses.append(
            {
                "tokens": " ".join(learner.tokenizer.convert_ids_to_tokens(token_ids[i, here].tolist())),
                "advantage": part.advantages[i].item(),
                "ratio": ratio[i, here].tolist(),
                **{name: each[i, here].tolist() for name, each in weights.items()},
            }
        )
    return responses


def run(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    arguments.workers = 1
    (responses,) = lab.side_by_side(measure, [(settings, arguments.device)], settings.steps, 1, arguments.name)
    shown = max(responses, key=farthest)
    content = {"shown": responses.index(shown), "words": shown["tokens"]}
    for response in responses:
        del response["tokens"]
    return lab.save(arguments, settings, began, {**content, "responses": responses})


def farthest(response: dict[str, Any]) -> float:
    """The largest deviation of a token's ratio from 1."""
    return max(abs(ratio - 1) for ratio in response["ratio"])


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    responses = record["responses"]
    figure, (one, each, joint) = lab.panels(3, "What the two losses make of the tokens of one mini-batch")

    shown = responses[record["shown"]]
    words = ["end" if word == "<eos>" else word for word in record["words"].split()]
    x = range(len(words))
    one.vlines(x, 1, shown["ratio"], color=COLORS["grpo"], lw=0.8)
    dots(one, x, shown["ratio"], shown["grpo"], "grpo")
    dots(one, x, [sequence_ratio(shown)] * len(words), shown["gspo"], "gspo")
    one.set_xticks(x, words, fontsize=7)
    one.set(title=f"One response, of advantage {shown['advantage']:+.2f}", xlabel="token", ylabel="ratio")
    one.legend(frameon=False, fontsize=8)

    ordered = sorted(responses, key=sequence_ratio)
    of_token = [i for i, response in enumerate(ordered) for _ in response["ratio"]]
    ratios, weights = (list(chain(*(response[key] for response in ordered))) for key in ("ratio", "grpo"))
    dots(each, of_token, ratios, weights, "grpo")
    first = [response["gspo"][0] for response in ordered]
    dots(each, range(len(ordered)), list(map(sequence_ratio, ordered)), first, "gspo")
    each.set(title="All responses (hollow: clipped)", xlabel="response, in the order of $s_i$", ylabel="ratio")

    for loss in LOSSES:
        off = sorted((abs(weight - 1) for weight in kept_weights(responses, loss)), reverse=True)
        joint.step(off, [(i + 1) / len(off) for i in range(len(off))], color=COLORS[loss], label=NAMES[loss])
    joint.set(title="All tokens with a gradient", xlabel="x", ylabel="share with |weight - 1| above x")
    joint.set(xscale="log", xlim=(1e-5, 1))
    joint.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    joint.legend(frameon=False, fontsize=8)
    lab.write(figure, arguments)


def dots(axes: Axes, x: Sequence[int], ratios: Sequence[float], weights: Sequence[float], loss: str) -> None:
    """Hollow where the weight is 0."""
    fill = [COLORS[loss] if weight else "none" for weight in weights]
    axes.scatter(x, ratios, s=12, facecolor=fill, edgecolor=COLORS[loss], lw=0.8, zorder=3)
    axes.plot([], [], "o", ms=4, color=COLORS[loss], label=LABELS[loss])


def kept_weights(responses: list[dict[str, Any]], loss: str) -> list[float]:
    return [weight for response in responses for weight in response[loss] if weight]


def sequence_ratio(response: dict[str, Any]) -> float:
    return math.exp(statistics.fmean(map(math.log, response["ratio"])))


def section(record: dict[str, Any]) -> str:
    lines = [
        "| loss | advantage | responses | tokens | clipped | smallest weight | largest "
        "| largest quotient in one response |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for loss in LOSSES:
        for sign in (1, -1):
            responses = [response for response in record["responses"] if response["advantage"] * sign > 0]
            tokens = sum(len(response[loss]) for response in responses)
            weights = kept_weights(responses, loss)
            apart = [max(kept) / min(kept) for each in responses if (kept := kept_weights([each], loss))]
            lines.append(
                f"| {NAMES[loss]} | {'above' if sign > 0 else 'below'} 0 | {len(responses)} | {tokens} "
                f"| {1 - len(weights) / tokens:.1%} | {min(weights):.4f} | {max(weights):.4f} "
                f"| {max(apart):.3g} |"
            )
    return "\n".join(lines)


def main() -> None:
    arguments, settings = lab.parse(__doc__, "weights", 1, SETTINGS, SMOKE)
    record = lab.load(arguments) if arguments.redraw else run(arguments, settings)
    draw(record, arguments)


if __name__ == "__main__":
    main()
