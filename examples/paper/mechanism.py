"""What stabilises: GRPO and GSPO with their parts removed or exchanged, at 64 updates per rollout.

The trainings are those of `staleness.py` at 21 tokens. The loss weights a token's gradient by a ratio, and clips by a
ratio: in GRPO both are the token's own, in GSPO both are the response's. Here they are exchanged (`Mixed`), clipping is
left out or limited to one sign of the advantage, and the limit of the gradient's norm is lowered or removed.

`Pushes` counts what a clipped token leaves behind. A response with a negative advantage has a wrong token, and the loss
pushes all of its tokens down. GRPO may clip the wrong one and go on with the right ones; GSPO clips all or none.

    python examples/paper/mechanism.py            # a quarter of a CPU hour; goes on where it was stopped
    python examples/paper/mechanism.py --quick    # a smoke run of a minute
"""

from __future__ import annotations

import argparse
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lab
import running_sums
import torch
from arithmetic import count
from lab import COLORS, GREY, Journal, mean
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from running_sums import EOS, SHORT, Part, Task, Trial, name_of
from stability import largest_fall
from torch import Tensor
from weights import token_weights

from gspo_kernels import GRPO, GSPO, Objective, Stats, Terms, TokenBatch

# --- the losses -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixed(Objective):
    """One ratio weights the gradient, and one decides what is clipped; with `w_t = exp(l_t - o_t)` and GSPO's `s_i`,

        dL/dl_t = -(1/S) v_it A_i / |y_i|,   v_it = 0 where clipped, else w_t or s_i.

    For A > 0 the deciding ratio is clipped above 1 + eps_high, for A < 0 below 1 - eps_low.
    """

    weight: Literal["token", "sequence"]  # w_t or s_i
    clipped_by: Literal["token", "any token", "sequence"]  # a token by its w_t; a response by any of its w_t, or by s_i
    eps_low: float
    eps_high: float

    def terms(self, tokens: TokenBatch) -> Terms:
        layout, advantages, of_token = tokens.layout, tokens.advantages, tokens.log_ratio
        of_sequence = layout.spread(layout.mean(of_token.detach()))
        # As in GSPO-token: the value is the sequence's, the gradient the token's own.
        weight = of_token if self.weight == "token" else of_sequence + (of_token - of_token.detach())
        deviation = torch.expm1(of_sequence if self.clipped_by == "sequence" else of_token.detach())
        low = (advantages < 0) & (deviation < -self.eps_low)
        high = (advantages > 0) & (deviation > self.eps_high)
        if self.clipped_by == "any token":
            low, high = (layout.spread(layout.sum(each.double())) > 0 for each in (low, high))
        ratio = torch.where(weight > tokens.max_log_ratio, tokens.max_log_ratio, weight).exp()
        return Terms(-torch.where(low | high, ratio.detach(), ratio) * advantages, weight, low, high)


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    objective: Objective
    clips: Literal["tokens", "responses", "nothing"]
    max_grad_norm: float = Trial.max_grad_norm
    rates: tuple[float, ...] = ()  # () for all


NARROW, WIDE = (0.2, 0.27), (0.5, 1.0)  # of token ratios: the best ranges of `staleness.py` at 8e-4 and at 4e-4
SEQUENCE = (3e-2, 4e-2)  # of response ratios: the best range
RATES = (4e-4, 8e-4)
HIGH = RATES[1:]
DUAL_CLIP, LOW_NORM = 3.0, 0.1
GRPO_NARROW, GRPO_WIDE, GSPO_BEST = (
    f"{loss} {low:g}/{high:g}" for loss, (low, high) in (("GRPO", NARROW), ("GRPO", WIDE), ("GSPO", SEQUENCE))
)
WHOLE = f"{GRPO_NARROW}, whole responses clipped"
COUNTED = (GRPO_NARROW, GRPO_WIDE, GSPO_BEST, WHOLE)  # `Pushes` of the others are not recorded
ARMS: dict[str, Arm] = {
    GRPO_NARROW: Arm(GRPO(*NARROW), "tokens"),
    GRPO_WIDE: Arm(GRPO(*WIDE), "tokens"),
    GSPO_BEST: Arm(GSPO(*SEQUENCE), "responses"),
    "GRPO, no clipping": Arm(GRPO(math.inf, math.inf), "nothing"),
    "GSPO, no clipping": Arm(GSPO(math.inf, math.inf), "nothing"),
    "GRPO, responses clipped by GSPO's rule": Arm(Mixed("token", "sequence", *SEQUENCE), "responses"),
    WHOLE: Arm(Mixed("token", "any token", *NARROW), "responses"),
    f"{GRPO_WIDE}, whole responses clipped": Arm(Mixed("token", "any token", *WIDE), "responses"),
    f"GSPO, tokens clipped by {GRPO_NARROW}": Arm(Mixed("sequence", "token", *NARROW), "tokens"),
    f"{GRPO_WIDE}, dual clip {DUAL_CLIP:g}": Arm(GRPO(*WIDE, dual_clip=DUAL_CLIP), "tokens"),
    f"{GRPO_NARROW}, clipped if A < 0": Arm(GRPO(NARROW[0], math.inf), "tokens"),
    f"{GRPO_NARROW}, clipped if A > 0": Arm(GRPO(math.inf, NARROW[1]), "tokens"),
    f"{GSPO_BEST}, clipped if A < 0": Arm(GSPO(SEQUENCE[0], math.inf), "responses"),
    f"{GSPO_BEST}, clipped if A > 0": Arm(GSPO(math.inf, SEQUENCE[1]), "responses"),
    f"{GRPO_NARROW}, norm up to {LOW_NORM:g}": Arm(GRPO(*NARROW), "tokens", LOW_NORM, HIGH),
    f"{GRPO_NARROW}, norm unlimited": Arm(GRPO(*NARROW), "tokens", math.inf, HIGH),
    f"{GSPO_BEST}, norm up to {LOW_NORM:g}": Arm(GSPO(*SEQUENCE), "responses", LOW_NORM, HIGH),
    f"{GSPO_BEST}, norm unlimited": Arm(GSPO(*SEQUENCE), "responses", math.inf, HIGH),
}


