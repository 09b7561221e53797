"""Losses of trainers that have no package to install, written from their sources; float64, nothing of ours.

    PrimeIntellect-ai/prime-rl 559b44772e47, src/prime_rl/trainer/rl/loss.py
    NVIDIA-NeMo/RL 7ea279abfbeb, nemo_rl/algorithms/loss/loss_functions.py, nemo_rl/algorithms/utils.py
    allenai/open-instruct e6c3044aa620, open_instruct/grpo_utils.py, grpo_fast.py, rl_utils.py

Each was compared once with the source at that commit: the pages of the trainers say with what result. Values at masked
positions have to be finite here, because these trainers multiply by their masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# --- prime-rl: one sample, [tokens]; the sum over its tokens ----------------------------------------------------------


def prime_rl_default(
    logprobs: Tensor,
    sampled: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
) -> Tensor:
    """DPPO by probabilities: a token that has moved too far, to the side of its advantage, loses its policy term."""
    total = logprobs.new_zeros(())
    for t in range(len(logprobs)):
        if not mask[t]:
            continue
        moved = float((logprobs[t].exp() - sampled[t].exp()).detach())
        dropped = moved > high if advantages[t] > 0 else moved < -low
        log_ratio = logprobs[t] - sampled[t]
        loss = kl_tau * log_ratio**2
        if not dropped:
            loss = loss - adv_tau * advantages[t] * log_ratio.exp()
        total = total + (loss if weights is None else weights[t] * loss)
    return total


def prime_rl_step(losses: Sequence[Tensor], tokens: int) -> Tensor:
    """`compute_loss` of one micro-batch; `tokens`: of all ranks and micro-batches, at least 1."""
    return sum(losses, torch.zeros((), dtype=torch.float64)) / max(tokens, 1)


# --- NeMo-RL: a micro-batch [B, T], its columns those of the tokens that are predicted --------------------------------


def nemo_mean(values: Tensor, mask: Tensor, dim: int | None = None, count: float | None = None) -> Tensor:
    return (values * mask).sum(dim) / ((mask.sum(dim) if count is None else count) + 1e-8)


def nemo_kl(logprobs: Tensor, ref: Tensor, kind: str, weights: Tensor, most: float) -> Tensor:
    """`most`: the clamp of the log-ratio. The estimate has its default one, 10."""
    raw = ref - logprobs
    d = raw.clamp(-most, most)
    weights = torch.where(raw == d, weights, weights.detach())
    estimate = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - 1 - d}[kind]
    return (weights * estimate).clamp(-10, 10)


def nemo_rl_loss(
    logprobs: Tensor,
    prev: Tensor,
    sampled: Tensor,
    ref: Tensor,
    advantages: Tensor,
    token_mask: Tensor,
    sample_mask: Tensor,
    responses: float,
    tokens: float,
    cfg: dict[str, object],
) -> Tensor:
    """The loss alone. `cfg`: ClippedPGLossConfig's names."""

    def option(name: str, default: object = None) -> object:
        return cfg.get(name, default)

    low, high, bound = (option(f"ratio_clip_{x}", d) for x, d in (("min", 0.2), ("max", 0.2), ("c", None)))
    by_sequence, forced = option("sequence_level_importance_ratios"), option("force_on_policy_ratio")
    mask = token_mask * sample_mask[:, None]
    prev = logprobs.detach() if forced else prev

    def reduce(values: Tensor) -> Tensor:
        if option("token_level_loss", True):
            return nemo_mean(values, mask, count=tokens)
        return nemo_mean(nemo_mean(values, token_mask, dim=-1), sample_mask, count=responses)

    log_ratio = logprobs - prev
    ratio = log_ratio.exp()
    if by_sequence and not forced:
        ratio = nemo_mean(log_ratio, token_mask, dim=-1)[:, None].exp().expand_as(logprobs)
    clamped = ratio if forced else ratio.clamp(1 - low, 1 + high)  # type: ignore[operator]
    if option("disable_ppo_ratio") and not forced:
        ratio = clamped = logprobs
    if option("use_cispo"):
        loss = -advantages * clamped.detach() * logprobs
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * clamped)
    if bound is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * bound), loss)  # type: ignore[operator]

    if option("use_importance_sampling_correction"):
        diff = prev - sampled
        weights = (diff * mask).sum(-1, keepdim=True).exp() if by_sequence else diff.exp()
        weights = weights.detach().nan_to_num(0.0, 0.0, 0.0)
        kind, most = option("truncated_importance_sampling_type"), option("truncated_importance_sampling_ratio")
        least = option("truncated_importance_sampling_ratio_min")
        if kind == "tis":
            weights = weights.clamp(least or 0.0, most)  # type: ignore[call-overload]
        elif kind == "icepop":
            weights = torch.where((weights >= least) & (weights <= most), weights, 0.0)  # type: ignore[operator]
        elif kind == "seq-mask-tis":
            mean = nemo_mean(diff, token_mask, dim=-1).exp()[:, None]
            weights = torch.where((mean >= least) & (mean <= most), weights, 0.0)  # type: ignore[operator]
        loss = weights * loss
    total = reduce(loss)
    penalty = option("reference_policy_kl_penalty", 0.01)
    if penalty and not option("use_kl_in_reward"):
        base = sampled if option("use_on_policy_kl_approximation") else logprobs.detach()
        weights = (logprobs - base).exp().nan_to_num(0.0, 0.0, 0.0)
        kind, most = str(option("reference_policy_kl_type", "k3")), float(option("kl_input_clamp_value", 20.0))  # type: ignore[arg-type]
        total = total + penalty * reduce(nemo_kl(logprobs, ref, kind, weights, most))  # type: ignore[operator]
    return total


# --- open-instruct: a micro-batch [B, T] ------------------------------------------------------------------------------


def open_instruct_loss(
    logprobs: Tensor,
    old: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    rho: Tensor,
    denominator: float,
    *,
    loss_fn: str = "dapo",
    clip_lower: float = 0.2,
    clip_higher: float = 0.272,
    beta: float = 0.05,
    kl_estimator: int = 2,
) -> Tensor:
    """`compute_grpo_loss`, the KL term and `masked_mean`."""
    ratio = (logprobs - old).exp()
    if loss_fn == "dapo":
        policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_lower, 1 + clip_higher))
    else:
        policy = -advantages * ratio.detach().clamp(max=1 + clip_higher) * logprobs
    loss = policy * rho
    if ref is not None:
        d = (logprobs - ref).clamp(-40, 40)
        loss = loss + beta * (d, d**2 / 2, torch.expm1(-d) + d, ratio * d)[kl_estimator]
    return torch.where(mask, loss, 0.0).sum() / denominator if denominator > 0 else torch.zeros(())
