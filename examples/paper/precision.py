"""Lower precision: rollouts and old log-probabilities from a bf16 or 8-bit copy of the policy, recomputed or not.

A copy of the policy stands for an inference engine (`engines.py`): it samples and returns log-probabilities. They are
the loss's old ones (direct), or the trainer recomputes them (recomputed). Measured are the distance between the two
before any update, by the length of the response (sums of up to six digits, worked out); how many clip decisions differ
while the policy learns (three digits); and the learning curves.

    python examples/paper/precision.py                                    # minutes on two cores
    python examples/paper/precision.py --seeds 5 --steps 300 --groups 32
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import lab
import torch
from arithmetic import QUICK, Settings, build_optimizer, greedy_accuracy
from engines import PRECISIONS, copy_of, roll_out
from estimators import LogWeights, by_length, stacked
from lab import LOSSES, mean, ranged
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from gspo_kernels import GRPO, GSPO, clipped_surrogate, rollout_mismatch

LONG = Settings(
    warmup_steps=300, warmup_batch=64, warmup_worked=1.0, steps=4, digits=6, max_response=80, held_out=0
)  # for rollouts before any update
EDGES = (2, 3, 5, 8, 13, 20, 30, 42, 56, 81)  # of the bins of lengths, in tokens
SHORT = Settings(steps=32, groups=16, evaluations=1)
ARMS = (  # (precision of the rollouts, origin of the old log-probabilities)
    ("fp32", "direct"),
    ("bf16", "direct"),
    ("bf16", "recomputed"),
    ("int8", "direct"),
    ("int8", "recomputed"),
)
OBJECTIVES = {"gspo": GSPO(), "grpo": GRPO()}
WEIGHTS = ("length", "token", "mean")  # statistics of log-weights that are recorded for every bin
MISMATCH = ("kl_k3", "flip_fraction", "sequence_effective_fraction")  # of the shortest, the longest and all responses


# --- before any update ------------------------------------------------------------------------------------------------


def measure(seed: int, settings: Settings, device: str) -> dict[str, Any]:
    """How far the engines' log-probabilities are from the policy's before any update, where all of it is noise."""
    learner = lab.warmed_up(seed, settings, device)
    found: dict[str, Any] = {"seed": seed}
    for precision in PRECISIONS:
        engine = copy_of(learner.model, precision)
        ratios, masks = [], []
        for _ in range(settings.steps):
            rollout, recomputed = roll_out(engine, learner.model, learner, settings)
            _, mask = rollout.batch.targets()
            ratios += (recomputed - rollout.old_logprobs).unbind()
            masks += mask.unbind()
            lab.tick()
        log_ratio, mask = stacked(ratios), stacked(masks)
        bins = [(log_ratio[held], mask[held]) for held in by_length(mask, EDGES)] or [(log_ratio, mask)]
        found[precision] = {
            "all": apart(log_ratio, mask),
            "shortest": apart(*bins[0]),
            "longest": apart(*bins[-1]),
        }
        if precision != "fp32":
            of_bins = [LogWeights.of(*each) for each in bins]
            found[precision]["bins"] = [{name: getattr(each, name) for name in WEIGHTS} for each in of_bins]
    return found


def apart(log_ratio: Tensor, mask: Tensor) -> dict[str, float]:
    """How far log-probabilities are apart; both [B, T]."""
    weights = LogWeights.of(log_ratio, mask)
    new, old = log_ratio.clamp(max=0.0), (-log_ratio).clamp(max=0.0)  # log-probabilities with these log ratios
    mismatch = rollout_mismatch(new, old, mask=mask)
    ratios = torch.expm1(log_ratio[mask.bool()])
    return {
        **{name: getattr(weights, name) for name in (*WEIGHTS, "drift")},
        **{name: getattr(mismatch, name).item() for name in MISMATCH},
        "responses_outside": mismatch.clip_fraction.item(),
        "tokens_outside": ((ratios < -GRPO.eps_low) | (ratios > GRPO.eps_high)).float().mean().item(),
    }


# --- training ---------------------------------------------------------------------------------------------------------


def decisions(log_ratio: Tensor, mask: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    """What each loss clips, of the units with an advantage other than 0: responses for GSPO, tokens for GRPO."""
    mask, found = mask.bool(), {}
    r = torch.where(mask, log_ratio, 0.0)
    units = {
        "gspo": (r.sum(1) / mask.sum(1), advantages),
        "grpo": (r[mask], advantages[:, None].expand_as(r)[mask]),
    }
    for name, (of_units, a) in units.items():
        loss = OBJECTIVES[name]
        terms = clipped_surrogate(
            of_units, a, eps_low=loss.eps_low, eps_high=loss.eps_high, dual_clip=None, max_log_ratio=torch.tensor(20.0)
        )
        found[name] = (terms.clipped_low | terms.clipped_high)[a != 0]
    return found


@dataclass
class Decisions:
    """Counts of a loss's units by depth, the number of updates since the policy was copied."""

    units: list[int]
    direct: list[int]  # clipped with the engine's log-probabilities
    recomputed: list[int]  # clipped with the trainer's
    differ: list[int]

    @classmethod
    def none(cls, depths: int) -> Decisions:
        return cls(*([0] * depths for _ in range(4)))

    def add(self, depth: int, direct: Tensor, recomputed: Tensor) -> None:
        self.units[depth] += len(direct)
        for counts, held in (
            (self.direct, direct), (self.recomputed, recomputed), (self.differ, direct != recomputed)
        ):  # fmt: skip
            counts[depth] += int(held.sum())


