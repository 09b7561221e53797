"""Mixture of experts: choices that change under one rollout, token ratios, GRPO with and without routing replay.

Section 5.3 of the GSPO paper: a router's choices change with every update, so a token's new likelihood comes from other
experts than its old one, and its ratio says little about the policy. Three trainings of a tiny Qwen3-MoE start from the
same warmed-up model: GSPO, GRPO, and GRPO with routing replay, which forces the old policy's experts on the new one.
At some steps the whole rollout is measured after each update: which choices have changed, and the log ratios with the
model's own choices and, with the same weights, with the old choices forced (`look` in `routing.py`).

    python examples/paper/experts.py
    python examples/paper/experts.py --seeds 8 --steps 200 --device cuda     # larger
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import lab
import torch
from arithmetic import Settings, build_optimizer, greedy_accuracy
from lab import COLORS, GREEN, GREY, Learner, mean, ranged, smooth, tick
from matplotlib.ticker import PercentFormatter
from routing import GROUPS, SIZES, Sums, add, look, roll_out_routed
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_kernels import GRPO, GSPO, grpo_loss, gspo_loss

LAYERS, EXPERTS, CHOSEN = 2, 32, 4
SETTINGS = Settings(
    steps=60, groups=16, digits=2, held_out=200, evaluations=6, max_response=24
)  # shorter sums than the examples': a Qwen3-MoE takes several times as long
QUICK = replace(lab.QUICK, mini_batches=2)
LEARNING_RATES = (2e-4, 8e-4)  # experts change more at the second
RAMP = 5  # steps in which the learning rate rises, because Adam's first steps are the largest
LOOKS = 10  # steps of a training at which the whole rollout is measured after each update
DISTRIBUTIONS = {"rerouted": COLORS["grpo"], "rerouted_replayed": GREEN, "kept": GREY, "sequences": COLORS["gspo"]}
SEQUENCES = ("sequences", "sequences_replayed")
BEYOND = int(torch.searchsorted(SIZES, GSPO.eps_low))  # the first size outside GSPO's clip range
METHODS = {"gspo": "GSPO", "grpo": "GRPO", "replay": "GRPO with routing replay"}
LINES = {"gspo": COLORS["gspo"], "grpo": COLORS["grpo"], "replay": GREEN}


def build_experts(tokenizer: PreTrainedTokenizerFast, head_size: int = 16) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,  # as in Qwen3-30B-A3B
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_size,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config)


# --- trainings --------------------------------------------------------------------------------------------------------


def looks(settings: Settings) -> set[int]:
    return {math.ceil(settings.steps * (i + 1) / LOOKS) for i in range(LOOKS)}


def train(learner: Learner, settings: Settings, method: str) -> dict[str, Any]:
    policy_loss = gspo_loss if method == "gspo" else grpo_loss
    optimizer = build_optimizer(learner.model)
    measured = looks(settings)
    by_depth: list[Sums | None] = [None] * settings.mini_batches
    found: dict[str, list[float]] = {
        name: [] for name in ("reward", "clip_fraction", "gradient_norm", "changed", "held_out")
    }
    evaluate = partial(greedy_accuracy, learner.model, learner.tokenizer, learner.problems.held_out)
    found["held_out"].append(evaluate())
    for step in range(1, settings.steps + 1):
        rollout, routed = roll_out_routed(learner, settings)
        learned = replace(rollout, batch=routed) if method == "replay" else rollout
        rate = settings.learning_rate_at(step) * min(1, step / RAMP)
        clipped, norms = [], []
        updates = lab.learn(learner.model, optimizer, learned, settings, rate, policy_loss)
        for depth, (_, stats, norm) in enumerate(updates):
            clipped.append(stats.clip_fraction.item())
            norms.append(norm.item())
            if step in measured:
                sums = look(learner.model, rollout, routed)
                by_depth[depth] = add(by_depth[depth], sums)
                if depth == 0:
                    found["changed"].append((sums["moved"].mean() / sums["count"][0]).item())
        found["reward"].append(rollout.rewards.mean().item())
        found["clip_fraction"].append(mean(clipped))
        found["gradient_norm"].append(mean(norms))
        if settings.is_evaluated(step):
            found["held_out"].append(evaluate())
        tick()
    return {**found, "by_depth": [{name: value.tolist() for name, value in sums.items()} for sums in by_depth if sums]}


def run(seed: int, settings: Settings, device: str) -> dict[Any, Any]:
    learner = lab.warmed_up(seed, settings, device, build_experts)
    found: dict[Any, Any] = {
        "parameters": sum(parameter.numel() for parameter in learner.model.parameters()),
        "load": load(learner.copy(), settings),
    }
    for rate in LEARNING_RATES:
        for method in METHODS:
            torch.manual_seed(seed)
            found[rate, method] = train(learner.copy(), replace(settings, learning_rate=rate), method)
    return found


def load(learner: Learner, settings: Settings) -> list[list[float]]:
    """Each expert's share of a layer's choices [layers, experts], largest first, after the warm-up."""
    rollout, routed = roll_out_routed(learner, settings)
    chosen = routed.experts[rollout.batch.targets()[1].bool()]  # [tokens, layers, k]
    counts = torch.stack([layer.flatten().bincount(minlength=EXPERTS) for layer in chosen.unbind(1)])
    return (counts / counts.sum(1, keepdim=True)).sort(descending=True).values.tolist()


# --- record -----------------------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """What figure and tables show of one method at one learning rate; `runs`: one for each seed."""
    depths = [pooled(list(map(shares, of_seeds))) for of_seeds in zip(*(run["by_depth"] for run in runs), strict=True)]
    ratios = {name: [depth.pop(name) for depth in depths] for name in ("rms", "outside")}
    return {
        "reward": [run["reward"] for run in runs],
        "held_out": [run["held_out"][-1] for run in runs],  # at the end
        "changed": [mean(step) for step in zip(*(run["changed"] for run in runs), strict=True)],  # by one update
        **{name: mean([mean(run[name]) for run in runs]) for name in ("clip_fraction", "gradient_norm")},
        "by_depth": depths,
        **(ratios if method == "grpo" else {}),  # by depth, too
    }


def larger(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The share of log ratios above each of the sizes after one update, over all seeds."""
    first = [run["by_depth"][0] for run in runs]
    above = torch.tensor([sums["larger"] for sums in first]).sum(0).view(len(GROUPS), -1)
    count = torch.tensor([sums["count"] for sums in first]).sum(0)
    return dict(zip(GROUPS, (above / count.clamp(min=1)[:, None]).tolist(), strict=True))


