"""Noise and length: how the importance weights of tokens and of responses scatter, and what that does to the gradient.

A policy works out sums of up to five digits, in 5 to 60 tokens. It is then updated by the GRPO loss on responses of the
first policy, the old one. After 1, 4 and 16 updates, a fixed set of other responses of the old policy is evaluated.
Measured are

- the variance over responses of the log-weights, by the length of the response: log w_t of a token; mean_t log w_t,
  the logarithm of GSPO's ratio; sum_t log w_t, the logarithm of the response's importance weight;
- the gradient of each problem's group of responses (a batch's gradient is the mean over groups): the trace of its
  covariance over the square of its mean, which is the number of groups for which noise equals signal; and the part of
  a group's gradient that exists only because its weights are not 1.

    python examples/paper/noise.py                                        # minutes on two cores
    python examples/paper/noise.py --seeds 8 --resampled 2048 --device cuda
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lab
import torch
from arithmetic import QUICK, Rollout, Settings, answer, build_optimizer, roll_out
from estimators import LogWeights, Scatter, by_length, slope, stacked
from lab import mean, ranged
from torch import Tensor
from transformers import PreTrainedModel

from gspo_kernels import grpo_loss, gspo_loss, rollout_weights, token_logprobs

LONG = Settings(warmup_steps=400, warmup_worked=1.0, steps=4, digits=5, max_response=64, held_out=0)
SMOKE = replace(QUICK, digits=2, held_out=0, max_response=40)
EDGES = (2, 3, 5, 8, 13, 20, 28, 38, 48, 65)  # of the bins of lengths, in tokens
DIGITS = ((1, 2), (3, 3), (4, 5))  # of the longer number of a problem
CHUNK = 256  # responses in a forward pass without gradients
SHOWN = 1  # the panels by length are of the second depth
WEIGHTS = ("length", "token", "mean", "sum", "largest")  # statistics of log-weights that are recorded
SHOWN_BY_SIZE = ("gspo", "grpo", "product")

# All losses are -A mean_t(weight logprob_t), averaged over responses. They differ only in the weight.
LEVELS = {"none": None, "gspo": "sequence_mean", "grpo": "token", "product": "sequence_sum"}
CLIPPED = {"gspo clipped": gspo_loss, "grpo clipped": grpo_loss}
VARIANTS = (*LEVELS, *CLIPPED)
LABELS = {
    "none": "1",
    "gspo": "s_i",
    "grpo": "w_t",
    "product": "prod_t w_t",
    "gspo clipped": "GSPO: s_i, clipped",
    "grpo clipped": "GRPO: w_t, clipped",
}


# --- gradients of groups ----------------------------------------------------------------------------------------------


def losses(logits: Tensor, group: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The loss of each variant, and the clip fractions of the clipped ones."""
    token_ids, mask = group.batch.targets()
    new = token_logprobs(logits.detach(), token_ids, mask=mask).logprobs
    found, clip_fractions = {}, {}
    for name, level in LEVELS.items():
        weights = None
        if level is not None:
            weights = rollout_weights(new, group.old_logprobs, mask=mask, level=level, upper=None).weights
        # Without old log-probabilities the ratio is 1, and `weights` are the only weights.
        found[name] = grpo_loss(logits, token_ids, group.advantages, mask=mask, importance_weights=weights).loss
    for name, policy_loss in CLIPPED.items():
        found[name], stats = policy_loss(logits, token_ids, group.advantages, group.old_logprobs, mask=mask)
        clip_fractions[name] = stats.clip_fraction.item()
    return found, clip_fractions


