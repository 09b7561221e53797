"""Mixture of experts: choices that change under one rollout, token ratios, GRPO with and without routing replay.

Section 5.3 of the GSPO paper: a router's choices move with every update, so a token's new likelihood comes from other
experts than its old one, and its ratio says little about the policy. Three trainings of a tiny Qwen3-MoE, each of which
starts from the same warmed-up model: GSPO, GRPO, and GRPO with routing replay, which forces the experts of the old
policy on the new one. At some steps the whole rollout is looked at after each update: which choices have changed, and
what the log ratios are with the model's own choices and, by the same weights, with the old ones forced.

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
from arithmetic import (
    Batch,
    Rollout,
    Settings,
    build_optimizer,
    greedy_accuracy,
)
from lab import COLORS, GREEN, GREY, Learner, smooth, tick
from matplotlib.ticker import PercentFormatter
from routing import RoutedBatch, RoutingReplay, changed, roll_out_routed
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_kernels import grpo_loss, gspo_loss, token_logprobs

LAYERS, EXPERTS, CHOSEN = 2, 32, 4
SETTINGS = Settings(
    steps=60, groups=16, digits=2, held_out=200, evaluations=6, max_response=24
)  # shorter sums than the examples': a Qwen3-MoE takes several times as long
QUICK = replace(lab.QUICK, mini_batches=2)
LEARNING_RATES = (2e-4, 8e-4)  # at the second one experts change more
RAMP = 5  # steps in which the learning rate rises: Adam's first ones are the largest
LOOKS = 10  # steps of a training at which the whole rollout is looked at after each update
METHODS = {"gspo": "GSPO", "grpo": "GRPO", "replay": "GRPO with routing replay"}
LINES = {"gspo": COLORS["gspo"], "grpo": COLORS["grpo"], "replay": GREEN}
GROUPS = {  # of log ratios under the present weights; rerouted: a token some of whose experts have changed
    "tokens": "tokens",
    "tokens_replayed": "tokens, experts replayed",
    "rerouted": "rerouted tokens",
    "rerouted_replayed": "rerouted tokens, experts replayed",
    "kept": "tokens of unchanged experts",
    "kept_replayed": "tokens of unchanged experts, experts replayed",
    "sequences": "sequences",
    "sequences_replayed": "sequences, experts replayed",
}
SIZES = torch.logspace(-4, 1, 41)  # of log ratios, where their distribution is recorded


def build_experts(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
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
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config)


# --- what updates have done to a rollout ------------------------------------------------------------------------------

Sums = dict[str, Tensor]


@torch.no_grad()
def look(model: PreTrainedModel, rollout: Rollout, routed: RoutedBatch) -> Sums:
    """The experts and the log ratios of all response tokens under the present weights, as sums over tokens.

    The same weights give the ratios twice: by the model's own choices, and with those of the rollout replayed.
    """
    token_ids, mask = routed.targets()
    response, lengths = mask.bool(), mask.sum(1)
    plain = Batch(routed.input_ids, routed.attention_mask, routed.response_mask)

    def log_ratios(batch: Batch) -> tuple[Tensor, Tensor]:
        ratios = token_logprobs(batch.logits(model), token_ids, mask=mask).logprobs - rollout.old_logprobs
        ratios = ratios.where(response, 0.0)
        return ratios[response], ratios.sum(1) / lengths

    with RoutingReplay(model).record() as choices:
        own, own_sequences = log_ratios(plain)
    forced, forced_sequences = log_ratios(routed)
    moved = changed(torch.stack(choices, dim=1), routed.experts.flatten(0, 1))[
        response.flatten()
    ]  # [tokens, layers, k]
    rerouted = moved.flatten(1).any(1)
    groups = dict(
        zip(
            GROUPS,
            (
                own,
                forced,
                own[rerouted],
                forced[rerouted],
                own[~rerouted],
                forced[~rerouted],
                own_sequences,
                forced_sequences,
            ),
            strict=True,
        )
    )
    return {
        "moved": moved.float().mean(2).sum(0),
        "count": torch.tensor([len(group) for group in groups.values()]),
        "squares": torch.stack([group.double().square().sum() for group in groups.values()]),
        "outside": torch.stack([_outside(group, 0.2, 0.27) for group in groups.values()]),
        "larger": torch.stack([(group.abs() > size).sum() for group in groups.values() for size in SIZES]),
    }


def _outside(log_ratios: Tensor, eps_low: float, eps_high: float) -> Tensor:
    ratios = log_ratios.exp()
    return ((ratios < 1 - eps_low) | (ratios > 1 + eps_high)).sum()


def add(some: Sums | None, more: Sums) -> Sums:
    return more if some is None else {name: some[name] + more[name] for name in some}


# --- trainings --------------------------------------------------------------------------------------------------------


def looks(settings: Settings) -> set[int]:
    return {math.ceil(settings.steps * (i + 1) / LOOKS) for i in range(LOOKS)}


def train(learner: Learner, settings: Settings, method: str) -> dict[str, Any]:
    policy_loss = gspo_loss if method == "gspo" else grpo_loss
    optimizer = build_optimizer(learner.model)
    looked_at = looks(settings)
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
            if step in looked_at:
                sums = look(learner.model, rollout, routed)
                by_depth[depth] = add(by_depth[depth], sums)
                if depth == 0:
                    found["changed"].append((sums["moved"].mean() / sums["count"][0]).item())
        found["reward"].append(rollout.rewards.mean().item())
        found["clip_fraction"].append(sum(clipped) / len(clipped))
        found["gradient_norm"].append(sum(norms) / len(norms))
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


# --- record, figure, tables -------------------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one method at one learning rate; a run for each seed."""
    first = [run["by_depth"][0] for run in runs]
    larger = torch.tensor([sums["larger"] for sums in first]).sum(0).view(len(GROUPS), -1)
    count = torch.tensor([sums["count"] for sums in first]).sum(0)
    shares = (larger / count.clamp(min=1)[:, None]).tolist()
    return {
        **{name: [run[name] for run in runs] for name in ("reward", "held_out", "changed")},
        **{name: [_mean(run[name]) for run in runs] for name in ("clip_fraction", "gradient_norm")},
        "by_depth": [[_shares(sums) for sums in run["by_depth"]] for run in runs],
        "larger": dict(zip(GROUPS, shares, strict=True)),  # share of log ratios above each of the sizes, one update on
    }


