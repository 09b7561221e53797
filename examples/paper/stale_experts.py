"""Stale rollouts of experts: a small Qwen3-MoE with and without routing replay, under GRPO and GSPO at equal rates.

Section 5.3 of the GSPO paper: experts change under a rollout, so GRPO needs routing replay to converge, and GSPO does
not. Here a Qwen3-MoE learns the task of `running_sums.py` with 64 updates per rollout, which is the setting of the
staleness study in which the losses differ, and with 4. Each arm is a loss and a clip range, trained with and without
replay at the same rates from the same models. Replay is in the updates alone: sampling and the final accuracy use the
model's own experts.

All updates are watched: which tokens are rerouted, that is, have other experts in some layer than under the old policy,
and how far their log-probabilities are from the old ones. In the first rollout of each training without replay, every
mini-batch is also measured with the same weights and the old experts.

    python examples/paper/stale_experts.py            # goes on where it was stopped
    python examples/paper/stale_experts.py --quick    # a smoke run of a minute
"""

from __future__ import annotations

import argparse
import random
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lab
import torch
from arithmetic import update
from lab import COLORS, GREEN, GREY, Journal, mean, ranged
from matplotlib.ticker import PercentFormatter
from routing import changed
from running_sums import (
    SHORT,
    Part,
    Task,
    Trial,
    accuracy,
    build_optimizer,
    logits_of,
    name_of,
    rate_at,
    roll_out,
    train,
    warmed_up,
)
from staleness import RANGES
from torch import Tensor

from gspo_kernels import Objective, Stats, policy_loss

EXPERTS = 8  # of which a token uses two
ARMS: dict[str, Objective] = {name: RANGES[name] for name in ("GRPO 0.2", "GRPO 0.5", "GSPO x100")}
COLOR = {"GRPO 0.2": COLORS["grpo"], "GRPO 0.5": COLORS["ppo"], "GSPO x100": COLORS["gspo"]}
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
SHOWN = 8e-4  # the rate of the figure's ratios
GROUPS = {"rerouted": "rerouted tokens", "other": "other tokens"}


@dataclass(frozen=True)
class Grid:
    """Trainings: each arm with and without replay, at each rate, from each seed."""

    mini_batches: int
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Plan:
    task: Task
    grids: tuple[Grid, ...]  # the first one's first rollouts are looked at, too
    updates: int = 320

    def trials(self, grid: Grid) -> list[Trial]:
        """Seed by seed, so that a run that was stopped has whole seeds."""
        return [
            Trial(
                self.task, seed, arm, ARMS[arm], rate, grid.mini_batches, self.updates, experts=EXPERTS, replay=replay
            )
            for seed in range(grid.seeds)
            for arm in grid.arms
            for rate in grid.rates
            for replay in (False, True)
        ]

    def jobs(self) -> list[tuple[str, Trial]]:
        first, *others = [self.trials(grid) for grid in self.grids]
        looked = [("look", trial) for trial in first if not trial.replay]
        return [("train", trial) for trial in first] + looked + [("train", trial) for grid in others for trial in grid]


PLAN = Plan(
    SHORT,
    (
        Grid(64, ("GRPO 0.2", "GSPO x100"), RATES, seeds=3),
        Grid(64, ("GRPO 0.5",), RATES, seeds=3),
        Grid(4, ("GRPO 0.2", "GSPO x100"), (4e-4,), seeds=2),
        Grid(4, ("GRPO 0.2", "GSPO x100"), (8e-4,), seeds=3),  # the third was added after the first two differed
    ),
)
TINY = Task(digits=3, slip=0.1, warmup_steps=20)
QUICK = Plan(TINY, (Grid(4, tuple(ARMS), (4e-4, SHOWN), seeds=2), Grid(2, ("GRPO 0.2",), (SHOWN,), seeds=1)), updates=8)


# --- what is measured -------------------------------------------------------------------------------------------------

Sums = dict[str, float]