# --- what is pushed down ----------------------------------------------------------------------------------------------

DEPTHS = 8  # parts of a rollout's updates, the eighths of the table


def right_tokens(prompts: Tensor, responses: Tensor) -> Tensor:
    """[B, T] bool: the tokens with which a perfect solver goes on from the response's own tokens before them.

    After a slip the sum that builds on it is right. What follows the place of the end is wrong.
    """
    digits = prompts[:, 1::2]
    found = torch.zeros_like(responses, dtype=torch.bool)
    last = 2 * digits.shape[1]
    for index in range(min(last + 1, responses.shape[1])):
        if index == last:
            expected = torch.full_like(responses[:, 0], EOS)
        elif index % 2 == 0:
            expected = digits[:, index // 2]
        else:
            before = responses[:, index - 2] if index > 1 else 0
            expected = (before + responses[:, index - 1]) % 10
        found[:, index] = responses[:, index] == expected
    return found


class Pushes:
    """Counts, by updates since the rollout, which tokens of responses with a negative advantage are pushed down.

    The wrong token is a response's first one. A clipped token has no gradient; the push of any other is its weight in
    the loss, which is a ratio. Log-ratios are those before an update learns from the response: what earlier updates of
    the rollout, on other problems, did to it.

    `down` and `up` are the gradients of right tokens, weight times |advantage|: of responses with a negative advantage
    and with a positive one.
    """

    def __init__(self, trial: Trial) -> None:
        self.objective, self.updates = trial.objective, trial.mini_batches
        self.sums: dict[str, list[float]] = {}
        self.largest = 0.0  # |log w_t|

    def see(self, part: Part, stats: Stats, depth: int) -> None:
        log_ratio = torch.where(part.mask, stats.logprobs - part.old_logprobs, 0.0)
        self.largest = max(self.largest, log_ratio.abs().max().item())
        negative, positive = part.advantages < 0, part.advantages > 0
        if not negative.any():
            return
        right = right_tokens(part.prompts, part.responses) & part.mask
        weights = token_weights(self.objective, stats.logprobs, part.old_logprobs, part.advantages, part.mask)
        push, right_here = weights[negative].nan_to_num(0.0), right[negative]
        wrong = (part.mask[negative] & ~right_here).int().argmax(1, keepdim=True)  # [N, 1], the first
        clipped = push.gather(1, wrong) == 0  # [N, 1]
        left = right_here & (push > 0) & clipped  # right tokens that are pushed although the wrong one is clipped
        for name, value in {
            "responses": negative.sum(),
            "clipped": clipped.sum(),  # responses whose wrong token is clipped
            "left": left.any(1).sum(),  # of these, with right tokens that are pushed
            "left_tokens": left.sum(),
            "push": push.sum(),
            "push_right": push[right_here].sum(),
            "push_left": push[left].sum(),
            "right": right_here.sum(),
            "right_change": log_ratio[negative][right_here].sum(),
            "wrong_change": log_ratio[negative].gather(1, wrong).sum(),
            "down": (push * right_here * -part.advantages[negative, None]).sum(),
            "up": (weights[positive].nan_to_num(0.0) * right[positive] * part.advantages[positive, None]).sum(),
            "rewarded": right[positive].sum(),
            "rewarded_change": log_ratio[positive][right[positive]].sum(),
        }.items():
            self.sums.setdefault(name, [0.0] * DEPTHS)[depth * DEPTHS // self.updates] += value.item()

    def result(self) -> dict[str, Any]:
        return {"largest": self.largest, "pushes": self.sums}


# --- the trainings ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What all trainings have in common."""

    task: Task
    mini_batches: int
    updates: int
    first_seed: int
    seeds: int
    rates: tuple[float, ...] = RATES

    def trials(self) -> list[Trial]:
        return [
            Trial(self.task, seed, name, arm.objective, rate, self.mini_batches, self.updates,
                  max_grad_norm=arm.max_grad_norm)
            for seed in range(self.first_seed, self.first_seed + self.seeds)
            for name, arm in ARMS.items()
            for rate in arm.rates or self.rates
        ]  # fmt: skip


PLAN = Plan(SHORT, mini_batches=64, updates=320, first_seed=2, seeds=3)  # seeds 0 and 1 chose the clip ranges
QUICK = Plan(Task(digits=3, slip=0.1, warmup_steps=20), mini_batches=8, updates=16, first_seed=0, seeds=1)


def train(trial: Trial, folder: Path) -> dict[str, Any]:
    return running_sums.train(trial, folder, Pushes)


def run(arguments: Namespace, plan: Plan) -> dict[str, Any]:
    began = time.perf_counter()
    trials = plan.trials()
    journal = Journal(arguments.output / f"{arguments.name}.jsonl")
    jobs = [(arguments.output, plan.task, seed) for seed in sorted({trial.seed for trial in trials})]
    lab.side_by_side(running_sums.prepare, jobs, len(jobs), arguments.workers, "warm-up")
    trainings = [(trial, arguments.output) for trial in trials]
    results = journal.run(train, trainings, arguments.workers, arguments.name, lambda job: name_of(job[0]))
    arguments.seeds = plan.seeds
    return lab.save(arguments, plan, began, content(trials, results))


def content(trials: Sequence[Trial], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for trial, result in zip(trials, results, strict=True):
        cells.setdefault((trial.name, trial.learning_rate), []).append(result)
    arms = [
        {
            "name": name,
            "rate": rate,
            "accuracy": [each["accuracy"] for each in runs],
            "fall": [largest_fall([*each["rewards"], each["accuracy"]]) for each in runs],  # of the reward
            "clipped": mean([each["clipped_sequences"] for each in runs]),
            "largest": max(each["largest"] for each in runs),
        }
        for (name, rate), runs in cells.items()
    ]
    counts = [
        {"name": name, "rate": rate, "runs": [each["pushes"] for each in runs]}
        for (name, rate), runs in cells.items()
        if name in COUNTED
    ]
    return {"cpu_seconds": round(sum(each["seconds"] for each in results)), "arms": arms, "counts": counts}


# --- figure and tables ------------------------------------------------------------------------------------------------

COLOR_OF = {"tokens": COLORS["grpo"], "responses": COLORS["gspo"], "nothing": GREY}
LINES = {
    GRPO_NARROW: {"color": COLORS["grpo"], "ls": "-"},
    GRPO_WIDE: {"color": COLORS["grpo"], "ls": "--"},
    GSPO_BEST: {"color": COLORS["gspo"], "ls": "-"},
    WHOLE: {"color": COLORS["gspo"], "ls": "--"},
}


def rates_of(record: dict[str, Any]) -> list[float]:
    return sorted({arm["rate"] for arm in record["arms"]})


def arm_of(record: dict[str, Any], name: str, rate: float) -> dict[str, Any] | None:
    return next((arm for arm in record["arms"] if (arm["name"], arm["rate"]) == (name, rate)), None)


def share(runs: Sequence[dict[str, list[float]]], part: str, whole: str) -> list[float]:
    """One sum as a share of another, or as a mean: over all updates, a number for each run."""
    return [sum(each[part]) / max(1e-9, sum(each[whole])) for each in runs]


def at_depths(runs: Sequence[dict[str, list[float]]], part: str, whole: str) -> list[list[float]]:
    """The same by depth: [runs][DEPTHS]."""
    return [[a / max(1.0, b) for a, b in zip(each[part], each[whole], strict=True)] for each in runs]


def draw(record: dict[str, Any], arguments: Namespace) -> None:
    figure, (accuracy, left, balance) = lab.panels(3, "Which parts of the losses stabilise")
    figure.set_size_inches(13.2, 6.5)
    draw_accuracy(accuracy, record)

    rate = rates_of(record)[-1]
    updates = record["settings"]["mini_batches"]
    depths = [(i + 0.5) * updates / DEPTHS for i in range(DEPTHS)]
    for each in record["counts"]:
        name, runs = each["name"], each["runs"]
        if each["rate"] == rate:
            lab.spread(left, depths, at_depths(runs, "left", "responses"), label=name, **LINES[name])
            lab.spread(balance, depths, at_depths(runs, "down", "up"), label=name, **LINES[name])
    left.set(
        title="A < 0: the wrong token is clipped,\nright tokens are pushed down", ylabel="responses", ylim=(-0.02, 1)
    )
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    balance.set(title="Gradient of right tokens:\ndown (A < 0) / up (A > 0)", ylim=(0, 1.3))
    balance.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
    balance.axhline(1, color="black", lw=0.8)
    for axis in (left, balance):
        axis.set(xlabel=f"updates since the rollout, rate {rate:g}", xticks=[updates * i / 4 for i in range(5)])
    lab.write(figure, arguments)


def draw_accuracy(axis: Axes, record: dict[str, Any]) -> None:
    """A row for each arm, a line in it for each rate: the seeds, and their mean."""
    rates = rates_of(record)
    for row, (name, arm) in enumerate(ARMS.items()):
        color = COLOR_OF[arm.clips]
        for index, rate in enumerate(rates):
            found = arm_of(record, name, rate)
            if found is not None:
                y, values = row + 0.36 * (index - (len(rates) - 1) / 2), found["accuracy"]
                axis.plot([min(values), max(values)], [y, y], color=color, lw=1)
                axis.plot(mean(values), y, "o", ms=5, color=color, mfc="white" if index == 0 else color)
    axis.set_yticks(range(len(ARMS)), list(ARMS), fontsize=8)
    axis.set(title="Accuracy at the end", xlim=(-0.02, 1), ylim=(len(ARMS) - 0.5, -0.5))
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    dots = {"color": GREY, "marker": "o", "ls": "", "ms": 5}
    handles = [
        *(Line2D([], [], color=color, label=f"clips {name}") for name, color in COLOR_OF.items()),
        *(
            Line2D([], [], **dots, mfc="white" if index == 0 else GREY, label=f"learning rate {rate:g}")
            for index, rate in enumerate(rates)
        ),
    ]
    axis.figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def section(record: dict[str, Any]) -> str:
    return "\n\n".join([table_of_arms(record), table_of_pushes(record)])


def table_of_arms(record: dict[str, Any]) -> str:
    rows = []
    for name in ARMS:
        cells = [name]
        for rate in rates_of(record):
            arm = arm_of(record, name, rate)
            if arm is None:
                cells += [""] * 4
                continue
            cells += [lab.ranged(arm["accuracy"], ".0%"), f"{mean(arm['fall']):.0%}"]
            cells += [f"{arm['clipped']:.0%}", f"{arm['largest']:.1f}"]
        rows.append(cells)
    titles = ["accuracy", "largest fall", "responses clipped", "largest \\|log w\\|"]
    return lab.table(["", *(f"{rate:g}: {title}" for rate in rates_of(record) for title in titles)], rows)


def table_of_pushes(record: dict[str, Any]) -> str:
    rows = []
    for each in sorted(record["counts"], key=lambda each: each["rate"]):
        runs = each["runs"]
        last = [run[-1] for run in at_depths(runs, "left", "responses")]
        tokens = share(runs, "left_tokens", "left")
        changes = [
            mean([run[-1] for run in at_depths(runs, f"{kind}_change", whole)])
            for kind, whole in (("wrong", "responses"), ("right", "right"), ("rewarded", "rewarded"))
        ]
        rows.append(
            [
                f"{each['name']}, {each['rate']:g}",
                f"{sum(sum(run['responses']) for run in runs):.0f}",
                percent(share(runs, "clipped", "responses")),
                percent(share(runs, "left", "responses")),
                percent(last),
                f"{mean(tokens):.1f}" if any(tokens) else "",
                percent(share(runs, "push_right", "push")),
                percent(share(runs, "push_left", "push")),
                lab.ranged(share(runs, "down", "up"), ".2f"),
                *(f"{change:+.3f}" for change in changes),
            ]
        )
    titles = [
        "loss, rate",
        "responses with A < 0",
        "wrong token clipped",
        "right ones pushed nevertheless",
        "the same, last eighth of a rollout",
        "right tokens pushed in such a response",
        "push on right tokens, of all",
        "on those of such responses",
        "gradient of right tokens, down / up",
        "change of log π, last eighth: wrong token",
        "right tokens",
        "right tokens, A > 0",
    ]
    return lab.table(titles, rows)


def percent(values: Sequence[float]) -> str:
    return lab.ranged(values, ".1%") if any(values) else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=count, help=f"how many (default: {PLAN.seeds})")
    arguments = lab.parse_study(parser, "mechanism")
    if not arguments.redraw:
        plan = QUICK if arguments.quick else PLAN
        run(arguments, replace(plan, seeds=arguments.seeds or plan.seeds))
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
