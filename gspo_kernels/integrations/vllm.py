"""Weights for a vLLM engine that runs in the trainer's process.

    from gspo_kernels.integrations.vllm import push_weights

    push_weights(llm, model.state_dict().items())

Checked with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["push_weights"]


def push_weights(llm: Any, weights: Iterable[tuple[str, Tensor]], version: str | None = None) -> None:
    """The engine samples with these weights from here on; its prefix cache, made with the old ones, is emptied.

    Args:
        llm: vLLM's `LLM`, in this process: `VLLM_ENABLE_V1_MULTIPROCESSING=0` is set before vLLM is imported.
        weights: names and tensors in the format of a checkpoint, as in `model.state_dict().items()`. A head that is
            tied to the embedding must be among them under its own name: `named_parameters()` has it only once, and on
            a CPU the engine's head would silently keep its old weights.
        version: names the weights in the `weight_versions` of the engine's outputs.
    """
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    if is_on_cpu(llm):
        llm.apply_model(_pack_experts)
    llm.reset_prefix_cache()
    if version is not None:
        llm.llm_engine.set_weight_version(version)


def is_on_cpu(llm: Any) -> bool:
    return bool(llm.llm_engine.vllm_config.device_config.device_type == "cpu")


def _pack_experts(model: Any) -> None:
    """Puts reloaded experts into the layout of vLLM's CPU kernels, which vLLM 0.32 does only on the first load."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)
