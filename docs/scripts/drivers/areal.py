"""AReaL: its engine calls the actor's `grpo_loss_fn` on a packed micro-batch as `step` does.

AReaL imports packages for its servers and loggers, which are not called here: empty modules take their place.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ._stubs import stubs

VERSION = f"AReaL {version('areal')}"
NOT_CALLED = (
    "aiofiles", "flask", "lark", "numba", "openai", "pybase64", "swanlab", "tabulate", "tensorboardX", "trackio",
    "uvloop", "wandb", "werkzeug",
)  # fmt: skip

with stubs(*NOT_CALLED):
    from areal.trainer.ppo.actor import grpo_loss_fn
    from areal.utils import stats_tracker

    from gspo_kernels.integrations.areal import with_our_losses

LOSS = with_our_losses(
    functools.partial(
        grpo_loss_fn, eps_clip=3e-4, eps_clip_higher=4e-4, c_clip=None, importance_sampling_level="sequence"
    ),
    "sequence_mean",
)
LOGGED = ("actor_loss", "approx_kl", "clip_ratio", "entropy", "importance_weight")


def packed(mask: Tensor, **arrays: Tensor) -> dict[str, Any]:
    """A micro-batch as AReaL packs it, of [B, T] arrays: [N], with one masked token, of the prompt, before each row."""
    width = mask.shape[1]
    lengths = torch.where(mask, torch.arange(1, width + 1, device=mask.device), 0).amax(1) + 1
    kept = torch.arange(width + 1, device=mask.device) < lengths[:, None]
    found: dict[str, Any] = {
        name: torch.nn.functional.pad(x, (1, 0))[kept] for name, x in (arrays | {"loss_mask": mask.float()}).items()
    }
    return found | {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()}


def step(batch: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what AReaL logs of it under `ppo_actor/update/`: means over tokens."""
    inputs = packed(
        batch.mask, new=batch.logprobs, logprobs=batch.old_logprobs, prox_logp=batch.old_logprobs,
        entropy=batch.entropy, advantages=batch.advantages[:, None] * batch.mask,
    )  # fmt: skip
    loss = LOSS(inputs.pop("new"), inputs.pop("entropy"), inputs)
    found = stats_tracker.export()
    return loss, {f"{name}/avg": float(found[f"{name}/avg"]) for name in LOGGED}
