"""Every objective of the package on the demo's task, from the same warmed-up models: held-out accuracy, three seeds.

Per seed there is one supervised warm-up (see train_arithmetic.py), from which every objective starts, with its default
parameters and the demo's settings, but for 100 steps in place of 160. The plot shows the accuracy of greedy decoding on
held-out problems: a line for each objective, the mean over seeds, and the range of the seeds as a band.

What it does not show: which objective is best. The settings were tuned on GSPO, the model has 108k parameters, four
updates a batch are hardly off-policy, and three seeds are few. It shows that each objective trains.

    python examples/compare_objectives.py                          # some 40 minutes on one CPU core
    python examples/compare_objectives.py --losses gspo cispo      # these alone; trainings that are on record are kept
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from arithmetic import OBJECTIVES, QUICK, Problems, Settings, build_model, build_tokenizer, count, warm_up
from train_arithmetic import PercentFormatter, plt, reinforce

import gspo_kernels

Record = dict[str, dict[str, dict[str, list[float]]]]  # by objective and seed: steps and accuracies


def train(record: Record, losses: list[str], seeds: list[int], settings: Settings, path: Path) -> None:
    """Adds the trainings that the record lacks, and writes it after each of them."""
    for seed in seeds:
        missing = [name for name in losses if str(seed) not in record.get(name, {})]
        if not missing:
            continue
        torch.manual_seed(seed)
        problems = Problems(random.Random(seed), settings.digits, settings.held_out)
        tokenizer = build_tokenizer()
        warm = build_model(tokenizer)
        warm_up(warm, tokenizer, problems, settings)
        for name in missing:
            torch.manual_seed(seed)
            own = copy.deepcopy(problems)  # each objective meets the same problems
            history = reinforce(copy.deepcopy(warm), tokenizer, own, settings, OBJECTIVES[name]())
            record.setdefault(name, {})[str(seed)] = {
                "step": history.held_out_step, "accuracy": history.held_out_accuracy,
                "clip_fraction": [statistics.fmean(history.clip_fraction)],
            }  # fmt: skip
            path.write_text(json.dumps({"settings": asdict(settings), "versions": versions(), "trainings": record}))


def versions() -> dict[str, str]:
    modules = (torch, transformers, gspo_kernels)
    return {"python": platform.python_version(), **{each.__name__: each.__version__ for each in modules}}


def draw(record: Record, path: Path) -> None:
    names = [name for name in OBJECTIVES if name in record]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns, 2.7 * rows),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    means = {}
    for name in names:
        runs = list(record[name].values())
        by_step = list(zip(*(run["accuracy"] for run in runs), strict=True))
        means[name] = runs[0]["step"], [statistics.fmean(values) for values in by_step], by_step
    for axes, name in zip(panels.flat, names, strict=False):
        for step, mean, _ in means.values():
            axes.plot(step, mean, color="#bbbbbb", linewidth=0.8)
        step, mean, by_step = means[name]
        axes.fill_between(step, [min(x) for x in by_step], [max(x) for x in by_step], color="#0072B2", alpha=0.2)
        axes.plot(step, mean, color="#0072B2", marker="o", markersize=3)
        axes.set_title(f"{OBJECTIVES[name].__name__}: {mean[0]:.0%} to {mean[-1]:.0%}", fontsize=10)
        axes.set_ylim(0.4, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(names) - columns) : len(names)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
    seeds = len(next(iter(record.values())))
    figure.supxlabel("step")
    figure.supylabel("held-out problems solved")
    figure.suptitle(f"Mean of {seeds} seeds, their range as a band; in grey the other objectives", fontsize=11)
    figure.savefig(path, dpi=130)


def table(record: Record) -> str:
    lines = ["| objective | held-out accuracy, by seed | mean | clip fraction |", "|---|---|--:|--:|"]
    for name in (name for name in OBJECTIVES if name in record):
        runs = record[name].values()
        last = [run["accuracy"][-1] for run in runs]
        clipped = statistics.fmean(run["clip_fraction"][0] for run in runs)
        shown = ", ".join(f"{x:.1%}" for x in last)
        lines.append(f"| `{OBJECTIVES[name].__name__}` | {shown} | {statistics.fmean(last):.1%} | {clipped:.2%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--losses", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES), help="(default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=count, default=100, help="of reinforcement learning (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/objectives"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test that learns next to nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = replace(QUICK, steps=2) if arguments.quick else Settings(steps=arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "objectives.json"
    record: Record = {}
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] != asdict(settings):
            parser.error(f"--output {arguments.output}: expected trainings with the same settings; {path} has others")
        record = found["trainings"]
    started = time.perf_counter()
    train(record, arguments.losses, arguments.seeds, settings, path)
    draw(record, path.with_suffix(".png"))
    print(table(record), f"{time.perf_counter() - started:.0f} s. Plot: {path.with_suffix('.png')}", sep="\n")


if __name__ == "__main__":
    main()
