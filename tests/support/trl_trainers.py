"""Trainers of TRL and ours, small and real: Qwen3 and Qwen3-MoE of two layers, sums as prompts, a checked reward."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SYMBOLS = ["<pad>", "<eos>", "<unk>", *"0123456789+="]

# What float32 leaves: log-probabilities of size 3, summed in another order.
LOSS, GRADIENT, METRIC = 5e-7, 3e-6, 2e-6


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def sums() -> Any:
    """Prompts of two lengths, so that they are padded."""
    from datasets import Dataset

    pairs = [(a, b) for a in (3, 14, 25) for b in (1, 8, 17, 29)] * 4
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in pairs], "answer": [str(a + b) for a, b in pairs]})


def right_digits(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [
        sum(x == y for x, y in zip(text, right, strict=False)) - 0.1 * len(text)
        for text, right in zip(completions, answer, strict=True)
    ]


def save_model(path: Path, kind: str) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": len(SYMBOLS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.15,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        )
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.save_pretrained(path)
    return str(path)


def trainer_of(cls: Any, model: str, folder: Path, config: Any = None, peft_config: Any = None, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig

    usual: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "report_to": [], "per_device_train_batch_size": 8, "num_generations": 8,
        "max_completion_length": 10, "gradient_accumulation_steps": 2, "learning_rate": 0.05, "optim": "sgd",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "temperature": 0.8,
    }  # fmt: skip
    args = (config or GRPOConfig)(output_dir=str(folder), **{**usual, **options})
    return cls(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        right_digits,
        args,
        train_dataset=sums(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def classes() -> tuple[Any, Any]:
    """TRL's trainer and ours."""
    import trl
    from trl import GRPOTrainer

    from gspo_kernels.integrations.trl import GSPOTrainer

    if not trl.__version__.startswith("1.15.") or torch.cuda.is_available():
        return GRPOTrainer, GSPOTrainer

    class OnOwnLogits(GRPOTrainer):
        """The kernels of TRL 1.15 need a GPU: without one, with the log-probabilities of the model's own logits."""

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **options: Any) -> Any:
            called = model if isinstance(model, OwnLogits) else OwnLogits(model, self.temperature)
            with self.accelerator.autocast():
                return super()._get_per_token_logps_and_entropies(called, *args, **options)

    OnOwnLogits.__name__ = "GRPOTrainer"
    return OnOwnLogits, GSPOTrainer


def batch_of(trainer: Any, off_policy: float = 1e-3) -> dict[str, Any]:
    """A micro-batch that the trainer generated, with old log-probabilities close to the model's."""
    torch.manual_seed(1)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    size = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    rows = [trainer.train_dataset[i // trainer.num_generations] for i in range(size)]
    found = trainer._generate_and_score_completions(rows)
    inputs = {name: x[: trainer.args.per_device_train_batch_size] if x.ndim else x for name, x in found.items()}
    inputs["num_sequences_in_batch"] = torch.tensor(float(size))
    if off_policy:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            now, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, attended, inputs["completion_ids"].shape[1]
            )
        noise = off_policy * torch.randn(now.shape, generator=torch.Generator().manual_seed(2))
        inputs["old_per_token_logps"] = (now + noise) * inputs["completion_mask"]
    assert 0 < int(inputs["completion_mask"].sum()) < inputs["completion_mask"].numel(), "ragged"
    assert (inputs["advantages"] > 0).any() and (inputs["advantages"] < 0).any()
    return inputs


def said(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, metrics


def assert_equal(theirs: Any, ours: Any, factor: float = 1.0) -> None:
    """`factor`: multiplies their loss and gradients."""
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = theirs, ours
    assert our_loss.item() == pytest.approx(factor * loss.item(), rel=LOSS, abs=LOSS), "loss"
    assert our_gradients.keys() == gradients.keys()
    largest = max(g.abs().max() for g in gradients.values()) * factor
    assert largest > 1e-4
    worst = max((our_gradients[n] - factor * g).abs().max() / largest for n, g in gradients.items())
    print(f"loss {abs(our_loss - factor * loss):.1e}, gradient {worst:.1e} of the largest, {largest:.1e}")
    assert worst < GRADIENT, "gradients"
    for name, gradient in gradients.items():  # each by its own size, but for those that cancel
        size = gradient.abs().max().clamp(min=largest / factor * 1e-2) * factor
        assert (our_gradients[name] - factor * gradient).abs().max() < GRADIENT * size, name
    assert_metrics(metrics, our_metrics)


def assert_metrics(theirs: dict[str, float], ours: dict[str, float]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=METRIC, abs=METRIC), name


LEVELS = {
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "token": {"importance_sampling_level": "token", "epsilon": 8e-4, "epsilon_high": 1e-3},
}


def history(trainer: Any) -> list[dict[str, float]]:
    torch.manual_seed(6)  # of what is sampled
    trainer.train()
    return [
        {k: v for k, v in log.items() if "time" not in k and "second" not in k} for log in trainer.state.log_history
    ]


# Of a fixture: a trainer of a class, on one of the models that `save_model` saves.
Build = Callable[..., Any]


class OwnLogits:
    """A model as TRL's trainer calls it, with log-probabilities and entropies of the model's own logits.

    From TRL 1.15 on, the trainer multiplies the hidden states of the model's base with the head instead, which is not
    what every model does.
    """

    def __init__(self, model: Any, temperature: float, seed: int | None = None) -> None:
        self.model, self.temperature, self.seed = model, temperature, seed

    def __call__(self, labels: Any = None, fused_lm_head: bool = False, logits_to_keep: int = 0, **inputs: Any) -> Any:
        if self.seed is not None:  # of dropout
            torch.manual_seed(self.seed)
        output = self.model(**{**inputs, "use_cache": False})
        if not fused_lm_head:
            return output
        logprobs = (output.logits[:, :-1].float() / self.temperature).log_softmax(-1)
        mask, entropy = labels[:, 1:] != -100, -(logprobs.exp() * logprobs).sum(-1)
        chosen = logprobs.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        return SimpleNamespace(
            log_probs=chosen.where(mask, 0.0),
            entropy=entropy.where(mask, 0.0),
            aux_loss=getattr(output, "aux_loss", None),
        )
