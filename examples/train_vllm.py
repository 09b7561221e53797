"""GSPO with vLLM as the sampler: the demo's Qwen3 learns to add, and each step begins with its weights in the engine.

One step: push the weights, sample with vLLM, read its output with `from_vllm`, compare its log-probabilities with the
trainer's (`rollout_mismatch`), and update four times on mini-batches of the packed batch. `--old` says which
log-probabilities the loss compares with:

    engine   those that vLLM returned: section 5.4 of the GSPO paper (arXiv 2507.18071)
    trainer  recomputed by the trainer before the first update
    weights  recomputed, and `rollout_weights` correct for the engine: the geometric mean of each response

The engine starts before the warm-up, with random weights. So the first push already shows whether pushing works:
weights that did not arrive stop the training with an error.

    python examples/train_vllm.py                                    # minutes on two CPU cores: make demo-vllm
    python examples/train_vllm.py --engine-dtype bfloat16 --old trainer
    python examples/train_vllm.py --top-p 0.8                        # with kept sets
    python examples/train_vllm.py --clip-share 0.15                  # with a clip range that fits the updates so far
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from arithmetic import (
    QUICK,
    Problems,
    Settings,
    build_model,
    build_optimizer,
    build_tokenizer,
    grade,
    greedy_accuracy,
    update,
    warm_up,
)
from clip_range import Clipping, add_option
from engine import Engine, vllm_version  # before anything imports vLLM, which reads the environment then
from torch import Tensor
from tqdm import tqdm
from train_arithmetic import History, draw_curve, draw_plot, parse_arguments, plt, positive, write_record
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gspo_kernels import (
    GSPO,
    KeptTokens,
    PromptedRollouts,
    RolloutMismatch,
    from_vllm,
    group_advantages,
    gspo_loss,
    rollout_mismatch,
    rollout_weights,
    token_logprobs,
)

SETTINGS = Settings(warmup_steps=300, steps=80, digits=2, held_out=250, evaluations=8)
HEAD_SIZE = 32  # the smallest that vLLM's attention has on a CPU
MAX_LENGTH = 64  # tokens of a prompt and its response
OLD = ("engine", "trainer", "weights")
KEPT = ("engine", "trainer", "none")
# Nats per token, mean over a batch: above the noise of an engine of this dtype, below what stale weights make.
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}


class StaleWeights(RuntimeError):
    """The engine does not sample with the weights that were pushed."""


@dataclass(frozen=True)
class Way:
    """How the engine samples, and what the loss takes of its output."""

    old: str = "engine"  # whose log-probabilities are `old_logprobs`: one of OLD
    engine_dtype: str = "float32"
    top_p: float = 1.0
    temperature: float = 1.0
    kept: str = "trainer"  # who says which columns top-p kept; "none": the loss is of all columns. One of KEPT

    @property
    def name(self) -> str:
        """Of its files."""
        filtered = f"-top-p-{self.top_p:g}-kept-{self.kept}" if self.top_p < 1 else ""
        heated = f"-temperature-{self.temperature:g}" if self.temperature != 1 else ""
        return f"{self.old}-{self.engine_dtype}{heated}{filtered}"

    @property
    def asks_for_sets(self) -> bool:
        return self.top_p < 1 and self.kept == "engine"

    def sampling(self, columns: int) -> dict[str, float]:
        """Parameters of a request. vLLM returns the sets of requests with top-k alone, which may be all columns."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": columns if self.asks_for_sets else 0,
        }


class Sampler(Protocol):
    """What the training needs of an engine."""

    def push(self, model: PreTrainedModel, version: str | None = None) -> None: ...

    def sample(self, prompts: Sequence[Sequence[int]], **parameters: Any) -> list[Any]: ...


@dataclass
class VllmHistory(History):
    """The demo's numbers, and those of the engine; one per step."""

    clip_fractions: list[list[float]] = field(default_factory=list)  # of each mini-batch
    apart: list[float] = field(default_factory=list)  # nats, mean over tokens: trainer's from engine's log-probability
    mismatch: dict[str, list[float]] = field(default_factory=dict)  # `rollout_mismatch`, by name
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of pushing, sampling, recomputing, training

    def add_mismatch(self, mismatch: RolloutMismatch) -> None:
        for name, value in mismatch.as_dict().items():
            self.mismatch.setdefault(name, []).append(value.item())

    @property
    def largest_off(self) -> float:
        """The largest distance of a response's ratio from 1 before any update."""
        return max(max(self.mismatch["sequence_ratio_max"]) - 1, 1 - min(self.mismatch["sequence_ratio_min"]))

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds.setdefault(what, []).append(time.perf_counter() - began)

    def newest(self) -> dict[str, str]:
        return super().newest() | {"nats apart": f"{self.apart[-1]:.0e}"}


