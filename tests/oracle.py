"""The truth of the suite: every formula in float64, as plain Python loops written straight from the papers.

GSPO and GSPO-token: arXiv 2507.18071. GRPO, its group advantage and the k3 estimator: arXiv 2402.03300.
PPO: arXiv 1707.06347. Nothing here comes from the package under test, and nothing is vectorised: lists in, lists out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Floats = Sequence[float]
Rows = Sequence[int]

LARGEST_LOG_RATIO = 1e30  # a token's log-ratio is brought into +-this before any sum, so inf - inf never happens


# --- one row of logits --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The statistics of one row: l = z_y - lse, H = sum_v p_v (lse - z_v), for z = logits / temperature."""

    logprob: float
    entropy: float
    lse: float


def below_peak(logits: Floats, temperature: float) -> tuple[list[float], float]:
    """(z_v - z_peak for every v, lse - z_peak): relative to the peak a confident row keeps its small numbers."""
    peak = max(range(len(logits)), key=lambda v: logits[v])
    d = [(x - logits[peak]) / temperature for x in logits]
    return d, math.log1p(math.fsum(math.exp(d[v]) for v in range(len(d)) if v != peak))


def has_distribution(logits: Floats) -> bool:
    return not any(math.isnan(x) or x == math.inf for x in logits) and max(logits) > -math.inf


def row_statistics(logits: Floats, target: int, temperature: float = 1.0) -> Row:
    if not has_distribution(logits):
        return Row(math.nan, math.nan, -math.inf if all(x == -math.inf for x in logits) else math.nan)
    d, log_sum = below_peak(logits, temperature)
    entropy = math.fsum(math.exp(x - log_sum) * (log_sum - x) for x in d if x > -math.inf)
    return Row(d[target] - log_sum, entropy, max(logits) / temperature + log_sum)


def row_gradient(
    logits: Floats, target: int, temperature: float, g_logprob: float, g_entropy: float = 0.0, g_lse: float = 0.0
) -> list[float]:
    """dL/dlogits of one row, from dL/dl, dL/dH and dL/dlse."""
    if g_logprob == 0 and g_entropy == 0 and g_lse == 0:
        return [0.0] * len(logits)
    if not has_distribution(logits):
        return [math.nan] * len(logits)
    d, log_sum = below_peak(logits, temperature)
    entropy = row_statistics(logits, target, temperature).entropy if g_entropy else 0.0
    gradient = []
    for v, x in enumerate(d):
        logp = x - log_sum
        p = math.exp(logp)
        g = -math.expm1(logp) * g_logprob if v == target else -p * g_logprob  # 1 - p without cancellation
        g += p * g_lse
        if g_entropy and p > 0:
            g -= p * (logp + entropy) * g_entropy
        gradient.append(g / temperature)
    return gradient


# --- what an objective does with one sequence: log-ratios, log-probabilities, advantages, shares of the loss ------


@dataclass(frozen=True)
class Options:
    eps_low: float
    eps_high: float
    dual_clip: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    normalizer: float | None = None
    max_log_ratio: float = 20.0


@dataclass(frozen=True)
class Unit:
    """What clips as one: a sequence in GSPO, a token elsewhere."""

    log_ratio: float
    ratio: float
    clipped_low: bool
    clipped_high: bool
    saturated: bool


@dataclass(frozen=True)
class Policy:
    """The policy term of one sequence: each token's term, its share of dL/dl, and the units."""

    terms: list[float]
    gradient: list[float]
    units: list[Unit]
    log_ratio_of_token: list[float]


def surrogate(log_ratio: float, advantage: float, opt: Options) -> tuple[float, float, Unit]:
    """-min(s A, clip(s) A), if A < 0 at most -dual_clip A; its derivative by log s; and what happened to the unit."""
    saturated = log_ratio > opt.max_log_ratio
    ratio = math.exp(opt.max_log_ratio) if saturated else math.exp(log_ratio)
    low = high = False
    if advantage > 0 and ratio > 1 + opt.eps_high:
        high, bound = True, 1 + opt.eps_high
    elif advantage < 0 and ratio < 1 - opt.eps_low:
        low, bound = True, 1 - opt.eps_low
    elif advantage < 0 and opt.dual_clip is not None and ratio > opt.dual_clip:
        high, bound = True, opt.dual_clip
    else:
        bound = ratio
    slope = 0.0 if low or high or saturated or advantage == 0 else -ratio * advantage
    value = 0.0 if advantage == 0 else -bound * advantage
    return value, slope, Unit(log_ratio, ratio, low, high, saturated)


