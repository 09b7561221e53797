"""The task and the trainings of the staleness study: digits are copied, and each is followed by the sum so far.

The answer to the digits 7 5 8 is `7 7 5 2 8 0`: each digit, then the sum of all digits up to it, modulo 10. Only the
last sum is graded, so L digits are a response of 2 L + 1 tokens with one reward at its end, and a slip anywhere is
carried on to it. A supervised warm-up on answers with slips leaves a model that is right now and then.

`train` is one training of such a model, a `Trial`: rollouts of one group of responses for each of its mini-batches, so
that the mini-batches of a rollout say how stale its last ones are.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is built here; nothing is downloaded

import torch
from arithmetic import update
from lab import mean, tick
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_kernels import Objective, Stats, group_advantages, policy_loss, suggest_clip_range, token_logprobs

EOS, PAD, DIGIT, ANSWER = 10, 11, 12, 13  # after the ten digits: the end, padding, "a digit follows", "answer"
VOCABULARY = 14
LONGER = 16  # tokens that a response may have beyond a right one
OLD_CHUNK = 64  # responses whose old log-probabilities are computed at once
RECENT = 64  # updates that a clip range is fitted to
TESTED = 384  # fresh problems of the accuracy at the end
BALANCE = 0.01  # weight of the load-balancing loss in a warm-up with experts, as in Switch Transformer


@dataclass(frozen=True)
class Task:
    """Sizes of the task and of its warm-up."""

    digits: int  # of a problem
    slip: float  # share of the tokens of the warm-up's answers that are wrong
    warmup_steps: int
    warmup_batch: int = 32
    warmup_learning_rate: float = 3e-3

    @property
    def tokens(self) -> int:
        """Of a right response."""
        return 2 * self.digits + 1


SHORT = Task(digits=10, slip=0.06, warmup_steps=400)  # responses of 21 tokens
LONG = Task(digits=50, slip=0.012, warmup_steps=450)  # of 101


@dataclass(frozen=True)
class Trial:
    """One training. All trials of a seed and a task start from the same model and draw the same problems."""

    task: Task
    seed: int
    name: str  # of the objective, for tables
    objective: Objective
    learning_rate: float  # after a rise over the first 15% of the updates, falls linearly to a tenth
    mini_batches: int  # updates for each rollout
    updates: int = 320
    samples: int = 8  # responses to a problem, which are one mini-batch
    max_grad_norm: float = 1.0
    clip_share: float | None = None  # adapts the clip range before each rollout but the first; None: it is constant
    experts: int = 0  # 0: a dense model
    replay: bool = False  # of the experts' choices under the old policy

    @property
    def rollouts(self) -> int:
        return self.updates // self.mini_batches


# --- the task ---------------------------------------------------------------------------------------------------------

Digits = list[int]


def draw(rng: random.Random, count: int, digits: int) -> list[Digits]:
    return [[rng.randrange(10) for _ in range(digits)] for _ in range(count)]


def prompt(digits: Digits) -> list[int]:
    return [token for digit in digits for token in (DIGIT, digit)] + [ANSWER]


def demonstration(digits: Digits, rng: random.Random, slip: float) -> list[int]:
    """An answer in which each token may be wrong. What follows builds on it."""
    total, answer = 0, []
    for digit in digits:
        copied = rng.randrange(10) if rng.random() < slip else digit
        total = rng.randrange(10) if rng.random() < slip else (total + copied) % 10
        answer += [copied, total]
    return [*answer, EOS]


def grade(responses: Tensor, problems: list[Digits]) -> Tensor:
    """Rewards: 1 if the response ends with the sum of all digits; otherwise 0."""
    ends = [[token for token in row if token != PAD][-2:] for row in responses.tolist()]
    return torch.tensor([float(end == [sum(digits) % 10, EOS]) for end, digits in zip(ends, problems, strict=True)])


# --- the model --------------------------------------------------------------------------------------------------------


def build(experts: int = 0) -> PreTrainedModel:
    """A Qwen3 of 107,776 parameters; or a Qwen3-MoE with so many experts, of which a token uses two."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    }
    if not experts:
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=192, **sizes))
    routing = {"num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=96, **routing, **sizes))


def forward(model: PreTrainedModel, prompts: Tensor, responses: Tensor, **options: Any) -> Any:
    """The model's output with logits [B, T, V] of the responses [B, T].

    They are padded on the right, where causal attention needs no mask.
    """
    ids = torch.cat([prompts, responses[:, :-1]], dim=1)
    return model(ids, use_cache=False, logits_to_keep=responses.shape[1], **options)


def logits_of(model: PreTrainedModel, prompts: Tensor, responses: Tensor) -> Tensor:
    logits: Tensor = forward(model, prompts, responses).logits
    return logits


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, most: int) -> Tensor:
    """[B, T], at temperature 1; at most `most` tokens, then padding."""
    ids, cache, found = prompts, None, []
    running = torch.ones(len(prompts), dtype=torch.bool)
    while len(found) < most and running.any():
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        tokens = torch.multinomial(output.logits[:, -1].softmax(-1), 1)[:, 0]
        found.append(torch.where(running, tokens, PAD))
        running &= tokens != EOS
        ids = found[-1][:, None]
    return torch.stack(found, dim=1)


