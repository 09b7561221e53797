"""A loss function as Megatron-Core's schedules call it, over the process groups of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo_kernels import global_count, gspo_loss

VERSION = f"Megatron-Core {version('megatron-core')}"


def loss_func(batch: Any, normalizer: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(the loss, what Megatron divides it by besides the number of micro-batches, metrics)"""
    from megatron.core import parallel_state

    loss, stats = gspo_loss(
        logits, batch.token_ids, batch.advantages, batch.old_logprobs, mask=batch.mask, normalizer=normalizer,
        vocab_size=logits.shape[-1], tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
    )  # fmt: skip
    log = {name: getattr(stats, name) for name in ("clip_fraction", "ratio_min", "ratio_max", "approx_kl", "entropy")}
    return loss, torch.ones((), dtype=torch.int), {"loss": loss.detach().clone(), **log}


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    with one_rank():
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
        from megatron.core.transformer import TransformerConfig

        count = global_count(
            batch.mask, group=parallel_state.get_data_parallel_group(with_context_parallel=True), averaged=True
        )
        config, log = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), list[dict[str, Tensor]]()
        loss, _ = forward_step_calc_loss(
            None, batch.logits, partial(loss_func, batch, count), config, None, False, 1, log, 1, True
        )
    return loss, {name: x.item() for name, x in log[0].items()}


@contextmanager
def one_rank() -> Iterator[Any]:
    """Megatron's `parallel_state` of this process alone. If there are others, each has the same batch."""
    from megatron.core import parallel_state

    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()