def gspo(r: Floats, logprobs: Floats, advantages: Floats, share: Floats, opt: Options) -> Policy:
    """One ratio s = exp(mean r) and one advantage a sequence; dR/dl_t = 1/|y| for every token."""
    n = len(r)
    value, slope, unit = surrogate(sum(r) / n, advantages[0], opt)
    total_share = math.fsum(share)
    return Policy([value] * n, [total_share * slope / n] * n, [unit], [unit.log_ratio] * n)


def gspo_token(r: Floats, logprobs: Floats, advantages: Floats, share: Floats, opt: Options) -> Policy:
    """s_t = sg[s] pi/sg[pi]: the value of s, but the slope of a token's own ratio."""
    mean = sum(r) / len(r)
    outcome = [surrogate(mean, a, opt) for a in advantages]
    gradient = [k * slope for k, (_, slope, _) in zip(share, outcome, strict=True)]
    return Policy([o[0] for o in outcome], gradient, [o[2] for o in outcome], [mean] * len(r))


def token_ratio(r: Floats, logprobs: Floats, advantages: Floats, share: Floats, opt: Options) -> Policy:
    """GRPO and PPO: every token has its own ratio exp r_t."""
    outcome = [surrogate(x, a, opt) for x, a in zip(r, advantages, strict=True)]
    gradient = [k * slope for k, (_, slope, _) in zip(share, outcome, strict=True)]
    return Policy([o[0] for o in outcome], gradient, [o[2] for o in outcome], list(r))


@dataclass(frozen=True)
class Objective:
    policy: Callable[[Floats, Floats, Floats, Floats, Options], Policy]
    eps_low: float
    eps_high: float
    aggregation: str
    per_sequence: bool  # the unit is the sequence
    of_tokens: bool = False  # each token has a ratio of its own
    is_surrogate: bool = True  # -min(s A, clip(s) A): where a ratio is clipped or saturated there is no gradient

    def options(self, **changes: object) -> Options:
        defaults = {"eps_low": self.eps_low, "eps_high": self.eps_high, "aggregation": self.aggregation}
        return Options(**{**defaults, **changes})  # type: ignore[arg-type]


OBJECTIVES = {
    "gspo": Objective(gspo, 3e-4, 4e-4, "sequence_mean", True),
    "gspo_token": Objective(gspo_token, 3e-4, 4e-4, "sequence_mean", False),
    "grpo": Objective(token_ratio, 0.2, 0.27, "sequence_mean", False, of_tokens=True),
    "ppo": Objective(token_ratio, 0.2, 0.2, "token_mean", False, of_tokens=True),
}


# --- a batch ------------------------------------------------------------------------------------------------------


def kl_and_slope(logprob: float, ref: float, opt: Options) -> tuple[float, float]:
    """The estimator of KL(pi || ref) at one token, and its derivative by l."""
    d = ref - logprob
    clamped = abs(d) > opt.max_log_ratio
    d = max(-opt.max_log_ratio, min(opt.max_log_ratio, d))
    value, slope = {
        "k1": (-d, 1.0),
        "k2": (d * d / 2, -d),
        "k3": (math.expm1(d) - d, -math.expm1(d)),
    }[opt.kl_estimator]
    return value, 0.0 if clamped else slope


@dataclass(frozen=True)
class Result:
    """loss, dL/dl and dL/dH by token, the stats; and the sums of absolute parts that an error is measured against."""

    loss: float
    d_logprobs: list[float]
    d_entropy: list[float]
    stats: dict[str, float]
    log_ratio: list[float]  # by sequence for gspo, by token else; 0 where masked or empty
    log_ratio_by_sequence: bool
    loss_size: float  # sum of the absolute terms of the loss
    d_logprobs_size: list[float]  # by token, the absolute parts of dL/dl before they cancel


