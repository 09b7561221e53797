"""TRL's own `train()`."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from torch import Tensor

VERSION = f"TRL {version('trl')}"
SHOWN = ("loss", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")


def history(
    model: Any, tokenizer: Any, problems: list[str], grade: Callable[[list[str], list[str]], Tensor], **options: Any
) -> list[dict[str, float]]:
    """The metrics of each optimizer step."""
    from datasets import Dataset

    from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return grade(prompts, completions).tolist()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = GSPOConfig(
            folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
            lr_scheduler_type="constant", shuffle_dataset=False, max_completion_length=32, **options,
        )  # fmt: skip
        dataset = Dataset.from_dict({"prompt": problems})
        trainer = GSPOTrainer(model, reward, args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
    found, steps = dict[str, float](), []
    for log in trainer.state.log_history[:-1]:  # the last entry is about the whole training
        found |= log  # the reward is logged where responses were sampled
        steps.append(dict(found))
    return steps
