"""Makes diagnosis.npz: rollouts of vLLM from the examples' model, and the logits that the trainer computes for them.

    python -m tests.rollout.recorded.record_diagnosis    # in an environment with vLLM; a process for each engine

The model has learned for a moment only, so that it is unsure of many tokens. "stale" are rollouts of the engine with
weights of before; for "stale_head" it got `named_parameters()`, which leaves out the tied head.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.arithmetic import Problems, Settings, build_model, build_tokenizer, warm_up
from gspo_kernels import from_vllm

RESPONSES = 12  # of each kind that are kept
KINDS: dict[str, dict[str, dict[str, Any]]] = {  # by engine: how is sampled
    "fp32": {
        "right": {}, "t07": {"temperature": 0.7}, "top_p": {"top_p": 0.8}, "top_k": {"top_k": 4}, "stale": {},
        "stale_head": {},
    },
    "raw": {"raw_t07": {"temperature": 0.7}},
    "bf16": {"bf16": {}, "bf16_t07": {"temperature": 0.7}, "bf16_top_p": {"top_p": 0.8}},
}  # fmt: skip


def build() -> tuple[PreTrainedTokenizerFast, Qwen3ForCausalLM]:
    tokenizer = build_tokenizer()
    config = build_model(tokenizer).config
    config.head_dim = 32  # vLLM has no kernel for 16
    return tokenizer, Qwen3ForCausalLM(config)


def train(weights: Path) -> None:
    tokenizer, model = build()
    problems = Problems(random.Random(0), 3, 50)
    warm_up(model, tokenizer, problems, Settings(warmup_steps=80, warmup_batch=48))
    torch.save(model.state_dict(), weights / "before.pt")
    further = Settings(warmup_steps=30, warmup_batch=48, warmup_learning_rate=8e-3)
    warm_up(model, tokenizer, problems, further)
    torch.save(model.state_dict(), weights / "after.pt")


def record(engine_name: str, weights: Path) -> None:
    from examples.engine import Engine

    tokenizer, model = build()
    before, after = (torch.load(weights / f"{when}.pt") for when in ("before", "after"))
    model.load_state_dict(before)
    mode = "raw_logprobs" if engine_name == "raw" else "processed_logprobs"
    dtype = "bfloat16" if engine_name == "bf16" else "float32"
    engine = Engine(model, tokenizer, max_length=64, dtype=dtype, logprobs_mode=mode)
    prompts = [tokenizer(problem).input_ids for problem in Problems(random.Random(1), 3, 50).draw(20)]
    found = {}
    for name, options in KINDS[engine_name].items():
        if name == "stale":
            model.load_state_dict(after)
        if name == "stale_head":
            named = ((key, value.detach()) for key, value in model.named_parameters())
            engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
            engine.llm.reset_prefix_cache()
        batch = from_vllm(engine.sample(prompts, n=2, max_tokens=24, **{"temperature": 1.0} | options)).with_prompts()
        with torch.no_grad():
            ids = {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None]}
            logits = model(**ids, use_cache=False).logits[0]
        found[name] = {
            "logits": logits, "token_ids": batch.token_ids.to(torch.uint8), "old_logprobs": batch.old_logprobs,
            "mask": batch.mask, "cu_seqlens": batch.cu_seqlens,
        }  # fmt: skip
    torch.save(found, weights / f"{engine_name}.pt")


def write(weights: Path) -> None:
    arrays = {}
    for engine_name in KINDS:
        for name, batch in torch.load(weights / f"{engine_name}.pt").items():
            cut = int(batch["cu_seqlens"][RESPONSES])
            for key, x in batch.items():
                arrays[f"{name}.{key}"] = (x[: RESPONSES + 1] if key == "cu_seqlens" else x[:cut]).numpy()
    np.savez_compressed(Path(__file__).with_name("diagnosis.npz"), **arrays)


def everything() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for command in ("train", *KINDS, "write"):
            subprocess.run([sys.executable, "-m", __spec__.name, command, folder], check=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    if len(sys.argv) == 1:
        everything()
    elif sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    elif sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        record(sys.argv[1], Path(sys.argv[2]))
