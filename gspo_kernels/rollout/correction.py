"""The trainer's log-probabilities against the rollout engine's: correction weights, and how far apart they are.

An engine (vLLM, SGLang) samples with kernels of its own, so its log-probabilities are not those that the trainer
computes with the same weights. With r_t = logprob - rollout_logprob of a token, exp r is the importance weight from one
to the other. Everything here is a constant: no gradient, no host sync.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..agreement import Together
from ..collectives import gather, ranks_of
from ..layout import BatchShape, Layout, batch_shape
from ..losses.objectives import GSPO, clipped_surrogate
from ..losses.token_stage import FINITE
from ..scalars import run_time

LEVELS = ("token", "sequence_sum", "sequence_mean")
MODES = ("truncate", "mask")


@dataclass(frozen=True)
class RolloutWeightStats:
    """0-d float32 tensors. A unit is what has a weight: a token, or a sequence with an unmasked token.

    The weights as they are before `lower` and `upper` are what tells how far the engines are apart; `applied_mean` is
    what multiplies the loss. The mean of nothing is 0.
    """

    weight_mean: Tensor  # before the bounds
    weight_min: Tensor
    weight_max: Tensor
    below_fraction: Tensor  # share of units below `lower`: raised to it, or weight 0
    above_fraction: Tensor  # share of units above `upper`: lowered to it, or weight 0
    saturated_fraction: Tensor  # share of units whose |log weight| exceeded max_log_ratio
    effective_fraction: Tensor  # before the bounds, (sum w)^2 / (n sum w^2): Kish's effective sample size over n
    applied_mean: Tensor  # after the bounds

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}


class RolloutWeights(NamedTuple):
    """Correction weights, and what they were before their bounds; it unpacks as `weights, stats = ...`."""

    weights: (
        Tensor  # token layout, or [sequences]: what the losses take as `importance_weights`; 0 where masked or empty
    )
    stats: RolloutWeightStats


@dataclass(frozen=True)
class RolloutMismatch:
    """0-d float32 tensors. Masked tokens and empty sequences are not counted; the mean of nothing is 0."""

    kl_k1: Tensor  # KL(rollout || trainer) in nats a token, mean of -r: unbiased, may be negative
    kl_k3: Tensor  # the same, mean of exp(r) - 1 - r: never negative
    token_ratio_mean: Tensor  # of exp r_t
    token_ratio_min: Tensor
    token_ratio_max: Tensor
    token_effective_fraction: Tensor  # (sum w)^2 / (n sum w^2) of w = exp r_t over tokens, in (0, 1]
    sequence_ratio_mean: Tensor  # of exp mean_t r_t, GSPO's ratio
    sequence_ratio_min: Tensor
    sequence_ratio_max: Tensor
    sequence_effective_fraction: (
        Tensor  # of w = exp sum_t r_t over sequences: what level="sequence_sum" has to live with
    )
    saturated_fraction: Tensor  # share of tokens with |r_t| above max_log_ratio, counted at that bound
    noise: Tensor  # standard deviation in nats of a token's log-probability that `flip_fraction` was taken with
    clip_fraction: Tensor  # share of sequences that GSPO clips
    flip_fraction: Tensor  # share of sequences that it may as well decide the other way: noise reaches the clip edge
    num_sequences: Tensor  # with at least one unmasked token
    num_tokens: Tensor  # unmasked

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The scalars by name, ready for a logger."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}


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

    and then, on a bound being within it,

        "truncate":  min(max(w, lower), upper)      truncated importance sampling (Ionides 2008; TIS)
        "mask":      w where lower <= w <= upper, and 0 elsewhere (MIS, IcePop)

    The defaults are verl's `rollout_is: token` and `rollout_is_threshold: 2.0`; TRL's `vllm_importance_sampling_mode`
    "sequence_mask" is `level="sequence_sum", mode="mask", upper=3.0`. Where `rollout_logprobs` themselves are the
    loss's `old_logprobs`, its ratio makes up for the difference already: do not weigh a second time.

    Args:
        logprobs: [B, T] or packed [N], float32 or float64: of the policy that sampled, computed by the trainer
            (`token_logprobs` before the first update), which are the loss's `old_logprobs`.
        rollout_logprobs: same shape and dtypes: what the engine returned (see `from_vllm`, `from_sglang`), at the
            temperature that `logprobs` were taken at.
        mask: one per token, True (or 1) where it counts. What stands at masked positions, NaN included, has no effect.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N. Wrong ones are refused, or give NaN, as in
            `policy_loss`. Weights by token do not depend on them: where wrong ones cannot be read, they change nothing.
        level: "token", "sequence_sum" or "sequence_mean".
        mode: "truncate" or "mask". A weight of 0 takes the policy term away and leaves the count that the loss is
            divided by; `mask & (weights > 0)` as the loss's mask takes it from both.
        lower: bound of the weight itself, from 0 to 1; None: none.
        upper: bound of the weight itself, at least 1; None: none.
        max_log_ratio: the logarithm of a weight is brought into +-max_log_ratio before exp, at most 80.
        cp_group: the ranks over which the tokens of each sequence are shared out, as in `policy_loss`: sums, means and
            the statistics are those of all ranks. One collective of two numbers a sequence unless the level is "token",
            and one for the statistics.

    Returns:
        `RolloutWeights(weights, stats)`: weights in the token layout, or [sequences] (for a packed batch with as many
            tokens as sequences see `policy_loss`: `weights[None]` are per token), in the dtype of `logprobs`, and
        statistics of the weights before the bounds. NaN log-probabilities of unmasked tokens are not hidden.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    cp = ranks_of("cp_group", cp_group)
    with Together(logprobs, cp, name="logprobs") as together:
        batch, new, rollout, max_log_ratio = _inputs(logprobs, rollout_logprobs, mask, cu_seqlens, max_log_ratio, cp)
        checks.choice("level", level, LEVELS)
        checks.choice("mode", mode, MODES)
        lower, upper = _bounds(lower, upper)
        if together.asks:
            bounds = {"lower": str(lower), "upper": str(upper)}
            together.same(cp, level=level, mode=mode, **bounds, **_shared(batch, max_log_ratio))
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

    sums, least, most = _over_ranks(
        layout, [total(x) for x in (counted, raw, raw.square(), applied, below, above, saturated)], [(raw, counted)]
    )
    n, weight, square, after, low, high, at_bound = sums
    per_unit = n.clamp(min=1)
    stats = RolloutWeightStats(
        *_as_float32(
            weight / per_unit, least[0], most[0], low / per_unit, high / per_unit, at_bound / per_unit,
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
    """How far the rollout engine's log-probabilities are from the trainer's, and what that does to GSPO's clipping.

    `r_t = logprobs - rollout_logprobs` over unmasked tokens, which the engine sampled, so that mean(-r) and
    mean(exp(r) - 1 - r) estimate KL(rollout || trainer) (http://joschu.net/blog/kl-approx.html, k1 and k3).

    GSPO with the engine's log-probabilities as its old ones decides by `R_i = mean_t r_t` against `log(1 + eps_high)`,
    or `log(1 - eps_low)` where the advantage is negative. Errors of `noise` nats a token, independent of each other,
    move R_i by `noise / sqrt(|y_i|)`: `flip_fraction` is the share of sequences that are clipped at one end of
    `R_i +- noise / sqrt(|y_i|)` and not at the other. With `logprobs` of the very policy that sampled, `clip_fraction`
    is the share that would be clipped though nothing has been learnt.

    Args:
        logprobs: [B, T] or packed [N], float32 or float64: the trainer's, of the policy that sampled; or the current
            ones, to see the decisions as they are taken.
        rollout_logprobs: same shape and dtypes, what the engine returned.
        advantages: one per sequence, whose sign says which edge counts; 0 has no decision. None: either edge counts.
        mask, cu_seqlens, max_log_ratio, cp_group: as in `rollout_weights`. With cp_group one collective of two numbers
            a sequence, and two for the scalars.
        eps_low, eps_high: the clip range, of the ratio around 1; GSPO's.
        noise: standard deviation of the error of one token's log-probability, in nats. None: the root mean square of r,
            which is noise where both are of one policy; once the policy has moved, pass what was measured before.

    Returns: `RolloutMismatch`, scalars of the batch (under `cp_group` of all ranks). No host sync.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    cp = ranks_of("cp_group", cp_group)
    with Together(logprobs, cp, name="logprobs") as together:
        batch, new, rollout, max_log_ratio = _inputs(logprobs, rollout_logprobs, mask, cu_seqlens, max_log_ratio, cp)
        eps_low = checks.number("eps_low", eps_low, "the clip range below 1", at_least=0.0)
        eps_high = checks.number("eps_high", eps_high, "the clip range above 1", at_least=0.0)
        if noise is not None:
            noise = checks.number("noise", noise, "a standard deviation in nats", at_least=0.0)
        if advantages is not None:
            checks.tensor("advantages", advantages, "one advantage per sequence, or None")
            advantages = batch.per_sequence("advantages", advantages, "advantages")
        if together.asks:
            given = {"advantages (0: None, 1: given)": int(advantages is not None), **_shared(batch, max_log_ratio)}
            together.same(cp, eps_low=eps_low, eps_high=eps_high, noise=str(noise), **given)
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

    sums, least, most = _over_ranks(
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
            ratios / per_token, least[0], most[0], _effective(tokens, ratios, ratio_squares),
            s_sum / per_sequence, least[1], most[1], _effective(sequences, w_sum, w_squares),
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


def _shared(batch: BatchShape, max_log_ratio: float) -> dict[str, float]:
    """What all ranks of a context-parallel group have alike, whatever the function."""
    return {
        "cu_seqlens (how many sequences, or rows of a padded batch)": batch.sequences,
        "max_log_ratio": max_log_ratio,
    }


def _difference(layout: Layout, logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """[tokens] float64, r_t; finite for infinite log-probabilities, 0 where masked."""
    new, rollout = (layout.of_tokens(x).clamp(-FINITE, FINITE) for x in (logprobs, rollout_logprobs))
    return new - rollout


def _saturate(log_ratio: Tensor, max_log_ratio: float) -> tuple[Tensor, Tensor]:
    """Within +-max_log_ratio, and where it was not."""
    bound = run_time(max_log_ratio, log_ratio.device)
    return log_ratio.clamp(-bound, bound), log_ratio.abs() > bound


def _clipped(log_ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float, max_log_ratio: float) -> Tensor:
    """Whether GSPO holds a sequence at a bound: the losses' own decision."""
    terms = clipped_surrogate(
        log_ratio, advantages, eps_low=eps_low, eps_high=eps_high, dual_clip=None,
        max_log_ratio=run_time(max_log_ratio, log_ratio.device),
    )  # fmt: skip
    assert terms.clipped_low is not None and terms.clipped_high is not None
    return terms.clipped_low | terms.clipped_high


def _effective(count: Tensor, weights: Tensor, squares: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2); 0 of nothing, and NaN of a count that is."""
    return torch.where(count == 0, 0.0, weights.square() / (count.clamp(min=1) * torch.where(count == 0, 1.0, squares)))


def _over_ranks(
    layout: Layout, sums: list[Tensor], of_units: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The sums, and of each (values, counted) the least and the largest, 0 of none; of all ranks, by one collective."""

    def none_or(values: Tensor, counted: Tensor, none: float) -> Tensor:
        return torch.cat([torch.where(counted, values, none), values.new_full((1,), none)])

    least = [none_or(values, counted, torch.inf).amin() for values, counted in of_units]
    most = [none_or(values, counted, -torch.inf).amax() for values, counted in of_units]
    found = torch.stack([*sums, *least, *most])
    a, b = len(sums), len(sums) + len(least)
    if layout.ranks is not None:
        of_ranks = gather(found, layout.ranks)
        found = torch.cat([of_ranks[:, :a].sum(0), of_ranks[:, a:b].amin(0), of_ranks[:, b:].amax(0)])
    values = list(torch.where(found.isinf(), 0.0, found).unbind())
    return values[:a], values[a:b], values[b:]


def _as_float32(*values: Tensor) -> tuple[Tensor, ...]:
    return torch.stack(values).float().unbind()
