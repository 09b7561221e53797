"""The loss of one packed micro-batch in open-instruct's grpo_fast.py, which has no hook for another. See
docs/open-instruct.md for the lines to change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.packed_rows import bounds_of
from ..losses.clipped import PPO
from ..losses.from_logits import policy_loss_from_logprobs
from ._arrays import checked_count
from .objectives import objective_of

__all__ = ["Loss", "policy_loss"]

KL = (("k1", "none"), ("k2", "none"), ("k3", "none"), ("k1", "ratio"))  # by open-instruct's kl_estimator


class Loss(NamedTuple):
    """What grpo_fast.py calls by these names; the arrays are [B, T], and not differentiable."""

    loss: Tensor  # not yet multiplied by the number of ranks
    pg_loss_BT: Tensor  # the mean of the policy term at every token, because its mean alone is logged
    clipfrac_BT: Tensor  # 1 where a token is clipped and its `rho_weights` is not 0
    ratio_BT: Tensor


def policy_loss(
    args: Any,
    new_logprobs: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    attention_mask: Tensor,
    ref_logprobs: Tensor | None,
    rho_weights: Tensor,
    loss_denominator: float | Tensor,
    *,
    objective: str = "gspo",
    aggregation: str = "sequence_mean",
    **parameters: Any,
) -> Loss:
    """GSPO, or another objective, in place of `compute_grpo_loss` and `masked_mean`. Arrays are [B, T]. No host sync.

    Args:
        args: GRPOExperimentConfig. Honours `beta`, `kl_estimator` and, for "ppo" and "cispo", `clip_lower` and
            `clip_higher`, where `parameters` do not say otherwise.
        new_logprobs: differentiable float32, and `old_logprob`, both with open-instruct's 1.0 at masked positions.
        response_mask: bool, True where a token counts.
        attention_mask: `data_BT.attention_masks[i][:, 1:]`, integers: the number of each token's sequence in its row.
        rho_weights: factors of the policy term, of `compute_rho_correction`.
        loss_denominator: "token_mean": the tokens of the optimizer step, which `--loss_denominator token` counts.
            "sequence_mean": its responses on all ranks, which `--loss_denominator` has to say.
        objective: a name of `gspo_kernels.integrations.objectives`.
        parameters: of the objective, such as `eps_low` and `eps_high`.

    Raises: ValueError, TypeError, NotImplementedError: naming the argument, what was expected and what came.
    """
    if args.sequence_parallel_size > 1:
        raise NotImplementedError(
            "sequence_parallel_size: expected 1, because a ratio needs whole responses; got "
            f"{args.sequence_parallel_size}"
        )
    if aggregation == "sequence_mean" and args.loss_denominator == "token":
        raise ValueError(
            "loss_denominator: expected the number of responses of an optimizer step, on all ranks, because "
            'aggregation is "sequence_mean"; got "token". Set --loss_denominator, or aggregation="token_mean"'
        )
    if objective == "ppo":
        parameters = {"eps_low": args.clip_lower, "eps_high": args.clip_higher} | parameters
    elif objective == "cispo":
        parameters = {"eps_low": 1.0, "eps_high": args.clip_higher} | parameters
    old_logprob, mask = old_logprob.detach(), response_mask.flatten()
    count = checked_count("loss_denominator", loss_denominator, mask[None])
    changes = torch.nn.functional.pad(attention_mask[:, 1:] != attention_mask[:, :-1], (1, 0), value=True)
    # A denominator of 0 counts no token: the loss is 0, as in open-instruct.
    options: dict[str, Any] = {
        "mask": mask, "cu_seqlens": bounds_of(changes.flatten().cumsum(0)),
        "aggregation": aggregation, "normalizer": count,
    }  # fmt: skip
    logprobs, old = new_logprobs.flatten(), old_logprob.flatten()
    loss, stats = policy_loss_from_logprobs(
        logprobs, advantages.reshape(1, -1), old, objective=objective_of(objective, **parameters),
        importance_weights=rho_weights.reshape(1, -1), **options,
    )  # fmt: skip
    units = stats.num_tokens if aggregation == "token_mean" else stats.num_sequences
    policy = loss.detach() * count / units.clamp(min=1)
    if ref_logprobs is not None and args.beta:
        estimator, weighting = KL[args.kl_estimator]
        kl, _ = policy_loss_from_logprobs(
            logprobs, torch.zeros_like(logprobs)[None], old, objective=PPO(), ref_logprobs=ref_logprobs.flatten(),
            beta=args.beta, kl_estimator=estimator, kl_weighting=weighting, **options,
        )  # fmt: skip
        loss = loss + kl
    shape = new_logprobs.shape
    clipped = (stats.clipped_low | stats.clipped_high).view(shape) & (rho_weights != 0)
    return Loss(loss, policy.expand(shape), clipped.to(loss.dtype), stats.log_ratio.exp().view(shape))
