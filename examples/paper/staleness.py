"""Stale rollouts: GSPO and GRPO with several clip ranges and learning rates, with 4, 16 and 64 updates per rollout.

The GSPO paper claims stability. Here both losses get what decides over it: a range of learning rates, several clip
ranges each, and rollouts that are more or less stale when the last update learns from them. The task and the trainings
are those of `running_sums.py`; all arms have the same updates, responses and problems. Every clip range is tried on two
seeds at every rate; for each loss the one whose best rate is best is confirmed on the other seeds, at that rate and at
its neighbours.

    python examples/paper/staleness.py                     # three CPU hours; goes on where it was stopped
    python examples/paper/staleness.py --quick             # a smoke run of a minute
    python examples/paper/staleness.py --tokens 21         # the short responses alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lab
import running_sums
from arithmetic import count
from lab import Journal, mean, plt
from matplotlib.ticker import PercentFormatter
from running_sums import LONG, SHORT, Task, Trial, name_of

from gspo_kernels import GRPO, GSPO, GSPOToken, Objective


def gspo(times: float) -> Objective:
    """GSPO with a multiple of the paper's range."""
    return GSPO(eps_low=times * GSPO.eps_low, eps_high=times * GSPO.eps_high)


RANGES: dict[str, Objective] = {
    "GRPO 0.05": GRPO(eps_low=0.05, eps_high=0.0675),
    "GRPO 0.2": GRPO(),
    "GRPO 0.2, dual": GRPO(dual_clip=3.0),
    "GRPO 0.5": GRPO(eps_low=0.5, eps_high=1.0),
    "GRPO 0.8": GRPO(eps_low=0.8, eps_high=3.0),
    **{f"GSPO x{times}": gspo(times) for times in (1, 10, 30, 100, 300)},
}
SHARE = 0.15  # of the adaptive arms
ADAPTIVE: dict[str, Objective] = {f"GRPO, share {SHARE:g}": GRPO(), f"GSPO, share {SHARE:g}": gspo(30)}
ARMS = RANGES | ADAPTIVE
DEFAULTS = ("GRPO 0.2", "GSPO x1")  # confirmed, too
LOSSES = ("GRPO", "GSPO")


class Plan:
    """Which trials to run: a list that depends on the results of the trials before."""

    def __init__(
        self,
        task: Task,
        rates: Sequence[float],
        staleness: Sequence[int],
        names: Sequence[str],
        seeds: Sequence[int],
        updates: int = 320,
    ) -> None:
        self.task, self.rates, self.staleness, self.names, self.updates = task, rates, staleness, names, updates
        self.choosing, self.confirming = tuple(seeds[:2]), tuple(seeds[2:])

    def trial(self, mini_batches: int, name: str, rate: float, seed: int) -> Trial:
        share = SHARE if name in ADAPTIVE else None
        return Trial(self.task, seed, name, ARMS[name], rate, mini_batches, self.updates, clip_share=share)

    def first(self) -> list[Trial]:
        """The choosing seeds: every arm at every rate."""
        return [
            self.trial(stale, name, rate, seed)
            for stale in self.staleness
            for name in self.names
            for rate in self.rates
            for seed in self.choosing
        ]

    def chosen(self, results: dict[str, Any]) -> Iterator[tuple[int, str, float]]:
        """Staleness, arm and best rate: of each loss the best constant range, the adaptive one, and the default."""
        for stale in self.staleness:
            best = {name: self._best(results, stale, name) for name in self.names}  # rate, accuracy
            for loss in LOSSES:
                constant = [name for name in RANGES if name in self.names and name.startswith(loss)]
                winner = max(constant, key=lambda name: best[name][1])
                shown = {winner, *(name for name in (*DEFAULTS, *ADAPTIVE) if name in self.names)}
                yield from ((stale, name, best[name][0]) for name in self.names if name in shown and loss in name)

    def second(self, results: dict[str, Any]) -> list[Trial]:
        """The confirming seeds: all chosen at their best rate, and a loss's best range also a rate below and above."""
        found = []
        for stale, name, best_rate in self.chosen(results):
            at = self.rates.index(best_rate)
            near = (best_rate,) if name in (*DEFAULTS, *ADAPTIVE) else self.rates[max(0, at - 1) : at + 2]
            found += [self.trial(stale, name, rate, seed) for rate in near for seed in self.confirming]
        return found

    def check(self, results: dict[str, Any]) -> list[Trial]:
        """GSPO-token with GSPO's range and rate, on the choosing seeds."""
        found = []
        for stale, name, rate in self.chosen(results):
            if name.startswith("GSPO") and name in RANGES and name not in DEFAULTS:
                objective = RANGES[name]
                assert isinstance(objective, GSPO)
                token = GSPOToken(eps_low=objective.eps_low, eps_high=objective.eps_high)
                trials = [self.trial(stale, name, rate, seed) for seed in self.choosing]
                found += [replace(trial, name=f"GSPO-token{name[4:]}", objective=token) for trial in trials]
        return found

    def _best(self, results: dict[str, Any], stale: int, name: str) -> tuple[float, float]:
        """The rate with the highest mean accuracy over the choosing seeds, and that accuracy."""

        def of(rate: float) -> float:
            trials = [self.trial(stale, name, rate, seed) for seed in self.choosing]
            return mean([results[name_of(trial)]["accuracy"] for trial in trials])

        return max(((rate, of(rate)) for rate in self.rates), key=lambda pair: pair[1])


