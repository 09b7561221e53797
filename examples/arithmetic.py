"""The task and the model of the examples: sums, answered directly or worked out, and a tiny Qwen3.

A supervised warm-up teaches two ways to answer, both incompletely: directly, `47+85=132`, and digit by digit first,
`47+85=7+5=12,4+8+1=13:132`. The trainings of the examples start from there.
"""

from __future__ import annotations

import argparse
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and tokenizer are built here; nothing is downloaded

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import gspo_kernels
from gspo_kernels import Objective, group_advantages, next_token_targets, token_logprobs

MAX_RESPONSE = 32  # tokens; 999+999, worked out, takes 30


@dataclass(frozen=True)
class Settings:
    """Sizes of a training. The command line changes the first five."""

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
    max_response: int = MAX_RESPONSE  # tokens; more digits take more
    held_out: int = 500
    evaluations: int = 10  # during the training, after one at the start

    def learning_rate_at(self, step: int) -> float:
        return self.learning_rate * (1 - 0.9 * (step - 1) / self.steps)

    def is_evaluated(self, step: int) -> bool:
        return step in {round(self.steps * (i + 1) / self.evaluations) for i in range(self.evaluations)}


def exported_objectives() -> dict[str, type[Objective]]:
    """The package's objectives by the names of their losses (GSPOToken is `gspo_token`); not those around another."""
    exported = (getattr(gspo_kernels, name) for name in gspo_kernels.__all__)
    kinds = [x for x in exported if isinstance(x, type) and issubclass(x, Objective) and x is not Objective]
    whole = [kind for kind in kinds if not any(each.default is MISSING for each in fields(kind))]  # type: ignore[arg-type]
    return {re.sub("(?<!^)(?=[A-Z][a-z])", "_", kind.__name__).lower(): kind for kind in whole}


OBJECTIVES = exported_objectives()
QUICK = Settings(warmup_steps=40, steps=4, groups=8, samples=8, digits=1, held_out=20, evaluations=2)


def settings_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace, default: Settings) -> Settings:
    """`default` with what the command line changes; ends the program where that is impossible."""
    names = ("warmup_steps", "steps", "groups", "samples", "learning_rate")
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    settings = replace(default, **given)
    if settings.samples < 2:
        parser.error("--samples must be at least 2: an advantage compares the responses to one problem")
    if settings.groups % settings.mini_batches:
        parser.error(f"--groups must be a multiple of {settings.mini_batches}, the updates per step")
    return settings


def count(text: str) -> int:
    """The type of an option that is a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


class Problems:
    """Sums such as `47+5=`. Some are held out at the start and never drawn again."""

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
    for column in range(max(map(len, numbers))):
        digits = [int(number[column]) for number in numbers if column < len(number)] + [1] * carry
        columns.append("+".join(map(str, digits)) + f"={sum(digits)}")
        carry = int(sum(digits) > 9)
    return ",".join(columns) + ":" + solve(problem)


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *"0123456789+=,:"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")


def build_model(tokenizer: PreTrainedTokenizerFast, *, tied: bool = True, head_size: int = 16) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=head_size,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


@dataclass
class Batch:
    """Problems padded on the left, then responses padded on the right, so that all responses start in one column.

    Positions count from the first column, padding included. That has no effect, because rotary embeddings are relative.
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

    def logits(self, model: PreTrainedModel) -> Tensor:
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


def sample(logits: Tensor, position: int) -> Tensor:
    """Next tokens [B, 1] at temperature 1."""
    return torch.multinomial(logits.softmax(-1), 1)


def most_likely(logits: Tensor, position: int) -> Tensor:
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[str],
    choose: Callable[[Tensor, int], Tensor] = sample,
    width: int | None = None,
    max_response: int = MAX_RESPONSE,
) -> tuple[Batch, list[str]]:
    """One response to each problem, token by token with a key-value cache.

    `choose` returns the next tokens [B, 1] from logits [B, V] and the tokens' position in the responses. `width` is
    the number of tokens that problems are padded to; None: that of the longest.
    """
    prompt = encode(tokenizer, problems, "left", model.device, width)
    tokens, attention_mask, cache = prompt.input_ids, prompt.attention_mask, None
    running = torch.ones_like(tokens[:, :1])  # [B, 1]: 1 until the response has ended
    ids, masks = [], []
    while len(ids) < max_response and running.any():
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
    """Rewards: 1 if the answer after the working, if any, is the sum; otherwise 0."""
    pairs = zip(problems, responses, strict=True)
    return torch.tensor([float(response.split(":")[-1] == solve(problem)) for problem, response in pairs])


@dataclass
class Rollout:
    """Responses to some problems, in groups, with the inputs of a policy loss."""

    batch: Batch
    rewards: Tensor  # [B]
    advantages: Tensor  # [B], each within its group; with a critic [B, T]
    old_logprobs: Tensor  # [B, T]

    def chunk(self, count: int) -> Iterator[Rollout]:
        wholes = (self.batch, self.rewards, self.advantages, self.old_logprobs)
        return (Rollout(*parts) for parts in zip(*(whole.chunk(count) for whole in wholes), strict=True))


def roll_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: Problems, settings: Settings
) -> Rollout:
    """`samples` responses to each of `groups` new problems, with rewards and group advantages."""
    return answer(model, tokenizer, problems.draw(settings.groups), settings)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[str],
    settings: Settings,
    choose: Callable[[Tensor, int], Tensor] = sample,
) -> Rollout:
    """`samples` responses to each of the problems."""
    repeated = [problem for problem in problems for _ in range(settings.samples)]
    batch, responses = generate(model, tokenizer, repeated, choose, max_response=settings.max_response)
    rewards = grade(repeated, responses).to(model.device)
    # The old log-probabilities are computed by the same function as the loss's. Those of another code path, such as the
    # sampler's, may differ by more than GSPO's clip range, 3e-4 below 1 to 4e-4 above.
    with torch.no_grad():
        token_ids, mask = batch.targets()
        old_logprobs = token_logprobs(batch.logits(model), token_ids, mask=mask).logprobs
    return Rollout(batch, rewards, group_advantages(rewards, group_size=settings.samples), old_logprobs)


def greedy_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[str]) -> float:
    _, responses = generate(model, tokenizer, problems, most_likely)
    return grade(problems, responses).mean().item()


def build_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99))


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    learning_rate: float,
    max_grad_norm: float,
    clip_gradients: Callable[[Iterable[Tensor], float], Tensor] = torch.nn.utils.clip_grad_norm_,
) -> Tensor:
    """One optimizer step -> the gradient's norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradients(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    quiet: bool = False,
) -> None:
    """Supervised training on example responses, most of them without working."""
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
