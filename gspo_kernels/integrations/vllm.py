"""Weights for a vLLM engine that runs in the trainer's process.

    from gspo_kernels.integrations.vllm import push_weights

    push_weights(llm, model.state_dict())

Checked with vLLM 0.32 on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..base import checks

__all__ = ["push_weights"]


def push_weights(
    llm: Any, weights: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor], version: str | None = None
) -> None:
    """The engine samples with these weights from here on; its prefix cache, made with the old ones, is emptied.

    Args:
        llm: vLLM's `LLM`, in this process: `VLLM_ENABLE_V1_MULTIPROCESSING=0` is set before vLLM is imported.
        weights: names and tensors in the format of a checkpoint: `model.state_dict()`, or pairs. A head that is tied to
            the embedding must be among them under its own name: `named_parameters()` has it only once, and on a CPU the
            engine's head would keep its old weights.
        version: names the weights in the `weight_versions` of the engine's outputs.

    Raises:
        TypeError, ValueError: `llm` is no engine in this process; `weights` are none, or something other than names and
            tensors; on a CPU, a tied head is not among them. vLLM raises its own errors for names and shapes that its
            model does not have. It has read some of the weights by then: push the right ones before it samples again.
    """
    check_in_this_process(llm)
    names = list[str]()
    pairs = _checked(weights, names)
    first = next(pairs, None)  # before the engine gives up its old weights
    if first is None:
        raise ValueError("weights: expected names and tensors; got none, as from an iterator that was read before")
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": itertools.chain([first], pairs)})
    on_cpu = is_on_cpu(llm)
    if on_cpu:
        llm.apply_model(_pack_experts)
    llm.reset_prefix_cache()
    if on_cpu and _ties_its_head(llm) and not any("lm_head" in name or "embed_out" in name for name in names):
        raise ValueError(
            "weights: expected lm_head.weight among them, because the engine has a copy of the tied head; got none, "
            "and that head has kept its old weights. Pass model.state_dict(), which has it, not named_parameters()"
        )
    if version is not None:
        llm.llm_engine.set_weight_version(version)


def _checked(weights: Any, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The pairs of `weights`; their names are added to `names` as they are read."""
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    if not isinstance(pairs, Iterable):
        remedy = "; pass its state_dict()" if hasattr(weights, "state_dict") else ""
        raise TypeError(f"weights: expected names and tensors; got a {type(weights).__name__}{remedy}")
    for i, pair in enumerate(pairs):
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(f"weights: expected pairs of a name and a tensor; got, at {i}, {checks.describe(pair)}")
        names.append(pair[0])
        yield pair


def check_in_this_process(llm: Any) -> None:
    """Raises unless `llm` is a `vllm.LLM` that can be handed weights."""
    engine = getattr(llm, "llm_engine", None)
    if engine is None:
        raise TypeError(f"llm: expected a vllm.LLM; got {checks.describe(llm)}")
    if not hasattr(engine, "model_executor"):
        raise ValueError(
            "llm: expected an engine in this process, which can be handed the weights; got one in a process of its own:"
            " set VLLM_ENABLE_V1_MULTIPROCESSING=0 before vLLM is imported"
        )


def _ties_its_head(llm: Any) -> bool:
    return bool(getattr(llm.llm_engine.model_config.hf_text_config, "tie_word_embeddings", False))


def is_on_cpu(llm: Any) -> bool:
    return bool(llm.llm_engine.vllm_config.device_config.device_type == "cpu")


def _pack_experts(model: Any) -> None:
    """Puts reloaded experts into the layout of vLLM's CPU kernels, which vLLM 0.32 does only on the first load."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)
