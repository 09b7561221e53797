"""GSPO end to end on a CPU: a tiny Qwen3 learns to add from nothing but "right" and "wrong".

A supervised warm-up shows two habits and leaves both half-learned: to blurt the sum out, `47+85=132`, and to work it
out digit by digit first, `47+85=7+5=12,4+8+1=13:132`. From then on there are no examples. Each step the model answers
a few problems many times over, a response earns 1 if its sum is right and 0 if not, and its advantage says how it
compares with the other responses to the same problem (GSPO, https://arxiv.org/abs/2507.18071). The model finds out by
itself that working pays, and gets better at it. One batch of responses feeds four updates: from the second on the
policy is no longer the one that sampled, its ratios leave 1, and the clip range has work to do.

The plot shows, step by step: the reward (the share of sampled responses that are right); the accuracy of greedy
decoding on problems kept out of all training; and the share of responses (gspo) or tokens (the others) held at the
clip range.

    python examples/train_arithmetic.py                  # two minutes on one CPU core
    python examples/train_arithmetic.py --loss grpo      # the same training with another loss
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and tokenizer are made here: nothing is downloaded

import matplotlib
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import gspo_kernels
from gspo_kernels import (
    group_advantages,
    grpo_loss,
    gspo_loss,
    gspo_token_loss,
    next_token_targets,
    ppo_loss,
    token_logprobs,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

LOSSES = {"gspo": gspo_loss, "gspo_token": gspo_token_loss, "grpo": grpo_loss, "ppo": ppo_loss}
MAX_RESPONSE = 32  # tokens; 999+999, worked out, takes 30


@dataclass(frozen=True)
class Settings:
    """How much of everything. The command line changes the first five."""

    warmup_steps: int = 400
    steps: int = 160  # of reinforcement learning
    groups: int = 32  # problems per step
    samples: int = 8  # responses per problem
    learning_rate: float = 4e-4  # falls linearly to a tenth
    mini_batches: int = 4  # updates per step
    max_grad_norm: float = 0.3
    warmup_batch: int = 96
    warmup_learning_rate: float = 3e-3
    warmup_worked: float = 0.4  # share of the warm-up's examples that work the sum out
    digits: int = 3  # of the longest number
    held_out: int = 500
    evaluations: int = 10  # during the training, beside the one before it

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate * (1 - 0.9 * (step - 1) / self.steps)

    def is_evaluated(self, step: int) -> bool:
        return step in {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}


QUICK = Settings(warmup_steps=40, steps=4, groups=8, samples=8, digits=1, held_out=20, evaluations=2)


@dataclass
class History:
    """What the plot shows, and the JSON file keeps."""

    reward: list[float] = field(default_factory=list)  # one number per step
    clip_fraction: list[float] = field(default_factory=list)  # mean over the step's updates
    response_length: list[float] = field(default_factory=list)  # tokens
    held_out_step: list[int] = field(default_factory=list)
    held_out_accuracy: list[float] = field(default_factory=list)

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


class Problems:
    """Sums such as `47+5=`. Some are set aside at the start and never drawn again."""

    def __init__(self, rng: random.Random, digits: int, held_out: int) -> None:
        self.rng, self.digits = rng, digits
        self.held_out: list[str] = []
        while len(self.held_out) < held_out:
            self.held_out += self.draw(1)

    def draw(self, count: int) -> list[str]:
        drawn: list[str] = []
        while len(drawn) < count:
            x, y = (self.rng.randrange(10 ** self.rng.randint(1, self.digits)) for _ in range(2))
            if (problem := f"{x}+{y}=") not in self.held_out:
                drawn.append(problem)
        return drawn


def solve(problem: str) -> str:
    x, y = problem.rstrip("=").split("+")
    return str(int(x) + int(y))


def work_out(problem: str) -> str:
    """The sum by columns, lowest first, as in `7+5=12,4+8+1=13:132`."""
    numbers = [number[::-1] for number in problem.rstrip("=").split("+")]
    columns, carry = [], 0
    for place in range(max(map(len, numbers))):
        digits = [int(number[place]) for number in numbers if place < len(number)] + [1] * carry
        columns.append("+".join(map(str, digits)) + f"={sum(digits)}")
        carry = int(sum(digits) > 9)
    return ",".join(columns) + ":" + solve(problem)


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+=,:"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer: PreTrainedTokenizerFast, *, tied: bool = True) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


@dataclass
class Batch:
    """Problems, padded on the left, then responses, padded on the right: all responses begin in one column.

    Positions count from the first column, padding included, which is harmless: rotary embeddings are relative.
    """

    input_ids: Tensor  # [B, T]
    attention_mask: Tensor  # [B, T]
    response_mask: Tensor  # [B, T], the end-of-sequence token included

    @classmethod
    def join(cls, problem: transformers.BatchEncoding, response_ids: Tensor, response_mask: Tensor) -> Batch:
        return cls(
            torch.cat([problem.input_ids, response_ids], dim=1),
            torch.cat([problem.attention_mask, response_mask], dim=1),
            torch.cat([torch.zeros_like(problem.input_ids), response_mask], dim=1),
        )

    def chunk(self, count: int) -> Iterator[Batch]:
        parts = (tensor.chunk(count) for tensor in (self.input_ids, self.attention_mask, self.response_mask))
        return (Batch(*part) for part in zip(*parts, strict=True))

    def logits(self, model: Qwen3ForCausalLM) -> Tensor:
        return model(self.input_ids, attention_mask=self.attention_mask, use_cache=False).logits

    def targets(self) -> tuple[Tensor, Tensor]:
        """The token that each row of the logits predicts, and whether it belongs to a response."""
        return next_token_targets(self.input_ids, self.response_mask)


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: list[str],
    padding_side: str,
    device: torch.device,
    width: int | None = None,
) -> transformers.BatchEncoding:
    """Padded to `width` tokens, or to the longest text."""
    padding = True if width is None else "max_length"
    found = tokenizer(texts, padding=padding, max_length=width, padding_side=padding_side, return_tensors="pt")
    return found.to(device)


def sample(logits: Tensor, place: int) -> Tensor:
    """At temperature 1."""
    return torch.multinomial(logits.softmax(-1), 1)


def most_likely(logits: Tensor, place: int) -> Tensor:
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def generate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[str],
    choose: Callable[[Tensor, int], Tensor] = sample,
    width: int | None = None,
) -> tuple[Batch, list[str]]:
    """One response to each problem, token by token with a key-value cache.

    `choose` finds the next tokens [B, 1] from logits [B, V] and the tokens' place in the responses. `width` is that of
    the problems with their padding; None: of the longest.
    """
    prompt = encode(tokenizer, problems, "left", model.device, width)
    tokens, attention_mask, cache = prompt.input_ids, prompt.attention_mask, None
    running = torch.ones_like(tokens[:, :1])  # [B, 1]: 1 until the response has ended
    ids, masks = [], []
    while len(ids) < MAX_RESPONSE and running.any():
        output = model(tokens, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1], output.past_key_values
        tokens = torch.where(running.bool(), choose(logits, len(ids)), tokenizer.pad_token_id)
        ids.append(tokens)
        masks.append(running)
        attention_mask = torch.cat([attention_mask, running], dim=1)
        running = running * (tokens != tokenizer.eos_token_id)
    batch = Batch.join(prompt, torch.cat(ids, dim=1), torch.cat(masks, dim=1))
    return batch, tokenizer.batch_decode(torch.cat(ids, dim=1), skip_special_tokens=True)


def grade(problems: list[str], responses: list[str]) -> Tensor:
    """Rewards: 1 if what follows the working, where there is any, is the sum; else 0."""
    pairs = zip(problems, responses, strict=True)
    return torch.tensor([float(response.split(":")[-1] == solve(problem)) for problem, response in pairs])


def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[str]) -> float:
    _, responses = generate(model, tokenizer, problems, most_likely)
    return grade(problems, responses).mean().item()


def build_optimizer(model: Qwen3ForCausalLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99))


def update(
    model: Qwen3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    learning_rate: float,
    max_grad_norm: float,
    clip_gradients: Callable[[Iterable[Tensor], float], Tensor] = torch.nn.utils.clip_grad_norm_,
) -> Tensor:
    """-> the gradient's norm, before it is clipped"""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradients(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    quiet: bool = False,
) -> None:
    """Supervised: the negative log-probability of example responses, most of them without working."""
    optimizer = build_optimizer(model)
    bar = tqdm(range(settings.warmup_steps), desc="warm-up", unit="step", disable=quiet)
    for step in bar:
        drawn = problems.draw(settings.warmup_batch)
        worked = (problems.rng.random() < settings.warmup_worked for _ in drawn)
        examples = [work_out(p) if work else solve(p) for p, work in zip(drawn, worked, strict=True)]
        prompt = encode(tokenizer, drawn, "left", model.device)
        response = encode(tokenizer, [text + tokenizer.eos_token for text in examples], "right", model.device)
        batch = Batch.join(prompt, response.input_ids, response.attention_mask)
        token_ids, mask = batch.targets()
        loss = -token_logprobs(batch.logits(model), token_ids, mask=mask).logprobs.sum() / mask.sum()
        rise, fall = (step + 1) / 20, 2 * (1 - step / settings.warmup_steps)
        update(model, optimizer, loss, settings.warmup_learning_rate * min(rise, 1, max(fall, 0.1)), 1.0)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def reinforce(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    loss_name: str,
    clip: dict[str, float],
) -> History:
    policy_loss = LOSSES[loss_name]
    optimizer = build_optimizer(model)
    history = History()
    history.add_evaluation(0, greedy_accuracy(model, tokenizer, problems.held_out))
    bar = tqdm(range(1, settings.steps + 1), desc=loss_name, unit="step")
    for step in bar:
        # Roll out: `samples` responses to each problem, graded, and compared within their group.
        asked = [problem for problem in problems.draw(settings.groups) for _ in range(settings.samples)]
        batch, responses = generate(model, tokenizer, asked)
        rewards = grade(asked, responses).to(model.device)
        advantages = group_advantages(rewards, group_size=settings.samples)
        # The old log-probabilities are computed as the loss computes the new ones. Those of another code path, such as
        # the sampler's, may differ by more than GSPO's clip range, 3e-4 below 1 to 4e-4 above.
        with torch.no_grad():
            token_ids, mask = batch.targets()
            old_logprobs = token_logprobs(batch.logits(model), token_ids, mask=mask).logprobs

        # Learn: the first update is on-policy, the ones after it less and less so.
        clip_fractions = []
        parts = (whole.chunk(settings.mini_batches) for whole in (batch, advantages, old_logprobs))
        for part, part_advantages, part_old_logprobs in zip(*parts, strict=True):
            token_ids, mask = part.targets()
            loss, stats = policy_loss(
                part.logits(model), token_ids, part_advantages, part_old_logprobs, mask=mask, **clip
            )
            update(model, optimizer, loss, settings.learning_rate_at(step), settings.max_grad_norm)
            clip_fractions.append(stats.clip_fraction)

        history.reward.append(rewards.mean().item())
        history.clip_fraction.append(torch.stack(clip_fractions).mean().item())
        history.response_length.append(batch.response_mask.sum(1).float().mean().item())
        if settings.is_evaluated(step):
            history.add_evaluation(step, greedy_accuracy(model, tokenizer, problems.held_out))
        bar.set_postfix(history.newest())
    return history


