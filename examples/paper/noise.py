"""Noise and length: how the importance weights of tokens and of responses scatter, and what that does to the gradient.

A policy works out sums of up to five digits, in 5 to 60 tokens. It is then updated, by the GRPO loss, on what the first
one, the old policy, has sampled, and after 1, 4 and 16 updates asked about other responses of the old policy,
always the same ones. Measured are

- the variance over responses of the log-weights, by the length of the response: of a token, log w_t; of GSPO's ratio,
  mean_t log w_t; of the importance weight of the response, sum_t log w_t;
- the gradient of each problem's group of responses, of which a batch's is the mean: the trace of its covariance over
  the square of its mean, which is how many groups a batch needs until noise is no larger than signal; and how much of
  a group's gradient is there only because its weights are not 1.

    python examples/paper/noise.py                                        # minutes on two cores
    python examples/paper/noise.py --seeds 8 --resampled 2048 --device cuda
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import lab
import torch
from arithmetic import QUICK, Rollout, Settings, answer, build_optimizer, roll_out
from matplotlib import pyplot as plt
from torch import Tensor
from transformers import PreTrainedModel

from gspo_kernels import grpo_loss, gspo_loss, rollout_weights, token_logprobs

LONG = Settings(warmup_steps=400, warmup_worked=1.0, steps=4, digits=5, max_response=64, held_out=0)
SMOKE = replace(QUICK, digits=2, held_out=0, max_response=40)
EDGES = (2, 3, 5, 8, 13, 20, 28, 38, 48, 65)  # of the bins of lengths, in tokens
FEWEST = 30  # responses that a bin needs to be counted
DIGITS = ((1, 2), (3, 3), (4, 5))  # of the longer number of a problem
CHUNK = 256  # responses in a forward pass without gradients

# All are losses of the form -A mean_t(weight logprob_t), averaged over responses, and differ in the weight alone.
LEVELS = {"none": None, "gspo": "sequence_mean", "grpo": "token", "product": "sequence_sum"}
CLIPPED = {"gspo clipped": gspo_loss, "grpo clipped": grpo_loss}
VARIANTS = (*LEVELS, *CLIPPED)
SAID = {
    "none": "1",
    "gspo": "s_i",
    "grpo": "w_t",
    "product": "prod_t w_t",
    "gspo clipped": "GSPO: s_i, clipped",
    "grpo clipped": "GRPO: w_t, clipped",
}


# --- log-weights by length --------------------------------------------------------------------------------------------


def by_length(mask: Tensor, edges: Sequence[int] = EDGES, fewest: int = FEWEST) -> list[Tensor]:
    """Which responses are in each bin, [B] bool; bins run from an edge to before the next."""
    lengths = mask.sum(1)
    bins = [(lengths >= low) & (lengths < high) for low, high in pairwise(edges)]
    return [held for held in bins if held.sum() >= fewest]


@dataclass(frozen=True)
class LogWeights:
    """Of some responses of about the same length."""

    length: float  # mean, in tokens
    responses: int
    token: float  # variance over all tokens of log w_t
    mean: float  # variance over responses of mean_t log w_t, the logarithm of s_i
    sum: float  # variance over responses of sum_t log w_t
    largest: float  # mean over responses of max_t |log w_t|
    drift: float  # mean over responses of mean_t log w_t, which the variances are around

    @classmethod
    def of(cls, log_ratio: Tensor, mask: Tensor) -> LogWeights:
        """Both [B, T]."""
        mask, lengths = mask.bool(), mask.sum(1).double()
        r = torch.where(mask, log_ratio.double(), 0.0)
        total = r.sum(1)
        return cls(
            length=lengths.mean().item(),
            responses=len(lengths),
            token=r[mask].var().item(),
            mean=(total / lengths).var().item(),
            sum=total.var().item(),
            largest=r.abs().amax(1).mean().item(),
            drift=(total / lengths).mean().item(),
        )


def stacked(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def slope(lengths: Sequence[float], variances: Sequence[float]) -> float:
    """The exponent a of variance ~ length^a, by least squares on logarithms."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (lengths, variances))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


# --- gradients of groups ----------------------------------------------------------------------------------------------