def shares(sums: dict[str, list[float]]) -> dict[str, Any]:
    count = dict(zip(GROUPS, sums["count"], strict=True))

    def share(name: str) -> dict[str, float]:
        return {group: total / max(count[group], 1) for group, total in zip(GROUPS, sums[name], strict=True)}

    return {
        "changed": [moved / count["tokens"] for moved in sums["moved"]],  # by layer
        "rerouted": count["rerouted"] / count["tokens"],
        "rms": {group: square**0.5 for group, square in share("squares").items()},
        "outside": share("outside"),
    }


def pooled(values: Sequence[Any]) -> Any:
    """The mean over seeds of numbers, or of lists and dicts of numbers."""
    if isinstance(values[0], dict):
        return {name: pooled([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [pooled(column) for column in zip(*values, strict=True)]
    return mean(values)


# --- figure and tables ------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], arguments: Namespace) -> None:
    figure, axes = lab.panels(3, "Expert choices of a small Qwen3-MoE, and what follows", rows=2)
    depths, over_time, distribution, growth, *rewards = axes
    rates = record["trainings"]
    updates = range(1, record["settings"]["mini_batches"] + 1)
    steps = range(1, record["settings"]["steps"] + 1)

    for axis in (depths, over_time):
        axis.axhline(0.1, color=GREY, linestyle=":")
        axis.annotate(
            "the paper's 48 layers: about 10%", (0.02, 0.1), (0, 3), ("axes fraction", "data"), "offset points"
        )
    for (rate, methods), style in zip(rates.items(), ("-", "--"), strict=True):
        for method, found in methods.items():
            line = {"color": LINES[method], "linestyle": style, "label": f"{METHODS[method]}, {float(rate):g}"}
            depths.plot(updates, [mean(depth["changed"]) for depth in found["by_depth"]], marker="o", **line)
            over_time.plot(record["looks"], found["changed"], **line)
    depths.set(title="Choices changed since the rollout", xlabel="updates since the rollout", xticks=list(updates))
    over_time.set(title="Choices changed by a rollout's first update", xlabel="step")
    for axis in (depths, over_time):
        axis.set(yscale="log", ylim=(1e-4, 0.3), ylabel="share of all choices")
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    depths.legend(frameon=False, fontsize="small", loc="lower right")

    rate = next(iter(rates))
    for group, color in DISTRIBUTIONS.items():
        distribution.loglog(record["sizes"], record["larger"][group], color=color, label=GROUPS[group])
    for bound, name, color in (
        (GRPO.eps_low, "GRPO's clip range", GREY),
        (GSPO.eps_low, "GSPO's", COLORS["gspo"]),
    ):
        distribution.axvline(bound, color=color, linestyle=":", label=name)
    distribution.set(
        title="Log ratios after one update",
        xlabel=f"size (GRPO, learning rate {rate})",
        ylabel="share that is larger",
        xlim=(1e-4, 3),
        ylim=(1e-4, 1.5),
    )
    distribution.legend(edgecolor="none", framealpha=1, fontsize="small", loc="lower left")

    for group, color in {"tokens": COLORS["grpo"], "sequences": COLORS["gspo"]}.items():
        for name, style in ((group, "-"), (f"{group}_replayed", "--")):
            values = [rms[name] for rms in rates[rate]["grpo"]["rms"]]
            growth.plot(updates, values, color=color, linestyle=style, marker="o", label=GROUPS[name])
    growth.set(title="Spread of log ratios", xlabel=f"updates since the rollout (GRPO, {rate})")
    growth.set(ylabel="root mean square", xticks=list(updates), ylim=(0, None))
    growth.legend(frameon=False, fontsize="small")

    window = max(1, len(steps) // 8)
    for axis, (rate, methods) in zip(rewards, rates.items(), strict=True):
        for method, found in methods.items():
            lab.spread(axis, steps, [smooth(run, window) for run in found["reward"]], LINES[method], METHODS[method])
        axis.set(title=f"Reward, learning rate {rate}", xlabel=f"step (mean of {window})", ylim=(0, 1))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    rewards[0].legend(frameon=False, fontsize="small", loc="lower right")
    lab.write(figure, arguments)


def section(record: dict[str, Any]) -> str:
    return "\n".join([*_model(record), "", *_changes(record), "", *_spreads(record), "", *_learning(record)])


def _model(record: dict[str, Any]) -> Iterator[str]:
    model, load = record["model"], record["load"]
    yield (
        f"The model has {model['parameters']:,} parameters, {model['layers']} layers, and in each {model['experts']} "
        f"experts, {model['chosen']} to a token. After the warm-up a layer's busiest expert has on average "
        f"{load['busiest']:.0%} of its choices, and {load['fewest']} to {load['most']} experts have 90% of them."
    )


def _changes(record: dict[str, Any]) -> Iterator[str]:
    last = record["settings"]["mini_batches"]
    yield (
        "Share of the new policy's choices for a rollout's tokens that the old policy did not make. A token is "
        "rerouted if it has such a choice in any layer:\n"
    )
    yield (
        "| learning rate | training | changed after 1 update | by layer "
        f"| after {last} updates | rerouted tokens after 1, {last} |\n|---|---|--:|---|--:|--:|"
    )
    for rate, method, found in _trainings(record):
        one, *_, all_ = found["by_depth"]
        layers = ", ".join(f"{share:.1%}" for share in one["changed"])
        yield (
            f"| {rate} | {METHODS[method]} | {mean(one['changed']):.1%} | {layers} | {mean(all_['changed']):.1%} "
            f"| {one['rerouted']:.0%}, {all_['rerouted']:.0%} |"
        )


def _spreads(record: dict[str, Any]) -> Iterator[str]:
    yield (
        "Root mean square of log ratios in GRPO's training, and in brackets the share of ratios outside its clip "
        f"range, {1 - GRPO.eps_low:g} to {1 + GRPO.eps_high:g}. Replayed: with the same weights and "
        "the old choices forced:\n"
    )
    yield (
        "| learning rate | updates | tokens | replayed | rerouted tokens | replayed | other tokens | replayed "
        "| sequences | replayed |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    last = record["settings"]["mini_batches"]
    for rate, methods in record["trainings"].items():
        for updates in (1, last):
            rms, outside = (methods["grpo"][name][updates - 1] for name in ("rms", "outside"))
            cells = (f"{rms[group]:.3f} ({outside[group]:.1%})" for group in GROUPS)
            yield f"| {rate} | {updates} | {' | '.join(cells)} |"
    own, replayed = (record["gspo_larger"][group] for group in SEQUENCES)
    yield (
        f"\nIn GSPO's training at {next(iter(record['trainings']))}, log ratios of {own:.0%} of the sequences are "
        f"larger than {record['sizes'][BEYOND]:.1e} after one update, {replayed:.0%} with the old choices forced."
    )


def _learning(record: dict[str, Any]) -> Iterator[str]:
    quarter = max(1, record["settings"]["steps"] // 4)
    yield "Mean over seeds, with the smallest and the largest in brackets:\n"
    yield (
        f"| learning rate | training | reward, last {quarter} steps | held-out accuracy at the end "
        "| clipped | gradient's norm |\n|---|---|--:|--:|--:|--:|"
    )
    for rate, method, found in _trainings(record):
        rewards = [mean(run[-quarter:]) for run in found["reward"]]
        unit = "responses" if method == "gspo" else "tokens"
        yield (
            f"| {rate} | {METHODS[method]} | {ranged(rewards, '.1%')} | {ranged(found['held_out'], '.1%')} "
            f"| {found['clip_fraction']:.1%} of {unit} | {found['gradient_norm']:.2f} |"
        )


def _trainings(record: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(rate, method, found) for rate, methods in record["trainings"].items() for method, found in methods.items()]


def main() -> None:
    began = time.perf_counter()
    arguments, settings = lab.parse(__doc__, "experts", 4, SETTINGS, QUICK)
    if not arguments.redraw:
        jobs = [(seed, settings, arguments.device) for seed in range(arguments.seeds)]
        total = len(jobs) * len(LEARNING_RATES) * len(METHODS) * settings.steps
        runs = lab.side_by_side(run, jobs, total, arguments.workers, "experts")
        gspo, grpo = (larger([found[LEARNING_RATES[0], method] for found in runs]) for method in ("gspo", "grpo"))
        layers = [of_layer for found in runs for of_layer in found["load"]]
        many = [sum(total < 0.9 for total in accumulate(of_layer)) + 1 for of_layer in layers]  # have 90% of them
        content = {
            "model": {"layers": LAYERS, "experts": EXPERTS, "chosen": CHOSEN, "parameters": runs[0]["parameters"]},
            "load": {"busiest": mean([of_layer[0] for of_layer in layers]), "fewest": min(many), "most": max(many)},
            "looks": sorted(looks(settings)),
            "sizes": SIZES.tolist(),
            "larger": {group: grpo[group] for group in DISTRIBUTIONS},
            "gspo_larger": {group: gspo[group][BEYOND] for group in SEQUENCES},
            "trainings": {
                f"{rate:g}": {method: summary([found[rate, method] for found in runs], method) for method in METHODS}
                for rate in LEARNING_RATES
            },
        }
        lab.save(arguments, settings, began, content)
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
