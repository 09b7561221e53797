"""The trainer's log-probabilities against the rollout engine's: correction weights and mismatch diagnostics.

An engine (vLLM, SGLang) samples with its own kernels, so its log-probabilities differ from those that the trainer
computes from the same parameters. With r_t = logprob - rollout_logprob of a token, exp r_t is the importance weight
from the engine's policy to the trainer's. Results are constants, without gradient. No function here syncs the host.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.agreement import Agreement
from ..base.collectives import gather, ranks_of
from ..base.layout import BatchShape, Layout, batch_shape
from ..base.scalars import FINITE, run_time
from ..losses.clipped import GSPO, clipped_surrogate

LEVELS = ("token", "sequence_sum", "sequence_mean")
MODES = ("truncate", "mask")


@dataclass(frozen=True)
class _Scalars:
    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class RolloutWeightStats(_Scalars):
    """0-d float32 tensors. A unit is what has one weight: a token, or a sequence with an unmasked token.

    Statistics of the weights before `lower` and `upper` show how far the engine is from the trainer; `applied_mean` is
    the mean of the weights that multiply the loss. The mean of no units is 0.
    """

    weight_mean: Tensor  # before the bounds
    weight_min: Tensor
    weight_max: Tensor
    below_fraction: Tensor  # share of units below `lower`: raised to it, or weight 0
    above_fraction: Tensor  # share of units above `upper`: lowered to it, or weight 0
    saturated_fraction: Tensor  # share of units whose |log weight| exceeded max_log_ratio
    effective_fraction: Tensor  # before the bounds, (sum w)^2 / (n sum w^2): Kish's effective sample size over n
    applied_mean: Tensor  # after the bounds


class RolloutWeights(NamedTuple):
    """Correction weights, and what they were before their bounds; it unpacks as `weights, stats = ...`."""

    weights: Tensor  # per token or [sequences], for the losses' `importance_weights`; 0 where masked or empty
    stats: RolloutWeightStats


@dataclass(frozen=True)
class RolloutMismatch(_Scalars):
    """0-d float32 tensors. Masked tokens and empty sequences are not counted; the mean of no units is 0."""

    kl_k1: Tensor  # KL(rollout || trainer) in nats per token, mean of -r: unbiased, may be negative
    kl_k3: Tensor  # the same, mean of exp(r) - 1 - r: never negative
    token_ratio_mean: Tensor  # of exp r_t
    token_ratio_min: Tensor
    token_ratio_max: Tensor
    token_effective_fraction: Tensor  # (sum w)^2 / (n sum w^2) of w = exp r_t over tokens, in (0, 1]
    sequence_ratio_mean: Tensor  # of exp mean_t r_t, GSPO's ratio
    sequence_ratio_min: Tensor
    sequence_ratio_max: Tensor
    sequence_effective_fraction: Tensor  # of w = exp sum_t r_t over sequences, the weights of level="sequence_sum"
    saturated_fraction: Tensor  # share of tokens with |r_t| above max_log_ratio, which are clamped to it
    noise: Tensor  # standard deviation in nats of a token's log-probability, as `flip_fraction` assumes it
    clip_fraction: Tensor  # share of sequences that GSPO clips
    flip_fraction: Tensor  # share of sequences close enough to the clip edge for noise to change the decision
    num_sequences: Tensor  # with at least one unmasked token
    num_tokens: Tensor  # unmasked


@torch.no_grad()
def rollout_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    mode: str = "truncate",
    lower: float | None = None,
    upper: float | None = 2.0,
    max_log_ratio: float = 20.0,
    cp_group: Any = None,
) -> RolloutWeights:
    """Importance weights from the rollout engine's policy to the trainer's, for the losses' `importance_weights`.

    With `r_t = logprobs - rollout_logprobs`, over unmasked tokens:

        "token":          w_t = exp r_t
        "sequence_sum":   w_i = exp sum_t r_t       the importance weight of a response; decays with its length
        "sequence_mean":  w_i = exp mean_t r_t      the geometric mean of the token's weights, as in GSPO's ratio

    and then, where a weight on a bound counts as within it,

        "truncate":  min(max(w, lower), upper)      truncated importance sampling (Ionides 2008; TIS)
        "mask":      w where lower <= w <= upper, and 0 elsewhere (MIS, IcePop)

    The defaults are verl's `rollout_is: token` and `rollout_is_threshold: 2.0`; TRL's `vllm_importance_sampling_mode`
    "sequence_mask" is `level="sequence_sum", mode="mask", upper=3.0`. Where `rollout_logprobs` themselves are the
    loss's `old_logprobs`, its ratio already corrects the difference: do not weight a second time.

    Args:
        logprobs: [B, T] or packed [N], float32 or float64: log-probabilities under the policy that sampled, computed by
            the trainer (`token_logprobs` before the first update). They are also the loss's `old_logprobs`.
        rollout_logprobs: same shape and dtypes: what the engine returned (see `from_vllm`, `from_sglang`), at the same
            temperature as `logprobs`.
        mask: one per token, True (or 1) where it counts. Values at masked positions, NaN included, have no effect.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N. Wrong ones are refused, or give NaN, as in
            `policy_loss`. Weights per token do not depend on them: wrong ones that cannot be read have no effect there.
        level: "token", "sequence_sum" or "sequence_mean".
        mode: "truncate" or "mask". A weight of 0 removes the policy term; its unit still counts in the loss's divisor.
            Pass `mask & (weights > 0)` as the loss's mask to remove it from both.
        lower: bound of the weight itself, from 0 to 1; None: none.
        upper: bound of the weight itself, at least 1; None: none.
        max_log_ratio: the logarithm of a weight is clamped to +-max_log_ratio before exp; at most 80.
        cp_group: the ranks that share the tokens of each sequence, as in `policy_loss`: sums, means and statistics are
            those of all ranks. One collective of two numbers per sequence unless the level is "token", and one for the
            statistics.

    Returns:
        `RolloutWeights(weights, stats)`: weights per token or [sequences], in the dtype of `logprobs`, and statistics.
        For a packed batch with as many tokens as sequences, pass `weights[None]` to say that they are per token. NaN
        log-probabilities of unmasked tokens give NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    cp = ranks_of("cp_group", cp_group)
    with Agreement("logprobs", logprobs, cp=cp) as agreement:
        batch, new, rollout, max_log_ratio = _inputs(logprobs, rollout_logprobs, mask, cu_seqlens, max_log_ratio, cp)
        checks.choice("level", level, LEVELS)
        checks.choice("mode", mode, MODES)
        lower, upper = _bounds(lower, upper)
        if agreement.active:
            options = {"level": level, "mode": mode, "lower": lower, "upper": upper}
            agreement.same(options | _equal_on_ranks(batch, max_log_ratio))
    layout = batch.layout()
    log_ratio = _difference(layout, new, rollout)
    if level == "token":
        counted, share = layout.mask, layout.mask.double()
    else:
        log_ratio = layout.sum(log_ratio) if level == "sequence_sum" else layout.mean(log_ratio)
        counted, share = layout.held, layout.share()
    log_weight, saturated = _saturate(log_ratio, max_log_ratio)
    raw = torch.where(counted, log_weight.exp(), 0.0)

    never = torch.zeros_like(counted)
    below = never if lower is None else counted & (raw < run_time(lower, raw.device))
    above = never if upper is None else counted & (raw > run_time(upper, raw.device))
    applied = raw
    for outside, bound in ((below, lower), (above, upper)):
        if bound is not None:
            applied = torch.where(outside, run_time(bound, raw.device) if mode == "truncate" else 0.0, applied)

    def total(values: Tensor) -> Tensor:
        return torch.where(counted, values.double() * share, 0.0).sum()

    sums, lowest, highest = _over_ranks(
        layout, [total(x) for x in (counted, raw, raw.square(), applied, below, above, saturated)], [(raw, counted)]
    )
    n, weight, square, after, low, high, at_bound = sums
    per_unit = n.clamp(min=1)
    stats = RolloutWeightStats(
        *_as_float32(
            weight / per_unit, lowest[0], highest[0], low / per_unit, high / per_unit, at_bound / per_unit,
            _effective(n, weight, square), after / per_unit,
        )
    )  # fmt: skip
    weights = applied.to(logprobs.dtype)
    return RolloutWeights(weights.reshape(layout.shape) if level == "token" else weights, stats)


