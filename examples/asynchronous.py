"""Asynchronous training: weights pushed to vLLM between and within requests, and the engine's difference by version.

The demo's small model (head size 32) is warmed up and samples; while three more requests run, it is trained on and its
weights are pushed. The trainer's log-probabilities with the weights before and after the push are compared with the
engine's, by the version of the weights that vLLM reports for each token.

    python examples/asynchronous.py                 # with vLLM; writes docs/weight-versions.json, prints the table
    python examples/asynchronous.py --redraw        # only the table
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from arithmetic import Problems, Settings, build_model, build_tokenizer, warm_up
from transformers import PreTrainedModel

from gspo_kernels import PromptedRollouts, from_vllm, token_logprobs

FILE = Path(__file__).parents[1] / "docs" / "weight-versions.json"
TOKENS, BEFORE = 16, 6  # of each response, and engine steps before the push
REQUESTS = {"before": "before the push", "across": "during the push", "after": "after the push"}
SETTINGS = Settings(warmup_steps=100, digits=2, held_out=10)


def sample_across(engine: Any, model: PreTrainedModel, prompts: list[list[int]], train: Any) -> list[Any]:
    """Requests that run while the weights change: `train` is called after BEFORE of their tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm.llm_engine
    for i, prompt in enumerate(prompts):
        parameters = SamplingParams(
            logprobs=0, max_tokens=TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        core.add_request(str(i), {"prompt_token_ids": prompt}, parameters)
    outputs = [output for _ in range(BEFORE) for output in core.step()]
    train()
    engine.push(model, version="2")
    while core.has_unfinished_requests():
        outputs += core.step()
    return outputs


@torch.no_grad()
def differences(model: PreTrainedModel, batch: PromptedRollouts) -> dict[str, dict[str, float]]:
    """By version: how many tokens, and the absolute difference of their log-probabilities."""
    called = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
    logprobs = token_logprobs(called.logits[0], batch.token_ids, mask=batch.mask).logprobs
    found = (logprobs - batch.old_logprobs).abs()
    assert batch.weight_versions is not None
    return {
        label: {"tokens": int(mask.sum()), "mean": float(found[mask].mean()), "largest": float(found[mask].max())}
        for label, mask in batch.weight_versions.masks(batch.mask).items()
        if mask.any()
    }


def measure() -> dict[str, Any]:
    from engine import Engine, vllm_version  # sets the environment for vLLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, head_size=32)  # vLLM on a CPU has no kernel for 16
    problems = Problems(random.Random(0), SETTINGS.digits, SETTINGS.held_out)
    warm_up(model, tokenizer, problems, SETTINGS, quiet=True)
    old = copy.deepcopy(model)
    engine = Engine(model, tokenizer, max_length=64)
    engine.push(model, version="1")
    prompts = [tokenizer(problem).input_ids for problem in problems.draw(16)]

    def train() -> None:
        warm_up(model, tokenizer, problems, replace(SETTINGS, warmup_steps=5), quiet=True)

    outputs = {"before": engine.sample(prompts, max_tokens=TOKENS, ignore_eos=True)}
    outputs["across"] = sample_across(engine, model, prompts, train)
    outputs["after"] = engine.sample(prompts, max_tokens=TOKENS, ignore_eos=True)
    batches = {name: from_vllm(of).with_prompts() for name, of in outputs.items()}
    return {
        "machine": processor(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"vllm": vllm_version()},
        "weights": {
            name: {requests: differences(weights, batch) for requests, batch in batches.items()}
            for name, weights in (("old", old), ("new", model))
        },
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.machine()


def table(record: dict[str, Any]) -> str:
    lines = [
        "| requests | version | tokens | to the old weights: mean, largest | to the new weights: mean, largest |",
        "|---|---|---|---|---|",
    ]
    old, new = record["weights"]["old"], record["weights"]["new"]
    for name, title in REQUESTS.items():
        for label, before in old[name].items():
            after = new[name][label]
            cells = (f"{x['mean']:.1e}, {x['largest']:.1e}" for x in (before, after))
            lines.append(f"| {title} | {label} | {before['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--redraw", action="store_true", help="only the table, from the file")
    if not parser.parse_args().redraw:
        FILE.write_text(json.dumps(measure(), indent=1) + "\n")
    print(table(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
