"""Log-probabilities and entropies for verl's engines, against verl's functions, its engines and Megatron-Core."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
from checks import check_close
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import token_logprobs
from gspo_kernels.integrations import verl as integration

pytestmark = DEFAULT_MODE


# --- log-probabilities and entropies ----------------------------------------------------------------------------------


def peaky(shape: tuple[int, ...], vocab: int = 97, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocab, generator=generator) * 4
    return logits, torch.randint(vocab, shape, generator=generator)


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_provider_is_token_logprobs(shape: tuple[int, ...]) -> None:
    """With a temperature per row, which is 0 at padding: results there are finite, as with verl's clamp."""
    logits, labels = peaky(shape)
    temperature = torch.rand(shape) + 0.5
    temperature[0] = 0.0
    leaf = logits.clone().requires_grad_()
    found = integration.log_probs_and_entropy(leaf, labels, temperature)
    reference = token_logprobs(logits, labels, temperature=temperature.clamp(min=1e-6))
    assert torch.equal(found[0], reference.logprobs) and torch.equal(found[1], reference.entropy)
    (found[0].sum() + found[1].sum()).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_provider_takes_whole_temperatures(dtype: torch.dtype) -> None:
    """Integers are accepted under any default dtype; 0 at padding is raised as in verl. Bool is refused."""
    logits, labels = peaky((4,))
    temperature = torch.tensor([1, 2, 0, 3])
    reference = token_logprobs(logits, labels, temperature=temperature.double().clamp(min=1e-6))
    torch.set_default_dtype(torch.bfloat16)  # clamp() brings integers into the default dtype
    try:
        found = integration.log_probs_and_entropy(logits, labels, temperature.to(dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], reference.logprobs) and torch.equal(found[1], reference.entropy)
    with pytest.raises(TypeError, match=r"^temperature: expected .* an integer dtype; got torch\.bool"):
        integration.log_probs_and_entropy(logits, labels, temperature.bool())


@pytest.mark.parametrize("inplace", [False, True])
def test_provider_writes_over_the_logits_if_asked(inplace: bool) -> None:
    logits, labels = peaky((7,))
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    integration.log_probs_and_entropy(given, labels, inplace_backward=inplace)[0].sum().backward()
    assert torch.equal(given.detach(), leaf.grad if inplace else logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_provider_against_verls_functions(dtype: torch.dtype) -> None:
    """In float32 equal to verl's. For bf16 logits equal to verl's on the same values in float32."""
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    logits, labels = peaky((64,))
    logits = logits.to(dtype)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    log_probs, entropy = integration.log_probs_and_entropy(ours, labels)
    wide = theirs.float()
    their_log_probs, their_entropy = logprobs_from_logits(wide, labels), entropy_from_logits(wide)
    check_close("log_probs", log_probs, their_log_probs, 2e-6 * (1 + their_log_probs.abs()))
    check_close("entropy", entropy, their_entropy, 4e-6 * (1 + their_entropy.abs()))
    (log_probs.sum() + 0.1 * entropy.sum()).backward()
    (their_log_probs.sum() + 0.1 * their_entropy.sum()).backward()
    assert ours.grad is not None and theirs.grad is not None
    step = 2.0**-7 if dtype is torch.bfloat16 else 1e-5  # one rounds up where the other rounds down
    check_close("gradient", ours.grad, theirs.grad, step * theirs.grad.abs() + 2e-6)
    if dtype is torch.bfloat16:
        own = logprobs_from_logits(logits, labels)
        assert own.dtype is torch.bfloat16 and log_probs.dtype is torch.float32
        assert float((own.float() - their_log_probs).abs().max()) > 1e-2, "a hundred times GSPO's clip range"


# --- engines ----------------------------------------------------------------------------------------------------------


@functools.cache
def registered_engines() -> Any:
    from verl.workers.engine import EngineRegistry

    integration.register_engines()
    return EngineRegistry


def test_engines_are_chosen_by_vendor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = registered_engines()
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    own = registry.get_engine_cls("language_model", "fsdp")
    assert own.__module__.startswith("verl.")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "gspo_kernels")
    for backend in ("fsdp", "fsdp2"):
        ours = registry.get_engine_cls("language_model", backend)
        assert issubclass(ours, own) and issubclass(ours, integration.LogProbsOfFSDP)
    assert registry.get_engine_cls("value_model", "fsdp").__module__.startswith("verl."), "a critic's stays verl's"


