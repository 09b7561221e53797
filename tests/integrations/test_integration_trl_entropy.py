"""TRL's options about entropy in GSPOTrainer: the bonus, its adaptive weight, and the tokens of highest entropy."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from trl_trainers import LEVELS, Build, assert_equal, batch_of, classes, history, said

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "bonus": {"entropy_coef": 0.3},
    "top tokens": {"top_entropy_quantile": 0.4},
    "adaptive": {"use_adaptive_entropy": True, "entropy_target": 9.0, "top_entropy_quantile": 0.4},
    "both": {"entropy_coef": 0.3, "top_entropy_quantile": 0.4, "beta": 0.1},
}


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_trl(build: Build, name: str, level: str, loss_type: str) -> None:
    options = {**LEVELS[level], "loss_type": loss_type, "steps_per_generation": 4, **OPTIONS[name]}
    trl, ours = (build(cls, **options) for cls in classes())
    inputs = batch_of(trl)
    expected, found = said(trl, inputs), said(ours, inputs)
    assert ("policy_loss" in expected[2]) == (name != "top tokens")
    assert_equal(expected, found)
    assert ours._last_world_entropy == pytest.approx(trl._last_world_entropy)
    without = {"entropy_coef": 0.0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0}
    plain = build(classes()[1], **{**options, **without})
    assert (said(plain, inputs)[1]["lm_head.weight"] - found[1]["lm_head.weight"]).abs().max() > 1e-4, "it matters"


@pytest.mark.parametrize("per_token", [True, False])
def test_with_rollout_correction(build: Build, per_token: bool) -> None:
    options = {**LEVELS["sequence"], "loss_type": "grpo", **OPTIONS["both"]}
    trl, ours = (build(cls, **options) for cls in classes())
    inputs = batch_of(trl)
    shape = inputs["completion_ids"].shape if per_token else (len(inputs["completion_ids"]), 1)
    inputs["importance_sampling_ratio"] = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3))
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][::2, 1] = 0
    for trainer in (trl, ours):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert_equal(said(trl, inputs), said(ours, inputs))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_adaptive_weight(build: Build, accumulated: int) -> None:
    """It moves up and down with the entropy of the whole optimizer step, as do the logs, in both trainers alike."""
    options = {
        **LEVELS["sequence"], "loss_type": "grpo", "max_steps": 6, "steps_per_generation": 4, "entropy_coef": 0.3,
        "use_adaptive_entropy": True, "entropy_target": 2.2, "entropy_coef_delta": 0.05,
        "gradient_accumulation_steps": accumulated, "learning_rate": 0.3,
    }  # fmt: skip
    trl, ours = (build(cls, **options) for cls in classes())
    expected, found = history(trl), history(ours)
    weights = [log["entropy_coef"] for log in expected if "entropy_coef" in log]
    assert len(set(weights)) > 2, "the weight moves"
    for theirs, mine in zip(expected, found, strict=True):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert ours.entropy_coef == trl.entropy_coef
    assert ours._last_world_entropy == pytest.approx(trl._last_world_entropy, rel=1e-4)


def test_the_weight_is_saved(build: Build) -> None:
    """By TRL, which reads it from the trainer."""
    options = {**LEVELS["sequence"], "loss_type": "grpo", "max_steps": 2, "save_strategy": "steps", "save_steps": 2,
               "use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 9.0}  # fmt: skip
    ours = build(classes()[1], **options)
    history(ours)
    again = build(classes()[1], **options)
    again.create_optimizer_and_scheduler(2)
    again._load_optimizer_and_scheduler(f"{ours.args.output_dir}/checkpoint-2")
    assert again.entropy_coef == ours.entropy_coef != 0.1
    assert again._last_world_entropy == ours._last_world_entropy


def test_nothing_counts(build: Build) -> None:
    """A micro-batch without a token: a loss of 0 and no gradient."""
    ours = build(classes()[1], **LEVELS["token"], loss_type="grpo", **OPTIONS["both"])
    inputs = batch_of(ours)
    inputs["completion_mask"][:] = 0
    loss, gradients, metrics = said(ours, inputs)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())
    assert metrics["entropy"] == 0