RATES = (2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3)
LONG_SEEDS = (0, 2, 4, 5)  # 1 and 3 end the warm-up at the accuracy of a guess, with nothing to learn from
LONG_NAMES = tuple(name for name in RANGES if name not in ("GSPO x300", "GRPO 0.5"))
FRESH_NAMES = ("GRPO 0.2", "GSPO x10")
PLANS = {
    21: [Plan(SHORT, RATES, (64, 16, 4), tuple(ARMS), seeds=range(8))],
    101: [
        Plan(LONG, RATES[:4], (64,), LONG_NAMES, LONG_SEEDS),
        Plan(LONG, (4e-4, 8e-4), (16, 4), FRESH_NAMES, LONG_SEEDS),
    ],
}
TINY = Task(digits=3, slip=0.1, warmup_steps=20)
QUICK = {7: [Plan(TINY, (2e-4, 8e-4), (4, 2), tuple(ARMS), seeds=range(3), updates=8)]}


def work(plans: Sequence[Plan], folder: Path, workers: int) -> dict[str, Any]:
    """Runs what the journal lacks -> the results by trial."""
    journal = Journal(folder / "staleness.jsonl")
    for plan in plans:
        seeds = [*plan.choosing, *plan.confirming]
        jobs = [(folder, plan.task, seed) for seed in seeds]
        lab.side_by_side(running_sums.prepare, jobs, len(jobs), workers, "warm-up")

        def run(trials: list[Trial], title: str) -> None:
            title = f"{title}, {plan.task.tokens} tokens"  # noqa: B023
            journal.run(running_sums.train, [(t, folder) for t in trials], workers, title, lambda job: name_of(job[0]))

        run(plan.first(), "choosing")
        run(plan.second(journal.results), "confirming")
        run(plan.check(journal.results), "GSPO-token")
    return journal.results


# --- record -----------------------------------------------------------------------------------------------------------


def content(plans: Sequence[Plan], results: dict[str, Any]) -> dict[str, Any]:
    """The record's numbers: for each arm at each rate the accuracies by seed, and means over the seeds."""
    arms, chosen, spent = [], [], 0.0
    for plan in plans:
        cells: dict[tuple[int, str, float], list[dict[str, Any]]] = {}
        for trial in [*plan.first(), *plan.second(results), *plan.check(results)]:
            found = results[name_of(trial)]
            spent += found["seconds"]
            cells.setdefault((trial.mini_batches, trial.name, trial.learning_rate), []).append(found)
        arms += [
            {"tokens": plan.task.tokens, "updates": stale, "name": name, "rate": rate, **summary(runs)}
            for (stale, name, rate), runs in cells.items()
        ]
        chosen += [
            {"tokens": plan.task.tokens, "updates": stale, "name": name, "rate": rate}
            for stale, name, rate in plan.chosen(results)
        ]
    return {"cpu_seconds": round(spent), "choosing": len(plans[0].choosing), "arms": arms, "chosen": chosen}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one arm at one rate; `runs`: one for each seed."""
    late = [fit for run in runs for fit in run["ranges"][len(run["ranges"]) // 5 :]]  # the first rise from no drift
    return {
        "accuracy": [run["accuracy"] for run in runs],
        "clipped": mean([run["clipped_sequences"] for run in runs]),
        "clipped_tokens": mean([run["clipped_tokens"] for run in runs]),
        "fit": [median(side) for side in zip(*late, strict=True)],  # would have clipped `SHARE` of the responses
    }


# --- figure and tables ------------------------------------------------------------------------------------------------


def settings_of(record: dict[str, Any]) -> list[tuple[int, int]]:
    """(tokens of a response, updates per rollout) of the panels, by length and staleness."""
    return sorted({(arm["tokens"], arm["updates"]) for arm in record["arms"]})


def arms_of(record: dict[str, Any], tokens: int, updates: int) -> dict[str, list[dict[str, Any]]]:
    """By name, the arms of one setting at rising rates; without the check of GSPO-token."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in sorted(record["arms"], key=lambda arm: arm["rate"]):  # type: ignore[no-any-return]
        if (arm["tokens"], arm["updates"]) == (tokens, updates) and arm["name"] in ARMS:
            found.setdefault(arm["name"], []).append(arm)
    return {name: found[name] for name in ARMS if name in found}