def evaluate(
    objective: str,
    sequences: Sequence[Rows],
    mask: Sequence[bool],
    logprobs: Floats,
    advantages: Sequence[Floats],
    opt: Options,
    *,
    old_logprobs: Floats | None = None,
    ref_logprobs: Floats | None = None,
    weights: Sequence[Floats] | None = None,
    entropy: Floats | None = None,
) -> Result:
    """`sequences[i]` are the row numbers of sequence i; `advantages[i][j]`, `weights[i][j]` belong to its j-th row.

    Masked rows are dropped at once: no number of theirs is looked at.
    """
    n_rows = len(mask)
    kept = [[(j, t) for j, t in enumerate(rows) if mask[t]] for rows in sequences]
    n_sequences = sum(1 for rows in kept if rows)
    n_tokens = sum(len(rows) for rows in kept)
    count: float = n_tokens if opt.aggregation == "token_mean" else n_sequences
    if opt.normalizer is not None:
        count = opt.normalizer

    d_logprobs, d_entropy, size = [0.0] * n_rows, [0.0] * n_rows, [0.0] * n_rows
    token_log_ratio, sequence_log_ratio = [0.0] * n_rows, [0.0] * len(kept)
    units: list[Unit] = []
    parts: list[float] = []  # summands of the loss
    approx_kl: list[float] = []
    ref_kl: list[float] = []
    bound = opt.max_log_ratio
    for i, rows in enumerate(kept):
        if not rows:
            continue
        share = 1 / (count * len(rows)) if opt.aggregation == "sequence_mean" else 1 / count
        r = [0.0] * len(rows)
        if old_logprobs is not None:
            exact = [logprobs[t] - old_logprobs[t] for _, t in rows]
            r = [x if math.isnan(x) else max(-LARGEST_LOG_RATIO, min(LARGEST_LOG_RATIO, x)) for x in exact]
        weighted = [share * (1.0 if weights is None else weights[i][j]) for j, _ in rows]
        of_sequence = [advantages[i][j] for j, _ in rows]
        policy = OBJECTIVES[objective].policy(r, [logprobs[t] for _, t in rows], of_sequence, weighted, opt)
        units += policy.units
        sequence_log_ratio[i] = policy.units[0].log_ratio
        for (_, t), k, term, slope, x in zip(rows, weighted, policy.terms, policy.gradient, r, strict=True):
            parts.append(k * term)
            d_logprobs[t] += slope
            size[t] += abs(slope)
            x = max(-bound, min(bound, x))
            approx_kl.append(math.expm1(x) - x)
        for (_, t), x in zip(rows, policy.log_ratio_of_token, strict=True):
            token_log_ratio[t] = x
        for _, t in rows:
            if ref_logprobs is not None:
                kl, slope = kl_and_slope(logprobs[t], ref_logprobs[t], opt)
                ref_kl.append(kl)
                parts.append(share * opt.beta * kl)
                d_logprobs[t] += share * opt.beta * slope
                size[t] += abs(share * opt.beta) * (1 + abs(slope))
            if opt.entropy_coef:
                assert entropy is not None
                parts.append(-share * opt.entropy_coef * entropy[t])
                d_entropy[t] = -share * opt.entropy_coef

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values) if values else 0.0

    clipped_low = mean([float(u.clipped_low) for u in units])
    clipped_high = mean([float(u.clipped_high) for u in units])
    stats = {
        "clip_fraction": clipped_low + clipped_high,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "ratio_mean": mean([u.ratio for u in units]),
        "ratio_min": min((u.ratio for u in units), default=0.0),
        "ratio_max": max((u.ratio for u in units), default=0.0),
        "approx_kl": mean(approx_kl),
        "ref_kl": mean(ref_kl),
        "entropy": 0.0 if entropy is None else mean([entropy[t] for rows in kept for _, t in rows]),
        "saturated_fraction": mean([float(u.saturated) for u in units]),
        "num_sequences": float(n_sequences),
        "num_tokens": float(n_tokens),
    }
    by_sequence = OBJECTIVES[objective].per_sequence
    return Result(
        loss=math.fsum(parts),
        d_logprobs=d_logprobs,
        d_entropy=d_entropy,
        stats=stats,
        log_ratio=sequence_log_ratio if by_sequence else token_log_ratio,
        log_ratio_by_sequence=by_sequence,
        loss_size=math.fsum(abs(x) for x in parts),
        d_logprobs_size=size,
    )


def group_advantages(rewards: Floats, groups: Sequence[int], normalize: str = "std", eps: float = 1e-6) -> list[float]:
    """(reward - mean of its group) / (sample deviation of its group + eps); exactly 0 where the group is all equal."""
    advantages = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [x for x, g in zip(rewards, groups, strict=True) if g == group]
        if all(x == members[0] for x in members):
            advantages.append(0.0)
            continue
        mean = math.fsum(members) / len(members)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in members) / (len(members) - 1))
        advantages.append((reward - mean) / (deviation + eps) if normalize == "std" else reward - mean)
    return advantages


# --- PPO: advantages from a value model, the value model's loss, and what pairs with the losses -------------------