class Scatter:
    """Mean and covariance of vectors that are seen one by one and not kept."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, vector: Tensor) -> None:
        vector = vector.double()
        self.count += 1
        self.total = self.total + vector
        self.squares += vector.square().sum().item()

    @property
    def trace(self) -> float:
        """Of the covariance, unbiased."""
        return (self.squares - self._mean_squared() * self.count) / (self.count - 1)

    @property
    def signal(self) -> float:
        """The squared norm of the expected vector, unbiased: by chance it may be negative."""
        return self._mean_squared() - self.trace / self.count

    def _mean_squared(self) -> float:
        return (self.total / self.count).square().sum().item()


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
    """What the gradients of some groups have in common: noise, signal, and the share that weights have in them."""

    def __init__(self) -> None:
        self.scatters = {name: Scatter() for name in VARIANTS}
        self.by_weights = dict.fromkeys(VARIANTS, 0.0)
        self.clip_fractions: dict[str, list[float]] = {name: [] for name in CLIPPED}
        self.lengths: list[float] = []

    def add(self, group: Rollout, found: dict[str, Tensor], clip_fractions: dict[str, float] | None) -> None:
        """`clip_fractions`: None of a group without an advantage, which decides nothing."""
        for name, gradient in found.items():
            self.scatters[name].add(gradient)
            self.by_weights[name] += (gradient - found["none"]).double().square().sum().item()
        for name, fraction in (clip_fractions or {}).items():
            self.clip_fractions[name].append(fraction)
        self.lengths.append(group.batch.response_mask.sum(1).float().mean().item())

    def record(self) -> dict[str, Any]:
        unweighted = max(self.scatters["none"].squares, 1e-300)
        return {
            "groups": len(self.lengths),
            "length": sum(self.lengths) / len(self.lengths),
            "clipped": {name: sum(values) / max(1, len(values)) for name, values in self.clip_fractions.items()},
            "trace": {name: scatter.trace for name, scatter in self.scatters.items()},
            "signal": {name: scatter.signal for name, scatter in self.scatters.items()},
            "by_weights": {name: value / unweighted for name, value in self.by_weights.items()},
        }


def gradient_noise(model: PreTrainedModel, pool: Sequence[Rollout], sizes: Sequence[str]) -> dict[str, Any]:
    """Over all groups, and over those of each size."""
    tallies = {name: Tally() for name in ("all", *dict.fromkeys(sizes))}
    nothing = {name: torch.zeros(sum(p.numel() for p in model.parameters()), device=model.device) for name in VARIANTS}
    for group, size in zip(pool, sizes, strict=True):
        found, clip_fractions = gradients(model, group) if group.advantages.any() else (nothing, None)
        for name in ("all", size):
            tallies[name].add(group, found, clip_fractions)
        lab.tick()
    return {name: tally.record() for name, tally in tallies.items() if len(tally.lengths) > 1}


# --- a seed -----------------------------------------------------------------------------------------------------------


def longer_number(problem: str) -> int:
    return max(map(len, problem.rstrip("=").split("+")))


def size(problem: str) -> str:
    low, high = next(pair for pair in DIGITS if longer_number(problem) <= pair[1])
    return f"{low}-{high}"


def updated(model: PreTrainedModel, learner: lab.Learner, settings: Settings) -> Iterator[int]:
    """Updates `model` on what the learner's own, which stays as it is, samples -> how many updates there were."""
    optimizer, done = build_optimizer(model), 0
    for _ in range(settings.steps):
        rollout = roll_out(learner.model, learner.tokenizer, learner.problems, settings)
        for _ in lab.learn(model, optimizer, rollout, settings, settings.learning_rate, grpo_loss):
            done += 1
            yield done


