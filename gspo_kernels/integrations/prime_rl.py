"""A loss for prime-rl's `CustomLossConfig`, one sample at a time.

    [trainer.loss]
    type = "custom"
    import_path = "gspo_kernels.integrations.prime_rl.policy_loss"
    kwargs = { objective = "gspo", eps_low = 3e-4, eps_high = 4e-4 }

See docs/prime-rl.md.
"""

from __future__ import annotations

from typing import Any

import torch

from ..base import checks
from ..losses.from_logits import policy_loss_from_logprobs
from .objectives import objective_of

__all__ = ["policy_loss"]


def policy_loss(
    inputs: Any,
    *,
    objective: str = "gspo",
    tokens_per_response: float | None = None,
    adv_tau: float = 1.0,
    kl_tau: float = 0.0,
    **parameters: Any,
) -> Any:
    """The loss of one sample, a sum over its tokens: prime-rl divides it by the tokens of all samples, ranks and
    micro-batches of the step. No host sync.

    Args:
        inputs: prime-rl's LossInputs, arrays [tokens] of one sample, its prompt included: `trainer_logprobs`
            (differentiable, float32), `inference_logprobs` (the old log-probabilities), `advantages`, `loss_mask`, and
            `loss_weights`, factors of each token's loss or None. `ref_logprobs` are not read.
        objective: a name of `gspo_kernels.integrations.objectives`.
        tokens_per_response: None: each token counts once. A number c: each sample counts as c tokens, whatever its
            length. With S samples and N tokens in the step the loss is then c S / N times the mean over samples of
            their means over tokens, the paper's.
        adv_tau, kl_tau: as in prime-rl's default loss: a factor of the advantages, and the weight of the squared
            log-ratio of each token.
        parameters: of the objective, such as `eps_low` and `eps_high`.

    Returns: LossOutputs: the loss, and metrics under the names of prime-rl's default loss.

    Raises: ValueError, TypeError: naming the argument, what was expected and what came.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    logprobs, old_logprobs, mask = inputs.trainer_logprobs, inputs.inference_logprobs, inputs.loss_mask
    weights = inputs.loss_weights
    aggregation, normalizer = "token_mean", 1.0
    if tokens_per_response is not None:
        count = checks.number("tokens_per_response", tokens_per_response, "the tokens that a sample counts as", above=0)
        aggregation, normalizer = "sequence_mean", 1.0 / count
    loss, stats = policy_loss_from_logprobs(
        logprobs[None], adv_tau * inputs.advantages[None], old_logprobs[None],
        objective=objective_of(objective, **parameters), mask=mask[None],
        importance_weights=None if weights is None else weights[None], aggregation=aggregation, normalizer=normalizer,
    )  # fmt: skip
    if checks.number("kl_tau", kl_tau, "the weight of the squared log-ratio", at_least=0.0):
        log_ratio = torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)
        squares = log_ratio**2 if weights is None else log_ratio**2 * torch.where(mask, weights, 0.0)
        penalty = kl_tau * squares.sum()
        if tokens_per_response is not None:
            penalty = penalty * tokens_per_response / mask.sum().clamp(min=1)
        loss = loss + penalty
    metrics = {
        "is_masked": stats.clip_fraction,
        "is_masked_low": stats.clip_fraction_low,
        "is_masked_high": stats.clip_fraction_high,
        "importance_ratio": stats.ratio_mean,
    }
    return LossOutputs(loss=loss, metrics=metrics)