def train(learner: lab.Learner, seed: int, loss: str, precision: str, old: str, settings: Settings) -> dict[str, Any]:
    torch.manual_seed(seed)
    policy, optimizer = learner.model, build_optimizer(learner.model)
    counts = Decisions.none(settings.mini_batches)
    rewards, noise = [], []
    for step in range(1, settings.steps + 1):
        rollout, recomputed = roll_out(copy_of(policy, precision), policy, learner, settings)
        _, mask = rollout.batch.targets()
        rewards.append(rollout.rewards.mean().item())
        noise.append(rollout_mismatch(recomputed, rollout.old_logprobs, mask=mask).noise.item())
        used = rollout if old == "direct" else replace(rollout, old_logprobs=recomputed)
        both = zip(rollout.chunk(settings.mini_batches), recomputed.chunk(settings.mini_batches), strict=True)
        updates = lab.learn(policy, optimizer, used, settings, settings.learning_rate_at(step), LOSSES[loss])
        for depth, ((part, again), (_, stats, _)) in enumerate(zip(both, updates, strict=True)):
            _, mask = part.batch.targets()
            direct, exact = (decisions(stats.logprobs - o, mask, part.advantages) for o in (part.old_logprobs, again))
            counts.add(depth, direct[loss], exact[loss])
        lab.tick()
    quarter = max(1, settings.steps // 4)
    record = {
        "seed": seed, "loss": loss, "precision": precision, "old": old, "reward": rewards,
        "noise": [mean(noise[:quarter]), mean(noise[-quarter:])],  # first and last quarter
        "held_out_accuracy": greedy_accuracy(policy, learner.tokenizer, learner.problems.held_out),
    }  # fmt: skip
    if old == "direct" and precision != "fp32":
        record["decisions"] = vars(counts)
    return record


def train_all(seed: int, settings: Settings, device: str) -> list[dict[str, Any]]:
    learner = lab.warmed_up(seed, settings, device)
    arms = [(loss, *arm) for loss in OBJECTIVES for arm in ARMS]
    return [train(learner.copy(), seed, *arm, settings) for arm in arms]


def run(task: Callable[..., Any], *arguments: Any) -> Any:
    return task(*arguments)


# --- figure and tables ------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    title = f"Rollouts from a copy of lower precision: mean and range of {record['seeds']} seeds"
    figure, (before, differ, *learning) = lab.panels(2, title, rows=2)

    for precision in PRECISIONS[1:]:
        bins = sorted((b for seed in record["before"] for b in seed[precision]["bins"]), key=lambda b: b["length"])
        lengths, color = [b["length"] for b in bins], COLOR[precision]
        before.plot(lengths, [root(b["token"]) for b in bins], "x", color=color, label=f"{precision}: log w_t")
        before.plot(lengths, [root(b["mean"]) for b in bins], "o", color=color, ms=4, label=f"{precision}: log s_i")
    before.axhspan(GSPO.eps_low, GSPO.eps_high, color=lab.GREEN, alpha=0.6, label="GSPO's clip range")
    before.axhspan(GRPO.eps_low, GRPO.eps_high, color=lab.GREY, alpha=0.4, label="GRPO's clip range")
    before.set(title="Before any update", xlabel="tokens in the response", yscale="log")
    before.set(ylabel="standard deviation, nats")
    lab.axis_of_lengths(before)

    for loss, style in (("gspo", "-"), ("grpo", "--")):
        for precision in PRECISIONS[1:]:
            shares = [differing(run["decisions"]) for run in runs(record, loss, precision, "direct")]
            depths = range(len(shares[0]))
            lab.spread(differ, depths, shares, COLOR[precision], f"{lab.NAMES[loss]}, {precision}")
            differ.lines[-1].set_linestyle(style)
    differ.set(title="Clip decisions that recomputing changes", xlabel="updates since the rollout")
    differ.set(ylabel="share of responses (GSPO), tokens (GRPO)", xticks=depths)

    window = max(1, record["settings"]["steps"] // 8)
    for axes, loss in zip(learning, OBJECTIVES, strict=True):
        for precision, old in ARMS:
            smoothed = [lab.smooth(run["reward"], window) for run in runs(record, loss, precision, old)]
            label = precision if precision == "fp32" else f"{precision}, {old}"
            lab.spread(axes, range(1, len(smoothed[0]) + 1), smoothed, COLOR[precision], label)
            axes.lines[-1].set_linestyle("--" if old == "recomputed" else "-")
        axes.set(title=lab.NAMES[loss], xlabel="step", ylabel=f"reward, mean of {window} steps")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    differ.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    learning[0].sharey(learning[1])
    before.set_ylim(2e-5, 0.5)
    before.legend(frameon=False, fontsize=8, loc="lower center", ncols=3, columnspacing=1)
    for axes in (differ, *learning):
        axes.legend(frameon=False, fontsize=8)
    lab.write(figure, arguments)


COLOR = {"fp32": lab.GREY, "bf16": "#0072B2", "int8": "#D55E00"}


def runs(record: dict[str, Any], loss: str, precision: str, old: str) -> list[dict[str, Any]]:
    """The trainings of each seed."""
    arm = {"loss": loss, "precision": precision, "old": old}
    return [run for run in record["training"] if all(run[name] == value for name, value in arm.items())]


def root(variance: float) -> float:
    return max(variance, 1e-30) ** 0.5


def differing(counts: dict[str, list[int]]) -> list[float]:
    return [differ / max(units, 1) for differ, units in zip(counts["differ"], counts["units"], strict=True)]


def section(record: dict[str, Any]) -> str:
    lines = [
        "| before any update | tokens in the response | standard deviation of log w_t | of log s_i"
        " | mean of log s_i | tokens outside GRPO's range | responses outside GSPO's | flip fraction"
        " | KL (k3), nats per token | effective sample size of responses |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for precision in PRECISIONS:
        for group in ("all", "shortest", "longest"):
            found = [seed[precision][group] for seed in record["before"]]
            m = {name: mean([each[name] for each in found]) for name in found[0]}
            lines.append(
                f"| {precision}, {group} | {m['length']:.0f} | {root(m['token']):.1e} | {root(m['mean']):.1e}"
                f" | {ranged([each['drift'] for each in found], '.1e')} | {m['tokens_outside']:.2%}"
                f" | {m['responses_outside']:.0%} | {m['flip_fraction']:.0%} | {m['kl_k3']:.1e}"
                f" | {m['sequence_effective_fraction']:.1%} |"
            )
    lines += [
        "",
        "| clipped by | updates | bf16: direct | recomputed | decisions that differ | int8: direct | recomputed"
        " | decisions that differ |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for loss in OBJECTIVES:
        for depth in range(record["settings"]["mini_batches"]):
            cells = []
            for precision in PRECISIONS[1:]:
                counts = [run["decisions"] for run in runs(record, loss, precision, "direct")]
                for kind in ("direct", "recomputed", "differ"):
                    clipped = sum(c[kind][depth] for c in counts) / max(1, sum(c["units"][depth] for c in counts))
                    cells.append(f"{clipped:.2%}")
            lines.append(f"| {lab.NAMES[loss]} | {depth} | " + " | ".join(cells) + " |")
    quarter = max(1, record["settings"]["steps"] // 4)
    lines += [
        "",
        "| loss | rollouts | old log-probabilities | reward, all steps | last quarter | held-out accuracy"
        " | standard deviation of log w_t, first to last quarter |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for loss in OBJECTIVES:
        for precision, old in ARMS:
            found = runs(record, loss, precision, old)
            rewards = [[mean(run["reward"]) for run in found], [mean(run["reward"][-quarter:]) for run in found]]
            cells = [ranged(values, ".1%") for values in (*rewards, [run["held_out_accuracy"] for run in found])]
            first, last = map(mean, zip(*(run["noise"] for run in found), strict=True))
            lines.append(
                f"| {lab.NAMES[loss]} | {precision} | {old} | {' | '.join(cells)} | {first:.1e} to {last:.1e} |"
            )
    return "\n".join(lines)


def main() -> None:
    arguments, settings = lab.parse(__doc__, "precision", 3, SHORT)
    if arguments.redraw:
        return draw(lab.load(arguments), arguments)
    began = time.perf_counter()
    long = replace(QUICK, steps=2) if arguments.quick else LONG
    seeds = range(arguments.seeds)
    jobs = [(train_all, seed, settings, arguments.device) for seed in seeds]
    jobs += [(measure, seed, long, arguments.device) for seed in seeds]
    total = len(seeds) * (len(OBJECTIVES) * len(ARMS) * settings.steps + len(PRECISIONS) * long.steps)
    found = lab.side_by_side(run, jobs, total, arguments.workers, "precision")
    trained, measured = found[: -len(seeds)], found[-len(seeds) :]
    content = {"long": asdict(long), "training": [run for runs in trained for run in runs], "before": measured}
    draw(lab.save(arguments, settings, began, content), arguments)


if __name__ == "__main__":
    main()
