"""Routing replay from an engine: vLLM's log-probabilities against the trainer's, with its experts and with our own.

A tiny Qwen3-MoE (that of `experts.py`, head size 32) is warmed up, and vLLM samples from it and returns the experts
that it used. The trainer computes the log-probabilities of the same tokens twice, with the experts that its own routers
choose and with the engine's replayed: what remains of the difference is not the routers'.

    python examples/paper/replay.py --output docs             # with vLLM: the environment of `make demo-vllm`
    python examples/paper/replay.py --output docs --redraw    # only the table, from docs/routing-replay.json

vLLM returns experts from its second model runner alone, whose kernels are Triton's. On a CPU they run in Triton's
interpreter, in a process of their own: about a second for each token.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lab
import torch
from arithmetic import Settings
from engine import Engine, vllm_version
from experts import QUICK, SETTINGS, build_experts
from lab import Learner, warmed_up
from routing import RoutingReplay, changed
from torch import Tensor

from gspo_kernels import PromptedRollouts, from_vllm, rollout_mismatch, token_logprobs

SAMPLED = replace(SETTINGS, groups=32, samples=4, max_response=16)
SMALL = replace(QUICK, groups=2, samples=2, max_response=4)
PAIRS = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))  # engine, trainer
NEEDED = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
INTERPRETED = NEEDED | {"TRITON_INTERPRET": "1"}


# --- the engine, in a process of its own ------------------------------------------------------------------------------


def register_interpreter() -> None:
    """Triton as a wheel has no backend for CPUs, without which vLLM does not use it; its interpreter needs none."""
    import triton.backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class Interpreted(BaseBackend):  # type: ignore[misc]
        """Compiles nothing: with TRITON_INTERPRET=1 kernels run in Triton's interpreter."""

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return bool(target.backend == "cpu")

        def hash(self) -> str:
            return "interpreted"

        def parse_options(self, options: dict[str, Any]) -> Any:
            return options

        def add_stages(self, stages: Any, options: Any) -> None:
            raise NotImplementedError

        def load_dialects(self, context: Any) -> None: ...

        def get_module_map(self) -> dict[str, Any]:
            return {}

    class Cpu(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None: ...

        @staticmethod
        def is_active() -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None: ...

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cpu

    triton.backends.backends["cpu"] = triton.backends.Backend(compiler=Interpreted, driver=Cpu)


def sample(
    learner: Learner, prompts: Sequence[Sequence[int]], dtype: str, interpret: bool, **parameters: Any
) -> list[dict[str, Any]]:
    """vLLM's outputs as plain values, with `routed_experts`."""
    if interpret:
        register_interpreter()
    engine = Engine(
        learner.model,
        learner.tokenizer,
        max_length=64,
        dtype=dtype,
        enable_return_routed_experts=True,
        enable_prefix_caching=True,  # vLLM asks for it
    )
    outputs = engine.sample(prompts, **parameters)
    return [
        {
            "prompt_token_ids": output.prompt_token_ids,
            "finished": True,
            "outputs": [
                {
                    "token_ids": list(completion.token_ids),
                    "logprobs": [
                        {token: {"logprob": x.logprob} for token, x in at.items()} for at in completion.logprobs
                    ],
                    "cumulative_logprob": completion.cumulative_logprob,
                    "routed_experts": completion.routed_experts,
                    "finish_reason": completion.finish_reason,
                }
                for completion in output.outputs
            ],
        }
        for output in outputs
    ]


@contextmanager
def environment(names: dict[str, str]) -> Iterator[None]:
    """For processes that start meanwhile: Triton reads it as its functions are defined."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def sampled(
    learner: Learner, prompts: Sequence[Sequence[int]], dtype: str, device: str, settings: Settings
) -> list[dict[str, Any]]:
    interpret = device == "cpu"
    context = multiprocessing.get_context("spawn")
    with environment(INTERPRETED if interpret else NEEDED), ProcessPoolExecutor(1, mp_context=context) as pool:
        call = partial(sample, n=settings.samples, max_tokens=settings.max_response, seed=0)
        return pool.submit(call, learner, prompts, dtype, interpret).result()


# --- the trainer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(learner: Learner, batch: PromptedRollouts, dtype: str) -> dict[str, Any]:
    """The trainer's log-probabilities against the engine's, with its own experts and with the engine's."""
    model = copy.deepcopy(learner.model).to(getattr(torch, dtype))
    replay = RoutingReplay(model)
    experts = batch.routed_experts
    assert experts is not None

    def logprobs() -> Tensor:
        logits = model(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False).logits
        return token_logprobs(logits[0], batch.token_ids, mask=batch.mask).logprobs

    with replay.record() as choices:
        own = logprobs()
    with replay.replay(experts):
        replayed = logprobs()
    moved = changed(torch.stack(choices, 1).to(experts.device), experts.long()).flatten(1)  # [P + N, layers * k]
    rerouted = moved.any(1) & batch.mask
    return {
        "choices_changed": float(moved[batch.mask].float().mean()),
        "tokens_rerouted": float(rerouted.sum() / batch.mask.sum()),
        "own": differences(batch, own, rerouted),
        "replayed": differences(batch, replayed, rerouted),
    }


def differences(batch: PromptedRollouts, logprobs: Tensor, rerouted: Tensor) -> dict[str, float]:
    signs = torch.ones(len(batch), device=logprobs.device)
    signs[::2] = -1  # advantages: GSPO's clip range has an edge for each sign
    found = (logprobs - batch.old_logprobs).abs()
    mismatch = rollout_mismatch(logprobs, batch.old_logprobs, signs, mask=batch.mask, cu_seqlens=batch.cu_seqlens)
    return {
        "mean": float(found[batch.mask].mean()),
        "largest": float(found[batch.mask].max()),
        "mean_of_rerouted": float(found[rerouted].mean()) if rerouted.any() else 0.0,
        "clip_fraction": float(mismatch.clip_fraction),
    }


# --- the program ------------------------------------------------------------------------------------------------------


def measure(device: str, settings: Settings) -> dict[str, Any]:
    learner = warmed_up(0, settings, build=partial(build_experts, head_size=32))
    prompts = [learner.tokenizer(problem).input_ids for problem in learner.problems.draw(settings.groups)]
    rows, seconds = [], {}
    for engine in dict.fromkeys(engine for engine, _ in PAIRS):
        start = time.perf_counter()
        outputs = sampled(learner, prompts, engine, device, settings)
        seconds[engine] = time.perf_counter() - start
        batch = from_vllm(outputs, device=device).with_prompts()
        learner.model.to(device)
        rows += [
            {"engine": engine, "trainer": trainer, "tokens": int(batch.mask.sum()), **compare(learner, batch, trainer)}
            for of, trainer in PAIRS
            if of == engine
        ]
        learner.model.to("cpu")
    return {"engine": f"vLLM {vllm_version()}", "sampling_seconds": seconds, "rows": rows}


def table(record: dict[str, Any]) -> str:
    lines = [
        "| engine, trainer | rerouted tokens | all tokens: mean, largest | replayed | rerouted tokens: mean | replayed "
        "| clipped before learning | replayed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        of_both = [row["own"], row["replayed"]]
        cells = [f"{x['mean']:.1e}, {x['largest']:.1e}" for x in of_both]
        cells += [f"{x['mean_of_rerouted']:.1e}" if row["tokens_rerouted"] else "" for x in of_both]
        cells += [f"{x['clip_fraction']:.0%}" for x in of_both]
        lines.append(f"| {row['engine']}, {row['trainer']} | {row['tokens_rerouted']:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    began = time.perf_counter()
    arguments, settings = lab.parse(__doc__, "routing-replay", 1, SAMPLED, SMALL)
    if arguments.redraw:
        record = lab.load(arguments)
    else:
        record = lab.save(arguments, settings, began, measure(arguments.device, settings))
    print(table(record))


if __name__ == "__main__":
    main()