def chosen_of(record: dict[str, Any], tokens: int, updates: int) -> dict[str, dict[str, Any]]:
    """By name, the arms that were chosen in one setting, at their best rate."""
    arms = arms_of(record, tokens, updates)
    return {
        each["name"]: next(arm for arm in arms[each["name"]] if arm["rate"] == each["rate"])
        for each in record["chosen"]
        if (each["tokens"], each["updates"]) == (tokens, updates)
    }


def best_of(record: dict[str, Any], tokens: int, updates: int) -> dict[str, str]:
    """By loss, the name of the constant range that was chosen: by the choosing seeds, at its best rate."""
    count = record["choosing"]
    chosen = chosen_of(record, tokens, updates)
    found = {}
    for loss in LOSSES:
        names = [name for name in chosen if name in RANGES and name.startswith(loss)]
        found[loss] = max(names, key=lambda name: mean(chosen[name]["accuracy"][:count]))
    return found


def style_of(name: str) -> dict[str, Any]:
    """GRPO in reds and GSPO in blues, the wider the range the darker; dual clip dashed, adaptive ranges dotted."""
    loss = name[:4]
    family = [each for each in RANGES if each.startswith(loss) and "dual" not in each]
    plain = name.split(",")[0]
    depth = 0.35 + 0.6 * family.index(plain) / (len(family) - 1) if plain in family else 0.6
    line = ":" if name in ADAPTIVE else "--" if "dual" in name else "-"
    color = plt.get_cmap("Oranges" if loss == "GRPO" else "Blues")(depth)
    return {"color": color, "linestyle": line, "label": title_of(name)}


def title_of(name: str) -> str:
    """For readers: the loss and its range, as in `GSPO 0.03/0.04`."""
    if name in ADAPTIVE:
        return f"{name[:4]} adapted to {SHARE:.0%}"
    arm: Any = ARMS[name]
    dual = f", dual clip {arm.dual_clip:g}" if arm.dual_clip else ""
    return f"{name[:4]} {arm.eps_low:g}/{arm.eps_high:g}{dual}"


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    settings = settings_of(record)
    lengths = sorted({tokens for tokens, _ in settings})
    columns = max(sum(tokens == length for tokens, _ in settings) for length in lengths)
    figure, axes = lab.panels(columns, "Accuracy at the end, by learning rate and clip range", len(lengths))
    for row, length in enumerate(lengths):
        here = [setting for setting in settings if setting[0] == length]
        for column in range(columns):
            axis = axes[row * columns + column]
            if column >= len(here):
                axis.set_axis_off()
                continue
            tokens, updates = here[column]
            best = best_of(record, tokens, updates).values()
            for name, arms in arms_of(record, tokens, updates).items():
                rates = [arm["rate"] for arm in arms]
                style = style_of(name) | {"marker": "o", "markersize": 3, "linewidth": 2.6 if name in best else 1}
                axis.plot(rates, [mean(arm["accuracy"]) for arm in arms], **style)
                if name in best:
                    low, high = ([pick(arm["accuracy"]) for arm in arms] for pick in (min, max))
                    axis.fill_between(rates, low, high, color=style["color"], alpha=0.15, lw=0)
            ticks = sorted({arm["rate"] for arm in record["arms"] if arm["tokens"] == length})
            axis.set(xscale="log", ylim=(0, 1), title=f"{tokens} tokens, {updates} updates per rollout")
            axis.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axis.set_xlabel("learning rate")
        axes[row * columns].set_ylabel("accuracy")
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    shown = [lines[title] for title in map(title_of, ARMS) if title in lines]
    figure.legend(handles=shown, loc="outside right center", frameon=False, title="clip range; thick: the best")
    lab.write(figure, arguments)


