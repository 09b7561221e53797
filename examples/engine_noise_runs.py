"""The models, the engine and the trainer of `engine_noise.py`: what each says of the same responses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arithmetic import Problems, Settings, build_model, build_optimizer, solve, update, warm_up, work_out
from engine import Engine
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gspo_kernels import from_vllm, linear_logits, linear_token_logprobs, token_logprobs

ENGINES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "bf16, fp32 head": "bf16, its fp32 head",
    "bf16, linear_logits": "bf16, `linear_logits`",
}
TRAINERS = {
    "fp32": "fp32",
    "fp32, bf16 weights": "fp32, weights rounded to bf16",
    "bf16": "bf16, bf16 logits",
    "bf16, linear": "bf16, `linear_token_logprobs`",
}


@dataclass(frozen=True)
class Sizes:
    warmup_steps: int = 400  # on single problems, as in the demo
    stream_steps: tuple[int, int] = (200, 60)  # on streams of problems, short and long ones
    responses: int = 128
    length: int = 1600
    short: tuple[int, int] = (256, 30)  # independent short responses: how many, tokens
    again: int = 4  # responses that are computed a second time, for the floors


# --- the models -------------------------------------------------------------------------------------------------------


def streams(tokenizer: PreTrainedTokenizerFast, problems: Problems, count: int, length: int) -> Tensor:
    """[count, length]: problems with their answers, one after the other; nine in ten are worked out."""
    rows = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            for problem in problems.draw(8):
                answer = work_out(problem) if problems.rng.random() < 0.9 else solve(problem)
                row += tokenizer(problem + answer + str(tokenizer.eos_token)).input_ids
        rows.append(row[:length])
    return torch.tensor(rows)


def trained_model(sizes: Sizes, problems: Problems, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The demo's model with heads that vLLM has (size 32), after the warm-up and then on streams of problems.

    So a response that goes on after its end is no surprise to the model: it writes the next problem.
    """
    config = build_model(tokenizer).config
    config.head_dim, config.max_position_embeddings = 32, 2048
    model = Qwen3ForCausalLM(config)
    settings = Settings(warmup_steps=sizes.warmup_steps, warmup_worked=0.9)
    warm_up(model, tokenizer, problems, settings)
    optimizer, total = build_optimizer(model), sum(sizes.stream_steps)
    batches = [(8, 208)] * sizes.stream_steps[0] + [(2, sizes.length + 64)] * sizes.stream_steps[1]
    for step, shape in enumerate(tqdm(batches, "streams", unit="step")):
        ids = streams(tokenizer, problems, *shape)
        loss = -token_logprobs(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).logprobs.mean()
        update(model, optimizer, loss, 2e-3 * min((step + 1) / 20, max(1 - step / total, 0.05)), 1.0)
    return model


def random_model() -> Qwen3ForCausalLM:
    """4 layers of width 256, vocabulary 2,048; the head makes logits of standard deviation 3."""
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=3 / math.sqrt(config.hidden_size))
    return model


# --- the engine -------------------------------------------------------------------------------------------------------


def use_linear_logits(engine: Engine) -> list[Tensor]:
    """The engine samples from the logits of `linear_logits` -> the hidden states of its steps, filled as it samples."""
    seen: list[Tensor] = []

    def replace(model: Any) -> None:
        def compute_logits(hidden: Tensor) -> Tensor:
            seen.append(hidden.clone())
            return linear_logits(hidden, model.lm_head.weight, vocab_size=model.config.vocab_size)  # not the padding

        model.compute_logits = compute_logits

    engine.llm.apply_model(replace)
    return seen