def routed_sums(part: Part, stats: Stats, choices: Sequence[Tensor]) -> Sums:
    """Counts, squared log ratios and clipped ones: of rerouted tokens, of other tokens, and of sequences.

    `choices` of the update, by layer [B * (P + T - 1), k]. A response token's experts are those at the position that
    predicts it.
    """
    assert part.experts is not None
    first = part.prompts.shape[1] - 1
    new = torch.stack(list(choices), dim=1).unflatten(0, (len(part.prompts), -1))  # [B, P + T - 1, layers, k]
    rerouted = changed(new, part.experts)[:, first:].flatten(2).any(2)  # [B, T]
    log_ratio = torch.where(part.mask, stats.logprobs - part.old_logprobs, 0.0).double()
    clipped = stats.clipped_low | stats.clipped_high
    of_tokens = clipped[:, None].expand_as(part.mask) if clipped.ndim == 1 else clipped
    found: Sums = {}
    for group, mask in {"rerouted": part.mask & rerouted, "other": part.mask & ~rerouted}.items():
        found[group] = mask.sum().item()
        found[f"{group}_squares"] = log_ratio[mask].square().sum().item()
        found[f"{group}_clipped"] = of_tokens[mask].sum().item()
    found["sequences"] = len(part.mask)
    found["sequences_squares"] = (log_ratio.sum(1) / part.mask.sum(1)).square().sum().item()
    found["sequences_clipped"] = (of_tokens & part.mask).any(1).sum().item()
    return found


def total(sums: Sequence[Sums]) -> Sums:
    return {name: sum(each.get(name, 0) for each in sums) for name in sums[-1]}


def share(sums: Sums) -> float:
    """Of the tokens that are rerouted."""
    return sums["rerouted"] / max(1, sums["rerouted"] + sums["other"])


def rms(sums: Sums, group: str) -> float:
    return float((sums[f"{group}_squares"] / max(1, sums[group])) ** 0.5)


def clipped(sums: Sums, group: str) -> float:
    return sums[f"{group}_clipped"] / max(1, sums[group])


class Watch:
    """Sums by staleness: of mini-batches after no update, after 1, 2 to 3, 4 to 7 and so on."""

    def __init__(self, trial: Trial) -> None:
        self.by_depth: list[Sums] = [{} for _ in range((trial.mini_batches - 1).bit_length() + 1)]

    def see(self, part: Part, stats: Stats, depth: int) -> None:
        """With replay the choices are those that the routers would have made."""
        self.put(depth, routed_sums(part, stats, part.choices))

    def put(self, depth: int, sums: Sums) -> None:
        self.by_depth[depth.bit_length()] = total([self.by_depth[depth.bit_length()], sums])

    def result(self) -> dict[str, Any]:
        return {"by_depth": self.by_depth}


def look(trial: Trial, folder: Path) -> dict[str, Any]:
    """The first rollout of a training: each mini-batch with the model's own experts, and with the old ones."""
    began = time.process_time()
    model = warmed_up(folder, trial.task, trial.seed, trial.experts)
    torch.manual_seed(trial.seed + 1000)
    parts, _ = roll_out(model, trial, random.Random(trial.seed + 1000))
    optimizer = build_optimizer(model)
    own, replayed = Watch(trial), Watch(trial)

    def loss_of(part: Part) -> tuple[Tensor, Stats]:
        with part.routed(model):
            logits = logits_of(model, part.prompts, part.responses)
        return policy_loss(
            logits, part.responses, part.advantages, part.old_logprobs, objective=trial.objective, mask=part.mask
        )

    for depth, part in enumerate(parts):
        loss, stats = loss_of(part)
        own.put(depth, routed_sums(part, stats, part.choices))
        with torch.no_grad():
            _, stats = loss_of(replace(part, replay=True))
        replayed.put(depth, routed_sums(part, stats, part.choices))  # grouped by the choices of the first pass
        update(model, optimizer, loss, rate_at(trial, depth + 1), trial.max_grad_norm)
    lab.tick()
    return {"own": own.by_depth, "replayed": replayed.by_depth, "seconds": time.process_time() - began}