def gae(
    rewards: Floats, values: Floats, sequences: Sequence[Rows], mask: Sequence[bool], last_values: Floats,
    gamma: float, lam: float,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """arXiv 1506.02438: A_t = delta_t + gamma lam A_t', delta_t = r_t + gamma V_t' - V_t; returns A_t + V_t.

    Masked rows are dropped first, so that t' is the row after t. After the last one there is `last_values`.
    """
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for rows, next_value in zip(sequences, last_values, strict=True):
        next_advantage = 0.0
        for t in reversed([t for t in rows if mask[t]]):
            delta = rewards[t] + gamma * next_value - values[t]
            next_advantage = delta + gamma * lam * next_advantage
            next_value = values[t]
            advantages[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages, returns


def response_advantages(
    rewards: Floats, groups: Sequence[int], baseline: str, normalize: str, eps: float = 1e-6
) -> list[float]:
    """GRPO (2402.03300), RLOO (2402.14740), REINFORCE++ (2501.03262), the group's maximum (2503.19595).

    A NaN reward is no reward: it is dropped before anything else, and its advantage is 0.
    """
    there = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    everything = [rewards[i] for i in there]
    found: dict[int, float] = {}
    for i in there:
        others = [rewards[j] for j in there if groups[j] == groups[i] and j != i]
        group = [rewards[i], *others]
        if baseline == "mean":
            found[i] = rewards[i] - math.fsum(group) / len(group)
        elif baseline == "leave_one_out":
            found[i] = rewards[i] - math.fsum(others) / len(others) if others else 0.0
        elif baseline == "leave_one_out_max":
            found[i] = max(group) - max(others) if others else 0.0
        else:
            found[i] = rewards[i] - math.fsum(everything) / len(everything)
        if len(set(everything if baseline == "batch_mean" else group)) == 1:
            found[i] = 0.0
    divisors = dict.fromkeys(there, 1.0)
    for i in there:
        if normalize == "std":
            divisors[i] = sample_deviation([rewards[j] for j in there if groups[j] == groups[i]]) + eps
        elif normalize == "batch_std":
            divisors[i] = sample_deviation(list(found.values())) + eps
    return [found[i] / divisors[i] if i in found else 0.0 for i in range(len(rewards))]


def sample_deviation(values: Floats) -> float:
    """With n - 1; 0 for a single value."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1))


def whitened(values: Floats, eps: float) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [(x - mean) / (sample_deviation(values) + eps) for x in values]


@dataclass(frozen=True)
class ValueResult:
    loss: float
    gradient: list[float]  # dL/dvalue by row
    stats: dict[str, float]


def value_loss(
    values: Floats, returns: Floats, old_values: Floats | None, sequences: Sequence[Rows], mask: Sequence[bool], *,
    clip_range: float | None = 0.2, aggregation: str = "token_mean", normalizer: float | None = None,
) -> ValueResult:  # fmt: skip
    """1/2 max((V - R)^2, (clip(V, old - c, old + c) - R)^2): PPO in OpenAI Baselines (ppo2), and verl."""
    kept = [[t for t in rows if mask[t]] for rows in sequences]
    tokens = [t for rows in kept for t in rows]
    count: float = len(tokens) if aggregation == "token_mean" else sum(1 for rows in kept if rows)
    count = count if normalizer is None else normalizer
    parts, gradient, clipped = [], [0.0] * len(mask), []
    for rows in kept:
        for t in rows:
            share = 1 / (count * len(rows)) if aggregation == "sequence_mean" else 1 / count
            error = values[t] - returns[t]
            square, slope = error**2, error
            is_clipped = False
            if old_values is not None and clip_range is not None:
                held = max(old_values[t] - clip_range, min(old_values[t] + clip_range, values[t]))
                is_clipped = held != values[t] and (held - returns[t]) ** 2 > square
                if is_clipped:
                    square, slope = (held - returns[t]) ** 2, 0.0
            parts.append(share * square / 2)
            gradient[t] = share * slope
            clipped.append(float(is_clipped))

    def mean(numbers: Sequence[float]) -> float:
        return math.fsum(numbers) / len(numbers) if numbers else 0.0

    def variance(numbers: Sequence[float]) -> float:
        return mean([(x - mean(numbers)) ** 2 for x in numbers])

    of_returns = [returns[t] for t in tokens]
    errors = [values[t] - returns[t] for t in tokens]
    stats = {
        "clip_fraction": mean(clipped),
        "value_mean": mean([values[t] for t in tokens]),
        "return_mean": mean(of_returns),
        "squared_error": mean([x * x for x in errors]),
        "explained_variance": 1 - variance(errors) / variance(of_returns) if len(set(of_returns)) > 1 else 0.0,
        "num_tokens": float(len(tokens)),
    }
    return ValueResult(math.fsum(parts), gradient, stats)