@torch.no_grad()
def rollout_mismatch(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps_low: float = GSPO.eps_low,
    eps_high: float = GSPO.eps_high,
    noise: float | None = None,
    max_log_ratio: float = 20.0,
    cp_group: Any = None,
) -> RolloutMismatch:
    """How far the rollout engine's log-probabilities are from the trainer's, and how that affects GSPO's clipping.

    `r_t = logprobs - rollout_logprobs` over unmasked tokens. The engine sampled these tokens, so mean(-r) and
    mean(exp(r) - 1 - r) estimate KL(rollout || trainer) (http://joschu.net/blog/kl-approx.html, k1 and k3).

    GSPO with the engine's log-probabilities as `old_logprobs` compares `R_i = mean_t r_t` with `log(1 + eps_high)`, or
    with `log(1 - eps_low)` where the advantage is negative. Independent errors of `noise` nats per token shift R_i by
    `noise / sqrt(|y_i|)`: `flip_fraction` is the share of sequences that are clipped at one end of
    `R_i +- noise / sqrt(|y_i|)` and not at the other. If `logprobs` are those of the policy that sampled,
    `clip_fraction` is the share that would be clipped before any update.

    Args:
        logprobs: [B, T] or packed [N], float32 or float64: the trainer's, under the policy that sampled; or under the
            current policy, to see the loss's decisions.
        rollout_logprobs: same shape and dtypes, what the engine returned.
        advantages: one per sequence. The sign selects the clip bound, and 0 is never clipped. None: both bounds apply.
        mask, cu_seqlens, max_log_ratio, cp_group: as in `rollout_weights`. With cp_group there is one collective of two
            numbers per sequence, and two for the scalars.
        eps_low, eps_high: the clip range, of the ratio around 1; GSPO's.
        noise: standard deviation of the error of one token's log-probability, in nats. None: the root mean square of r,
            which is noise where both are of one policy. After updates, pass the value measured before them.

    Returns: `RolloutMismatch`, scalars of the batch (of all ranks with `cp_group`). No host sync.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    cp = ranks_of("cp_group", cp_group)
    with Agreement("logprobs", logprobs, cp=cp) as agreement:
        batch, new, rollout, max_log_ratio = _inputs(logprobs, rollout_logprobs, mask, cu_seqlens, max_log_ratio, cp)
        eps_low = checks.number("eps_low", eps_low, "the clip range below 1", at_least=0.0)
        eps_high = checks.number("eps_high", eps_high, "the clip range above 1", at_least=0.0)
        if noise is not None:
            noise = checks.number("noise", noise, "a standard deviation in nats", at_least=0.0)
        if advantages is not None:
            checks.tensor("advantages", advantages, "one advantage per sequence, or None")
            advantages = batch.per_sequence("advantages", advantages, "advantages")
        if agreement.active:
            given = "None" if advantages is None else "given"
            options = {"eps_low": eps_low, "eps_high": eps_high, "noise": noise, "advantages": given}
            agreement.same(options | _equal_on_ranks(batch, max_log_ratio))
    layout = batch.layout()
    exact = _difference(layout, new, rollout)
    r, token_saturated = _saturate(exact, max_log_ratio)
    summed = layout.sum(exact)
    lengths = layout.lengths.clamp(min=1)
    log_weight, log_s = (_saturate(x, max_log_ratio)[0] for x in (summed, summed / lengths))
    held, share = layout.held, layout.share()
    w, ratio, s = torch.where(held, log_weight.exp(), 0.0), r.exp(), torch.where(held, log_s.exp(), 0.0)

    def by_token(values: Tensor) -> Tensor:
        return layout.select(values.double()).sum()

    def by_sequence(values: Tensor) -> Tensor:
        return torch.where(held, values.double() * share, 0.0).sum()

    sums, lowest, highest = _over_ranks(
        layout,
        [by_token(x) for x in (layout.mask, r, torch.expm1(r) - r, ratio, ratio.square(), r.square(), token_saturated)]
        + [by_sequence(x) for x in (held, s, w, w.square())],
        [(ratio, layout.mask), (s, held)],
    )
    tokens, r_sum, k3, ratios, ratio_squares, r_squares, saturated, sequences, s_sum, w_sum, w_squares = sums
    per_token, per_sequence = tokens.clamp(min=1), sequences.clamp(min=1)
    deviation = (r_squares / per_token).sqrt() if noise is None else run_time(noise, r.device)

    reach = deviation / lengths.sqrt()
    clipped, flips = torch.zeros_like(held), torch.zeros_like(held)
    ones = torch.ones_like(log_s)
    for a in (ones, -ones) if advantages is None else (layout.of_sequences(advantages),):
        here, down, up = (
            _clipped(x, a, eps_low, eps_high, max_log_ratio) for x in (log_s, log_s - reach, log_s + reach)
        )
        clipped, flips = clipped | here, flips | (down != up)
    (clipped_sum, flip_sum), _, _ = _over_ranks(layout, [by_sequence(clipped), by_sequence(flips)], [])
    return RolloutMismatch(
        *_as_float32(
            -r_sum / per_token, k3 / per_token,
            ratios / per_token, lowest[0], highest[0], _effective(tokens, ratios, ratio_squares),
            s_sum / per_sequence, lowest[1], highest[1], _effective(sequences, w_sum, w_squares),
            saturated / per_token, deviation, clipped_sum / per_sequence, flip_sum / per_sequence, sequences, tokens,
        )
    )  # fmt: skip


def _inputs(
    logprobs: Any, rollout_logprobs: Any, mask: Any, cu_seqlens: Any, max_log_ratio: Any, ranks: Any
) -> tuple[BatchShape, Tensor, Tensor, float]:
    checks.digits("logprobs", checks.tensor("logprobs", logprobs, "the trainer's log-probabilities per token"))
    if logprobs.ndim not in (1, 2):
        raise ValueError(f"logprobs: expected [sequences, tokens] or, packed, [tokens]; got {list(logprobs.shape)}")
    batch = batch_shape(logprobs.shape, mask, cu_seqlens, logprobs.device, ranks)
    checks.log_probabilities("logprobs", logprobs, batch.mask)
    rollout = batch.log_probabilities("rollout_logprobs", rollout_logprobs, "the engine's log-probabilities")
    # e^80 still fits fp32, in which the weights are reported.
    bound = checks.number("max_log_ratio", max_log_ratio, "where a log-ratio saturates", above=0.0, at_most=80.0)
    return batch, logprobs, rollout, bound


def _bounds(lower: Any, upper: Any) -> tuple[float | None, float | None]:
    meaning = "a bound of the weight itself, not of its distance from 1"
    if lower is not None:
        lower = checks.number("lower", lower, meaning, at_least=0.0)
        if lower > 1:
            raise ValueError(f"lower: expected a bound of the weight that 1 is not below; got {lower}")
    return lower, None if upper is None else checks.number("upper", upper, meaning, at_least=1.0)


def _equal_on_ranks(batch: BatchShape, max_log_ratio: float) -> dict[str, Any]:
    """Values that must be equal on all ranks of a context-parallel group, for both functions."""
    return {
        "cu_seqlens (how many sequences, or rows of a padded batch)": batch.sequences,
        "max_log_ratio": max_log_ratio,
    }


def _difference(layout: Layout, logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """[tokens] float64, r_t; finite for infinite log-probabilities, 0 where masked."""
    new, rollout = (layout.of_tokens(x).clamp(-FINITE, FINITE) for x in (logprobs, rollout_logprobs))
    return new - rollout


def _saturate(log_ratio: Tensor, max_log_ratio: float) -> tuple[Tensor, Tensor]:
    """(clamped to +-max_log_ratio, where clamping changed it)."""
    bound = run_time(max_log_ratio, log_ratio.device)
    return log_ratio.clamp(-bound, bound), log_ratio.abs() > bound


def _clipped(log_ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float, max_log_ratio: float) -> Tensor:
    """Whether GSPO clips a sequence, by the function that the losses use."""
    terms = clipped_surrogate(
        log_ratio, advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=None,
        max_log_ratio=run_time(max_log_ratio, log_ratio.device),
    )  # fmt: skip
    assert terms.clipped_low is not None and terms.clipped_high is not None
    return terms.clipped_low | terms.clipped_high


def _effective(count: Tensor, weights: Tensor, squares: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2); 0 where the count is 0, NaN where it is NaN."""
    return torch.where(count == 0, 0.0, weights.square() / (count.clamp(min=1) * torch.where(count == 0, 1.0, squares)))


def _over_ranks(
    layout: Layout, sums: list[Tensor], of_units: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Sums, minima and maxima over all ranks, in one collective; each (values, counted) has a minimum and a maximum.

    The minimum and the maximum of no units are 0.
    """

    def filled(values: Tensor, counted: Tensor, empty: float) -> Tensor:
        return torch.cat([torch.where(counted, values, empty), values.new_full((1,), empty)])

    minima = [filled(values, counted, torch.inf).amin() for values, counted in of_units]
    maxima = [filled(values, counted, -torch.inf).amax() for values, counted in of_units]
    local = torch.stack([*sums, *minima, *maxima])
    parts = [len(sums), len(minima), len(maxima)]
    if layout.ranks is not None:
        sums_of, minima_of, maxima_of = gather(local, layout.ranks).split(parts, dim=1)
        local = torch.cat([sums_of.sum(0), minima_of.amin(0), maxima_of.amax(0)])
    total, low, high = torch.where(local.isinf(), 0.0, local).split(parts)
    return list(total.unbind()), list(low.unbind()), list(high.unbind())


def _as_float32(*values: Tensor) -> tuple[Tensor, ...]:
    return torch.stack(values).float().unbind()