def start(task: Task, seed: int, folder: Path) -> dict[str, Any]:
    """The model after its warm-up: its accuracy, and the busiest expert's share of each layer's choices."""
    trial = Trial(task, seed, "GRPO 0.2", ARMS["GRPO 0.2"], SHOWN, mini_batches=16, experts=EXPERTS)
    model = warmed_up(folder, task, seed, EXPERTS)
    torch.manual_seed(seed)
    parts, _ = roll_out(model, trial, random.Random(seed))
    used = [part.experts[:, part.prompts.shape[1] - 1 :][part.mask] for part in parts if part.experts is not None]
    chosen = torch.cat(used)  # [tokens, layers, k]
    counts = torch.stack([layer.flatten().bincount(minlength=EXPERTS) for layer in chosen.unbind(1)]).double()
    lab.tick()
    return {
        "accuracy": accuracy(model, trial),
        "busiest": (counts / counts.sum(1, keepdim=True)).amax(1).tolist(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


# --- record -----------------------------------------------------------------------------------------------------------


def work(plan: Plan, folder: Path, workers: int) -> dict[str, Any]:
    """Runs what the journal lacks -> what figure and tables show."""
    journal = Journal(folder / "stale_experts.jsonl")
    starts = [(plan.task, seed, folder) for seed in range(max(grid.seeds for grid in plan.grids))]
    before = journal.run(start, starts, workers, "warm-up", lambda job: f"start; {job[0]!r}; seed {job[1]}")
    jobs = [(kind, trial, folder) for kind, trial in plan.jobs()]
    found = journal.run(perform, jobs, workers, "trainings", lambda job: f"{job[0]}; {name_of(job[1])}")
    runs: dict[tuple[str, Trial], list[dict[str, Any]]] = {}  # of all seeds, by the first one's trial
    for (kind, trial, _), result in zip(jobs, found, strict=True):
        runs.setdefault((kind, replace(trial, seed=0)), []).append(result)
    return {
        "start": [each["accuracy"] for each in before],
        "parameters": before[0]["parameters"],
        "load": [mean(shares) for shares in zip(*(each["busiest"] for each in before), strict=True)],
        "trainings": [summary(trial, of, before) for (kind, trial), of in runs.items() if kind == "train"],
        "looks": [compared(trial, of) for (kind, trial), of in runs.items() if kind == "look"],
        "cpu_seconds": round(sum(result["seconds"] for result in found)),
    }


def perform(kind: str, trial: Trial, folder: Path) -> dict[str, Any]:
    return train(trial, folder, Watch) if kind == "train" else look(trial, folder)


def summary(trial: Trial, runs: list[dict[str, Any]], starts: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm at one rate, with or without replay; `runs`: one for each seed."""
    depths = [total(of_seeds) for of_seeds in zip(*(run["by_depth"] for run in runs), strict=True)]
    whole = total(depths)
    ends = [run["accuracy"] for run in runs]
    return {
        "mini_batches": trial.mini_batches,
        "arm": trial.name,
        "rate": trial.learning_rate,
        "replay": trial.replay,
        "accuracy": ends,
        "collapsed": sum(end < begin["accuracy"] for end, begin in zip(ends, starts, strict=False)),
        "rerouted": share(whole),
        "by_depth": [share(sums) for sums in depths],
        "rms": {group: rms(whole, group) for group in GROUPS},
        "clipped_tokens": mean([run["clipped_tokens"] for run in runs]),
        "clipped_sequences": mean([run["clipped_sequences"] for run in runs]),
    }


def compared(trial: Trial, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first rollout of one arm at one rate, with own experts and with the old ones, by staleness and over all."""
    found: dict[str, Any] = {"arm": trial.name, "rate": trial.learning_rate}
    for experts in ("own", "replayed"):
        depths = [total(of_seeds) for of_seeds in zip(*(run[experts] for run in runs), strict=True)]
        whole = total(depths)
        found[experts] = {
            "by_depth": {group: [rms(sums, group) for sums in depths] for group in GROUPS},
            "rms": {group: rms(whole, group) for group in (*GROUPS, "sequences")},
            "clipped": {group: clipped(whole, group) for group in (*GROUPS, "sequences")},
        }
    return {**found, "rerouted": share(whole)}


# --- figure and tables ------------------------------------------------------------------------------------------------


def title_of(arm: str) -> str:
    objective: Any = ARMS[arm]
    return f"{arm.split()[0]}, {objective.eps_low:g} and {objective.eps_high:g}"


def chosen(record: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [each for each in record["trainings"] if all(each[name] == value for name, value in wanted.items())]


def depth_names(count: int) -> list[str]:
    """Of bins of mini-batches, by the updates since the rollout."""
    ends = [(2 ** (i - 1), 2**i - 1) for i in range(1, count)]
    return ["0", *(str(low) if low == high else f"{low}-{high}" for low, high in ends)]


def draw(record: dict[str, Any], arguments: Namespace) -> None:
    figure, axes = lab.panels(3, "Stale rollouts of a small Qwen3-MoE, with and without routing replay", rows=2)
    stale = record["trainings"][0]["mini_batches"]
    for axis, arm in zip(axes, ARMS, strict=False):
        for replay, color, label in ((False, COLOR[arm], "own experts"), (True, GREEN, "old experts replayed")):
            found = chosen(record, mini_batches=stale, arm=arm, replay=replay)
            runs = list(zip(*(each["accuracy"] for each in found), strict=True))
            lab.spread(axis, [each["rate"] for each in found], runs, color, label, marker="s" if replay else "o")
        axis.axhline(mean(record["start"]), color=GREY, linestyle=":", label="before")
        axis.set(title=title_of(arm), xscale="log", xlabel="learning rate", ylim=(0, 1), ylabel="accuracy at the end")
        rates = [each["rate"] for each in found]
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.legend(frameon=False, fontsize="small", loc="lower left")
    _routes(axes[3], record, stale)
    _ratios(axes[4], record)
    _clips(axes[5], record, stale)
    lab.write(figure, arguments)


def _routes(axis: Any, record: dict[str, Any], stale: int) -> None:
    for arm, style in {"GRPO 0.2": "-", "GSPO x100": "--"}.items():
        found = chosen(record, mini_batches=stale, arm=arm, replay=False)
        for i, each in enumerate(found, start=1):
            line = {"color": COLOR[arm], "alpha": i / len(found), "linestyle": style, "marker": "o", "markersize": 4}
            axis.plot(each["by_depth"], label=f"{arm.split()[0]}, rate {each['rate']:g}", **line)
    names = depth_names(len(found[0]["by_depth"]))
    axis.set(title="Rerouted tokens without replay", ylim=(0, None))
    axis.set(xlabel="updates since the rollout", ylabel="share of response tokens")
    axis.set_xticks(range(len(names)), names)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(frameon=False, fontsize="small")


def _ratios(axis: Any, record: dict[str, Any]) -> None:
    """Without the mini-batch after no update, whose log ratios are zero."""
    found = next(each for each in record["looks"] if each["arm"] == "GRPO 0.2" and each["rate"] == SHOWN)
    names = depth_names(len(found["own"]["by_depth"]["other"]))
    for group, color in {"rerouted": COLORS["grpo"], "other": GREY}.items():
        for experts, style in (("own", "-"), ("replayed", "--")):
            label = GROUPS[group] + (", old experts" if experts == "replayed" else "")
            values = found[experts]["by_depth"][group][1:]
            axis.plot(range(1, len(names)), values, color=color, linestyle=style, marker="o", label=label)
    axis.set(title=f"Log ratios in the first rollout (GRPO, rate {SHOWN:g})", yscale="log")
    axis.set(xlabel="updates since the rollout", ylabel="root mean square")
    axis.set_xticks(range(1, len(names)), names[1:])
    axis.legend(frameon=False, fontsize="small")


def _clips(axis: Any, record: dict[str, Any], stale: int) -> None:
    for arm in ARMS:
        for replay, style in ((False, "-"), (True, "--")):
            found = chosen(record, mini_batches=stale, arm=arm, replay=replay)
            values = [each["clipped_sequences"] for each in found]
            label = f"{title_of(arm)}{', replay' if replay else ''}"
            axis.plot([each["rate"] for each in found], values, style, color=COLOR[arm], marker="o", label=label)
    rates = [each["rate"] for each in found]
    axis.set(title="Responses clipped (GRPO: in some token)", xscale="log", xlabel="learning rate", ylim=(0, 0.6))
    axis.set(ylabel="share of responses")
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.legend(frameon=False, fontsize="small")


def section(record: dict[str, Any]) -> dict[str, str]:
    return {
        "model": _model(record),
        "pairs": _pairs(record),
        "trainings": _trainings(record),
        "ratios": _first_rollout(record),
    }


def _model(record: dict[str, Any]) -> str:
    return (
        f"The model has {record['parameters']:,} parameters, and in each of its {len(record['load'])} layers {EXPERTS} "
        f"experts, two to a token. After the warm-up its accuracy is {ranged(record['start'], '.0%')}, and the busiest "
        f"expert has {' and '.join(f'{share:.0%}' for share in record['load'])} of a layer's choices."
    )


def _trainings(record: dict[str, Any]) -> str:
    titles = ["updates", "loss, range", "rate", "replay", "accuracy at the end", "collapsed", "rerouted tokens"]
    titles += ["rms of their log ratios", "of others'", "tokens clipped", "responses clipped"]
    rows = []
    for each in record["trainings"]:
        row = [str(each["mini_batches"]), title_of(each["arm"]), f"{each['rate']:g}", "yes" if each["replay"] else "no"]
        row += [ranged(each["accuracy"], ".0%"), f"{each['collapsed']} of {len(each['accuracy'])}"]
        row += [f"{each['rerouted']:.1%}", *(f"{each['rms'][group]:.3f}" for group in GROUPS)]
        rows.append([*row, f"{each['clipped_tokens']:.2%}", f"{each['clipped_sequences']:.1%}"])
    return lab.table(titles, rows, left=4)


def _first_rollout(record: dict[str, Any]) -> str:
    titles = ["loss, range", "rate", "rerouted tokens", "rms of their log ratios", "of others'", "of sequences'"]
    titles += ["rerouted tokens clipped", "others", "responses clipped"]
    rows = []
    for each in record["looks"]:
        row = [title_of(each["arm"]), f"{each['rate']:g}", f"{each['rerouted']:.1%}"]
        for kind, form in (("rms", ".3f"), ("clipped", ".2%")):
            pairs = ((each["own"][kind][group], each["replayed"][kind][group]) for group in each["own"][kind])
            row += [f"{own:{form}}, {replayed:{form}}" for own, replayed in pairs]
        rows.append(row)
    return lab.table(titles, rows, left=2)


def _pairs(record: dict[str, Any]) -> str:
    """Accuracies at the end, of pairs of trainings with the same seed and rate."""
    titles = ["updates", "loss, range", "best rate's accuracy without replay", "with replay", "pairs"]
    titles += ["higher with replay", "gain by replay, mean", f"higher than {title_of('GRPO 0.2')}, both without replay"]
    rows = []
    for stale in dict.fromkeys(each["mini_batches"] for each in record["trainings"]):
        default = gathered(record, stale, "GRPO 0.2", replay=False)
        for arm in dict.fromkeys(each["arm"] for each in record["trainings"] if each["mini_batches"] == stale):
            own, replayed = (gathered(record, stale, arm, replay) for replay in (False, True))
            row = [str(stale), title_of(arm)]
            for found in (own, replayed):
                rate = max(found, key=lambda rate: mean(found[rate]))
                row.append(f"{ranged(found[rate], '.0%')} at {rate:g}")
            gains = differences(replayed, own)
            row += [str(len(gains)), str(sum(gain > 0 for gain in gains)), f"{mean(gains):+.1%}"]
            over = differences(own, default)
            rows.append([*row, f"{sum(gain > 0 for gain in over)} of {len(over)}" if arm != "GRPO 0.2" else ""])
    return lab.table(titles, rows, left=2)


def gathered(record: dict[str, Any], stale: int, arm: str, replay: bool) -> dict[float, list[float]]:
    """The accuracies by rate and seed."""
    found = chosen(record, mini_batches=stale, arm=arm, replay=replay)
    return {each["rate"]: each["accuracy"] for each in found}


def differences(more: dict[float, list[float]], less: dict[float, list[float]]) -> list[float]:
    return [a - b for rate in more for a, b in zip(more[rate], less[rate], strict=True)]


# --- the program ------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = lab.parse_study(argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]), "stale_experts")
    plan = QUICK if arguments.quick else PLAN
    arguments.seeds = plan.grids[0].seeds
    if not arguments.redraw:
        began = time.perf_counter()
        lab.save(arguments, plan, began, work(plan, arguments.output, arguments.workers))
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