# --- sampling ---------------------------------------------------------------------------------------------------------


def roll_out(
    engine: Sampler,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    way: Way,
    device: torch.device,
) -> tuple[PromptedRollouts, Tensor]:
    """`samples` responses to each of `groups` new problems, and their rewards [S]."""
    drawn = problems.draw(settings.groups)
    outputs = engine.sample(
        [tokenizer(problem).input_ids for problem in drawn],
        n=settings.samples,
        max_tokens=settings.max_response,
        **way.sampling(len(tokenizer)),
    )
    ids = [completion.token_ids for output in outputs for completion in output.outputs]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rewards = grade([problem for problem in drawn for _ in range(settings.samples)], texts)
    return from_vllm(outputs, device=device).with_prompts(), rewards.to(device)


def logits_of(model: PreTrainedModel, batch: PromptedRollouts) -> Tensor:
    """[tokens, vocabulary], packed: attention starts again where `position_ids` do."""
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]


def kept_of(logits: Tensor, batch: PromptedRollouts, way: Way) -> KeptTokens | None:
    """The columns that top-p kept, by the engine's output; or by the trainer's logits, and the sampled tokens.

    The engine's rounding may have kept a token that the trainer's drops.
    """
    if way.top_p == 1 or way.asks_for_sets:
        return batch.kept
    made = KeptTokens.from_logits(logits, top_p=way.top_p, temperature=way.temperature, mask=batch.mask)
    pairs = zip(made.to_lists(), batch.token_ids.tolist(), strict=True)
    rows = [row if row is None or token in row else [*row, token] for row, token in pairs]
    return KeptTokens.from_lists(rows, device=logits.device)


@torch.no_grad()
def recompute(model: PreTrainedModel, batch: PromptedRollouts, way: Way, parts: int) -> tuple[PromptedRollouts, Tensor]:
    """The trainer's log-probabilities of the distribution that was sampled from; the batch has its kept sets."""
    logprobs, kept = [], []
    for _, part in batch.mini_batches(parts):
        logits = logits_of(model, part)
        sets = kept_of(logits, part, way)
        found = token_logprobs(logits, part.token_ids, mask=part.mask, temperature=way.temperature, kept=sets)
        logprobs.append(found.logprobs if sets is None else found.kept.logprobs)
        kept.append(sets)
    return replace(batch, kept=None if kept[0] is None else KeptTokens.cat(kept)), torch.cat(logprobs)


def check_weights(apart: float, batch: PromptedRollouts, way: Way, step: int) -> None:
    """Raises `StaleWeights` unless the batch was sampled with the weights that were pushed in this step.

    `apart`: nats, the mean over tokens of the distance between the trainer's and the engine's log-probabilities.
    """
    versions = batch.weight_versions
    if versions is not None and set(versions.labels) != {str(step)}:
        raise StaleWeights(
            f"step {step}: expected responses of weight version {step}, which was pushed last; the engine reports "
            f"{', '.join(versions.labels) or 'none'}. Push before sampling, with version=str(step)."
        )
    limit = LIMITS[way.engine_dtype]
    if not apart <= limit:
        raise StaleWeights(
            f"step {step}: expected the engine's log-probabilities within {limit:g} nats of the trainer's (mean over "
            f"tokens), because both have the same weights; got {apart:.2g}. The engine samples with other weights, or "
            "its log-probabilities are of another distribution. Push model.state_dict(), not named_parameters(), which "
            'lacks a tied head; then reset the prefix cache; ask for logprobs_mode="processed_logprobs".'
        )