def micro_batch(remove_padding: bool, per_sample: bool) -> tuple[Any, dict[str, Any], Tensor]:
    """(micro batch, output_args, logits) as verl's `prepare_model_inputs` and a model would have them."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    lengths = torch.tensor([5, 1, 7, 3])
    offsets = torch.tensor([0, 5, 6, 13, 16])
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0]) if per_sample else torch.ones(4)
    _, ids = peaky((16,))
    micro = TensorDict({"input_ids": torch.nested.nested_tensor_from_jagged(ids, offsets)}, batch_size=[4])
    tu.assign_non_tensor(micro, use_remove_padding=remove_padding, calculate_entropy=True)
    args: dict[str, Any] = {"input_ids_rmpad_rolled": torch.roll(ids, -1), "temperature_is_one": not per_sample}
    if not remove_padding:
        logits, _ = peaky((4, 7))
        return micro, args | {"temperature": temperature}, logits
    logits, _ = peaky((1, 18))
    args["input_ids_rmpad_rolled"] = torch.cat([args["input_ids_rmpad_rolled"], torch.zeros(2, dtype=torch.int64)])
    args["temperature_rmpad"] = torch.cat([temperature.repeat_interleave(lengths), torch.ones(2)])
    return micro, args | {"pad_size": 2}, logits


def bare(cls: type) -> Any:
    """An engine without a model, which is enough for log-probabilities from logits."""
    engine = cls.__new__(cls)
    engine.use_ulysses_sp = False
    engine.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    from verl.utils.torch_functional import entropy_from_logits

    engine.compute_entropy_from_logits = entropy_from_logits
    return engine


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("remove_padding", [False, True])
def test_fsdp_engine_against_verls(remove_padding: bool, per_sample: bool, autocast: bool) -> None:
    """Packed and padded logits, one temperature or one per sample, under autocast as in verl's engine."""
    registry = registered_engines()
    engines = registry._engines["language_model"]["fsdp"]
    found = []
    for cls in (engines["cuda", "gspo_kernels"], engines["cuda"]):
        micro, args, logits = micro_batch(remove_padding, per_sample)
        leaf = logits.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = bare(cls).prepare_model_outputs(SimpleNamespace(logits=leaf * 1), args, micro, None)
        log_probs, entropy = (output[name].values() for name in ("log_probs", "entropy"))
        assert torch.equal(output["log_probs"].offsets(), micro["input_ids"].offsets())
        weights = torch.linspace(-1, 1, 16)
        (log_probs @ weights + 0.1 * entropy.sum()).backward()
        found.append((log_probs.detach(), entropy.detach(), leaf.grad))
    (log_probs, entropy, gradient), (theirs, their_entropy, their_gradient) = found
    check_close("log_probs", log_probs, theirs, 2e-6 * (1 + theirs.abs()))
    check_close("entropy", entropy, their_entropy, 4e-6 * (1 + their_entropy.abs()))
    assert gradient is not None and their_gradient is not None
    check_close("gradient", gradient, their_gradient, 1e-5 * their_gradient.abs() + 2e-6)


def test_fsdp_engine_does_not_read_padding() -> None:
    registry = registered_engines()
    micro, args, logits = micro_batch(False, True)
    logits[1, 1:] = math.nan
    leaf = logits.requires_grad_()
    engine = bare(registry._engines["language_model"]["fsdp"]["cuda", "gspo_kernels"])
    output = engine.prepare_model_outputs(SimpleNamespace(logits=leaf * 1), args, micro, None)
    (output["log_probs"].values().sum() + output["entropy"].values().sum()).backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all()) and bool((leaf.grad[1, 1:] == 0).all())


@pytest.mark.parametrize("option", ["use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk"])
def test_fsdp_engine_refuses_by_name(option: str) -> None:
    from verl.utils import tensordict_utils as tu

    registered_engines()
    micro, args, logits = micro_batch(True, False)
    tu.assign_non_tensor(micro, **{option: True})
    engine = bare(registered_engines()._engines["language_model"]["fsdp"]["cuda", "gspo_kernels"])
    with pytest.raises(NotImplementedError, match=rf"{option}: expected it off with VERL_ENGINE_VENDOR=gspo_kernels"):
        engine.prepare_model_outputs(SimpleNamespace(logits=logits), args, micro, None)


# --- vocabulary-parallel ----------------------------------------------------------------------------------------------


def megatron_engine(ours: bool) -> Any:
    """An engine without a model."""
    engines = registered_engines()._engines["language_model"]["megatron"]
    cls = engines["cuda", "gspo_kernels"] if ours else engines["cuda"]
    assert cls.__mro__[-1] is object and "Megatron" in cls.__name__
    engine = cls.__new__(cls)
    engine.engine_config = SimpleNamespace(use_fused_kernels=False, entropy_from_logits_with_chunking=False)
    return engine


MEGATRON_OPTIONS: dict[str, Any] = {
    "calculate_sum_pi_squared": False, "distillation_use_topk": False, "distillation_only": False,
    "logits_processor_func": None, "batch": None, "data_format": "thd",
}  # fmt: skip