def build_optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True)


def warm_up(task: Task, seed: int, experts: int = 0) -> PreTrainedModel:
    """Supervised training on demonstrations; of experts with a load-balancing loss, so that all are used."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build(experts)
    optimizer = build_optimizer(model)
    for index in range(task.warmup_steps):
        problems = draw(rng, task.warmup_batch, task.digits)
        prompts = torch.tensor([prompt(digits) for digits in problems])
        answers = torch.tensor([demonstration(digits, rng, task.slip) for digits in problems])
        output = forward(model, prompts, answers, **({"output_router_logits": True} if experts else {}))
        loss = -token_logprobs(output.logits, answers).logprobs.mean()
        if experts:
            loss = loss + BALANCE * output.aux_loss
        rate = task.warmup_learning_rate * min((index + 1) / 30, 1, max(0.1, 2 * (1 - index / task.warmup_steps)))
        update(model, optimizer, loss, rate, 1.0)
    return model


def prepare(folder: Path, task: Task, seed: int, experts: int = 0) -> None:
    """Warms a model up before trials in several processes need it."""
    warmed_up(folder, task, seed, experts)
    tick()


def warmed_up(folder: Path, task: Task, seed: int, experts: int = 0) -> PreTrainedModel:
    """The model after its warm-up, from the folder's file if there is one."""
    path = folder / f"warm-{task.tokens}-{task.warmup_steps}-{seed}{f'-{experts}' if experts else ''}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(warm_up(task, seed, experts).state_dict(), unfinished)
        unfinished.replace(path)
    model = build(experts)
    model.load_state_dict(torch.load(path))
    return model


# --- a rollout --------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A mini-batch: responses to one problem or more, and what a policy loss needs of them."""

    prompts: Tensor  # [B, P]
    responses: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B]
    old_logprobs: Tensor  # [B, T]
    experts: Tensor | None = None  # [B, P + T - 1, layers, k], of the old policy; None: the model is dense
    replay: bool = False
    choices: list[Tensor] = field(default_factory=list)  # of its update: [B * (P + T - 1), k], by layer

    @contextmanager
    def routed(self, model: PreTrainedModel) -> Iterator[None]:
        """A forward pass within it records the routers' choices, and with `replay` uses the old policy's experts."""
        if self.experts is None:
            yield
            return
        from routing import RoutingReplay

        routing = RoutingReplay(model)
        forced = routing.replay(self.experts.flatten(0, 1)) if self.replay else nullcontext()
        with routing.record() as self.choices, forced:  # in this order: recorded is what the routers prefer
            yield


def roll_out(model: PreTrainedModel, trial: Trial, rng: random.Random) -> tuple[list[Part], Tensor]:
    """-> one mini-batch for each problem, and all rewards"""
    problems = [digits for digits in draw(rng, trial.mini_batches, trial.task.digits) for _ in range(trial.samples)]
    prompts = torch.tensor([prompt(digits) for digits in problems])
    responses = sample(model, prompts, trial.task.tokens + LONGER - 1)
    rewards = grade(responses, problems)
    advantages = group_advantages(rewards, group_size=trial.samples)
    old, experts = old_policy(model, prompts, responses, bool(trial.experts))
    parts = []
    for first in range(0, len(problems), trial.samples):
        rows = slice(first, first + trial.samples)
        width = int((responses[rows] != PAD).sum(1).max())
        taken = responses[rows, :width]
        routed = None if experts is None else experts[rows, : prompts.shape[1] + width - 1]
        part = Part(prompts[rows], taken, taken != PAD, advantages[rows], old[rows, :width], routed, trial.replay)
        parts.append(part)
    return parts, rewards


@torch.no_grad()
def old_policy(
    model: PreTrainedModel, prompts: Tensor, responses: Tensor, routed: bool
) -> tuple[Tensor, Tensor | None]:
    """-> log-probabilities [B, T], and the experts that gave them if the model has any"""
    logprobs, experts = [], []
    for some, taken in zip(prompts.split(OLD_CHUNK), responses.split(OLD_CHUNK), strict=True):
        recording: AbstractContextManager[list[Tensor]] = nullcontext([])
        if routed:
            from routing import RoutingReplay

            recording = RoutingReplay(model).record()
        with recording as choices:
            logits = logits_of(model, some, taken)
        logprobs.append(token_logprobs(logits, taken, mask=taken != PAD).logprobs)
        if routed:
            experts.append(torch.stack(choices, dim=1).unflatten(0, (len(some), -1)))
    return torch.cat(logprobs), torch.cat(experts) if routed else None


# --- a training -------------------------------------------------------------------------------------------------------