# --- training ---------------------------------------------------------------------------------------------------------


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: PromptedRollouts,
    advantages: Tensor,
    weights: Tensor | None,
    clipping: Clipping,
    way: Way,
    settings: Settings,
    step: int,
) -> list[float]:
    """One update for each mini-batch -> their clip fractions. `weights`: one per response, or None."""
    clip_fractions = []
    for chosen, part in batch.mini_batches(settings.mini_batches):
        loss, stats = gspo_loss(
            logits_of(model, part),
            part.token_ids,
            advantages[chosen],
            part.old_logprobs,
            mask=part.mask,
            cu_seqlens=part.cu_seqlens,
            kept=part.kept,
            temperature=way.temperature,
            importance_weights=None if weights is None else weights[chosen],
            eps_low=clipping.bounds[0],
            eps_high=clipping.bounds[1],
        )
        update(model, optimizer, loss, settings.learning_rate_at(step), settings.max_grad_norm)
        clip_fractions.append(stats.clip_fraction)
        clipping.see(stats, advantages[chosen], part.mask, part.cu_seqlens)
    return torch.stack(clip_fractions).tolist()


def reinforce(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    engine: Sampler,
    way: Way,
    quiet: bool = False,
    on_step: Callable[[], object] = lambda: None,
    clip_share: float | None = None,
) -> VllmHistory:
    """A training from `model` on, which changes. `on_step` is called after each step."""
    optimizer = build_optimizer(model)
    clipping = Clipping(GSPO(), clip_share)
    history = VllmHistory()
    history.add_evaluation(0, greedy_accuracy(model, tokenizer, problems.held_out))
    bar = tqdm(range(1, settings.steps + 1), desc="GSPO", unit="step", disable=quiet)
    for step in bar:
        with history.timed("pushing"):
            engine.push(model, version=str(step))
        with history.timed("sampling"):
            batch, rewards = roll_out(engine, tokenizer, problems, settings, way, model.device)
        advantages = group_advantages(rewards, group_size=settings.samples)
        with history.timed("recomputing"):
            batch, recomputed = recompute(model, batch, way, settings.mini_batches)
        tokens = {"mask": batch.mask, "cu_seqlens": batch.cu_seqlens}
        mismatch = rollout_mismatch(recomputed, batch.old_logprobs, advantages, **tokens)
        history.add_mismatch(mismatch)
        history.apart.append((recomputed - batch.old_logprobs)[batch.mask].abs().mean().item())
        check_weights(history.apart[-1], batch, way, step)
        with history.timed("training"):
            weights = None
            if way.old == "weights":
                weights = rollout_weights(recomputed, batch.old_logprobs, level="sequence_mean", **tokens).weights
            if way.old != "engine":
                batch = replace(batch, old_logprobs=recomputed)
            if way.kept == "none":
                batch = replace(batch, kept=None)
            clipped = learn(model, optimizer, batch, advantages, weights, clipping, way, settings, step)
            history.clip_fractions.append(clipped)
        noise = mismatch.noise if way.old == "engine" else None  # else the ratio does not contain it
        objective = clipping.objective
        if clip_share is not None:
            history.clip_range.append(clipping.bounds)
            clipping.adapt(noise)
        history.reward.append(rewards.mean().item())
        history.clip_fraction.append(math.fsum(history.clip_fractions[-1]) / len(history.clip_fractions[-1]))
        history.response_length.append((batch.mask.sum() / len(batch)).item())
        if settings.is_evaluated(step):
            history.add_evaluation(step, greedy_accuracy(model, tokenizer, problems.held_out))
        bar.set_postfix(history.newest())
        on_step()
    history.clip_fit = clipping.fit(objective, noise)
    return history


def start_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, way: Way, seed: int, device: str = "cpu"
) -> Engine:
    """An engine with the model's present weights. On a GPU it shares the memory with the trainer; not tried there."""
    options: dict[str, Any] = {} if device == "cpu" else {"gpu_memory_utilization": 0.2}
    if way.asks_for_sets:
        options["return_sampling_mask"] = True
    engine = Engine(model, tokenizer, max_length=MAX_LENGTH, dtype=way.engine_dtype, seed=seed, **options)
    engine.sample([tokenizer("1+1=").input_ids], max_tokens=2, **way.sampling(len(tokenizer)))  # it compiles
    return engine


