"""Width of the clip range: GSPO with the paper's range and with wider ones beside GRPO, on responses of 2 to 32 tokens.

The paper makes no claim about this: it has one range, for long responses of large models. In `stability.py` that range
clips a fifth of all tokens, and GSPO learns more slowly than GRPO; here the range is widened on both sides. Model, data
and budget are those of the first setting there.

    python examples/paper/width.py
"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

import lab
import stability
import torch
from arithmetic import Settings, build_optimizer, greedy_accuracy, roll_out
from lab import COLORS, Learner, mean, ranged
from matplotlib.ticker import PercentFormatter

from gspo_kernels import GRPO, GSPO, grpo_loss, gspo_loss

WIDTHS = (1, 3, 10, 30, 100, 300)  # times the paper's range
GRPO_ITSELF = 0  # stands for GRPO with its own range
SETTINGS = replace(stability.SETTINGS, mini_batches=4)
SMOKE = replace(stability.SMOKE, mini_batches=4)


def train(learner: Learner, seed: int, width: int, settings: Settings, device: str) -> dict[str, Any]:
    learner = learner.copy()  # its tensors are in memory that all processes share
    torch.manual_seed(seed)
    model, tokenizer, problems = learner.model.to(device), learner.tokenizer, learner.problems
    optimizer = build_optimizer(model)
    loss = gspo_loss if width else grpo_loss
    clip = {"eps_low": width * GSPO.eps_low, "eps_high": width * GSPO.eps_high} if width else {}
    reward, clipped = [], []
    accuracy = [greedy_accuracy(model, tokenizer, problems.held_out)]
    for step in range(1, settings.steps + 1):
        rollout = roll_out(model, tokenizer, problems, settings)
        updates = lab.learn(model, optimizer, rollout, settings, settings.learning_rate_at(step), loss, **clip)
        clipped += [stats.clip_fraction.item() for _, stats, _ in updates]
        reward.append(rollout.rewards.mean().item())
        if settings.is_evaluated(step):
            accuracy.append(greedy_accuracy(model, tokenizer, problems.held_out))
        lab.tick()
    return {
        "seed": seed,
        "width": width,
        "clip_fraction": mean(clipped),  # of responses, GRPO's of tokens
        "reward": mean(reward[-max(1, settings.steps // 10) :]),  # of the last tenth
        "accuracy": mean(accuracy[1:]),  # held-out, after the start
        "last_accuracy": accuracy[-1],
    }


def chosen(record: dict[str, Any], width: int) -> list[dict[str, Any]]:
    """One run per seed."""
    return [run for run in record["runs"] if run["width"] == width]


def draw(record: dict[str, Any], arguments: Namespace) -> None:
    figure, (left, right) = lab.panels(2, f"GSPO with wider clip ranges: mean and range of {record['seeds']} seeds")
    seeds = range(record["seeds"])
    widths = record["widths"]
    runs = [chosen(record, width) for width in widths]
    grpo = [run["accuracy"] for run in chosen(record, GRPO_ITSELF)]
    left.axhline(mean(grpo), color=COLORS["grpo"], label="GRPO, its own range")
    left.axhspan(min(grpo), max(grpo), color=COLORS["grpo"], alpha=0.15, lw=0)
    accuracies = [[column[seed]["accuracy"] for column in runs] for seed in seeds]
    lab.spread(left, widths, accuracies, COLORS["gspo"], "GSPO", marker="o")
    left.set(title="Held-out accuracy, mean of the training")
    left.legend(frameon=False, loc="lower right")
    fractions = [[column[seed]["clip_fraction"] for column in runs] for seed in seeds]
    lab.spread(right, widths, fractions, COLORS["gspo"], "GSPO", marker="o")
    right.set(title="Responses clipped", ylim=(0, None))
    for axes in (left, right):
        axes.set(xscale="log", xlabel=f"width of the range, times {GSPO.eps_low:g} and {GSPO.eps_high:g}")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lab.write(figure, arguments)


def section(record: dict[str, Any]) -> str:
    lines = [
        "| clip range | clipped | held-out accuracy at the end | mean of the training | reward, last tenth |",
        "|---|--:|--:|--:|--:|",
    ]
    for width in (*record["widths"], GRPO_ITSELF):
        runs = chosen(record, width)
        loss, times, unit = (GSPO, width, "responses") if width else (GRPO, 1, "tokens")
        name = f"{loss.__name__}, {times * loss.eps_low:.2g} and {times * loss.eps_high:.2g}"
        cells = [f"{mean([run['clip_fraction'] for run in runs]):.2%} of {unit}"]
        cells += [ranged([run[key] for run in runs], ".0%") for key in ("last_accuracy", "accuracy", "reward")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(arguments: Namespace, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    seeds, device = range(arguments.seeds), arguments.device
    jobs = [(seed, settings, device) for seed in seeds]
    learners = lab.side_by_side(stability.warmed_up, jobs, len(jobs), arguments.workers, "warm-up")
    trainings = [(learners[seed], seed, width, settings, device) for width in (GRPO_ITSELF, *WIDTHS) for seed in seeds]
    runs = lab.side_by_side(train, trainings, len(trainings) * settings.steps, arguments.workers, "width")
    return lab.save(arguments, settings, began, {"widths": WIDTHS, "runs": runs})


def main() -> None:
    arguments, settings = lab.parse(__doc__, "width", stability.SEEDS, SETTINGS, SMOKE)
    draw(lab.load(arguments) if arguments.redraw else run(arguments, settings), arguments)


if __name__ == "__main__":
    main()