class Observer(Protocol):
    """Sees each update before its weights change; `result` goes to the trial's record."""

    def see(self, part: Part, stats: Stats, depth: int) -> None: ...

    def result(self) -> dict[str, Any]: ...


@dataclass
class Meter:
    """The clipping and the ratios of all updates."""

    seen: dict[str, list[float]] = field(default_factory=dict)

    def see(self, part: Part, stats: Stats, depth: int) -> None:
        log_ratio = torch.where(part.mask, stats.logprobs - part.old_logprobs, 0.0)
        clipped = stats.clipped_low | stats.clipped_high
        lengths = part.mask.sum(1)
        rewarded = part.advantages != 0
        of_sequences = clipped if clipped.ndim == 1 else clipped.any(1)
        of_tokens = (clipped[:, None] & part.mask) if clipped.ndim == 1 else clipped
        self._add("clipped_sequences", of_sequences.float().mean())
        self._add("clipped_tokens", of_tokens.sum() / lengths.sum())
        if rewarded.any():
            self._add("clipped_of_rewarded", of_sequences[rewarded].float().mean())
        self._add("token_spread", log_ratio[part.mask].square().mean().sqrt())
        self._add("sequence_spread", (log_ratio.sum(1) / lengths).square().mean().sqrt())

    def _add(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.item())

    def result(self) -> dict[str, float]:
        return {name: mean(values) for name, values in self.seen.items()}


def name_of(trial: Trial) -> str:
    """All that the trial's result depends on, for a journal."""
    return "; ".join(f"{each.name}={getattr(trial, each.name)!r}" for each in fields(trial))


def rate_at(trial: Trial, update: int) -> float:
    """`update`: from 1 on."""
    rise = 0.15 * trial.updates
    return trial.learning_rate * min(1.0, update / rise) * (1 - 0.9 * update / trial.updates)


def train(trial: Trial, folder: Path, observe: Callable[[Trial], Observer] | None = None) -> dict[str, Any]:
    """The trial's accuracy at the end, its rewards, clip fractions and ratios; with what the observer has seen."""
    began = time.process_time()
    model = warmed_up(folder, trial.task, trial.seed, trial.experts)
    torch.manual_seed(trial.seed + 1000)
    rng = random.Random(trial.seed + 1000)
    optimizer, objective = build_optimizer(model), trial.objective
    meter, observer = Meter(), observe(trial) if observe else None
    rewards: list[float] = []
    norms: list[float] = []
    recent: deque[tuple[Part, Tensor]] = deque(maxlen=RECENT)
    ranges: list[tuple[float, float]] = []  # that would have fitted the recent updates, after each rollout
    for index in range(trial.rollouts):
        parts, graded = roll_out(model, trial, rng)
        rewards.append(graded.mean().item())
        for depth, part in enumerate(parts):
            with part.routed(model):
                logits = logits_of(model, part.prompts, part.responses)
            loss, stats = policy_loss(
                logits, part.responses, part.advantages, part.old_logprobs, objective=objective, mask=part.mask
            )
            meter.see(part, stats, depth)
            if observer is not None:
                observer.see(part, stats, depth)
            recent.append((part, stats.log_ratio))
            rate = rate_at(trial, index * trial.mini_batches + depth + 1)
            norm = update(model, optimizer, loss, rate, trial.max_grad_norm).item()
            norms.append(norm)
            if not math.isfinite(norm):
                raise FloatingPointError(f"{trial.name}, seed {trial.seed}: the gradient's norm is {norm}")
        low, high = fitting_range(trial.clip_share or 0.15, recent, objective)
        ranges.append((low, high))
        if trial.clip_share is not None:
            objective = replace(objective, eps_low=low, eps_high=high)  # type: ignore[call-arg]
    tick()
    return {
        "accuracy": accuracy(model, trial),
        "rewards": rewards,
        "seconds": time.process_time() - began,
        "gradient_norm": mean(norms),
        "ranges": ranges,
        **meter.result(),
        **(observer.result() if observer is not None else {}),
    }


def fitting_range(share: float, recent: Sequence[tuple[Part, Tensor]], objective: Objective) -> tuple[float, float]:
    """The clip range that would have clipped this share of the responses; the objective's on a side without any."""
    ratios = [log_ratio for _, log_ratio in recent]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "advantages: expected at least", UserWarning)  # few responses at first
        found = suggest_clip_range(
            ratios,
            [part.advantages for part, _ in recent],
            share,
            mask=[part.mask for part, _ in recent] if ratios[0].ndim == 2 else None,
            current=(objective.eps_low, objective.eps_high),  # type: ignore[attr-defined]
        )
    return found.eps_low, found.eps_high


def accuracy(model: PreTrainedModel, trial: Trial) -> float:
    """The share of fresh problems that one sampled response each gets right."""
    problems = draw(random.Random(10**6 + trial.seed), TESTED, trial.task.digits)
    prompts = torch.tensor([prompt(digits) for digits in problems])
    return grade(sample(model, prompts, trial.task.tokens + LONGER - 1), problems).mean().item()