# --- the program ------------------------------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, Settings, Way]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Writes a plot and a JSON file.")
    parser.add_argument("--old", choices=OLD, default="engine", help="old log-probabilities (default: %(default)s)")
    parser.add_argument("--engine-dtype", choices=LIMITS, default="float32", help="default: %(default)s")
    parser.add_argument("--top-p", type=positive, default=1.0, help="of the sampling (default: 1, which is off)")
    parser.add_argument("--temperature", type=positive, default=1.0, help="of the sampling (default: %(default)s)")
    parser.add_argument(
        "--kept",
        choices=KEPT,
        default="trainer",
        help="the columns that top-p kept: from vLLM's output, which has none on a CPU; from the trainer's logits; or "
        "none, a loss over all columns, to see what top-p does to it (default: %(default)s)",
    )
    add_option(parser)
    arguments, settings = parse_arguments(parser, Path("runs/vllm"), SETTINGS, replace(QUICK, digits=2))
    if arguments.top_p > 1:
        parser.error(f"--top-p: expected at most 1, got {arguments.top_p:g}")
    if arguments.kept == "none" and arguments.old != "engine":
        parser.error("--kept none: only with --old engine, because the trainer recomputes what was sampled from")
    way = Way(arguments.old, arguments.engine_dtype, arguments.top_p, arguments.temperature, arguments.kept)
    if way.asks_for_sets and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
        parser.error(
            "--kept engine: vLLM 0.32 returns kept sets from its second model runner, which needs Triton: set "
            "VLLM_USE_V2_MODEL_RUNNER=1 on a GPU, and take --kept trainer on a CPU"
        )
    return arguments, settings, way


def draw_apart(history: VllmHistory, axes: plt.Axes) -> None:
    draw_curve(axes, history.apart, "#CC79A7")
    axes.yaxis.set_major_formatter("{x:.1e}")
    axes.set(title="Engine against trainer", ylabel="nats per token, mean")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False)


def main() -> None:
    arguments, settings, way = parse()
    began = time.perf_counter()
    tokenizer = build_tokenizer()
    torch.manual_seed(arguments.seed)
    model = build_model(tokenizer, head_size=HEAD_SIZE).to(arguments.device)
    print("starting vLLM ...", flush=True)
    engine = start_engine(model, tokenizer, way, arguments.seed, arguments.device)
    started = time.perf_counter() - began

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)  # vLLM has set its own
    problems = Problems(random.Random(arguments.seed), settings.digits, settings.held_out)
    warm_up(model, tokenizer, problems, settings)
    try:
        share = arguments.clip_share
        history = reinforce(model, tokenizer, problems, settings, engine, way, clip_share=share)
    except StaleWeights as error:
        raise SystemExit(f"\nstopped at {error}") from None

    seconds = time.perf_counter() - began
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"way": asdict(way), "parameters": parameters, "vllm": vllm_version(), "engine_start": round(started, 1)}
    if share is not None:
        facts["clip_share"] = share
    path = arguments.output / f"{way.name}{'' if share is None else f'-clip-share-{share:g}'}.png"
    write_record(path.with_suffix(".json"), facts, arguments, settings, seconds, history)
    title = f"GSPO with vLLM ({way.engine_dtype}), {way.old}: a Qwen3 of {parameters:,} parameters learns to add"
    draw_plot(history, title, "responses", path, partial(draw_apart, history))
    report(history, path, seconds, started)
    if way.top_p < 1:
        sources = {"engine": "of vLLM's output", "trainer": "made from the trainer's logits", "none": "not used"}
        print(f"Kept sets of top-p {way.top_p:g}: {sources[way.kept]}")


def report(history: VllmHistory, path: Path, seconds: float, started: float) -> None:
    each = max(1, len(history.reward) // 16)
    first, last = (sum(part) / each for part in (history.reward[:each], history.reward[-each:]))
    before, after = history.held_out_accuracy[0], history.held_out_accuracy[-1]
    by_part = [sum(values) / len(values) for values in zip(*history.clip_fractions, strict=True)]
    by_noise = sum(history.mismatch["clip_fraction"]) / len(history.reward)
    spent = ", ".join(f"{what} {sum(values):.1f} s" for what, values in history.seconds.items())
    print(f"\nReward {first:.0%} -> {last:.0%}; held-out accuracy {before:.1%} -> {after:.1%}")
    print(f"Clipped by mini-batch: {', '.join(f'{value:.1%}' for value in by_part)}")
    print(
        f"Engine against trainer: at most {max(history.apart):.1e} nats per token; ratios off 1 by at most "
        f"{history.largest_off:.1e}; clipped before any update {by_noise:.1%}"
    )
    if history.clip_fit is not None:
        print(history.clip_fit.lines())
    print(f"{seconds:.0f} s: start of the engine {started:.1f} s, {spent}. Plot: {path}, numbers: {path.stem}.json")


if __name__ == "__main__":
    main()
