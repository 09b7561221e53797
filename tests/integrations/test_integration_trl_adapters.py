"""GSPOTrainer with PEFT: LoRA on the base or on the LM head, and whole copies of the head, against the model itself."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor
from trl_trainers import LEVELS, Build, OwnLogits, assert_equal, batch_of, classes, said

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT"),
]


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"], **options})


OPTIONS = {**LEVELS["sequence"], "loss_type": "grpo", "beta": 0.1}


@pytest.mark.parametrize("kind", ["qwen3", "tied"])
def test_adapters_of_the_base(build: Build, kind: str) -> None:
    """The head is frozen, and the reference is the model without adapters."""
    trl, ours = (build(cls, kind, peft_config=lora(), **OPTIONS) for cls in classes())
    ours.model.load_state_dict(trl.model.state_dict())  # TRL 1.14 draws them without a seed
    inputs = batch_of(trl)
    expected, found = said(trl, inputs), said(ours, inputs)
    assert all("lora" in name for name in found[1])
    assert_equal(expected, found)


def test_a_copy_of_the_head(build: Build) -> None:
    """`modules_to_save`: the copy is trained; the reference has the original head."""
    trl, ours = (build(cls, peft_config=lora(modules_to_save=["lm_head"]), **OPTIONS) for cls in classes())
    head = trl.model.get_output_embeddings().modules_to_save["default"]
    with torch.no_grad():
        head.weight += 0.05 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    ours.model.load_state_dict(trl.model.state_dict())
    inputs, mine = batch_of(trl), batch_of(ours)
    assert (inputs["ref_per_token_logps"] - mine["ref_per_token_logps"]).abs().max() < 2e-6
    expected, found = said(trl, inputs), said(ours, inputs)
    assert expected[2]["kl"] > 1e-4 and any("modules_to_save" in name for name in found[1])
    assert_equal(expected, found)


def own_logits(trainer: Any, build: Build) -> Any:
    """TRL's trainer, which computes losses of the model of `trainer` from its own logits."""
    trl = build(classes()[0], **{**OPTIONS, "beta": trainer.beta})
    trl.model = trainer.model
    scored, own = trl._get_per_token_logps_and_entropies, OwnLogits(trainer.model, trl.temperature)
    trl._get_per_token_logps_and_entropies = lambda model, *args, **options: scored(own, *args, **options)
    return trl


def second(model: Any) -> None:
    model.add_adapter("other", lora(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])


def dropout(model: Any) -> None:
    """A dropout that is the same in every forward, whatever the shape."""

    class EverySecond(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (torch.arange(hidden.shape[-1]) % 2) * 2

    model.get_output_embeddings().lora_dropout["default"] = EverySecond()


CHANGES: dict[str, Any] = {
    "one adapter": lambda model: None,
    "two adapters": second,
    "dropout": dropout,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["qwen3", "tied"])
def test_lora_of_the_head(build: Build, kind: str, change: str) -> None:
    """TRL refuses it from 1.15 on, so the truth is TRL's loss of the model's own logits."""
    config = lora(target_modules=["q_proj", "lm_head"])
    ours = build(classes()[1], kind, peft_config=config, **OPTIONS)
    assert ours.model.get_output_embeddings.__self__ is not None, "the model has its own method again"
    inputs = batch_of(ours)
    CHANGES[change](ours.model)
    expected, found = said(own_logits(ours, build), inputs), said(ours, inputs)
    trained = [name for name in found[1] if "lm_head" in name]
    assert len(trained) == (4 if change == "two adapters" else 2) and not any("base_layer" in name for name in trained)
    assert_equal(expected, found)
    head = ours.model.get_output_embeddings()
    rank = 6 if change == "two adapters" else 4
    with torch.no_grad():
        hidden = torch.randn(2, 3, head.in_features)
        from gspo_kernels.linear.model_head import head_tensors

        u, right = head_tensors(head, hidden, torch.ones(2, 3))["low_rank"]
    assert u.shape == (2, 3, rank) and right.shape == (head.out_features, rank)


def logprobs_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ours, and those of the model's own logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    count = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, count)
        logits = trainer.model(ids, attention_mask=attended).logits[:, -count - 1 : -1] / trainer.temperature
    expected = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    return found, expected * inputs["completion_mask"]


def test_without_the_adapter(build: Build) -> None:
    """Disabled, as for reference log-probabilities, and merged."""
    ours = build(classes()[1], peft_config=lora(target_modules=["q_proj", "lm_head"]), **OPTIONS)
    inputs = batch_of(ours)
    trained, _ = logprobs_of(ours, inputs)
    with ours.model.disable_adapter():
        found, expected = logprobs_of(ours, inputs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found, inputs["ref_per_token_logps"], rtol=2e-6, atol=2e-6)
    assert (found - trained).abs().max() > 1e-2, "the adapter matters"
    ours.model.merge_adapter()
    found, expected = logprobs_of(ours, inputs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)


def test_nan_in_the_padding(build: Build) -> None:
    """Hidden states at padding are not read, by LoRA neither."""
    ours = build(classes()[1], peft_config=lora(target_modules=["q_proj", "lm_head"]), **OPTIONS)
    inputs = batch_of(ours)
    clean = said(ours, inputs)
    nowhere = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1) == 0
    norm = ours.model.base_model.model.model.norm
    norm.register_forward_hook(lambda _, args, output: output.masked_fill(nowhere[:, :, None], torch.nan))
    found = said(ours, inputs)
    assert found[0] == clean[0] and all(torch.equal(found[1][name], g) for name, g in clean[1].items())


REFUSED: dict[str, dict[str, Any]] = {
    "DoraLinearVariant": {"use_dora": True},
    "lora_bias=True": {"lora_bias": True},
}


@pytest.mark.parametrize("got", REFUSED)
def test_refused_adapters_of_the_head(build: Build, got: str) -> None:
    with pytest.raises(ValueError, match=f"^peft_config: expected plain LoRA on the LM head.*; got {got}"):
        build(classes()[1], peft_config=lora(target_modules=["lm_head"], **REFUSED[got]), **OPTIONS)


def test_other_adapters_of_the_head_are_refused(build: Build) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"^peft_config: expected plain LoRA on the LM head.*; got Linear"):
        build(classes()[1], peft_config=config, **OPTIONS)
