"""Width of the clip range: GSPO with the paper's range and with wider ones beside GRPO, on responses of 2 to 32 tokens.

Not a claim of the paper, which has one range, for long responses of large models. In `stability.py` it clips a fifth of
all tokens, and GSPO learns more slowly than GRPO; here is what becomes of that as the range is widened on both sides.
Model, data and budget are those of its first setting.

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
from lab import COLORS, Learner
from matplotlib.ticker import PercentFormatter
from stability import percent

from gspo_kernels import GSPO

WIDTHS = (1, 3, 10, 30, 100, 300)  # times the paper's range
GRPO_ITSELF = 0  # in the place of a width: GRPO with its own range
SETTINGS = replace(stability.SETTINGS, mini_batches=4)
SMOKE = replace(stability.SMOKE, mini_batches=4)


def train(learner: Learner, seed: int, width: int, settings: Settings, device: str) -> dict[str, Any]:
    learner = learner.copy()  # tensors come in memory that all processes share
    torch.manual_seed(seed)
    model, tokenizer, problems = learner.model.to(device), learner.tokenizer, learner.problems
    optimizer = build_optimizer(model)
    loss = lab.LOSSES["gspo" if width else "grpo"]
    usual = GSPO()
    clip = {"eps_low": width * usual.eps_low, "eps_high": width * usual.eps_high} if width else {}
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
        "clip_fraction": sum(clipped) / len(clipped),  # of responses, GRPO's of tokens
        "reward": reward,
        "held_out_accuracy": accuracy,
    }


def chosen(record: dict[str, Any], width: int) -> list[dict[str, Any]]:
    """One run per seed."""
    return [run for run in record["runs"] if run["width"] == width]


def of_training(run: dict[str, Any]) -> float:
    """The mean held-out accuracy after the start."""
    later: list[float] = run["held_out_accuracy"][1:]
    return sum(later) / len(later)


def at_the_end(run: dict[str, Any]) -> float:
    found: float = run["held_out_accuracy"][-1]
    return found


def draw(record: dict[str, Any], arguments: Namespace) -> None:
    figure, (left, right) = lab.panels(2, f"GSPO with wider clip ranges: mean and range of {record['seeds']} seeds")
    seeds = range(record["seeds"])
    widths = record["widths"]
    runs = [chosen(record, width) for width in widths]
    grpo = [of_training(run) for run in chosen(record, GRPO_ITSELF)]
    left.axhline(sum(grpo) / len(grpo), color=COLORS["grpo"], label="GRPO, its own range")
    left.axhspan(min(grpo), max(grpo), color=COLORS["grpo"], alpha=0.15, lw=0)
    accuracies = [[of_training(column[seed]) for column in runs] for seed in seeds]
    lab.spread(left, widths, accuracies, COLORS["gspo"], "GSPO", marker="o")
    left.set(title="Held-out accuracy, mean of the training")
    left.legend(frameon=False, loc="lower right")
    fractions = [[column[seed]["clip_fraction"] for column in runs] for seed in seeds]
    lab.spread(right, widths, fractions, COLORS["gspo"], "GSPO", marker="o")
    right.set(title="Responses clipped", ylim=(0, None))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="width of the range, times 3e-4 and 4e-4")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lab.write(figure, arguments)


def section(record: dict[str, Any]) -> str:
    lines = [
        "| clip range | clipped | held-out accuracy at the end | mean of the training | reward, last tenth |",
        "|---|--:|--:|--:|--:|",
    ]
    tenth = max(1, record["settings"]["steps"] // 10)
    for width in (*record["widths"], GRPO_ITSELF):
        runs = chosen(record, width)
        usual = GSPO()
        name = f"GSPO, {width * usual.eps_low:.2g} and {width * usual.eps_high:.2g}" if width else "GRPO, 0.2 and 0.27"
        fraction = sum(run["clip_fraction"] for run in runs) / len(runs)
        cells = [
            f"{fraction:.2%} of {'responses' if width else 'tokens'}",
            percent([at_the_end(run) for run in runs]),
            percent([of_training(run) for run in runs]),
            percent([sum(run["reward"][-tenth:]) / tenth for run in runs]),
        ]
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