def sample(folder: Path, engine_name: str, prompts: list[list[int]], sizes: Sizes) -> dict[str, Tensor]:
    """What an engine returns for one response to each prompt; called in a process of its own.

    `ids` and `logprobs` [R, length]. In bf16 also those of independent short responses, and `prefill` [again, length]:
    the log-probabilities that the engine computes when it reads prompt and response at once. With `linear_logits` also
    `own`, the largest difference between the engine's log-probabilities and `linear_token_logprobs` of the hidden
    states that the engine itself computed.
    """
    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), Qwen3ForCausalLM.from_pretrained(folder)
    options = {"hf_overrides": {"head_dtype": "float32"}} if engine_name == "bf16, fp32 head" else {}
    dtype = "float32" if engine_name == "fp32" else "bfloat16"
    engine = Engine(model, tokenizer, max_length=sizes.length + 64, dtype=dtype, **options)
    seen = use_linear_logits(engine) if engine_name == "bf16, linear_logits" else []

    def responses(prompts: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
        rollouts = from_vllm(engine.sample(prompts, max_tokens=length, ignore_eos=True))
        return rollouts.token_ids.view(-1, length), rollouts.old_logprobs.view(-1, length)

    found: dict[str, Tensor] = {}
    found["ids"], found["logprobs"] = responses(prompts, sizes.length)
    if seen:  # a row for each response in each step, in the order of the prompts
        hidden, weight = torch.stack(seen, 1), model.lm_head.weight.detach().bfloat16()
        found["own"] = (linear_token_logprobs(hidden, weight, found["ids"]).logprobs - found["logprobs"]).abs().max()
        seen.clear()
    if engine_name != "bf16":
        return found
    found["short_ids"], found["short_logprobs"] = responses(repeated(prompts, sizes.short[0]), sizes.short[1])
    whole = [prompt + ids for prompt, ids in zip(prompts[: sizes.again], found["ids"].tolist(), strict=False)]
    read = engine.sample(whole, max_tokens=1, prompt_logprobs=0)
    rows = [
        [at[token].logprob for at, token in zip(x.prompt_logprobs[1:], x.prompt_token_ids[1:], strict=True)]
        for x in read  # the first token has no log-probability
    ]
    found["prefill"] = torch.tensor([row[-sizes.length :] for row in rows])
    return found


def repeated(prompts: list[list[int]], count: int) -> list[list[int]]:
    return [prompts[i % len(prompts)] for i in range(count)]


# --- the trainer ------------------------------------------------------------------------------------------------------


def trainer_model(folder: Path, trainer: str) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32 if trainer == "fp32" else torch.bfloat16)
    return model.float() if trainer == "fp32, bf16 weights" else model


@torch.no_grad()
def trainer_logprobs(
    model: Qwen3ForCausalLM, trainer: str, prompts: list[list[int]], ids: Tensor, rows: int = 16
) -> Tensor:
    """[R, length] float64, from batches of `rows` responses. Padding is behind the response, so that none sees it."""
    length, found = ids.shape[1], []
    sequences = [torch.cat([torch.tensor(prompt), row]) for prompt, row in zip(prompts, ids, strict=True)]
    for first in range(0, len(sequences), rows):
        part = sequences[first : first + rows]
        padded = pad_sequence(part, batch_first=True)
        logprobs = logprobs_of(model, trainer, padded, padded.roll(-1, 1))
        found += [row[len(x) - length - 1 : len(x) - 1] for row, x in zip(logprobs, part, strict=True)]
    return torch.stack(found).double()


def logprobs_of(model: Qwen3ForCausalLM, trainer: str, input_ids: Tensor, token_ids: Tensor, **inputs: Any) -> Tensor:
    if trainer == "bf16, linear":
        hidden = model.model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state
        return linear_token_logprobs(hidden, model.lm_head.weight, token_ids).logprobs
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits
    return token_logprobs(logits, token_ids).logprobs


@torch.no_grad()
def packed_logprobs(model: Qwen3ForCausalLM, trainer: str, prompts: list[list[int]], ids: Tensor) -> Tensor:
    """As `trainer_logprobs`, from packed batches of two responses."""
    found = []
    for first in range(0, len(ids), 2):
        part = [torch.cat([torch.tensor(x), y]) for x, y in zip(prompts[first:], ids[first : first + 2], strict=False)]
        packed, position = torch.cat(part), torch.cat([torch.arange(len(x)) for x in part])
        logprobs = logprobs_of(model, trainer, packed[None], packed.roll(-1)[None], position_ids=position[None])[0]
        ends = torch.tensor([len(x) for x in part]).cumsum(0).tolist()
        found += [logprobs[end - ids.shape[1] - 1 : end - 1] for end in ends]
    return torch.stack(found).double()
