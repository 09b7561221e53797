"""TRL's generation with vLLM where TRL's own does not do: on a CPU, and with an engine that the user started.

On a CPU vLLM repacks its layers, and TRL's way to hand over weights fails. TRL starts the engine without a dtype, and
vLLM then runs a float32 model in bfloat16.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.generation.vllm_generation import VLLMGeneration

from ..vllm import check_in_this_process, is_on_cpu, push_weights


class RunningEngine(VLLMGeneration):
    """TRL's `VLLMGeneration` with an engine that runs already; on a CPU, weights reach it by `push_weights`."""

    def __init__(self, llm: Any, trainer: Any) -> None:
        args = trainer.args
        self.llm = llm
        super().__init__(
            trainer.model,
            trainer.accelerator,
            trainer.processing_class,
            mode="colocate",
            structured_outputs_regex=args.vllm_structured_outputs_regex,
            repetition_penalty=trainer.repetition_penalty,
            temperature=trainer.temperature,
            top_p=trainer.top_p,
            top_k=trainer.top_k,
            min_p=trainer.min_p,
            max_completion_length=trainer.max_completion_length,
            logprobs=0,
            generation_kwargs=args.generation_kwargs,
        )

    def _init_vllm(self) -> None:
        """Starts nothing."""

    def sync_weights(self) -> None:
        if is_on_cpu(self.llm):
            push_weights(self.llm, self._weights())
        else:
            super().sync_weights()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under vLLM's names, tied ones under each of theirs.

        They are copies: vLLM reads a layer's weights when it has all of them, and by then TRL may have released what it
        gathered from other ranks, or separated an adapter again.
        """
        names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            names[id(parameter)].append(self._fix_param_name_to_vllm(name, ["modules_to_save.default."]))
        tied = {first: others for first, *others in names.values()}
        for name, value in self._iter_named_params():
            for each in (name, *tied.get(name, ())):
                yield each, value.detach().clone()


def check_engine(llm: Any, args: Any) -> None:
    """Raises a ValueError if TRL cannot generate with the user's engine."""
    for name, expected in {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_tensor_parallel_size": 1,
        "vllm_enable_sleep_mode": False,
    }.items():
        if (value := getattr(args, name)) != expected:
            raise ValueError(f"{name}: expected {expected!r} with llm=, an engine that runs already; got {value!r}")
    check_in_this_process(llm)
    if (mode := llm.llm_engine.model_config.logprobs_mode) != "processed_logprobs":
        raise ValueError(
            "llm: expected logprobs_mode='processed_logprobs', log-probabilities at the temperature of the sampling, "
            f"which TRL compares with the trainer's; got {mode!r}"
        )


@contextmanager
def engine_given(args: Any, llm: Any) -> Iterator[None]:
    """Within it TRL starts no engine, if the user's runs already."""
    if llm is None:
        yield
        return
    check_engine(llm, args)
    args.use_vllm = False
    try:
        yield
    finally:
        args.use_vllm = True


def generate_with_vllm(trainer: Any, llm: Any) -> None:
    """Replaces TRL's generation where it does not do, and warns about an engine whose dtype is not the trainer's.

    Args:
        llm: the user's engine. None: the trainer's own, which TRL has started.
    """
    if not trainer.args.use_vllm or trainer.args.vllm_mode != "colocate":
        return
    engine = trainer.vllm_generation.llm if llm is None else llm
    if llm is not None or is_on_cpu(engine):
        trainer.vllm_generation = RunningEngine(engine, trainer)
        trainer.use_vllm, trainer._last_loaded_step = True, -1  # as if TRL had started it
    of_engine, of_trainer = engine.llm_engine.model_config.dtype, _dtype(trainer)
    if of_engine != of_trainer:
        warnings.warn(
            f"vLLM runs in {of_engine} and the trainer in {of_trainer}, so their log-probabilities differ: see "
            "sampling/sampling_logp_difference in the logs. TRL leaves the engine's dtype to vLLM, which runs a "
            "float32 model in bfloat16. To choose it, start the engine: GSPOTrainer(..., llm=vllm.LLM(folder, "
            "dtype='float32', logprobs_mode='processed_logprobs')); see docs/trl.md",
            stacklevel=3,
        )


def _dtype(trainer: Any) -> torch.dtype:
    """The dtype of the trainer's products of matrices."""
    mixed: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
    own: torch.dtype = trainer.model.dtype
    return mixed.get(trainer.accelerator.mixed_precision, own)
