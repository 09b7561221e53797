"""Stability and efficiency: GSPO, GSPO-token, GRPO and PPO-clip on one task, from one model, with one budget.

Figure 1 of the GSPO paper. Each loss has its own clip range, and all have the demo's learning rate; nothing is tuned
here. A rollout feeds 4 updates, as in the paper, or 16, of which the last are further off-policy; 16 updates also run
at a quarter of the rate, which ends about as far from the rollout as 4. All losses get the same problems, and the same
compute for the same number of responses: each response is sampled once and is in one mini-batch.

The clip rules of GSPO, GRPO and PPO are also applied to every update, whichever loss trains: `clipping.py` shows them.

    python examples/paper/stability.py                                    # eleven minutes on two cores
    python examples/paper/stability.py --seeds 8 --steps 320 --device cuda
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from typing import Any

import lab
import torch
from arithmetic import QUICK, Settings, build_optimizer, greedy_accuracy, roll_out
from lab import COLORS, LOSSES, NAMES, Learner, mean, ranged
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from weights import token_weights

from gspo_kernels import GRPO, GSPO, PPO, Objective

ARMS = ((4, 4e-4), (16, 4e-4), (16, 1e-4))  # updates per rollout, learning rate
SEEDS = 3
SETTINGS = Settings(steps=64, groups=16, mini_batches=16, evaluations=8)
SMOKE = replace(QUICK, groups=16, samples=4, mini_batches=16)

RULES: dict[str, Objective] = {"gspo": GSPO(), "grpo": GRPO(), "ppo": PPO()}
RULE_OF = {"gspo": "gspo", "gspo_token": "gspo", "grpo": "grpo", "ppo": "ppo"}
LENGTHS = ((1, 5), (6, 10), (11, 15), (16, 20), (21, 25), (26, 32))  # tokens; a sum without working takes 2 to 5
STAGES = 10  # of a training
CLIPPING = ("gspo", "grpo", "ppo")  # losses whose clipping is recorded; GSPO-token clips as GSPO does


# --- what is clipped --------------------------------------------------------------------------------------------------


class Meter:
    """Counts the tokens of each response that each rule clips."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rows: list[Tensor] = []  # [B, columns]: stage, depth, length, |log s|, tokens clipped by each rule

    def add(self, step: int, depth: int, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> None:
        length = mask.sum(1)
        columns = [
            torch.full_like(length, (step - 1) * STAGES // self.steps),
            torch.full_like(length, depth),
            length,
            (((logprobs - old) * mask).sum(1) / length).abs(),
            *((token_weights(rule, logprobs, old, advantages, mask) == 0).sum(1) for rule in RULES.values()),
        ]
        self.rows.append(torch.stack([column.float() for column in columns], dim=1).cpu())

    def shares(self, loss: str) -> dict[str, Any]:
        """Clipped by the loss's own rule, by stage of the training, depth and length; by all rules in all updates."""
        rows = torch.cat(self.rows)
        stage, depth, length, drift, *_ = rows.unbind(1)
        own = RULE_OF[loss]
        return {
            "drift": drift.mean().item(),
            "all": {rule: dict(zip(("tokens", "sequences"), share(rule, rows), strict=True)) for rule in RULES},
            "stage": clipped(own, [rows[stage == value] for value in stage.unique()]),
            "depth": clipped(own, [rows[depth == value] for value in depth.unique()]),
            "length": clipped(own, [rows[(low <= length) & (length <= high)] for low, high in LENGTHS]),
        }


def share(rule: str, rows: Tensor) -> tuple[float | None, float | None]:
    """Of a meter's rows, the shares of tokens and of sequences that a rule clips.

    A sequence counts as clipped if any of its tokens is. By GSPO's rule all or none are.
    """
    if not len(rows):
        return None, None
    _, _, length, _, *by_rule = rows.unbind(1)
    tokens = dict(zip(RULES, by_rule, strict=True))[rule]
    return (tokens.sum() / length.sum()).item(), (tokens > 0).float().mean().item()


def clipped(rule: str, parts: list[Tensor]) -> dict[str, Any]:
    """For each part of a meter's rows, the number of responses and the shares clipped."""
    tokens, sequences = zip(*(share(rule, rows) for rows in parts), strict=True)
    return {"responses": [len(rows) for rows in parts], "tokens": list(tokens), "sequences": list(sequences)}


# --- the trainings ----------------------------------------------------------------------------------------------------


def warmed_up(seed: int, settings: Settings, device: str) -> Learner:
    learner = lab.warmed_up(seed, settings, device)
    learner.model.cpu()  # for other processes
    lab.tick()
    return learner


def train(learner: Learner, seed: int, loss: str, settings: Settings, device: str) -> dict[str, Any]:
    learner = learner.copy()  # its tensors are in memory that all processes share
    torch.manual_seed(seed)
    model, tokenizer, problems = learner.model.to(device), learner.tokenizer, learner.problems
    optimizer, meter = build_optimizer(model), Meter(settings.steps)
    reward, tokens = [], 0
    at, accuracy = [0], [greedy_accuracy(model, tokenizer, problems.held_out)]
    began = time.process_time()
    for step in range(1, settings.steps + 1):
        rollout = roll_out(model, tokenizer, problems, settings)
        rate = settings.learning_rate_at(step)
        for depth, (part, stats, _) in enumerate(lab.learn(model, optimizer, rollout, settings, rate, LOSSES[loss])):
            meter.add(step, depth, stats.logprobs, part.old_logprobs, part.advantages, part.batch.targets()[1])
        reward.append(rollout.rewards.mean().item())
        tokens += int(rollout.batch.response_mask.sum())
        if settings.is_evaluated(step):
            at.append(step)
            accuracy.append(greedy_accuracy(model, tokenizer, problems.held_out))
        lab.tick()
    return {
        "seed": seed,
        "loss": loss,
        "arm": [settings.mini_batches, settings.learning_rate],
        "cpu_seconds": time.process_time() - began,
        "reward": reward,  # of each step
        "held_out_step": at,
        "held_out_accuracy": accuracy,
        "tokens": tokens,  # sampled, and learned from
        **({"clipping": lab.rounded(meter.shares(loss), 3)} if loss in CLIPPING else {}),
    }


def run(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    seeds, device, workers = range(arguments.seeds), arguments.device, arguments.workers
    jobs = [(seed, settings, device) for seed in seeds]
    learners = lab.side_by_side(warmed_up, jobs, len(jobs), workers, "warm-up")
    trainings = [
        (learners[seed], seed, loss, replace(settings, mini_batches=updates, learning_rate=rate), device)
        for updates, rate in ARMS
        for seed in seeds
        for loss in LOSSES
    ]
    runs = lab.side_by_side(train, trainings, len(trainings) * settings.steps, workers, "trainings")
    return lab.save(arguments, settings, began, {"arms": ARMS, "lengths": LENGTHS, "runs": runs})


def recorded(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The folder's record if it has these settings; otherwise the result of a new run."""
    if (arguments.output / f"{arguments.name}.json").exists():
        record = lab.load(arguments)
        expected = {"settings": asdict(settings), "seeds": arguments.seeds, "arms": [list(arm) for arm in ARMS]}
        if all(record[name] == value for name, value in expected.items()):
            return record
    return run(arguments, settings)


# --- figure and table -------------------------------------------------------------------------------------------------


def chosen(record: dict[str, Any], arm: list[float], loss: str) -> list[dict[str, Any]]:
    """One run per seed."""
    return [each for each in record["runs"] if each["arm"] == arm and each["loss"] == loss]


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    steps = record["settings"]["steps"]
    responses = record["settings"]["groups"] * record["settings"]["samples"] / 1000
    columns = len(record["arms"])
    figure, axes = lab.panels(columns, f"One task, model and budget: mean and range of {record['seeds']} seeds", rows=2)
    for column, (updates, rate) in enumerate(record["arms"]):
        upper, lower = axes[column], axes[columns + column]
        for loss in LOSSES:
            runs = chosen(record, [updates, rate], loss)
            style = {"color": COLORS[loss], "label": NAMES[loss], "linestyle": "--" if loss == "gspo_token" else "-"}
            rewards = [lab.smooth(each["reward"], max(1, steps // 16)) for each in runs]
            lab.spread(upper, [responses * step for step in range(1, steps + 1)], rewards, **style)
            accuracies = [each["held_out_accuracy"] for each in runs]
            lab.spread(lower, [responses * step for step in runs[0]["held_out_step"]], accuracies, **style)
        upper.set(title=f"{updates} updates per rollout, learning rate {rate:g}")
        lower.set(xlabel="thousand responses")
        for each in (upper, lower):
            each.set_ylim(0, 1)
            each.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set(ylabel="training reward")
    axes[columns].set(ylabel="held-out accuracy")
    axes[0].legend(loc="lower right", frameon=False)
    lab.write(figure, arguments)


def section(record: dict[str, Any]) -> str:
    lines = [
        "| updates, rate | loss | held-out accuracy at the end | mean of the training | largest fall"
        " | reward, last tenth | thousand tokens | CPU seconds |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in record["arms"]:
        for loss in LOSSES:
            runs = chosen(record, arm, loss)
            accuracy = [each["held_out_accuracy"] for each in runs]
            tenth = max(1, record["settings"]["steps"] // 10)
            cells = [
                ranged([each[-1] for each in accuracy], ".0%"),
                ranged([mean(each[1:]) for each in accuracy], ".0%"),
                ranged([largest_fall(each) for each in accuracy], ".0%"),
                ranged([mean(each["reward"][-tenth:]) for each in runs], ".0%"),
                f"{mean([each['tokens'] for each in runs]) / 1e3:.0f}",
                f"{mean([each['cpu_seconds'] for each in runs]):.0f}",
            ]
            lines.append(f"| {arm[0]}, {arm[1]:g} | {NAMES[loss]} | " + " | ".join(cells) + " |")
    pairs = [
        (one["reward"], other["reward"])
        for arm in record["arms"]
        for one, other in zip(chosen(record, arm, "gspo"), chosen(record, arm, "gspo_token"), strict=True)
    ]
    equal = sum(one == other for one, other in pairs)
    lines += [
        "",
        f"GSPO and GSPO-token have equal rewards in every step of {equal} of {len(pairs)} pairs of trainings.",
    ]
    return "\n".join(lines)


def largest_fall(values: list[float]) -> float:
    """The largest distance of a value below the largest value before it."""
    return max(max(values[: i + 1]) - value for i, value in enumerate(values))


def main() -> None:
    arguments, settings = lab.parse(__doc__, "stability", SEEDS, SETTINGS, SMOKE)
    draw(lab.load(arguments) if arguments.redraw else run(arguments, settings), arguments)


if __name__ == "__main__":
    main()
