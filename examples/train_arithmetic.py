"""Policy optimization end to end on a CPU: a tiny Qwen3 learns to add from nothing but "right" and "wrong".

A supervised warm-up teaches two ways to answer, both incompletely: directly, `47+85=132`, and digit by digit first,
`47+85=7+5=12,4+8+1=13:132`. After it there are no examples. In each step the model answers a few problems many times. A
response has reward 1 if its sum is right and 0 if not, and its advantage compares it with the other responses to the
same problem (GSPO, https://arxiv.org/abs/2507.18071). The model learns that working a sum out is rewarded more often,
and gets better at it. One batch of responses feeds four updates: from the second on, the policy is not the one that
sampled, ratios differ from 1, and some are clipped.

The plot shows for each step: the reward (the share of sampled responses that are right); the accuracy of greedy
decoding on held-out problems; and the share of responses or tokens, whichever have a ratio, that are clipped.

    python examples/train_arithmetic.py                      # two minutes on one CPU core
    python examples/train_arithmetic.py --loss grpo          # the same training with another objective of the package
    python examples/train_arithmetic.py --loss ppo --critic  # with a value model and an advantage for each token
    python examples/train_arithmetic.py --clip-share 0.15    # with a clip range that fits the updates so far
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import matplotlib
import torch
import transformers
from arithmetic import (
    OBJECTIVES,
    QUICK,
    Problems,
    Settings,
    build_model,
    build_optimizer,
    build_tokenizer,
    count,
    generate,
    greedy_accuracy,
    most_likely,
    roll_out,
    settings_of,
    update,
    warm_up,
)
from clip_range import Clipping, Fit, add_option, check_option
from critic import Critic
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import gspo_kernels
from gspo_kernels import Objective, policy_loss

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter


@dataclass
class History:
    """The numbers of the plot and the JSON file."""

    reward: list[float] = field(default_factory=list)  # one number per step
    clip_fraction: list[float] = field(default_factory=list)  # mean over the step's updates
    response_length: list[float] = field(default_factory=list)  # tokens
    held_out_step: list[int] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)
    explained_variance: list[float] = field(default_factory=list)  # of the returns, by a critic; one number per step
    clip_range: list[list[float]] = field(default_factory=list)  # eps_low and eps_high of each step, if they change
    clip_fit: Fit | None = None  # at the end, for an objective whose range can be fitted

    def add_evaluation(self, step: int, accuracy: float) -> None:
        self.held_out_step.append(step)
        self.held_out_accuracy.append(accuracy)

    def newest(self) -> dict[str, str]:
        """For the progress bar."""
        return {
            "reward": f"{self.reward[-1]:.2f}",
            "clipped": f"{self.clip_fraction[-1]:.2f}",
            "tokens": f"{self.response_length[-1]:.0f}",
            "held_out": f"{self.held_out_accuracy[-1]:.0%}",
        }


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    objective: Objective,
    critic: Critic | None = None,
    clip_share: float | None = None,
) -> History:
    optimizer = build_optimizer(model)
    clipping = Clipping(objective, clip_share)
    history = History()
    history.add_evaluation(0, greedy_accuracy(model, tokenizer, problems.held_out))
    bar = tqdm(range(1, settings.steps + 1), desc=type(objective).__name__, unit="step")
    for step in bar:
        rollout = roll_out(model, tokenizer, problems, settings)
        if critic is not None:
            rollout, targets = critic.judge(rollout)
            explained = critic.learn(rollout, targets, settings)
            history.explained_variance.append(explained.item())
        # The first update is on-policy; each later one is further off-policy.
        clip_fractions = []
        objective = clipping.objective
        for part in rollout.chunk(settings.mini_batches):
            token_ids, mask = part.batch.targets()
            loss, stats = policy_loss(
                part.batch.logits(model), token_ids, part.advantages, part.old_logprobs, objective=objective, mask=mask
            )
            update(model, optimizer, loss, settings.learning_rate_at(step), settings.max_grad_norm)
            clip_fractions.append(stats.clip_fraction)
            clipping.see(stats, part.advantages, mask)
        if clip_share is not None:
            history.clip_range.append(clipping.bounds)
            clipping.adapt()

        history.reward.append(rollout.rewards.mean().item())
        history.clip_fraction.append(torch.stack(clip_fractions).mean().item())
        history.response_length.append(rollout.batch.response_mask.sum(1).float().mean().item())
        if settings.is_evaluated(step):
            history.add_evaluation(step, greedy_accuracy(model, tokenizer, problems.held_out))
        bar.set_postfix(history.newest())
    if clipping.fits:
        history.clip_fit = clipping.fit(objective)
    return history


def draw_curve(axes: plt.Axes, values: list[float], color: str) -> None:
    """One value for each step, and their mean over the last few steps."""
    steps = range(1, len(values) + 1)
    window = max(1, len(values) // 16)
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, [sum(part) / len(part) for part in recent], color=color, label=f"mean of {window} steps")


def draw_critic(history: History, axes: plt.Axes) -> None:
    draw_curve(axes, history.explained_variance, "#CC79A7")
    axes.set(title="Critic", ylabel="variance of the returns that it explains", ylim=(-0.5, 1))
    axes.legend(loc="lower right", frameon=False)


def draw_plot(
    history: History, title: str, clip_unit: str, path: Path, fourth: Callable[[plt.Axes], None] | None = None
) -> None:
    """Three panels, and a fourth with what `fourth` draws in it."""
    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#666666"  # distinct for colour-blind readers
    panels = 3 if fourth is None else 4
    figure, (left, middle, right, *rest) = plt.subplots(1, panels, figsize=(13 * panels / 3, 4), layout="constrained")

    draw_curve(left, history.reward, blue)
    left.set(title="Reward", ylabel="sampled responses that are right", ylim=(0, 1))
    left.legend(loc="lower right", frameon=False)

    accuracy = history.held_out_accuracy
    middle.axhline(accuracy[0], color=grey, linestyle=":", label="after the warm-up")
    middle.plot(history.held_out_step, accuracy, color=green, marker="o", label="greedy decoding")
    for index, offset in ((0, (8, -14)), (-1, (-8, 9))):
        end = history.held_out_step[index], accuracy[index]
        middle.annotate(f"{accuracy[index]:.0%}", end, offset, textcoords="offset points", color=green)
    middle.set(title="Held-out accuracy", ylabel="problems solved", ylim=(0, 1))
    middle.legend(loc="lower right", frameon=False)

    draw_curve(right, history.clip_fraction, orange)
    right.set(title="Clip fraction", ylabel=f"{clip_unit} that are clipped")
    right.set_ylim(bottom=0)
    right.legend(loc="upper right", frameon=False)

    for axes in (left, middle, right, *rest):
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if fourth is not None:
        fourth(rest[0])
    figure.suptitle(title)
    figure.get_layout_engine().set(wspace=0.05)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def parse_arguments(
    parser: argparse.ArgumentParser, output: Path, default: Settings = Settings(), quick: Settings = QUICK
) -> tuple[argparse.Namespace, Settings]:
    """Adds the options of every training to those of `parser`, and parses the command line."""
    parser.add_argument("--warmup-steps", type=count, help=f"supervised steps (default: {default.warmup_steps})")
    parser.add_argument("--steps", type=count, help=f"steps of reinforcement learning (default: {default.steps})")
    parser.add_argument("--groups", type=count, help=f"problems per step (default: {default.groups})")
    parser.add_argument("--samples", type=count, help=f"responses per problem (default: {default.samples})")
    parser.add_argument("--learning-rate", type=positive, help=f"at its start (default: {default.learning_rate})")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where torch runs: cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=output, help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds that learns next to nothing")
    arguments = parser.parse_args()

    settings = settings_of(parser, arguments, quick if arguments.quick else default)
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    return arguments, settings


def write_record(
    path: Path,
    facts: dict[str, object],
    arguments: argparse.Namespace,
    settings: Settings,
    seconds: float,
    history: History,
) -> None:
    record = {
        **facts,
        **{name: getattr(arguments, name) for name in ("seed", "device", "threads")},
        "seconds": round(seconds, 1),
        "settings": asdict(settings),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, gspo_kernels)},
        },
        "history": asdict(history),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def chosen_objective(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> tuple[Objective, dict[str, float]]:
    """The objective, and the clip range that the command line gives it."""
    kind = OBJECTIVES[arguments.loss]
    clip = {name: value for name in ("eps_low", "eps_high") if (value := getattr(arguments, name)) is not None}
    own = {each.name for each in fields(kind)}
    if unknown := clip.keys() - own:
        parser.error(f"--{min(unknown).replace('_', '-')}: {arguments.loss} has no such clip range")
    if arguments.critic and not kind.advantages_per_token:
        parser.error(f"--critic: makes an advantage for each token, and {arguments.loss} has one for a response")
    try:
        return kind(**clip), clip
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-', 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Writes a plot and a JSON file.")
    parser.add_argument("--loss", choices=OBJECTIVES, default="gspo", help="the objective (default: %(default)s)")
    parser.add_argument("--eps-low", type=float, help="clip range below 1, inf for none (default: the objective's own)")
    parser.add_argument(
        "--eps-high", type=float, help="clip range above 1, inf for none (default: the objective's own)"
    )
    parser.add_argument("--critic", action="store_true", help="train a value model, for an advantage for each token")
    parser.add_argument("--lam", type=float, default=1.0, help="of the critic's advantages (default: %(default)s)")
    add_option(parser)
    arguments, settings = parse_arguments(parser, Path("runs/arithmetic"))
    objective, clip = chosen_objective(parser, arguments)
    check_option(parser, arguments.clip_share, arguments.loss, objective)
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    problems = Problems(random.Random(arguments.seed), settings.digits, settings.held_out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(arguments.device)
    warm_up(model, tokenizer, problems, settings)
    critic = Critic(model, arguments.lam) if arguments.critic else None

    shown = problems.held_out[:4]
    _, before = generate(model, tokenizer, shown, most_likely)
    history = reinforce(model, tokenizer, problems, settings, objective, critic, arguments.clip_share)
    _, after = generate(model, tokenizer, shown, most_likely)

    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"loss": arguments.loss, "clip": clip or "default", "parameters": parameters}
    if critic is not None:
        facts |= {"critic": sum(parameter.numel() for parameter in critic.parameters()), "lam": arguments.lam}
    if arguments.clip_share is not None:
        facts["clip_share"] = arguments.clip_share
    clipped = "" if arguments.clip_share is None else f"-clip-share-{arguments.clip_share:g}"
    path = arguments.output / f"{arguments.loss}{'-critic' if critic else ''}{clipped}.png"
    write_record(path.with_suffix(".json"), facts, arguments, settings, seconds, history)
    name = arguments.loss.replace("_", "-").upper() + (" with a critic" if critic else "")
    title = f"{name}: a Qwen3 of {parameters:,} parameters learns to add (seed {arguments.seed})"
    unit = "responses" if objective.ratio_of == "sequence" else "tokens"
    draw_plot(history, title, unit, path, None if critic is None else partial(draw_critic, history))

    print("\nHeld-out problems, before and after:")
    for line in zip(shown, before, after, strict=True):
        print("  {:10}{:34}{}".format(*line))
    first, last = history.held_out_accuracy[0], history.held_out_accuracy[-1]
    if history.clip_fit is not None:
        print(history.clip_fit.lines())
    print(f"Held-out accuracy {first:.1%} -> {last:.1%} in {seconds:.0f} s. Plot: {path}, numbers: {path.stem}.json")


if __name__ == "__main__":
    main()
