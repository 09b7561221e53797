"""`GSPOTrainer(use_vllm=True)` without vLLM: which weights an engine is given. tests/vllm_engine has a real one."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

pytest.importorskip("trl", reason="needs TRL: pip install gspo-kernels[trl]")

from trl.generation.vllm_generation import VLLMGeneration
from trl_trainers import Build

from gspo_kernels.integrations.trl import GSPOConfig, GSPOTrainer
from gspo_kernels.integrations.vllm import push_weights

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainer's and the model's own
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


class Engine:
    """What the trainer touches of a `vllm.LLM`; keeps the weights that it was given."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, mode: str = "processed_logprobs"):
        self.weights: dict[str, Tensor] = {}
        self.repacked = self.resets = 0
        own = SimpleNamespace(load_weights=lambda pairs: self.weights.update(pairs))
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=own))
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(
                dtype=dtype,
                logprobs_mode=mode,
                max_model_len=64,
                hf_text_config=SimpleNamespace(tie_word_embeddings=True),
            ),
            model_executor=SimpleNamespace(driver_worker=worker),
            vllm_config=SimpleNamespace(device_config=SimpleNamespace(device_type=device)),
        )

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.weights = dict(list(kwargs["weights_iterator"]))  # a layer's weights are kept until it has all of them

    def apply_model(self, change: Any) -> None:
        self.repacked += 1

    def reset_prefix_cache(self) -> None:
        self.resets += 1


def build_with(build: Build, llm: Any, kind: str = "tied", **options: Any) -> Any:
    return build(lambda *args, **others: GSPOTrainer(*args, llm=llm, **others), kind, GSPOConfig, **options)


@pytest.mark.parametrize("kind", ["qwen3", "tied", "moe"])
def test_an_engine_on_a_cpu_gets_the_state_dict(build: Build, kind: str) -> None:
    """`reload_weights` needs a tied head under its own name, which TRL does not send."""
    llm = Engine()
    trainer = build_with(build, llm, kind, use_vllm=True)
    assert isinstance(trainer.vllm_generation, VLLMGeneration) and trainer.use_vllm and trainer.args.use_vllm
    trainer.vllm_generation.sync_weights()
    expected = trainer.model.state_dict()
    assert "lm_head.weight" in expected and llm.weights.keys() == expected.keys()
    assert all(torch.equal(llm.weights[name], weights) for name, weights in expected.items())
    assert (llm.repacked, llm.resets) == (1, 1)


def test_an_engine_on_a_gpu_is_left_to_trl(build: Build) -> None:
    llm = Engine("cuda")
    trainer = build_with(build, llm, use_vllm=True)
    trainer.vllm_generation.sync_weights()
    assert llm.weights.keys() == dict(trainer.model.named_parameters()).keys()
    assert (llm.repacked, llm.resets) == (0, 1)


def test_adapters_are_merged(build: Build) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights=False)
    llm = Engine()
    trainer = build_with(build, llm, "tied", use_vllm=True, peft_config=lora)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.vllm_generation.sync_weights()
    after = dict(trainer.model.named_parameters())
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items()), "separated again"
    plain = trainer.model.merge_and_unload()
    assert llm.weights.keys() == plain.state_dict().keys()
    assert all(torch.allclose(llm.weights[name], value, atol=1e-6) for name, value in plain.state_dict().items())


def test_the_engines_dtype_is_compared(build: Build) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "vLLM runs in")
        build_with(build, Engine(), use_vllm=True)
        build_with(build, Engine(dtype=torch.bfloat16), use_vllm=True, bf16=True)
    with pytest.warns(UserWarning, match=r"vLLM runs in torch.bfloat16 and the trainer in torch.float32"):
        build_with(build, Engine(dtype=torch.bfloat16), use_vllm=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_vllm", False), ("vllm_mode", "server"), ("vllm_enable_sleep_mode", True), ("vllm_tensor_parallel_size", 2)],
)
def test_options_that_an_engine_of_ones_own_refuses(build: Build, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .* with llm=, an engine that runs already; got {value!r}"):
        build_with(build, Engine(), **{"use_vllm": True, name: value})


def test_engines_that_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"llm: expected logprobs_mode='processed_logprobs'.*; got 'raw_logprobs'"):
        build_with(build, Engine(mode="raw_logprobs"), use_vllm=True)
    elsewhere = Engine()
    del elsewhere.llm_engine.model_executor
    with pytest.raises(ValueError, match=r"llm: expected an engine in this process.*VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        build_with(build, elsewhere, use_vllm=True)
    with pytest.raises(TypeError, match=r"llm: expected a vllm.LLM; got str 'Qwen/Qwen3-0.6B'"):
        build_with(build, "Qwen/Qwen3-0.6B", use_vllm=True)


# --- push_weights -----------------------------------------------------------------------------------------------------

HEAD, BODY = ("lm_head.weight", torch.ones(2)), ("model.embed_tokens.weight", torch.zeros(2))


@pytest.mark.parametrize("weights", [dict([BODY, HEAD]), [BODY, HEAD], iter([BODY, HEAD])])
def test_weights_come_as_a_dict_or_as_pairs(weights: Any) -> None:
    llm = Engine()
    push_weights(llm, weights)
    assert llm.weights == dict([BODY, HEAD]) and llm.resets == 1


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ([], ValueError, "weights: expected names and tensors; got none"),
        ({}.items(), ValueError, "weights: expected names and tensors; got none"),
        (torch.nn.Linear(1, 1), TypeError, r"weights: .*; got a Linear; pass its state_dict\(\)"),
        (None, TypeError, "weights: .*; got a NoneType"),
        (["lm_head.weight"], TypeError, "weights: .*; got, at 0, str 'lm_head.weight'"),
        ([("lm_head.weight", torch.ones(2).numpy())], TypeError, "weights: .*; got, at 0, tuple .*array"),
    ],
    ids=str,
)
def test_what_is_no_weights_leaves_the_engine_as_it_was(weights: Any, kind: type[Exception], message: str) -> None:
    llm = Engine()
    llm.weights = dict([BODY])
    with pytest.raises(kind, match=message):
        push_weights(llm, weights)
    assert llm.weights == dict([BODY]) and llm.resets == 0


def test_a_tied_head_that_is_left_out_is_named() -> None:
    llm = Engine()
    with pytest.raises(ValueError, match=r"weights: expected lm_head.weight .* Pass model.state_dict\(\)"):
        push_weights(llm, [BODY])
    llm.llm_engine.model_config.hf_text_config.tie_word_embeddings = False
    push_weights(llm, [BODY])
    push_weights(Engine("cuda"), [BODY])
