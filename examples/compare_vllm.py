"""Ways to train on vLLM's samples, from the same warmed-up models: the tables and the figure of docs/vllm.md.

The engine computes in float32 or bfloat16, the trainer in float32. The old log-probabilities are the engine's, or the
trainer's own, or the trainer's own with correction weights. With top-p, the loss has kept sets or not.

    .venv-vllm/bin/python examples/compare_vllm.py                # 24 trainings, into runs/vllm (after make demo-vllm)
    .venv-vllm/bin/python examples/compare_vllm.py --quick
    cp runs/vllm/vllm.json docs
    python examples/compare_vllm.py --redraw --output docs        # the page's figure and tables, from docs/vllm.json

Each finished training is a file in the folder `trainings`; those that are there with the same settings are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "paper"))

import lab
import torch
from arithmetic import QUICK, Settings, build_model, build_tokenizer
from engine import vllm_version
from lab import mean, ranged
from matplotlib.ticker import PercentFormatter
from train_vllm import HEAD_SIZE, SETTINGS, VllmHistory, Way, reinforce, start_engine

NAME = "vllm"
SEEDS = 3
SMOKE = replace(QUICK, warmup_steps=20, steps=2, digits=2, held_out=10, evaluations=1)
BF16, TOP_P = "bfloat16", 0.8
WAYS = {
    "fp32, the engine's": Way(),
    "fp32, the trainer's": Way("trainer"),
    "fp32, the trainer's, with weights": Way("weights"),
    "bf16, the engine's": Way("engine", BF16),
    "bf16, the trainer's": Way("trainer", BF16),
    "bf16, the trainer's, with weights": Way("weights", BF16),
    "fp32, top-p 0.8, the engine's, with kept sets": Way(top_p=TOP_P),
    "fp32, top-p 0.8, the engine's, all columns": Way(top_p=TOP_P, kept="none"),
}
STYLES = {  # of the figure: color, line
    "engine": "#0072B2",
    "trainer": "#D55E00",
    "weights": "#009E73",
}


# --- trainings --------------------------------------------------------------------------------------------------------


def file_of(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{WAYS[name].name}-seed-{seed}.json"


def finished(folder: Path, name: str, seed: int, settings: Settings) -> dict[str, Any] | None:
    """What a training with these settings has written, if there was one."""
    path = file_of(folder, name, seed)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found.pop("settings") == asdict(settings) else None


def trainings(dtype: str, seed: int, settings: Settings, names: Sequence[str], folder: Path, device: str) -> None:
    """The ways `names` that have no file yet, with one engine, from the same warmed-up model."""
    missing = [name for name in names if finished(folder, name, seed, settings) is None]
    lab.tick((len(names) - len(missing)) * settings.steps)
    if not missing:
        return
    build = partial(build_model, head_size=HEAD_SIZE)
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    engine = start_engine(build(tokenizer), tokenizer, Way(engine_dtype=dtype), seed, device)
    torch.set_num_threads(1)
    learner = lab.warmed_up(seed, settings, device, build)
    for name in missing:
        own = learner.copy()
        torch.manual_seed(seed)
        began = time.perf_counter()
        history = reinforce(
            own.model, own.tokenizer, own.problems, settings, engine, WAYS[name], quiet=True, on_step=lab.tick
        )
        content = summary(history) | {
            "total_seconds": time.perf_counter() - began,
            "settings": asdict(settings),
        }
        path = file_of(folder, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lab.as_text(lab.rounded(content)) + "\n")


def summary(history: VllmHistory) -> dict[str, Any]:
    """What the tables and the figure show of a training."""
    return {
        "reward": history.reward,
        "accuracy": history.held_out_accuracy,
        "apart": history.apart,
        "largest": history.largest_off,
        "clipped": [mean(values) for values in zip(*history.clip_fractions, strict=True)],
        "clipped_by_noise": mean(history.mismatch["clip_fraction"]),
        "tokens": mean(history.response_length),
        "seconds": {what: sum(values) for what, values in history.seconds.items()},
    }


def run(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    folder = arguments.output / "trainings"
    seeds = range(arguments.seeds)
    by_dtype = {dtype: [name for name, way in WAYS.items() if way.engine_dtype == dtype] for dtype in ("float32", BF16)}
    jobs = [
        (dtype, seed, settings, names, folder, arguments.device) for seed in seeds for dtype, names in by_dtype.items()
    ]
    lab.side_by_side(trainings, jobs, len(seeds) * len(WAYS) * settings.steps, arguments.workers, arguments.name)
    found = {name: [finished(folder, name, seed, settings) for seed in seeds] for name in WAYS}
    return lab.save(arguments, settings, began, {"vllm": vllm_version(), "trainings": found})


# --- tables and figure ------------------------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> dict[str, str]:
    return {
        "training": training_table(record),
        "mismatch": mismatch_table(record),
        "seconds": seconds_table(record),
        "source": source(record),
    }


def source(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    return (
        f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}, {record['settings']['steps']} steps of "
        f"{record['settings']['groups'] * record['settings']['samples']} responses of "
        f"{mean([run['tokens'] for runs in record['trainings'].values() for run in runs]):.0f} tokens on average, "
        f"{machine['workers']} processes on {machine['processor']}, vLLM {record['vllm']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
    )


def percent(value: float) -> str:
    return f"{value:.1%}" if 0 < value < 0.1 else f"{value:.0%}"


def tenth(values: list[float], first: bool = False) -> float:
    """The mean of the last tenth, or of the first."""
    count = max(1, len(values) // 10)
    return mean(values[:count] if first else values[-count:])


def training_table(record: dict[str, Any]) -> str:
    titles = ["engine, old log-probabilities", "reward, first tenth", "last tenth", "held-out accuracy, before"]
    titles += ["after", "clipped by mini-batch"]
    rows = []
    for name, runs in record["trainings"].items():
        cells = [
            ranged([tenth(run["reward"], first=True) for run in runs], ".0%"),
            ranged([tenth(run["reward"]) for run in runs], ".0%"),
            ranged([run["accuracy"][0] for run in runs], ".0%"),
            ranged([run["accuracy"][-1] for run in runs], ".0%"),
            ", ".join(percent(mean(values)) for values in zip(*(run["clipped"] for run in runs), strict=True)),
        ]
        rows.append([name, *cells])
    return lab.table(titles, rows)


def mismatch_table(record: dict[str, Any]) -> str:
    titles = ["engine, old log-probabilities", "nats per token", "first step", "last step"]
    titles += ["ratio off 1, largest", "clipped by the engine's noise"]
    rows = []
    for name, runs in record["trainings"].items():
        apart = [run["apart"] for run in runs]
        cells = [mean(list(map(mean, apart))), mean([x[0] for x in apart]), mean([x[-1] for x in apart])]
        cells.append(max(run["largest"] for run in runs))
        rows.append([name, *(f"{x:.1e}" for x in cells), percent(mean([run["clipped_by_noise"] for run in runs]))])
    return lab.table(titles, rows)


def seconds_table(record: dict[str, Any]) -> str:
    """Milliseconds per step, of the fastest seed: the machine may have done other work beside."""
    phases = ("pushing", "sampling", "recomputing", "training")
    rows = []
    for name, runs in record["trainings"].items():
        steps = len(runs[0]["reward"])
        fastest = min(runs, key=lambda run: run["total_seconds"])
        each = [1000 * fastest["seconds"][phase] / steps for phase in phases]
        total = fastest["total_seconds"]
        rows.append([name, *(f"{x:.0f}" for x in each), f"{total:.0f}"])
    titles = [f"{phase}, ms per step" for phase in phases]
    return lab.table(["engine, old log-probabilities", *titles, "whole training, s"], rows)


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    figure, (reward, accuracy, apart) = lab.panels(3, "GSPO on vLLM's samples, trainer in float32")
    for name, runs in record["trainings"].items():
        way = WAYS[name]
        if way.top_p < 1:
            continue
        style = {"color": STYLES[way.old], "label": name, "ls": "--" if way.engine_dtype == BF16 else "-"}
        curves = [lab.smooth(run["reward"], 8) for run in runs]
        steps = range(1, len(curves[0]) + 1)
        lab.spread(reward, steps, curves, **style)
        lab.spread(apart, steps, [run["apart"] for run in runs], **style)
        last = len(runs[0]["accuracy"]) - 1
        at = [i * len(steps) / last for i in range(last + 1)]
        lab.spread(accuracy, at, [run["accuracy"] for run in runs], **style, marker="o", ms=3)
    reward.set(title="Reward", ylabel="sampled responses that are right")
    accuracy.set(title="Held-out accuracy", ylabel="problems solved, greedy decoding")
    apart.set(title="Engine against trainer", ylabel="nats per token, mean", yscale="log")
    for axes in (reward, accuracy, apart):
        axes.set_xlabel("step")
    for axes in (reward, accuracy):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    reward.legend(frameon=False, fontsize=7, title="engine, old log-probabilities", title_fontsize=7)
    lab.write(figure, arguments)


def fill(page: str, record: dict[str, Any]) -> str:
    return lab.fill(page, NAME, tables(record))


def main() -> None:
    arguments, settings = lab.parse(__doc__, NAME, SEEDS, SETTINGS, SMOKE, output=Path("runs/vllm"))
    record = lab.load(arguments) if arguments.redraw else run(arguments, settings)
    draw(record, arguments)
    page = arguments.output / f"{NAME}.md"
    if page.exists():
        page.write_text(fill(page.read_text(), record))
        print(f"page: {page}")
    print("", *tables(record).values(), sep="\n\n")


if __name__ == "__main__":
    main()
