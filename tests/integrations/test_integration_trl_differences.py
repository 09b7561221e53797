"""Where GSPOTrainer differs from TRL's own trainer, on purpose."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor
from trl_trainers import LEVELS, METRIC, Build, assert_equal, batch_of, classes, history, said

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


def test_empty_rows_are_not_counted(build: Build) -> None:
    """TRL counts them in its divisor and its metrics."""
    trl, ours = (build(cls, **LEVELS["sequence"], loss_type="grpo") for cls in classes())
    inputs = batch_of(trl)
    assert inputs["old_per_token_logps"].shape[0] == 8
    clipped = said(trl, inputs)[2]["clip_ratio/region_mean"]
    inputs["completion_mask"][[1, 5]] = 0
    inputs["num_sequences_in_batch"] = torch.tensor(2 * 6.0)
    expected, found = said(trl, inputs), said(ours, inputs)
    left = [name for name in expected[2] if "clip" in name]
    for name in left:
        if name.endswith("mean"):
            assert found[2][name] == pytest.approx(expected[2][name] * 8 / 6, abs=METRIC), name
    assert clipped > 0
    assert_equal(*((a, b, {n: v for n, v in c.items() if n not in left}) for a, b, c in (expected, found)), 8 / 6)

    inputs["completion_mask"][:] = 0
    loss, gradients, metrics = said(ours, inputs)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())
    assert metrics["entropy"] == metrics["clip_ratio/region_mean"] == 0


def test_truncated_completions(build: Build) -> None:
    """`mask_truncated_completions` makes empty rows; the others are counted over the generation batch."""
    _, cls = classes()
    ours = build(cls, **LEVELS["sequence"], loss_type="grpo", mask_truncated_completions=True, max_steps=4)
    seen, compute = [], ours._compute_loss

    def watch(model: Any, inputs: Any) -> Tensor:
        seen.append((inputs["completion_mask"].any(1).sum(), inputs["num_sequences_in_batch"]))
        return compute(model, inputs)

    ours._compute_loss = watch
    logs = history(ours)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first[0] + second[0] == first[1] == second[1]
    assert any(0 < x[0] < 8 for x in seen)
    assert all(abs(log["loss"]) < 10 for log in logs if "loss" in log)


def test_nan_in_the_padding(build: Build) -> None:
    """Hidden states at padding are undefined. TRL multiplies their gradients by 0, and NaN times 0 is NaN."""
    trl, ours = (build(cls, **LEVELS["sequence"], loss_type="grpo") for cls in classes())
    inputs = batch_of(trl)
    clean = said(ours, inputs)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    nowhere = attended == 0

    def nan_at_padding(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.masked_fill(nowhere[:, :, None], torch.nan)

    found = []
    for trainer in (trl, ours):
        hook = trainer.model.model.norm.register_forward_hook(nan_at_padding)
        found.append(said(trainer, inputs))
        hook.remove()
    assert found[0][1]["lm_head.weight"].isnan().any()
    assert found[1][0] == clean[0] and found[1][2] == clean[2]
    assert all(torch.equal(found[1][1][name], g) for name, g in clean[1].items())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_off_policy(build: Build, advantage: float) -> None:
    """A ratio that overflows: TRL's gradient is NaN. Ours is 0, because the sequence is clipped or saturated."""
    trl, ours = (build(cls, **LEVELS["sequence"], loss_type="grpo") for cls in classes())
    inputs = batch_of(trl)
    inputs["old_per_token_logps"][0] -= 200.0
    inputs["advantages"][0] = advantage
    expected, found = said(trl, inputs), said(ours, inputs)
    assert expected[1]["lm_head.weight"].isnan().any()
    assert torch.isfinite(found[0]) and all(torch.isfinite(g).all() for g in found[1].values())


@pytest.mark.parametrize("name", ["old_per_token_logps", "ref_per_token_logps"])
def test_nan_of_masked_tokens(build: Build, name: str) -> None:
    trl, ours = (build(cls, **LEVELS["token"], loss_type="grpo", beta=0.1) for cls in classes())
    inputs = batch_of(trl)
    clean = said(ours, inputs)
    inputs[name] = inputs[name].masked_fill(inputs["completion_mask"] == 0, torch.nan)
    found = said(ours, inputs)
    assert said(trl, inputs)[0].isnan()
    assert found[0] == clean[0] and all(torch.equal(found[1][n], g) for n, g in clean[1].items())


def test_completions_of_one_token(build: Build) -> None:
    """TRL reads [B, 1] as one number per sequence, and counts masked tokens in its means."""
    trl, ours = (build(cls, **LEVELS["token"], loss_type="bnpo") for cls in classes())
    inputs = {n: x[:, :1] if n.startswith(("completion", "old")) else x for n, x in batch_of(trl).items()}
    assert_equal(said(trl, inputs), said(ours, inputs))
    inputs["completion_mask"] = inputs["completion_mask"].clone()
    inputs["completion_mask"][2:] = 0
    expected, found = said(trl, inputs), said(ours, inputs)
    assert_equal((*expected[:2], {}), (*found[:2], {}))
    assert found[2]["entropy"] == pytest.approx(expected[2]["entropy"] * 8 / 2, rel=METRIC)