def run(seed: int, settings: Settings, resampled: int, device: str) -> dict[str, Any]:
    learner = lab.warmed_up(seed, settings, device)
    asked = sorted(learner.problems.draw(resampled), key=longer_number)  # of a size in a row: less padding
    at_once = max(1, CHUNK // settings.samples)
    rollouts = [
        answer(learner.model, learner.tokenizer, asked[start : start + at_once], settings)
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
        weights = [LogWeights.of(log_ratio[held], mask[held]) for held in by_length(mask)]
        noise = gradient_noise(model, pool, list(map(size, asked)))
        depths.append({"updates": depth, "weights": [vars(found) for found in weights], "gradients": noise})
    rewards = torch.cat([group.rewards for group in pool])
    return {"seed": seed, "reward": rewards.mean().item(), "depths": depths}


def depths_of(settings: Settings) -> list[int]:
    """1, 4, 16, ..."""
    return [4**i for i in range(10) if 4**i <= settings.steps * settings.mini_batches]


# --- figure and tables ------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    depths = depths_in(record)
    shown = depths[min(1, len(depths) - 1)]
    title = f"The old policy's responses, weighed for later ones: mean and range of {record['seeds']} seeds"
    figure, (by_length, by_depth, by_size, noise) = lab.panels(2, title, rows=2)

    bins = sorted(weights(record, shown), key=lambda found: found["length"])
    lengths = [found["length"] for found in bins]
    for variant, (kind, text) in KINDS.items():
        by_length.plot(lengths, [found[kind] for found in bins], "o", color=COLOR[variant], markersize=4, label=text)
    if bins:
        token = sum(found["token"] for found in bins) / len(bins)
        for power in (1, 0, -1):
            line = [token * length**power for length in (lengths[0], lengths[-1])]
            by_length.plot((lengths[0], lengths[-1]), line, color=lab.GREY, ls=":", lw=1)
        by_length.set_xscale("log")
        plain_lengths(by_length)
    by_length.set(title=f"Variance of log-weights after {updates(shown)}", xlabel="tokens in the response")
    by_length.set(ylabel="variance (dotted: powers 1, 0, -1)")

    for name in VARIANTS:
        style = {"color": COLOR[name], "label": SAID[name]}
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

    for name in ("gspo", "grpo", "product"):
        found = [gradients_in(record, shown, size) for size in sizes_in(record)]
        places = [sum(each["length"] for each in seeds) / len(seeds) for seeds in found]
        of_sizes = [variances(seeds, name) for seeds in found]
        lab.spread(by_size, places, list(zip(*of_sizes, strict=True)), COLOR[name], SAID[name])
    by_size.set(title=f"The same by length, after {updates(shown)}", xlabel="mean length of a group's responses")
    by_size.set(ylabel="to that of weight 1")
    for axes in (by_length, by_depth, by_size, noise):
        if any(y > 0 for line in axes.lines for y in line.get_ydata()):  # a smoke test may have none
            axes.set_yscale("log")
        axes.margins(y=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    noise.axhline(record["resampled"], color=lab.GREY, ls=":", lw=1)
    lab.write(figure, arguments)


def plain_lengths(axes: plt.Axes) -> None:
    axes.set_xticks((5, 10, 20, 40), (5, 10, 20, 40))
    axes.minorticks_off()


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
    """Of each seed."""
    return [next(d for d in run["depths"] if d["updates"] == depth) for run in record["runs"]]


def weights(record: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    return [found for seed in at(record, depth) for found in seed["weights"]]


def gradients_in(record: dict[str, Any], depth: int, size: str = "all") -> list[dict[str, Any]]:
    return [seed["gradients"][size] for seed in at(record, depth)]


def sizes_in(record: dict[str, Any]) -> list[str]:
    found = [set(seed["gradients"]) for seed in at(record, depths_in(record)[0])]
    return sorted(set.intersection(*found) - {"all"})


def scale(found: Sequence[dict[str, Any]], name: str) -> float:
    """Noise over signal, in groups; of several seeds the ratio of sums: the signal of one may be next to nothing."""
    signal = sum(each["signal"][name] for each in found)
    return sum(each["trace"][name] for each in found) / signal if signal > 1e-12 else math.nan


def variances(found: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Of each seed, the trace of the covariance to that of weight 1."""
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
        + " and ".join(f"{sum(each) / len(each):.0f}" for each in ends)
        + " tokens on average.",
        "",
        "| updates | weights | clipped | variance of a group's gradient, to that of weight 1 | made by weights"
        " | groups until signal equals noise, by seed |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for depth in depths_in(record):
        found = gradients_in(record, depth)
        for name in VARIANTS:
            unit = {"gspo clipped": "responses", "grpo clipped": "tokens"}.get(name)
            clipped = f"{sum(each['clipped'][name] for each in found) / len(found):.1%} of {unit}" if unit else ""
            share = ranged([each["by_weights"][name] for each in found]) if name != "none" else ""
            variance = ranged(variances(found, name)) if name != "none" else ""
            scales = [scale([each], name) for each in found]
            seen = sorted(round(each) for each in scales if not math.isnan(each))
            by_seed = ", ".join([*map(str, seen), *["?"] * (len(scales) - len(seen))])
            lines.append(f"| {depth} | {SAID[name]} | {clipped} | {variance} | {share} | {by_seed} |")
    lines += [
        "",
        "Variance: the trace of the covariance. Made by weights: the mean square of what they change in a group's "
        "gradient, to the mean square of the gradient of weight 1. Signal and noise are estimated from "
        f"{record['resampled']} groups: numbers beyond that are uncertain, a question mark is a signal that was not "
        "found.",
    ]
    return "\n".join(lines)


def ranged(values: Sequence[float], form: str | None = None) -> str:
    """Mean, least and largest; two digits, or as `form` says."""

    def said(value: float) -> str:
        return format(value, form or (".2g" if abs(value) < 100 else ".0f"))

    mean = said(sum(values) / len(values))
    return f"{mean} ({said(min(values))} to {said(max(values))})" if len(values) > 1 else mean


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