def megatron_logits() -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, temperatures)."""
    logits, labels = peaky((2, 9), vocab=96)
    temperature = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) + 0.5
    return logits, labels, temperature


def on_vocabulary_shards(rank: int) -> list[dict[str, Tensor]]:
    """In a rank of Megatron-Core's tensor-parallel group: the logits processor of our engine, and verl's own."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    logits, labels, temperature = megatron_logits()
    found = []
    for ours in (True, False):
        leaf = logits.chunk(2, -1)[rank].clone().requires_grad_()
        out = megatron_engine(ours)._lm_head_logits_processor(
            leaf * 1, labels, temperature.clone(), calculate_entropy=True, **MEGATRON_OPTIONS
        )
        (out["log_probs"].sum() + 0.1 * out["entropy"].sum()).backward()
        assert leaf.grad is not None
        found.append({"log_probs": out["log_probs"], "entropy": out["entropy"], "gradient": leaf.grad})
    parallel_state.destroy_model_parallel()
    return found


def on_a_dtensor(rank: int) -> list[dict[str, Tensor]]:
    """In a rank: both engines on DTensor logits, which verl's engine gathers and ours does not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))
    engines = registered_engines()._engines["language_model"]["fsdp"]
    found = []
    for cls in (engines["cuda", "gspo_kernels"], engines["cuda"]):
        micro, args, logits = micro_batch(True, True)
        leaf = logits[..., :96].chunk(2, -1)[rank].clone().requires_grad_()
        args["input_ids_rmpad_rolled"] %= 96
        given = SimpleNamespace(logits=DTensor.from_local(leaf * 1, mesh, [Shard(-1)], run_check=False))
        with mock.patch.object(DTensor, "full_tensor", autospec=True, side_effect=DTensor.full_tensor) as gather:
            output = bare(cls).prepare_model_outputs(given, args, micro, None)
        assert gather.called == (cls is engines["cuda"])
        log_probs, entropy = (output[name].values() for name in ("log_probs", "entropy"))
        (log_probs.sum() + 0.1 * entropy.sum()).backward()
        assert leaf.grad is not None
        found.append({"log_probs": log_probs, "entropy": entropy, "gradient": leaf.grad})
    return found


def on_shards(rank: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    return on_vocabulary_shards(rank), on_a_dtensor(rank)


@pytest.mark.parametrize("mark", [pytest.param(0, marks=ranks.mark)])
def test_logits_sharded_over_the_vocabulary(mark: int) -> None:
    """Both engines on two ranks, beside verl's; Megatron's against the whole vocabulary in one process as well."""
    ranks_found = ranks.run(2, on_shards, plain_memory=True)
    for of_rank in ranks_found:
        for ours, theirs in of_rank:
            for name, bound in (("log_probs", 2e-6), ("entropy", 1e-5), ("gradient", 1e-6)):  # theirs: float32
                check_close(name, ours[name], theirs[name], bound * (1 + theirs[name].abs()))
    logits, labels, temperature = megatron_logits()
    leaf = logits.clone().requires_grad_()
    reference = token_logprobs(leaf, labels, temperature=temperature)
    (reference.logprobs.sum() + 0.1 * reference.entropy.sum()).backward()
    assert leaf.grad is not None
    mine = [of_rank[0][0] for of_rank in ranks_found]
    for one in mine:
        check_close("log_probs", one["log_probs"], reference.logprobs, 1e-6 * (1 + reference.logprobs.abs()))
        check_close("entropy", one["entropy"], reference.entropy, 1e-6 * (1 + reference.entropy))
    gradient = torch.cat([one["gradient"] for one in mine], -1)
    check_close("gradient", gradient, leaf.grad, 2e-6 * leaf.grad.abs() + 1e-7)


@pytest.mark.parametrize("option", ["calculate_sum_pi_squared", "distillation_use_topk", "distillation_only"])
def test_megatron_engine_refuses_by_name(option: str) -> None:
    logits, labels, temperature = megatron_logits()
    with pytest.raises(NotImplementedError, match=rf"^{option}: expected it off"):
        megatron_engine(True)._lm_head_logits_processor(
            logits, labels, temperature, calculate_entropy=True, **MEGATRON_OPTIONS | {option: True}
        )


def test_megatron_engine_refuses_its_fused_head() -> None:
    engine = megatron_engine(True)
    with pytest.raises(StopIteration):  # verl's own asks for a micro-batch
        engine.forward_step(iter(()), None, None, None)
    engine.engine_config = SimpleNamespace(use_fused_kernels=True)
    with pytest.raises(NotImplementedError, match=r"use_fused_kernels: expected it off"):
        engine.forward_step(iter(()), None, None, None)
