"""gspo_kernels.integrations.trl against TRL's own GRPOTrainer: loss, gradients and metrics of one batch.

Everything is real but the size: Qwen3 and Qwen3-MoE of two layers, a tokenizer of sums, a reward that is checked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modes import DEFAULT_MODE
from torch import Tensor

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
]

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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in ("qwen3", "tied", "moe")}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield


Build = Callable[..., Any]


@pytest.fixture
def build(models: dict[str, str], tmp_path: Path) -> Build:
    """A trainer of class `cls` on the model `kind`."""

    def make(cls: Any, kind: str = "qwen3", config: Any = None, **options: Any) -> Any:
        return trainer_of(cls, models[kind], tmp_path, config, **options)

    return make


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
    from trl import GRPOTrainer

    from gspo_kernels.integrations.trl import GSPOTrainer

    return GRPOTrainer, GSPOTrainer


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


def history(trainer: Any) -> list[dict[str, float]]:
    torch.manual_seed(6)  # of what is sampled
    trainer.train()
    return [
        {k: v for k, v in log.items() if "time" not in k and "second" not in k} for log in trainer.state.log_history
    ]


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


@pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
def test_adapters(build: Build) -> None:
    """LoRA: the head is frozen, and the reference is the model without adapters."""
    from peft import LoraConfig

    def lora(**options: Any) -> Any:
        return LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj", "down_proj"], **options})

    options = {**LEVELS["sequence"], "loss_type": "grpo", "beta": 0.1}
    trl, ours = (build(cls, peft_config=lora(), **options) for cls in classes())
    inputs = batch_of(trl)
    expected, found = said(trl, inputs), said(ours, inputs)
    assert all("lora" in name for name in found[1])
    assert_equal(expected, found)


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


# ---- two ranks

FSDP2 = ("head with the rest", "head alone")


def on_ranks(folder: Path) -> None:
    """Under torchrun: DDP trains as with TRL; gradients under FSDP2 are the mean over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = str(folder / "qwen3")
    options = {**LEVELS["sequence"], "loss_type": "grpo", "steps_per_generation": 4}
    trainers = [trainer_of(cls, model, folder, max_steps=4, **options) for cls in classes()]
    theirs, ours = ([log.get(name) for log in history(t) for name in ("loss", "entropy")] for t in trainers)
    parameters = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in trainers]
    say = {"type": type(trainers[1].model_wrapped).__name__, "theirs": theirs, "ours": ours}
    say["apart"] = (parameters[1] - parameters[0]).abs().max().item()

    whole = trainer_of(classes()[0], model, folder, **options)
    inputs = batch_of(whole)
    inputs["advantages"] = inputs["advantages"].roll(dist.get_rank())
    inputs["num_sequences_in_batch"] *= dist.get_world_size()
    _, expected, _ = said(whole, inputs)
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for wrapped in FSDP2:
        for cls in classes():
            trainer = trainer_of(cls, model, folder, **options)
            for module in (*trainer.model.model.layers, *([trainer.model.lm_head] if wrapped == FSDP2[1] else [])):
                fully_shard(module, mesh=mesh)
            fully_shard(trainer.model, mesh=mesh)
            _, gradients, _ = said(trainer, inputs)
            worst = [(gradients[n].full_tensor() - g).abs().max() / g.abs().max() for n, g in expected.items()]
            say[f"{cls.__name__}, {wrapped}"] = max(x.item() for x in worst)

    completions = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    for cls in classes():
        trainer, bf16 = trainer_of(cls, model, folder, **options), torch.bfloat16
        fully_shard(trainer.model, mesh=mesh, mp_policy=MixedPrecisionPolicy(bf16, bf16, bf16))  # as accelerate does
        with torch.no_grad():
            logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, completions)
        say[f"{cls.__name__}, digits lost"] = bool((logprobs.float() == logprobs.bfloat16().float()).all())
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(say))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_two_ranks(tmp_path: Path) -> None:
    save_model(tmp_path / "qwen3", "qwen3")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found["type"] == "DistributedDataParallel"
    assert found["ours"][:8] == pytest.approx(found["theirs"][:8], abs=1e-5)
    assert found["apart"] < 1e-6
    for wrapped in FSDP2:
        assert found[f"GSPOTrainer, {wrapped}"] < GRADIENT
    assert found["GRPOTrainer, head with the rest"] < GRADIENT
    assert found["GRPOTrainer, head alone"] > 0.1, "TRL's gradient of the head is that of one rank"
    assert found["GRPOTrainer, digits lost"] and not found["GSPOTrainer, digits lost"]


# ---- where we differ from TRL, on purpose


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


# ---- options


def test_defaults_are_the_papers(build: Build) -> None:
    from gspo_kernels.integrations.trl import GSPOConfig

    _, cls = classes()
    ours = build(cls, config=GSPOConfig)
    assert (ours.importance_sampling_level, ours.loss_type, ours.beta) == ("sequence", "grpo", 0.0)
    assert (ours.epsilon_low, ours.epsilon_high) == (3e-4, 4e-4)
    given = [
        ({"epsilon": 1e-3}, (1e-3, 1e-3)),
        ({"epsilon_high": 5e-4}, (3e-4, 5e-4)),
        ({"epsilon": 1e-3, "epsilon_high": 2e-3}, (1e-3, 2e-3)),
        ({"importance_sampling_level": "sequence_token"}, (3e-4, 4e-4)),
        ({"importance_sampling_level": "token"}, (0.2, 0.27)),
    ]
    for options, expected in given:
        ours = build(cls, config=GSPOConfig, **options)
        assert (ours._objective.eps_low, ours._objective.eps_high) == expected


def test_a_range_that_never_clips_is_pointed_out(build: Build) -> None:
    _, cls = classes()
    with pytest.warns(UserWarning, match="epsilon"):
        build(cls, importance_sampling_level="sequence", loss_type="grpo")


REFUSED: dict[str, Any] = {
    "loss_type": "cispo", "importance_sampling_level": "turn", "delta": 1.1, "off_policy_mask_threshold": 0.5,
    "use_liger_kernel": True, "cast_lm_head_to_fp32": True, "torch_compile": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(build: Build, name: str) -> None:
    _, cls = classes()
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        build(cls, **{name: REFUSED[name]})


@pytest.mark.parametrize("loss_type", ["sapo", "luspo", "vespo"])
def test_refused_losses(build: Build, loss_type: str) -> None:
    _, cls = classes()
    with pytest.raises(ValueError, match=r"^loss_type: expected 'grpo' or"):
        build(cls, loss_type=loss_type)


@pytest.mark.parametrize("name", ["zero_stage", "fsdp_version"])
def test_refused_surroundings(name: str) -> None:
    from gspo_kernels.integrations.trl.trainer import check_surroundings

    def trainer(stage: int = 2, version: int = 2) -> Any:
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
        return SimpleNamespace(
            args=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
            accelerator=SimpleNamespace(state=state),
            is_fsdp_enabled=True,
        )

    check_surroundings(trainer())
    wrong = {"zero_stage": {"stage": 3}, "fsdp_version": {"version": 1}}
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        check_surroundings(trainer(**wrong[name]))


def test_the_head_still_makes_logits(build: Build, models: dict[str, str], tmp_path: Path) -> None:
    """For generation, and after the model is saved and loaded."""
    from transformers import AutoModelForCausalLM

    ours = build(classes()[1])
    before = AutoModelForCausalLM.from_pretrained(models["qwen3"])
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_ranks(Path(sys.argv[1]))
