"""What the experiments of this folder share: command line, parallel runs, records and the style of figures.

An experiment is one script. It trains the model of `arithmetic.py` from several seeds, one process each, writes
`<name>.json` with the numbers behind its figure and tables and no others, and draws `<name>.png` from that file alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import matplotlib
import torch
import transformers
from arithmetic import (
    QUICK,
    Problems,
    Rollout,
    Settings,
    build_model,
    build_tokenizer,
    count,
    settings_of,
    update,
    warm_up,
)
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import gspo_kernels
from gspo_kernels import Stats, grpo_loss, gspo_loss, gspo_token_loss, ppo_loss

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOSSES = {"gspo": gspo_loss, "gspo_token": gspo_token_loss, "grpo": grpo_loss, "ppo": ppo_loss}
NAMES = {"gspo": "GSPO", "gspo_token": "GSPO-token", "grpo": "GRPO", "ppo": "PPO-clip"}
COLORS = {
    "gspo": "#0072B2",
    "gspo_token": "#56B4E9",
    "grpo": "#D55E00",
    "ppo": "#CC79A7",
}  # distinct for colour-blind readers
GREEN, GREY = "#009E73", "#666666"


# --- a model that has been warmed up, and its updates -----------------------------------------------------------------


@dataclass
class Learner:
    """A model, its tokenizer and its problems."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    problems: Problems

    def copy(self) -> Learner:
        """Another learner, which draws the same problems."""
        return Learner(copy.deepcopy(self.model), self.tokenizer, copy.deepcopy(self.problems))


def warmed_up(
    seed: int,
    settings: Settings,
    device: str = "cpu",
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel] = build_model,
) -> Learner:
    """A learner after the supervised warm-up, which all compared trainings start from."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    problems = Problems(random.Random(seed), settings.digits, settings.held_out)
    learner = Learner(build(tokenizer).to(device), tokenizer, problems)
    warm_up(learner.model, tokenizer, problems, settings, quiet=True)
    return learner


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    settings: Settings,
    learning_rate: float,
    policy_loss: Callable[..., tuple[Tensor, Stats]],
    **options: Any,
) -> Iterator[tuple[Rollout, Stats, Tensor]]:
    """One update for each mini-batch of a rollout -> the mini-batch, the loss's stats, the gradient's norm.

    The first update is on-policy; each later one is further off-policy.
    """
    for part in rollout.chunk(settings.mini_batches):
        token_ids, mask = part.batch.targets()
        logits = part.batch.logits(model)
        loss, stats = policy_loss(logits, token_ids, part.advantages, part.old_logprobs, mask=mask, **options)
        yield part, stats, update(model, optimizer, loss, learning_rate, settings.max_grad_norm)


# --- the command line -------------------------------------------------------------------------------------------------


def parse(
    description: str | None,
    name: str,
    seeds: int,
    settings: Settings,
    quick: Settings = QUICK,
    parser: argparse.ArgumentParser | None = None,
    output: Path = Path("runs/paper"),
) -> tuple[argparse.Namespace, Settings]:
    """Adds the options of every experiment to those of `parser`, and parses the command line."""
    parser = parser or argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--seeds", type=count, help=f"how many, from 0 on (default: {seeds})")
    parser.add_argument("--steps", type=count, help=f"of reinforcement learning (default: {settings.steps})")
    parser.add_argument("--groups", type=count, help=f"problems per step (default: {settings.groups})")
    parser.add_argument("--samples", type=count, help=f"responses per problem (default: {settings.samples})")
    parser.add_argument("--device", default="cpu", help="where torch runs: cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=_cores(), help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=output, help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds that learns next to nothing")
    parser.add_argument("--redraw", action="store_true", help=f"only the figure, from the folder's {name}.json")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (1 if arguments.quick else seeds)
    arguments.name = name
    return arguments, settings_of(parser, arguments, quick if arguments.quick else settings)


def parse_study(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Adds the options of an experiment that has its own plan and a journal, and parses the command line."""
    parser.add_argument("--workers", type=count, default=_cores(), help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test that learns next to nothing")
    parser.add_argument("--redraw", action="store_true", help=f"only the figure, from the folder's {name}.json")
    arguments = parser.parse_args()
    arguments.name, arguments.device = name, "cpu"
    return arguments


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- runs side by side ------------------------------------------------------------------------------------------------

Job = tuple[Any, ...]
_ticks: Any = None


def tick(count: int = 1) -> None:
    """Called by a run for each step: moves the progress bar."""
    if _ticks is not None:
        _ticks.put(count)


def _begin(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_program, daemon=True).start()


def _end_with_the_program() -> None:
    """A killed program does not leave a run behind, which nobody would hear from."""
    program = multiprocessing.parent_process()
    assert program is not None
    program.join()
    os._exit(1)


def side_by_side(
    run: Callable[..., Any],
    jobs: Sequence[Job],
    total: int,
    workers: int,
    title: str,
    finished: Callable[[Job, Any], None] | None = None,
) -> list[Any]:
    """`run(*job)` for each job, in processes of one thread -> results in the jobs' order; `total`: all runs' ticks.

    `run` must be a function of a module's top level, because each process imports it. `finished(job, result)` is called
    after each run, in any order.
    """
    if not jobs:
        return []
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with (
        ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (ticks,)) as executor,
        tqdm(total=total, desc=title, unit="step") as bar,
    ):
        futures = [executor.submit(run, *job) for job in jobs]
        if finished is not None:
            for job, future in zip(jobs, futures, strict=True):
                future.add_done_callback(partial(_report, finished, job))
        while not all(future.done() for future in futures):
            if any(future.done() and future.exception() for future in futures):
                executor.shutdown(cancel_futures=True)
                break
            try:
                bar.update(ticks.get(timeout=0.2))
            except queue.Empty:
                continue
        while not ticks.empty():
            bar.update(ticks.get())
        return [future.result() for future in futures]