def draw_plot(history: History, title: str, clip_unit: str, path: Path) -> None:
    blue, orange, green, grey = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by colour-blind readers too
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    steps = range(1, len(history.reward) + 1)

    def draw_curve(axes: plt.Axes, values: list[float], color: str) -> None:
        window = max(1, len(values) // 16)
        recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
        axes.plot(steps, values, color=color, alpha=0.3, linewidth=1, label="each step")
        axes.plot(steps, [sum(part) / len(part) for part in recent], color=color, label=f"mean of {window} steps")

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
    right.set(title="Clip fraction", ylabel=f"{clip_unit} held at the clip range")
    right.set_ylim(bottom=0)
    right.legend(loc="upper right", frameon=False)

    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.get_layout_engine().set(wspace=0.05)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def parse_arguments(parser: argparse.ArgumentParser, output: Path) -> tuple[argparse.Namespace, Settings]:
    """What any training here is asked, beside the options that `parser` has already."""
    default = Settings()
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

    names = ("warmup_steps", "steps", "groups", "samples", "learning_rate")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    settings = replace(QUICK if arguments.quick else default, **given)
    if settings.samples < 2:
        parser.error("--samples must be at least 2: an advantage compares the responses to one problem")
    if settings.groups % settings.mini_batches:
        parser.error(f"--groups must be a multiple of {settings.mini_batches}, the updates per step")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Writes a plot and a JSON file.")
    parser.add_argument("--loss", choices=LOSSES, default="gspo", help="the policy loss (default: %(default)s)")
    parser.add_argument("--eps-low", type=positive, help="clip range below 1 (default: the loss's own)")
    parser.add_argument("--eps-high", type=positive, help="clip range above 1 (default: the loss's own)")
    arguments, settings = parse_arguments(parser, Path("runs/arithmetic"))
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    problems = Problems(random.Random(arguments.seed), settings.digits, settings.held_out)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(arguments.device)
    warm_up(model, tokenizer, problems, settings)

    shown = problems.held_out[:4]
    _, before = generate(model, tokenizer, shown, most_likely)
    clip = {name: value for name in ("eps_low", "eps_high") if (value := getattr(arguments, name)) is not None}
    history = reinforce(model, tokenizer, problems, settings, arguments.loss, clip)
    _, after = generate(model, tokenizer, shown, most_likely)

    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"loss": arguments.loss, "clip": clip or "default", "parameters": parameters}
    path = arguments.output / f"{arguments.loss}.png"
    write_record(path.with_suffix(".json"), facts, arguments, settings, seconds, history)
    name = arguments.loss.replace("_", "-").upper()
    title = f"{name}: a Qwen3 of {parameters:,} parameters learns to add (seed {arguments.seed})"
    draw_plot(history, title, "responses" if arguments.loss == "gspo" else "tokens", path)

    print("\nHeld-out problems, before and after:")
    for line in zip(shown, before, after, strict=True):
        print("  {:10}{:34}{}".format(*line))
    first, last = history.held_out_accuracy[0], history.held_out_accuracy[-1]
    print(f"Held-out accuracy {first:.1%} -> {last:.1%} in {seconds:.0f} s. Plot: {path}, numbers: {path.stem}.json")


if __name__ == "__main__":
    main()
