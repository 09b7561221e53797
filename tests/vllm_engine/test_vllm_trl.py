"""`GSPOTrainer(use_vllm=True)`: after each step the engine has the trainer's weights, and its log-probabilities."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import engine_with_experts
import pytest
from tiny import Tiny, start_engine

pytest.importorskip("trl", reason="TRL is not installed here: make test-vllm")

import torch
from datasets import Dataset

from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer

pytestmark = pytest.mark.plain_memory

ROOT = Path(__file__).parents[2]
PROMPTS = ["hello", "a", "the same", "again"] * 8


def short_and_vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) - 0.1 * len(text) for text in completions]


class Recorder(GSPOTrainer):
    """Compares all log-probabilities that the engine returned with the trainer's, recomputed with the same weights."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        mask = found["completion_mask"]
        ids = torch.cat([found["prompt_ids"], found["completion_ids"]], dim=1)
        attention = torch.cat([found["prompt_mask"], mask], dim=1)
        with torch.no_grad():
            logprobs, *_ = self._get_per_token_logps_and_entropies(self.model, ids, attention, mask.shape[1])
        differences = (logprobs - found["sampling_per_token_logps"])[mask.bool()].abs()
        self.differences = [*getattr(self, "differences", []), differences.max().item()]
        self.fields = set(found)
        return found


def trainer_of(own: Tiny, folder: Path, llm: Any = None, kind: Any = Recorder, **options: Any) -> Any:
    usual: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 8, "num_generations": 8,
        "gradient_accumulation_steps": 2, "max_completion_length": 12, "max_steps": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", "save_strategy": "no", "logging_steps": 1,
        "gradient_checkpointing": False, "temperature": 0.7, "use_vllm": True, "disable_tqdm": True,
    }  # fmt: skip
    return kind(
        copy.deepcopy(own.model),
        short_and_vowels,
        GSPOConfig(str(folder), **(usual | options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=own.tokenizer,
        llm=llm,
    )


MODELS = {"tied": Tiny, "untied": lambda: Tiny(tie_word_embeddings=False)}
OPTIONS: dict[str, dict[str, Any]] = {
    "correction": {},
    "no correction": {"vllm_importance_sampling_correction": False},
    "by token, off-policy": {"vllm_importance_sampling_mode": "token_truncate", "steps_per_generation": 4},
}


@pytest.fixture(scope="module")
def started() -> Callable[[str], tuple[Tiny, Any]]:
    """A model and an engine, made once for each kind. The first step of a training pushes the model's weights."""

    @cache
    def start(kind: str) -> tuple[Tiny, Any]:
        own = MODELS[kind]()
        return own, start_engine(own, max_length=64).llm

    return start


@pytest.mark.parametrize(
    ("model", "options"), [("tied", "correction"), ("tied", "no correction"), ("untied", "by token, off-policy")]
)
def test_every_step(model: str, options: str, started: Any, tmp_path: Path) -> None:
    check_every_step(*started(model), tmp_path, **OPTIONS[options])


def check_every_step(own: Tiny, llm: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="vLLM runs in")  # its dtype is the trainer's
        trainer = trainer_of(own, folder, llm, **options)
    trainer.train()

    corrected = trainer.args.vllm_importance_sampling_correction
    assert ("importance_sampling_ratio" in trainer.fields) == corrected
    assert len(trainer.differences) == 8 // trainer.args.steps_per_generation
    assert max(trainer.differences) < 1e-5, trainer.differences
    before, after = dict(own.model.named_parameters()), dict(trainer.model.named_parameters())
    assert min((after[name] - before[name]).abs().max() for name in before) > 1e-2, "every weight has moved"
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for step in steps:
        assert all(math.isfinite(step[name]) for name in ("loss", "grad_norm", "entropy"))
        if corrected and "reward" in step:  # a step with new responses
            assert math.isfinite(step["reward"])
            assert step["sampling/sampling_logp_difference/max"] < 1e-5
            assert abs(step["sampling/importance_sampling_ratio/mean"] - 1) < 1e-4


def test_experts(tmp_path: Path) -> None:
    """In a process of its own: vLLM makes the experts' group with a process's first engine, or never."""
    command = [sys.executable, engine_with_experts.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]


def test_engine_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that TRL starts: in bfloat16, which a warning says; weights reach it."""
    own = Tiny()
    for part in (own.model, own.tokenizer):
        part.save_pretrained(tmp_path / "model")
    own.model.name_or_path = str(tmp_path / "model")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # TRL has no option for it, and it takes a minute
    with pytest.warns(UserWarning, match=r"vLLM runs in torch.bfloat16 and the trainer in torch.float32"):
        trainer = trainer_of(own, tmp_path, vllm_max_model_length=64)
    trainer.train()
    assert 1e-3 < max(trainer.differences) < 0.5


def test_refused_engines(tiny: Tiny, engines: Any, tmp_path: Path) -> None:
    raw = engines(logprobs_mode="raw_logprobs").llm
    with pytest.raises(ValueError, match=r"llm: expected logprobs_mode='processed_logprobs'.*got 'raw_logprobs'"):
        trainer_of(tiny, tmp_path, raw)
    right = engines().llm
    for name, value in (("use_vllm", False), ("vllm_mode", "server"), ("vllm_enable_sleep_mode", True)):
        with pytest.raises(ValueError, match=rf"{name}: expected .* with llm=, .*; got {value!r}"):
            trainer_of(tiny, tmp_path, right, **{name: value})