def cell(values: Sequence[float]) -> str:
    return lab.ranged(values, ".0%")


def section(record: dict[str, Any]) -> str:
    """The comparison of what was chosen, then the accuracy of every arm at every rate."""
    return "\n\n".join([verdict(record), agreement(record), *(grid(record, *each) for each in settings_of(record))])


def verdict(record: dict[str, Any]) -> str:
    """A line for each setting: the confirming seeds alone, each loss at the rate that the choosing seeds chose."""
    count, rows = record["choosing"], []
    for tokens, updates in settings_of(record):
        chosen, best = chosen_of(record, tokens, updates), best_of(record, tokens, updates)
        grpo, gspo = (chosen[best[loss]] for loss in LOSSES)
        pairs = list(zip(grpo["accuracy"][count:], gspo["accuracy"][count:], strict=True))
        cells = [f"{title_of(arm['name'])}, {arm['rate']:g}: {cell(arm['accuracy'][count:])}" for arm in (grpo, gspo)]
        cells.append(f"{sum(b > a for a, b in pairs)} of {len(pairs)}")
        for name in (*DEFAULTS, *ADAPTIVE):
            cells.append(cell(chosen[name]["accuracy"][count:]) if name in chosen else "")
        rows.append([f"{tokens}, {updates}", *cells])
    titles = ["tokens, updates per rollout", "GRPO's best", "GSPO's best", "seeds where GSPO's is better"]
    return lab.table([*titles, *map(title_of, (*DEFAULTS, *ADAPTIVE))], rows)


def agreement(record: dict[str, Any]) -> str:
    """How far GSPO-token's accuracies are from GSPO's."""
    pairs = []
    for arm in record["arms"]:
        if arm["name"].startswith("GSPO-token"):
            same = arms_of(record, arm["tokens"], arm["updates"])["GSPO" + arm["name"][10:]]
            other = next(each for each in same if each["rate"] == arm["rate"])
            pairs += list(zip(arm["accuracy"], other["accuracy"], strict=False))
    equal = sum(a == b for a, b in pairs)
    return f"GSPO-token ends with GSPO's accuracy in {equal} of {len(pairs)} pairs of trainings."


def grid(record: dict[str, Any], tokens: int, updates: int) -> str:
    arms = arms_of(record, tokens, updates)
    rates = sorted({arm["rate"] for each in arms.values() for arm in each})
    rows = []
    for name, each in arms.items():
        by_rate = {arm["rate"]: cell(arm["accuracy"]) for arm in each}
        rows.append([title_of(name), *(by_rate.get(rate, "") for rate in rates)])
    return lab.table([f"{tokens} tokens, {updates} updates per rollout", *(f"{rate:g}" for rate in rates)], rows)


# --- the program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """What all trainings have in common."""

    updates: int
    samples: int = Trial.samples
    max_grad_norm: float = Trial.max_grad_norm
    share: float = SHARE
    recent: int = running_sums.RECENT
    tested: int = running_sums.TESTED


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=count, nargs="+", help=f"lengths of responses (default: {[*PLANS]})")
    arguments = lab.parse_study(parser, "staleness")
    plans = QUICK if arguments.quick else PLANS
    if unknown := set(arguments.tokens or ()) - set(plans):
        parser.error(f"--tokens: expected some of {', '.join(map(str, plans))}; got {min(unknown)}")
    chosen = [plan for tokens in arguments.tokens or plans for plan in plans[tokens]]
    if not arguments.redraw:
        began = time.perf_counter()
        results = work(chosen, arguments.output, arguments.workers)
        arguments.seeds = max(len(plan.choosing) + len(plan.confirming) for plan in chosen)
        lab.save(arguments, Shared(chosen[0].updates), began, content(chosen, results))
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
