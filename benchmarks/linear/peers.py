"""Log-probabilities of sampled tokens as each peer computes them from hidden states and a head, by its own functions.

Each takes hidden [B, T, D], weight [V, D] and token_ids [B, T], and gives [B, T]. A peer is imported when it is asked
for, and given the settings that its own trainer gives it or that suit it best.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..exact import EPSILONS

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]
PACKAGES = ("liger-kernel", "trl", "transformers", "cut-cross-entropy", "verl", "triton")
_LIGER_TOKENS = 2_048  # rows of a tile of Liger's: with fewer in a chunk its products are smaller than they could be
_TORCH_ROWS = 512  # about as much memory as this package takes for logits
_TRL_COLUMNS = 32_768  # of a tile: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, whose module needs many packages


def materialised(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def trl() -> Logprobs:
    function = _find("trl.kernels", "ChunkedLogProbFunction")

    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        found: Tensor = function.apply(
            hidden.flatten(0, 1), weight, None, token_ids.flatten(), 1.0, _TRL_COLUMNS, None, 1.0, ()
        )[0]
        return found.view(token_ids.shape)

    return logprobs


def torch_chunked() -> Logprobs:
    """Of torch 2.13 and later; without options it would hold all logits.

    Left to itself it takes D / V of the rows at a time, some 16 of 2,048, each a walk over the whole head: minutes.
    """
    function = _find("torch.nn.functional", "linear_cross_entropy")
    options = _find("torch.nn", "LinearCrossEntropyOptions")(batch_chunk_size=_TORCH_ROWS)

    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        found: Tensor = function(hidden.flatten(0, 1), weight, token_ids.flatten(), reduction="none", options=options)
        return -found.view(token_ids.shape)

    return logprobs


def cut_cross_entropy() -> Logprobs:
    """By its own Triton kernels on a GPU, with the gradient filter that it has on by default; else by torch.compile."""
    function = _find("cut_cross_entropy", "linear_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        impl = "cce" if hidden.is_cuda else "torch_compile"
        found: Tensor = function(hidden, weight, token_ids, reduction="none", impl=impl)
        return -found

    return logprobs


def verl() -> Logprobs:
    function = _find("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()

    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        found: Tensor = function(hidden, weight, token_ids)[0]
        return found

    return logprobs


def liger() -> Logprobs:
    """The inside of its loss, which itself returns none."""
    base = _find("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")

    def logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
        found: Tensor = base.chunk_forward(hidden, weight, token_ids)
        return found

    return logprobs


def liger_loss(tokens: int, objective: str = "gspo") -> Callable[..., Tensor]:
    """Of sequences of `tokens` tokens."""
    low, high = EPSILONS[objective]
    module = _find("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0,
        compiled=False,  # it compiles what follows the log-probabilities alone, [B, T] numbers
        use_ref_model=False,
        chunk_size=max(1, _LIGER_TOKENS // tokens),
        epsilon_low=low,
        epsilon_high=high,
        loss_type="grpo",  # mean over tokens, then over sequences
        importance_sampling_level="sequence" if objective == "gspo" else "token",
    )

    def loss(
        hidden: Tensor, weight: Tensor, token_ids: Tensor, mask: Tensor, advantages: Tensor, old_logprobs: Tensor
    ) -> Tensor:
        found: Tensor = module(hidden, weight, token_ids, mask, advantages, old_per_token_logps=old_logprobs)[0]
        return found

    return loss


def versions() -> dict[str, str | None]:
    """None: not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