def _shares(sums: dict[str, list[float]]) -> dict[str, Any]:
    count = dict(zip(GROUPS, sums["count"], strict=True))

    def share(name: str) -> dict[str, float]:
        return {group: total / max(count[group], 1) for group, total in zip(GROUPS, sums[name], strict=True)}

    return {
        "changed": [moved / count["tokens"] for moved in sums["moved"]],  # by layer
        "rerouted": count["rerouted"] / count["tokens"],
        "rms": {group: square**0.5 for group, square in share("squares").items()},
        "outside": share("outside"),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


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
            by_depth = [_mean(_pooled(found, update - 1)["changed"]) for update in updates]
            depths.plot(updates, by_depth, marker="o", **line)
            changed = [_mean(column) for column in zip(*found["changed"], strict=True)]
            over_time.plot(record["looks"], changed, **line)
    depths.set(title="Choices changed since the rollout", xlabel="updates since the rollout", xticks=list(updates))
    over_time.set(title="Choices changed by a rollout's first update", xlabel="step")
    for axis in (depths, over_time):
        axis.set(yscale="log", ylim=(1e-4, 0.3), ylabel="share of all choices")
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    depths.legend(frameon=False, fontsize="small", loc="lower right")

    rate = next(iter(rates))
    colors = {"rerouted": COLORS["grpo"], "rerouted_replayed": GREEN, "kept": GREY, "sequences": COLORS["gspo"]}
    for group, color in colors.items():
        distribution.loglog(record["sizes"], rates[rate]["grpo"]["larger"][group], color=color, label=GROUPS[group])
    for bound, name, color in ((0.2, "GRPO's clip range", GREY), (3e-4, "GSPO's", COLORS["gspo"])):
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
            values = [_pooled(rates[rate]["grpo"], update - 1)["rms"][name] for update in updates]
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
    model, layers = record["model"], [shares for load in record["load"] for shares in load]
    carriers = [sum(total < 0.9 for total in accumulate(shares)) + 1 for shares in layers]
    yield (
        f"The model has {model['parameters']:,} parameters, {model['layers']} layers, and in each {model['experts']} "
        f"experts, {model['chosen']} to a token. After the warm-up a layer's busiest expert has on average "
        f"{_mean([shares[0] for shares in layers]):.0%} of its choices, and {min(carriers)} to {max(carriers)} experts "
        "have 90% of them."
    )


def _changes(record: dict[str, Any]) -> Iterator[str]:
    last = record["settings"]["mini_batches"]
    yield (
        "Choices that the new policy makes for a rollout's tokens and the old one did not. A token is rerouted if it "
        "has one or more such choices, in any layer:\n"
    )
    yield (
        "| learning rate | training | changed after 1 update | by layer "
        f"| after {last} updates | rerouted tokens after 1, {last} |\n|---|---|--:|---|--:|--:|"
    )
    for rate, method, found in _trainings(record):
        one, all_ = (_pooled(found, depth) for depth in (0, -1))
        layers = ", ".join(f"{share:.1%}" for share in one["changed"])
        yield (
            f"| {rate} | {METHODS[method]} | {_mean(one['changed']):.1%} | {layers} | {_mean(all_['changed']):.1%} "
            f"| {one['rerouted']:.0%}, {all_['rerouted']:.0%} |"
        )


def _spreads(record: dict[str, Any]) -> Iterator[str]:
    yield (
        "Root mean square of log ratios in GRPO's training, and in brackets the share of ratios outside of its clip "
        "range, 0.8 to 1.27. Replayed: the same weights, the old choices forced:\n"
    )
    yield (
        "| learning rate | updates | tokens | replayed | rerouted tokens | replayed | other tokens | replayed "
        "| sequences | replayed |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    last = record["settings"]["mini_batches"]
    for rate, methods in record["trainings"].items():
        for updates in (1, last):
            found = _pooled(methods["grpo"], updates - 1)
            cells = (f"{found['rms'][group]:.3f} ({found['outside'][group]:.1%})" for group in GROUPS)
            yield f"| {rate} | {updates} | {' | '.join(cells)} |"


def _learning(record: dict[str, Any]) -> Iterator[str]:
    quarter = max(1, record["settings"]["steps"] // 4)
    yield "The mean over seeds, in brackets from the least to the largest:\n"
    yield (
        f"| learning rate | training | reward, last {quarter} steps | held-out accuracy at the end "
        "| clipped | gradient's norm |\n|---|---|--:|--:|--:|--:|"
    )
    for rate, method, found in _trainings(record):
        rewards = [_mean(run[-quarter:]) for run in found["reward"]]
        unit = "responses" if method == "gspo" else "tokens"
        yield (
            f"| {rate} | {METHODS[method]} | {_range(rewards)} | {_range([run[-1] for run in found['held_out']])} "
            f"| {_mean(found['clip_fraction']):.1%} of {unit} | {_mean(found['gradient_norm']):.2f} |"
        )


def _trainings(record: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(rate, method, found) for rate, methods in record["trainings"].items() for method, found in methods.items()]


def _pooled(found: dict[str, Any], depth: int) -> dict[str, Any]:
    """The mean over seeds."""

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: mean([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values, strict=True)]
        return _mean(values)

    return mean([run[depth] for run in found["by_depth"]])  # type: ignore[no-any-return]


def _range(values: Sequence[float]) -> str:
    return f"{_mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    began = time.perf_counter()
    arguments, settings = lab.parse(__doc__, "experts", 4, SETTINGS, QUICK)
    if not arguments.redraw:
        jobs = [(seed, settings, arguments.device) for seed in range(arguments.seeds)]
        total = len(jobs) * len(LEARNING_RATES) * len(METHODS) * settings.steps
        runs = lab.side_by_side(run, jobs, total, arguments.workers, "experts")
        content = {
            "model": {"layers": LAYERS, "experts": EXPERTS, "chosen": CHOSEN, "parameters": runs[0]["parameters"]},
            "load": [found["load"] for found in runs],
            "looks": sorted(looks(settings)),
            "sizes": SIZES.tolist(),
            "trainings": {
                f"{rate:g}": {method: summary([found[rate, method] for found in runs]) for method in METHODS}
                for rate in LEARNING_RATES
            },
        }
        lab.save(arguments, settings, began, content)
    draw(lab.load(arguments), arguments)


if __name__ == "__main__":
    main()
