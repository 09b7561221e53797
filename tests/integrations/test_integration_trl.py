"""gspo_kernels.integrations.trl against TRL's own GRPOTrainer: loss, gradients and metrics of one batch.

Everything is real but the size: Qwen3 and Qwen3-MoE of two layers, a tokenizer of sums, a reward that is checked.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from causal_models import tiny_model
from modes import DEFAULT_MODE
from trl_trainers import (
    GRADIENT,
    LEVELS,
    LOSS,
    Build,
    assert_equal,
    batch_of,
    classes,
    history,
    said,
    trainer_of,
)

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("kind", ["qwen3", "tied", "moe"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", LEVELS)
def test_equals_trl(build: Build, level: str, loss_type: str, kind: str) -> None:
    options = {**LEVELS[level], "loss_type": loss_type, "steps_per_generation": 4}
    trl, ours = (build(cls, kind, **options) for cls in classes())
    inputs = batch_of(trl)
    expected = said(trl, inputs)
    assert 0 < expected[2]["clip_ratio/region_mean"] < 1, "some are clipped, and others are not"
    assert ("aux_loss" in expected[2]) == (kind == "moe")
    assert_equal(expected, said(ours, inputs))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_reference_model(build: Build, level: str, on_policy: bool, bias_correction: bool) -> None:
    options = {**LEVELS[level], "loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": bias_correction}
    trl, ours = (build(cls, **options) for cls in classes())
    with torch.no_grad():
        for trainer in (trl, ours):
            for name, parameter in trainer.ref_model.named_parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter += 0.02 * noise
    inputs = batch_of(trl, off_policy=0.0 if on_policy else 1e-3)
    assert ("old_per_token_logps" not in inputs) == on_policy
    assert inputs["ref_per_token_logps"].abs().max() > 0.1
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    arguments = (ids, attended, inputs["completion_ids"].shape[1])
    for model in ("model", "ref_model"):
        of_policy = model == "model"  # of the reference TRL has no entropies
        with torch.no_grad():
            expected, found = (
                t._get_per_token_logps_and_entropies(
                    getattr(t, model), *arguments, batch_size=3, compute_entropy=of_policy
                )
                for t in (trl, ours)
            )
        torch.testing.assert_close(found[:2], expected[:2], rtol=2e-6, atol=2e-6)
    expected = said(trl, inputs)
    assert expected[2]["kl"] > 1e-4
    assert_equal(expected, said(ours, inputs))


@pytest.mark.parametrize("level", LEVELS)
def test_delta(build: Build, level: str) -> None:
    """A bound on large ratios where the advantage is negative."""
    options = {**LEVELS[level], "loss_type": "grpo", "delta": 1.0015}
    trl, ours = (build(cls, **options) for cls in classes())
    inputs = batch_of(trl, off_policy=2e-2)
    expected = said(trl, inputs)
    trl.args.delta = None
    assert abs(said(trl, inputs)[0] - expected[0]) > 1e-5, "delta is in what is compared"
    assert_equal(expected, said(ours, inputs))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rollout_correction(build: Build, level: str, per_token: bool, beta: float) -> None:
    """The weights of a batch that vLLM sampled, and tokens of tools."""
    trl, ours = (build(cls, **LEVELS[level], loss_type="grpo", beta=beta) for cls in classes())
    inputs = batch_of(trl)
    shape = inputs["completion_ids"].shape if per_token else (len(inputs["completion_ids"]), 1)
    inputs["importance_sampling_ratio"] = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3))
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][::2, 1] = 0
    for trainer in (trl, ours):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert_equal(said(trl, inputs), said(ours, inputs))


def test_sequence_token(build: Build) -> None:
    """A level that TRL lacks: equal to "sequence" with one advantage per sequence; takes one per token as well."""
    _, cls = classes()
    trl, _ = build(classes()[0], **LEVELS["sequence"], loss_type="grpo"), None
    options = {**LEVELS["sequence"], "loss_type": "grpo"}
    ours = build(cls, **{**options, "importance_sampling_level": "sequence_token"})
    inputs = batch_of(trl)
    (loss, gradients, metrics), (expected_loss, expected, their_metrics) = said(ours, inputs), said(trl, inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=LOSS)
    largest = max(g.abs().max() for g in expected.values())
    assert max((gradients[n] - g).abs().max() for n, g in expected.items()) < GRADIENT * largest
    assert metrics.keys() == their_metrics.keys()

    noise = torch.randn(inputs["completion_ids"].shape, generator=torch.Generator().manual_seed(4))
    inputs["advantages"] = inputs["advantages"][:, None] + noise
    loss, gradients, _ = said(ours, inputs)
    mask, lengths = inputs["completion_mask"], inputs["completion_mask"].sum(1, keepdim=True)
    ours.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], mask], 1)
    new, _, _ = trl._get_per_token_logps_and_entropies(trl.model, ids, attended, mask.shape[1])
    mean = ((new.detach() - inputs["old_per_token_logps"]) * mask).sum(1, keepdim=True) / lengths
    ratio = torch.exp(mean + new - new.detach())
    held = ratio.clamp(1 - 3e-4, 1 + 4e-4)
    term = -torch.min(ratio * inputs["advantages"], held * inputs["advantages"])
    direct = ((term * mask).sum(1) / lengths[:, 0]).mean() / 2
    assert loss.item() == pytest.approx(direct.item(), abs=LOSS)
    trl.model.zero_grad()
    direct.backward()
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in trl.model.named_parameters():
        if parameter.grad is not None:
            assert (gradients[name] - parameter.grad).abs().max() < GRADIENT * largest, name

    with pytest.raises(ValueError, match="gspo_token_loss"):
        said(build(cls, **options), inputs)


@pytest.mark.parametrize("kind", ["qwen3", "moe"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_training_is_the_same(build: Build, kind: str, level: str, beta: float) -> None:
    """Six optimizer steps of two micro-batches, two per generation: the same samples, metrics and parameters."""
    options = {**LEVELS[level], "loss_type": "grpo", "beta": beta, "max_steps": 6, "steps_per_generation": 4}
    options["gradient_checkpointing"] = kind == "qwen3"
    trl, ours = (build(cls, kind, **options) for cls in classes())
    before = {name: p.detach().clone() for name, p in ours.model.named_parameters()}
    expected, found = history(trl), history(ours)
    assert len(found) == 7
    assert max(log.get("clip_ratio/region_mean", 0) for log in found) > 0.1, "the second step is off-policy"
    for theirs, mine in zip(expected, found, strict=True):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    largest = max((p - before[name]).abs().max() for name, p in trl.model.named_parameters())
    others = dict(trl.model.named_parameters())
    worst = max((p - others[name]).abs().max() for name, p in ours.model.named_parameters())
    print(f"parameters moved by {largest:.1e} and differ by {worst:.1e}")
    assert worst < 1e-4 * largest


@pytest.mark.parametrize("model_type", ["granite", "opt", "mamba2"])
def test_other_models_train(tmp_path: Path, model_type: str) -> None:
    """Models that call methods of what their head returns: generation, old log-probabilities and steps, as with TRL."""
    model = tiny_model(model_type)
    model.config.pad_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(tmp_path / model_type)
    options = {
        **LEVELS["sequence"],
        "loss_type": "grpo",
        "max_steps": 2,
        "steps_per_generation": 4,
        "learning_rate": 1e-4,
    }
    expected, found = (history(trainer_of(cls, str(tmp_path / model_type), tmp_path, **options)) for cls in classes())
    assert len(found) == 3
    for theirs, mine in zip(expected, found, strict=True):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_accumulation(build: Build) -> None:
    """Accumulated micro-batches of 4 equal a batch of 8, with any lengths and empty rows."""
    _, cls = classes()
    whole = build(cls, **LEVELS["sequence"], loss_type="grpo", gradient_accumulation_steps=1)
    parts = build(cls, **LEVELS["sequence"], loss_type="grpo", gradient_accumulation_steps=2)
    inputs = batch_of(build(classes()[0], gradient_accumulation_steps=1))
    inputs["completion_mask"][1:4] = 0
    inputs["num_sequences_in_batch"] = torch.tensor(5.0)
    loss, gradients, _ = said(whole, inputs)
    halves = [{n: x[i : i + 4] if x.ndim else x for n, x in inputs.items()} for i in (0, 4)]
    found = [said(parts, half) for half in halves]
    assert sum(f[0].item() for f in found) == pytest.approx(loss.item(), abs=LOSS)
    largest = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        assert (found[0][1][name] + found[1][1][name] - gradient).abs().max() < GRADIENT * largest, name


def test_bf16(build: Build) -> None:
    """Under autocast TRL rounds logits to bf16, which changes log-probabilities by far more than GSPO's clip range."""
    trl, ours = (build(cls, bf16=True, importance_sampling_level="sequence", loss_type="grpo") for cls in classes())
    inputs = batch_of(trl, off_policy=0.0)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = inputs["completion_mask"]
    attended = torch.cat([inputs["prompt_mask"], mask], 1)
    found = []
    with torch.no_grad():
        for trainer in (trl, ours):
            found.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, mask.shape[1])[0])
        with ours.accelerator.autocast():
            hidden = ours.model.model(ids, attention_mask=attended).last_hidden_state[:, -mask.shape[1] - 1 : -1]
        logits = hidden.bfloat16().double() @ ours.model.lm_head.weight.bfloat16().double().T / ours.temperature
    exact = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0] * mask
    theirs, mine = ((x - exact).abs().max() for x in found)
    print(f"log-probabilities: TRL {theirs:.1e}, ours {mine:.1e}")
    assert mine < 2e-6 < 1e-3 < theirs
    _, gradients, metrics = said(ours, inputs)
    assert metrics["clip_ratio/region_mean"] == 0 and all(torch.isfinite(g).all() for g in gradients.values())


def test_the_head_still_makes_logits(build: Build, trl_models: dict[str, str], tmp_path: Path) -> None:
    """For generation, and after the model is saved and loaded."""
    from transformers import AutoModelForCausalLM

    ours = build(classes()[1])
    before = AutoModelForCausalLM.from_pretrained(trl_models["qwen3"])
    ids = torch.arange(2, 10)[None]
    assert torch.equal(ours.model(ids).logits, before(ids).logits)
    ours.save_model(str(tmp_path / "saved"))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(after.lm_head) is torch.nn.Linear
    assert all(
        torch.equal(a, b) for a, b in zip(after.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_evaluation(build: Build) -> None:
    results = []
    for cls in classes():
        trainer = build(cls, **LEVELS["sequence"], loss_type="grpo", per_device_eval_batch_size=8)
        torch.manual_seed(5)
        results.append(trainer.evaluate(trainer.train_dataset.select(range(4))))
    for name, value in results[0].items():
        if not any(word in name for word in ("second", "runtime", "time")):
            assert results[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