def gradients(model: PreTrainedModel, group: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
    parameters = list(model.parameters())
    of_variants, clip_fractions = losses(group.batch.logits(model), group)
    found = {}
    for name, loss in of_variants.items():
        parts = torch.autograd.grad(loss, parameters, retain_graph=name != VARIANTS[-1])
        found[name] = torch.cat([part.flatten() for part in parts])
    return found, clip_fractions


class Tally:
    """Noise and signal in the gradients of some groups, and the part of them that weights make."""

    def __init__(self) -> None:
        self.scatters = {name: Scatter() for name in VARIANTS}
        self.by_weights = dict.fromkeys(VARIANTS, 0.0)
        self.clip_fractions: dict[str, list[float]] = {name: [] for name in CLIPPED}
        self.lengths: list[float] = []

    def add(self, group: Rollout, found: dict[str, Tensor], clip_fractions: dict[str, float] | None) -> None:
        """`clip_fractions`: None for a group whose advantages are all 0, where nothing can be clipped."""
        for name, gradient in found.items():
            self.scatters[name].add(gradient)
            self.by_weights[name] += (gradient - found["none"]).double().square().sum().item()
        for name, fraction in (clip_fractions or {}).items():
            self.clip_fractions[name].append(fraction)
        self.lengths.append(group.batch.response_mask.sum(1).float().mean().item())

    def record(self) -> dict[str, Any]:
        unweighted = max(self.scatters["none"].squares, 1e-300)
        return {
            "clipped": {name: sum(values) / max(1, len(values)) for name, values in self.clip_fractions.items()},
            "trace": {name: scatter.trace for name, scatter in self.scatters.items()},
            "signal": {name: scatter.signal for name, scatter in self.scatters.items()},
            "by_weights": {name: value / unweighted for name, value in self.by_weights.items() if name != "none"},
        }

    def record_of_size(self) -> dict[str, Any]:
        return {
            "length": mean(self.lengths),
            "trace": {name: self.scatters[name].trace for name in ("none", *SHOWN_BY_SIZE)},
        }


def gradient_noise(model: PreTrainedModel, pool: Sequence[Rollout], sizes: Sequence[str]) -> dict[str, Tally]:
    """Over all groups, and over those of each size that has several."""
    tallies = {name: Tally() for name in ("all", *dict.fromkeys(sizes))}
    nothing = {name: torch.zeros(sum(p.numel() for p in model.parameters()), device=model.device) for name in VARIANTS}
    for group, size in zip(pool, sizes, strict=True):
        found, clip_fractions = gradients(model, group) if group.advantages.any() else (nothing, None)
        for name in ("all", size):
            tallies[name].add(group, found, clip_fractions)
        lab.tick()
    return {name: tally for name, tally in tallies.items() if len(tally.lengths) > 1}


# --- a seed -----------------------------------------------------------------------------------------------------------


def longer_number(problem: str) -> int:
    return max(map(len, problem.rstrip("=").split("+")))


def size(problem: str) -> str:
    low, high = next(pair for pair in DIGITS if longer_number(problem) <= pair[1])
    return f"{low}-{high}"


def updated(model: PreTrainedModel, learner: lab.Learner, settings: Settings) -> Iterator[int]:
    """Updates `model` on responses of the learner's own model, which stays unchanged -> the updates so far."""
    optimizer, done = build_optimizer(model), 0
    for _ in range(settings.steps):
        rollout = roll_out(learner.model, learner.tokenizer, learner.problems, settings)
        for _ in lab.learn(model, optimizer, rollout, settings, settings.learning_rate, grpo_loss):
            done += 1
            yield done


def run(seed: int, settings: Settings, resampled: int, device: str) -> dict[str, Any]:
    learner = lab.warmed_up(seed, settings, device)
    problems = sorted(learner.problems.draw(resampled), key=longer_number)  # equal sizes in a row: less padding
    at_once = max(1, CHUNK // settings.samples)
    rollouts = [
        answer(learner.model, learner.tokenizer, problems[start : start + at_once], settings)
        for start in range(0, resampled, at_once)
    ]
    pool = [group for rollout in rollouts for group in rollout.chunk(len(rollout.rewards) // settings.samples)]
    model = copy.deepcopy(learner.model)
    depths = []
    for depth in updated(model, learner, settings):
        if depth not in depths_of(settings):
            continue
        ratios, masks = [], []
        with torch.no_grad():
            for rollout in rollouts:
                token_ids, mask = rollout.batch.targets()
                new = token_logprobs(rollout.batch.logits(model), token_ids, mask=mask).logprobs
                ratios += (new - rollout.old_logprobs).unbind()
                masks += mask.unbind()
        log_ratio, mask = stacked(ratios), stacked(masks)
        weights = [LogWeights.of(log_ratio[held], mask[held]) for held in by_length(mask, EDGES)]
        noise = gradient_noise(model, pool, list(map(size, problems)))
        found = {"updates": depth, "gradients": noise.pop("all").record()}
        found["weights"] = [{name: getattr(each, name) for name in WEIGHTS} for each in weights]
        if len(depths) == SHOWN or depths_of(settings) == [depth]:
            found["by_size"] = {name: tally.record_of_size() for name, tally in noise.items()}
        depths.append(found)
    return {"seed": seed, "depths": depths}


def depths_of(settings: Settings) -> list[int]:
    """1, 4, 16, ..."""
    return [4**i for i in range(10) if 4**i <= settings.steps * settings.mini_batches]


# --- figure and tables ------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    depths = depths_in(record)
    shown = depths[min(SHOWN, len(depths) - 1)]
    title = f"The old policy's responses, weighted for later ones: mean and range of {record['seeds']} seeds"
    figure, (by_length, by_depth, by_size, noise) = lab.panels(2, title, rows=2)

    bins = sorted(weights(record, shown), key=lambda found: found["length"])
    lengths = [found["length"] for found in bins]
    for variant, (kind, text) in KINDS.items():
        by_length.plot(lengths, [found[kind] for found in bins], "o", color=COLOR[variant], markersize=4, label=text)
    if bins:
        token = mean([found["token"] for found in bins])
        for power in (1, 0, -1):
            line = [token * length**power for length in (lengths[0], lengths[-1])]
            by_length.plot((lengths[0], lengths[-1]), line, color=lab.GREY, ls=":", lw=1)
        lab.axis_of_lengths(by_length)
    by_length.set(title=f"Variance of log-weights after {updates(shown)}", xlabel="tokens in the response")
    by_length.set(ylabel="variance (dotted: powers 1, 0, -1)")

    for name in VARIANTS:
        style = {"color": COLOR[name], "label": LABELS[name]}
        if name != "none":
            of_depths = [variances(gradients_in(record, depth), name) for depth in depths]
            lab.spread(by_depth, depths, list(zip(*of_depths, strict=True)), **style)
            by_depth.lines[-1].set_linestyle("--" if name in CLIPPED else "-")
        scales = [scale(gradients_in(record, depth), name) for depth in depths]
        noise.plot(depths, scales, "o--" if name in CLIPPED else "o-", markersize=4, **style)
    by_depth.set(title="Variance of a group's gradient", xlabel="updates since the rollout")
    by_depth.set(ylabel="to that of weight 1")
    noise.set(title="Noise to signal (uncertain above the line)", xlabel="updates since the rollout")
    noise.set(ylabel="groups until signal equals noise")
    for axes in (by_depth, noise):
        axes.set_xscale("log", base=4)
        axes.set_xticks(depths, depths)

    found = by_sizes(record, shown)
    for name in SHOWN_BY_SIZE:
        lengths = [mean([each["length"] for each in seeds]) for seeds in found]
        of_sizes = [variances(seeds, name) for seeds in found]
        lab.spread(by_size, lengths, list(zip(*of_sizes, strict=True)), COLOR[name], LABELS[name])
    by_size.set(title=f"The same by length, after {updates(shown)}", xlabel="mean length of a group's responses")
    by_size.set(ylabel="to that of weight 1")
    for axes in (by_length, by_depth, by_size, noise):
        if any(y > 0 for line in axes.lines for y in line.get_ydata()):  # a smoke test may have none
            axes.set_yscale("log")
        axes.margins(y=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    noise.axhline(record["resampled"], color=lab.GREY, ls=":", lw=1)
    lab.write(figure, arguments)


KINDS = {
    "product": ("sum", "sum_t log w_t"),
    "grpo": ("token", "log w_t, over tokens"),
    "gspo": ("mean", "log s_i"),
}
COLOR = {
    "none": lab.GREY,
    "gspo": lab.COLORS["gspo"],
    "grpo": lab.COLORS["grpo"],
    "product": lab.GREEN,
    "gspo clipped": lab.COLORS["gspo_token"],
    "grpo clipped": lab.COLORS["ppo"],
}


def updates(count: int) -> str:
    return f"{count} update{'s' * (count > 1)}"


def depths_in(record: dict[str, Any]) -> list[int]:
    return [depth["updates"] for depth in record["runs"][0]["depths"]]


def at(record: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    """The record of each seed after `depth` updates."""
    return [next(d for d in run["depths"] if d["updates"] == depth) for run in record["runs"]]


def weights(record: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    return [found for seed in at(record, depth) for found in seed["weights"]]


def gradients_in(record: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    return [seed["gradients"] for seed in at(record, depth)]


def by_sizes(record: dict[str, Any], depth: int) -> list[list[dict[str, Any]]]:
    """For each size that all seeds have, the record of each seed."""
    seeds = [seed["by_size"] for seed in at(record, depth)]
    return [[seed[size] for seed in seeds] for size in sorted(set.intersection(*map(set, seeds)))]


def scale(found: Sequence[dict[str, Any]], name: str) -> float:
    """Noise over signal, in groups. The ratio is of sums over seeds, because one seed's signal may be close to 0."""
    signal = sum(each["signal"][name] for each in found)
    return sum(each["trace"][name] for each in found) / signal if signal > 1e-12 else math.nan


def variances(found: Sequence[dict[str, Any]], name: str) -> list[float]:
    """For each seed, the trace of the covariance relative to that of weight 1."""
    return [each["trace"][name] / max(each["trace"]["none"], 1e-300) for each in found]


def section(record: dict[str, Any]) -> str:
    seeds = range(record["seeds"])
    lines = [
        "| updates | | variance ~ length to the power | standard deviation, shortest responses | longest |",
        "|--:|---|--:|--:|--:|",
    ]
    for depth in depths_in(record):
        bins = [seed["weights"] for seed in at(record, depth)]
        for kind, text in KINDS.values():
            powers = [slope([b["length"] for b in bins[i]], [b[kind] for b in bins[i]]) for i in seeds]
            ends = [[math.sqrt(bins[i][end][kind]) for i in seeds] for end in (0, -1)]
            lines.append(f"| {depth} | {text} | {ranged(powers)} | " + " | ".join(map(ranged, ends)) + " |")
        ends = [[bins[i][end]["largest"] for i in seeds] for end in (0, -1)]
        lines.append(f"| {depth} | largest abs log w_t of a response, mean | | " + " | ".join(map(ranged, ends)) + " |")
    ends = [[bins[i][end]["length"] for i in seeds] for end in (0, -1)]
    lines += [
        "",
        "Mean and range of the seeds. Independent tokens would have the powers 1, 0 and -1. Shortest and longest bin: "
        + " and ".join(f"{mean(each):.0f}" for each in ends)
        + " tokens on average.",
        "",
        "| updates | weights | clipped | variance of a group's gradient, relative to weight 1 | part due to weights"
        " | groups until signal equals noise, by seed |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for depth in depths_in(record):
        found = gradients_in(record, depth)
        for name in VARIANTS:
            unit = {"gspo clipped": "responses", "grpo clipped": "tokens"}.get(name)
            clipped = f"{mean([each['clipped'][name] for each in found]):.1%} of {unit}" if unit else ""
            share = ranged([each["by_weights"][name] for each in found]) if name != "none" else ""
            variance = ranged(variances(found, name)) if name != "none" else ""
            scales = [scale([each], name) for each in found]
            seen = sorted(round(each) for each in scales if not math.isnan(each))
            by_seed = ", ".join([*map(str, seen), *["?"] * (len(scales) - len(seen))])
            lines.append(f"| {depth} | {LABELS[name]} | {clipped} | {variance} | {share} | {by_seed} |")
    lines += [
        "",
        "Variance: the trace of the covariance. Part due to weights: the mean square of what they change in a group's "
        "gradient, relative to the mean square of the gradient of weight 1. Signal and noise are estimated from "
        f"{record['resampled']} groups: numbers beyond that are uncertain. A question mark means that no signal was "
        "found.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--resampled", type=int, help="groups whose gradients are taken (default: 256)")
    arguments, settings = lab.parse(__doc__, "noise", 3, LONG, SMOKE, parser)
    if arguments.redraw:
        return draw(lab.load(arguments), arguments)
    began = time.perf_counter()
    resampled = arguments.resampled or (8 if arguments.quick else 256)
    jobs = [(seed, settings, resampled, arguments.device) for seed in range(arguments.seeds)]
    total = len(jobs) * len(depths_of(settings)) * resampled
    runs = lab.side_by_side(run, jobs, total, arguments.workers, "noise")
    draw(lab.save(arguments, settings, began, {"resampled": resampled, "runs": runs}), arguments)


if __name__ == "__main__":
    main()