def _report(finished: Callable[[Job, Any], None], job: Job, future: Future[Any]) -> None:
    if not future.cancelled() and future.exception() is None:
        finished(job, future.result())


class Journal:
    """The results of finished runs, a line of JSON each, so that a long experiment goes on where it was stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        if path.exists():  # a line that a stopped program left unfinished is run again
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self.results = {(found := json.loads(line))["run"]: found["result"] for line in lines}
            path.write_text("".join(lines))

    def run(
        self, run: Callable[..., Any], jobs: Sequence[Job], workers: int, title: str, name: Callable[[Job], str]
    ) -> list[Any]:
        """As `side_by_side`, one tick a run; runs whose `name(job)` is in the journal are read from it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        left = {name(job): job for job in jobs if name(job) not in self.results}
        with self.path.open("a") as lines:

            def finished(job: Job, result: Any) -> None:
                self.results[name(job)] = rounded(result)
                lines.write(json.dumps({"run": name(job), "result": self.results[name(job)]}) + "\n")
                lines.flush()

            side_by_side(run, list(left.values()), len(left), workers, title, finished)
        return [self.results[name(job)] for job in jobs]


# --- records ----------------------------------------------------------------------------------------------------------


def save(arguments: argparse.Namespace, settings: Any, began: float, content: dict[str, Any]) -> dict[str, Any]:
    """Writes the record -> the record, as `load` reads it. `settings`: a dataclass."""
    record = {
        "experiment": arguments.name,
        "seeds": arguments.seeds,
        "device": arguments.device,
        "machine": {"processor": _processor(), "workers": arguments.workers},
        "seconds": round(time.perf_counter() - began),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, gspo_kernels)},
        },
        "settings": asdict(settings),
        **content,
    }
    path = arguments.output / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(rounded(record)) + "\n")
    print(f"numbers: {path}")
    return load(arguments)


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((arguments.output / f"{arguments.name}.json").read_text())
    return found


def as_text(value: Any, indent: str = "") -> str:
    """JSON: what fits on a line, and a list of numbers, is one line."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(indent + line) <= 120:
        return line
    if isinstance(value, list) and not any(isinstance(item, dict | list | str) for item in value):
        return line
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    items = value.values() if isinstance(value, dict) else value
    inner = indent + " "
    lines = [f"{inner}{name}{as_text(item, inner)}" for name, item in zip(names, items, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(lines) + f"\n{indent}{closing}"


def rounded(value: Any, digits: int = 5) -> Any:
    """`value` with all floats rounded to `digits` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- figures ----------------------------------------------------------------------------------------------------------


def panels(columns: int, title: str, rows: int = 1) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 4 * rows), layout="constrained", squeeze=False)
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.get_layout_engine().set(wspace=0.05)
    return figure, list(axes.flat)


def spread(
    axes: plt.Axes, x: Sequence[float], runs: Sequence[Sequence[float]], color: str, label: str, **style: Any
) -> None:
    """The mean over seeds, and a band from the smallest to the largest."""
    columns = list(zip(*runs, strict=True))
    axes.plot(x, list(map(mean, columns)), color=color, label=label, **style)
    if len(runs) > 1:
        axes.fill_between(x, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15, lw=0)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` values, of fewer at the start."""
    return [mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def axis_of_lengths(axes: plt.Axes) -> None:
    """A logarithmic axis of response lengths."""
    axes.set_xscale("log")
    axes.set_xticks((5, 10, 20, 40), (5, 10, 20, 40))
    axes.minorticks_off()


def write(figure: plt.Figure, arguments: argparse.Namespace) -> None:
    path = arguments.output / f"{arguments.name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"figure: {path}")


# --- tables -----------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ranged(values: Sequence[float], form: str | None = None) -> str:
    """Mean, smallest and largest; in the format `form`, or with two digits."""

    def text(value: float) -> str:
        return format(value, form or (".2g" if abs(value) < 100 else ".0f"))

    return f"{text(mean(values))} ({text(min(values))} to {text(max(values))})" if len(values) > 1 else text(values[0])


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; all columns but the first `left` are aligned to the right."""
    lines = [titles, ["---"] * left + ["--:"] * (len(titles) - left), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: str, kind: str, tables: dict[str, str]) -> str:
    """The page with these tables: each from `<!-- kind: name -->` to `<!-- end -->`."""
    for name, text in tables.items():
        block = rf"(<!-- {re.escape(kind)}: {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(block, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL)
    return page
