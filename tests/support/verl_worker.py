"""verl's own actor worker on a CPU, a batch as verl's trainer passes it, and the same update in plain torch.

What stands in for a GPU is `verl_cpu_platform`. Two more things differ from a run of verl's: the process group is
opened first, because verl asks for "cpu:gloo,cpu:gloo" and torch refuses a device that is named twice; and TRL counts
as not installed, because verl 0.9.1 imports a class from it that TRL 1.16 does not have.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import page_lines
import torch
import verl
import verl_cpu_platform  # noqa: F401  # in a worker process of Ray: before anything asks for the platform
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.utils.import_utils import is_trl_available
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import left_right_2_no_padding

with mock.patch.dict(sys.modules, {"trl": None}):
    assert not is_trl_available()  # verl keeps the answer

VOCAB, PROMPT, WIDTH = 97, 3, 6
LENGTHS = (6, 1, 4, 0, 6, 2, 5, 3)  # of the responses; one is empty
MINI_BATCH, LEARNING_RATE = 4, 0.5

RECIPE = page_lines.options("verl", 1)


class Worker(ActorRolloutRefWorker):
    """verl's worker; its model's parameters can be read."""

    def __init__(self, config: Any, role: str) -> None:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        super().__init__(config, role)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[misc]
    def parameters(self) -> dict[str, Tensor]:
        found = self.actor.engine.module.state_dict()
        return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in found.items()}


def save_model(folder: Path) -> str:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@functools.cache
def config() -> Any:
    """`actor_rollout_ref` of verl's own PPO config, with the lines of docs/verl.md, and what a CPU needs."""
    overrides = [
        *RECIPE,
        "+actor_rollout_ref.model.load_tokenizer=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",  # verl's default is flash_attention_2
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.actor.strategy=fsdp2",  # torch's FSDP 1 does not broadcast the weights of a CPU
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=1",
        f"actor_rollout_ref.rollout.n={MINI_BATCH}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.optim.optimizer=SGD",  # of a gradient, not of its sign
        f"actor_rollout_ref.actor.optim.lr={LEARNING_RATE}",
        "actor_rollout_ref.actor.optim.weight_decay=0.0",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
    ]
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=overrides).actor_rollout_ref


def batch() -> dict[str, Tensor]:
    """Eight responses: prompts on the left, padding on the right, and one advantage per response."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (len(LENGTHS), PROMPT), generator=generator)
    responses = torch.randint(VOCAB, (len(LENGTHS), WIDTH), generator=generator)
    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()
    attention = torch.cat([torch.ones_like(prompts), mask], 1)
    advantages = torch.randn(len(LENGTHS), 1, generator=generator) * mask
    return {
        "prompts": prompts, "responses": responses, "input_ids": torch.cat([prompts, responses], 1),
        "attention_mask": attention, "position_ids": (attention.cumsum(1) - 1).clamp(min=0), "response_mask": mask,
        "advantages": advantages,
    }  # fmt: skip


def tensordict(arrays: dict[str, Tensor], **settings: Any) -> Any:
    """As verl's trainer passes a batch to its workers."""
    found = left_right_2_no_padding(TensorDict(dict(arrays), batch_size=[len(arrays["prompts"])]))
    tu.assign_non_tensor(found, temperature=1.0, calculate_entropy=False, **settings)
    return found


def update(worker: Any, arrays: dict[str, Tensor], old_log_probs: Tensor) -> dict[str, Any]:
    """verl's `_update_actor`; its metrics."""
    data = tensordict(
        {**arrays, "old_log_probs": old_log_probs},
        compute_loss=True, global_batch_size=MINI_BATCH, mini_batch_size=MINI_BATCH, epochs=1, seed=42,
        dataloader_kwargs={"shuffle": False},
    )  # fmt: skip
    output = worker.update_actor(data)
    if not isinstance(output, TensorDict):
        output = output.get()  # of Ray's workers
    metrics: dict[str, Any] = tu.get(output, "metrics")
    return metrics


# --- plain torch ------------------------------------------------------------------------------------------------------


def plain_log_probs(model: Any, arrays: dict[str, Tensor], rows: Sequence[int]) -> list[Tensor]:
    """Of each response alone, without padding: float64 log-probabilities [tokens]."""
    found = []
    for i in rows:
        ids = arrays["input_ids"][i, : PROMPT + LENGTHS[i]]
        logits = model(input_ids=ids[None]).logits[0, PROMPT - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[PROMPT:, None]).squeeze(1))
    return found


def plain_update(
    model: Any, arrays: dict[str, Tensor], old: Tensor, mini_batches: Sequence[Sequence[int]]
) -> list[float]:
    """GSPO by its formula: one step of SGD for each mini-batch, gradients clipped to 1; each step's clip fraction."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    fractions = []
    for rows in mini_batches:
        clipped, count = 0, 0
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for i, log_probs in zip(rows, plain_log_probs(model, arrays, rows), strict=True):
            if not LENGTHS[i]:
                continue  # counts in the mean
            ratio = (log_probs - old[i, : LENGTHS[i]].double()).mean().exp()
            advantage = arrays["advantages"][i, 0].double()
            bounded = ratio.clamp(1 - 3e-4, 1 + 4e-4)
            loss = loss - torch.minimum(ratio * advantage, bounded * advantage) / MINI_BATCH
            clipped += int((ratio - bounded) * advantage > 0)
            count += 1
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        fractions.append(clipped / count)
    return fractions


def environment(rank: int = 0, world: int = 1) -> dict[str, str]:
    """What verl's launcher sets for a worker, and the choice of its FSDP engine, which is registered for GPUs."""
    import ranks

    port = os.environ.get("MASTER_PORT") or str(ranks.free_port())  # verl's launcher has set it for several workers
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "VERL_ENGINE_DEVICE": "cuda",
    }  # fmt: skip
