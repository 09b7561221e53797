"""The truth of the suite: every formula in float64, as plain Python loops written straight from the papers.

GSPO and GSPO-token: arXiv 2507.18071. GRPO, its group advantage and the k3 estimator: arXiv 2402.03300.
PPO: arXiv 1707.06347. The others name theirs. Nothing here comes from the package under test, and nothing is
vectorised: lists in, lists out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def of_model(outputs: Floats, logit_scale: float = 1.0, softcap: float | None = None) -> list[float]:
    """The logits that a model makes of its head's outputs: c tanh(s x / c), or s x where it has no cap."""
    if softcap is None:
        return [logit_scale * x for x in outputs]
    return [softcap * math.tanh(logit_scale * x / softcap) for x in outputs]


def of_model_slope(outputs: Floats, logit_scale: float = 1.0, softcap: float | None = None) -> list[float]:
    """The derivative of each by its output: s / cosh^2(s x / c), or s."""
    if softcap is None:
        return [logit_scale] * len(outputs)
    decays = [math.exp(-2.0 * abs(logit_scale * x / softcap)) for x in outputs]
    return [logit_scale * 4.0 * e / (1.0 + e) ** 2 for e in decays]


def of_kept(logits: Floats, columns: Rows | None) -> list[float]:
    """The logits of which the columns that a sampler kept are the softmax (2512.02556, section 3.1); None: all."""
    return [x if columns is None or v in columns else -math.inf for v, x in enumerate(logits)]


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
    """What a loss is told. Fields of the objective are read as attributes, too: `opt.eps_low`."""

    fields: Mapping[str, Any]
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_weighting: str = "none"
    entropy_coef: float = 0.0
    aggregation: str = "sequence_mean"
    normalizer: float | None = None
    max_log_ratio: float = 20.0

    def __getattr__(self, name: str) -> Any:
        if name in self.fields:
            return self.fields[name]
        raise AttributeError(name)


@dataclass(frozen=True)
class Sampled:
    """The unmasked tokens of one sequence."""

    r: Floats  # log-ratios; 0 on-policy
    logprobs: Floats
    rollout_logprobs: Floats  # of the engine; where it gave none, of the old policy; on-policy the current ones
    advantages: Floats
    share: Floats  # what a token counts for in the loss, importance weight included


@dataclass(frozen=True)
class Unit:
    """What has a ratio: a sequence in GSPO, a token elsewhere."""

    log_ratio: float
    ratio: float  # exp of it, at most exp(max_log_ratio)
    clipped_low: bool
    clipped_high: bool
    saturated: bool


@dataclass(frozen=True)
class Policy:
    """The policy term of one sequence, token by token, and its units (one per token, or one for all)."""

    terms: list[float]  # before shares
    gradient: list[float]  # dL/dl, shares included
    units: list[Unit]
    log_ratio_of_token: list[float]
    margin: float = math.inf  # how far the nearest decision is from going the other way
    ratio_is_constant: list[bool] | None = None  # where the ratio has no derivative though it is not saturated
    gradient_size: list[float] | None = None  # what an error of l is multiplied by in dL/dl; None: |gradient|
    loss_size: list[float] | None = None  # the same in the loss; None: |gradient|


def unit_of(log_ratio: float, opt: Options, low: bool = False, high: bool = False) -> Unit:
    saturated = log_ratio > opt.max_log_ratio
    ratio = math.exp(opt.max_log_ratio) if saturated else math.exp(log_ratio)
    return Unit(log_ratio, ratio, low, high, saturated)


def log_of_bound(bound: float) -> float:
    """The log-ratio at which a ratio meets this bound."""
    return math.log(bound) if bound > 0 else -math.inf


def nearest(x: float, *kinks: float) -> float:
    return min((abs(x - k) for k in kinks if math.isfinite(k)), default=math.inf)


def surrogate(log_ratio: float, advantage: float, opt: Options) -> tuple[float, float, Unit, float]:
    """-min(s A, clip(s) A), if A < 0 at most -dual_clip A; its derivative by log s; the unit; its margin."""
    plain = unit_of(log_ratio, opt)
    ratio, dual = plain.ratio, math.inf if opt.dual_clip is None else opt.dual_clip
    low = high = False
    bound = ratio
    if advantage > 0 and ratio > 1 + opt.eps_high:
        high, bound = True, 1 + opt.eps_high
    elif advantage < 0 and ratio < 1 - opt.eps_low:
        low, bound = True, 1 - opt.eps_low
    elif advantage < 0 and ratio > dual:
        high, bound = True, dual
    slope = 0.0 if low or high or plain.saturated or advantage == 0 else -ratio * advantage
    value = 0.0 if advantage == 0 else -bound * advantage
    kinks = (log_of_bound(1 - opt.eps_low), log_of_bound(1 + opt.eps_high), log_of_bound(dual), opt.max_log_ratio)
    return value, slope, unit_of(log_ratio, opt, low, high), nearest(log_ratio, *kinks)


def gspo(s: Sampled, opt: Options) -> Policy:
    """One ratio s = exp(mean r) and one advantage a sequence; dR/dl_t = 1/|y| for every token."""
    n = len(s.r)
    value, slope, unit, margin = surrogate(sum(s.r) / n, s.advantages[0], opt)
    total_share = math.fsum(s.share)
    return Policy([value] * n, [total_share * slope / n] * n, [unit], [unit.log_ratio] * n, margin)


def gspo_token(s: Sampled, opt: Options) -> Policy:
    """s_t = sg[s] pi/sg[pi]: the value of s, but the slope of a token's own ratio."""
    mean = sum(s.r) / len(s.r)
    outcome = [surrogate(mean, a, opt) for a in s.advantages]
    gradient = [k * slope for k, (_, slope, _, _) in zip(s.share, outcome, strict=True)]
    margin = min(o[3] for o in outcome)
    return Policy([o[0] for o in outcome], gradient, [o[2] for o in outcome], [mean] * len(s.r), margin)


def token_ratio(s: Sampled, opt: Options) -> Policy:
    """GRPO and PPO: every token has its own ratio exp r_t."""
    outcome = [surrogate(x, a, opt) for x, a in zip(s.r, s.advantages, strict=True)]
    gradient = [k * slope for k, (_, slope, _, _) in zip(s.share, outcome, strict=True)]
    margin = min(o[3] for o in outcome)
    return Policy([o[0] for o in outcome], gradient, [o[2] for o in outcome], list(s.r), margin)


def gmpo(s: Sampled, opt: Options) -> Policy:
    """The geometric mean of ratios that are clipped one by one, in the logarithm (arXiv 2507.20673)."""
    held, low, high = [], [], []
    for x, a in zip(s.r, s.advantages, strict=True):
        low.append(a < 0 and x < -opt.eps_low)
        high.append(a > 0 and x > opt.eps_high)
        held.append(-opt.eps_low if low[-1] else opt.eps_high if high[-1] else x)
    mean = sum(held) / len(held)
    units = [unit_of(mean, opt, *flags) for flags in zip(low, high, strict=True)]
    constant = [u.clipped_low or u.clipped_high for u in units]
    terms, gradient, size = [], [], []
    for k, a, unit, is_constant in zip(s.share, s.advantages, units, constant, strict=True):
        terms.append(-unit.ratio * a)
        gradient.append(0.0 if is_constant or unit.saturated or a == 0 else -k * unit.ratio * a)
        size.append(k * unit.ratio * abs(a))
    margin = min(nearest(mean, opt.max_log_ratio), *(nearest(x, -opt.eps_low, opt.eps_high) for x in s.r))
    return Policy(terms, gradient, units, [mean] * len(s.r), margin, constant, loss_size=size)


def sapo(s: Sampled, opt: Options) -> Policy:
    """(4 / tau) sigmoid(tau (w - 1)) in place of the ratio w (arXiv 2511.20347)."""
    units = [unit_of(x, opt) for x in s.r]
    terms, gradient, size, loss_size = [], [], [], []
    for k, a, unit in zip(s.share, s.advantages, units, strict=True):
        tau = opt.tau_pos if a > 0 else opt.tau_neg
        x = tau * (unit.ratio - 1)
        away = math.exp(-abs(x)) if abs(x) < 700 else 0.0
        gate = (1 if x > 0 else away) / (1 + away)
        slope = 4 * away / (1 + away) ** 2 * unit.ratio
        terms.append(-4 / tau * gate * a)
        gradient.append(0.0 if unit.saturated or a == 0 else -k * slope * a)
        size.append(abs(k * slope * a) * (1 + abs(x) + tau * unit.ratio))
        loss_size.append(abs(k * slope * a))
    margin = min(nearest(x, opt.max_log_ratio) for x in s.r)
    return Policy(terms, gradient, units, list(s.r), margin, gradient_size=size, loss_size=loss_size)


def weighted(s: Sampled, opt: Options, weights: Floats, moves: Floats, units: list[Unit], margin: float) -> Policy:
    """-w A l with a constant weight; `moves`: by how much the weight changes with the log-ratio that it has."""
    terms = [0.0 if a == 0 else -w * a * x for w, a, x in zip(weights, s.advantages, s.logprobs, strict=True)]
    gradient = [0.0 if a == 0 else -k * w * a for k, w, a in zip(s.share, weights, s.advantages, strict=True)]
    loss_size = [
        abs(k * a) * (w + m * abs(x))
        for k, a, w, m, x in zip(s.share, s.advantages, weights, moves, s.logprobs, strict=True)
    ]
    log_ratios = [u.log_ratio for u in units]
    return Policy(terms, gradient, units, log_ratios, margin, loss_size=loss_size)


def cispo(s: Sampled, opt: Options) -> Policy:
    """sg[clip(w, 1 - eps_low, 1 + eps_high)] A l (arXiv 2506.13585)."""
    weights, moves, units = [], [], []
    for x, a in zip(s.r, s.advantages, strict=True):
        ratio = unit_of(x, opt).ratio
        low, high = ratio < 1 - opt.eps_low, ratio > 1 + opt.eps_high
        weights.append(1 - opt.eps_low if low else 1 + opt.eps_high if high else ratio)
        moves.append(0.0 if low or high else ratio)
        units.append(unit_of(x, opt, low and a != 0, high and a != 0))
    kinks = (log_of_bound(1 - opt.eps_low), log_of_bound(1 + opt.eps_high), opt.max_log_ratio)
    return weighted(s, opt, weights, moves, units, min(nearest(x, *kinks) for x in s.r))


def tapered(s: Sampled, opt: Options, log_ratios: Floats) -> Policy:
    """Weight 1 for A > 0, sg[min(1, w)] for all others (arXiv 2503.14286, equation 8)."""
    weights, moves, units, margins = [], [], [], [math.inf]
    for x, a in zip(log_ratios, s.advantages, strict=True):
        ratio = unit_of(x, opt).ratio
        one = a > 0 or ratio > 1
        weights.append(1.0 if one and not math.isnan(x) else ratio)
        moves.append(0.0 if one else ratio)
        units.append(unit_of(x, opt, False, a < 0 and ratio > 1))
        margins.append(nearest(x, opt.max_log_ratio))
        if a < 0 and x != 0:
            margins.append(abs(x))
    return weighted(s, opt, weights, moves, units, min(margins))


def topr(s: Sampled, opt: Options) -> Policy:
    """The ratio is that of the whole response."""
    return tapered(s, opt, [sum(s.r)] * len(s.r))


def topr_token(s: Sampled, opt: Options) -> Policy:
    return tapered(s, opt, s.r)


def bernoulli_kl(q: float, p: float) -> float:
    """KL of "this token or another", from log-probabilities."""
    if q == p:
        return 0.0
    if p >= 0:
        return math.inf
    same = math.exp(q) * (q - p)
    return same if q >= 0 else same - math.expm1(q) * (math.log(-math.expm1(q)) - math.log(-math.expm1(p)))


def dppo(s: Sampled, opt: Options) -> Policy:
    """A token is dropped where its divergence exceeds delta, on the side that A pushes to (arXiv 2602.04879)."""
    usual = 0.15 if opt.divergence == "tv" else 0.05
    delta_low, delta_high = (usual if d is None else d for d in (opt.delta_low, opt.delta_high))
    most = math.inf if opt.max_ratio is None else opt.max_ratio
    weights, moves, units, margins = [], [], [], []
    for x, a, now, engine in zip(s.r, s.advantages, s.logprobs, s.rollout_logprobs, strict=True):
        p, q = min(now, 0.0), min(engine, 0.0)
        distance = abs(math.exp(p) - math.exp(q)) if opt.divergence == "tv" else bernoulli_kl(q, p)
        low, high = a < 0 and p < q and distance > delta_low, a > 0 and p > q and distance > delta_high
        ratio = min(unit_of(x, opt).ratio, most) if not math.isnan(x) else x
        weights.append(0.0 if low or high else ratio)
        moves.append(0.0 if low or high else ratio)
        units.append(unit_of(x, opt, low, high))
        margins.append(nearest(x, log_of_bound(most), opt.max_log_ratio))
        margins += [nearest(distance, delta_low)] * (a < 0) + [nearest(distance, delta_high)] * (a > 0)
    return weighted(s, opt, weights, moves, units, min(margins))


def dro(s: Sampled, opt: Options) -> Policy:
    """-(A l - penalty / 2 r^2) (Tinker's and verl's token form of arXiv 2405.19107)."""
    terms, gradient, gradient_size, loss_size = [], [], [], []
    bound = opt.max_log_ratio
    for x, a, now, k in zip(s.r, s.advantages, s.logprobs, s.share, strict=True):
        r = x if math.isnan(x) else max(-bound, min(bound, x))
        terms.append(opt.penalty / 2 * r * r - (0.0 if a == 0 else a * now))
        gradient.append(k * ((0.0 if abs(x) > bound else opt.penalty * r) - a))
        gradient_size.append(k * (abs(a) + opt.penalty * (1 + abs(r))))
        loss_size.append(k * (abs(a) + opt.penalty * abs(r)))
    margin = min(nearest(x, -bound, bound) for x in s.r)
    return Policy(terms, gradient, [unit_of(x, opt) for x in s.r], list(s.r), margin, None, gradient_size, loss_size)


@dataclass(frozen=True)
class Objective:
    policy: Callable[[Sampled, Options], Policy]
    fields: Mapping[str, Any]  # those of the class, with the paper's defaults
    aggregation: str
    per_sequence: bool = False  # the unit is the sequence
    of_tokens: bool = True  # each token has a ratio of its own
    is_surrogate: bool = False  # -min(s A, clip(s) A): where a ratio is clipped or saturated there is no gradient
    window: tuple[float, float] | None = None  # log-ratios about which tests place theirs; None: the clip range's

    def options(self, **changes: Any) -> Options:
        """Fields of other objectives are ignored."""
        common = {name: value for name, value in changes.items() if name in Options.__dataclass_fields__}
        own = {name: value for name, value in changes.items() if name in self.fields}
        return Options(**{"aggregation": self.aggregation, **common}, fields={**self.fields, **own})

    def edges(self, eps_low: float | None = None, eps_high: float | None = None) -> tuple[float, float]:
        if self.window is not None:
            return self.window
        low, high = self.fields["eps_low"] if eps_low is None else eps_low, eps_high
        return math.log1p(-low), math.log1p(self.fields["eps_high"] if high is None else high)


def clip(eps_low: float, eps_high: float) -> dict[str, Any]:
    return {"eps_low": eps_low, "eps_high": eps_high, "dual_clip": None}


OBJECTIVES = {
    "gspo": Objective(gspo, clip(3e-4, 4e-4), "sequence_mean", True, of_tokens=False, is_surrogate=True),
    "gspo_token": Objective(gspo_token, clip(3e-4, 4e-4), "sequence_mean", of_tokens=False, is_surrogate=True),
    "grpo": Objective(token_ratio, clip(0.2, 0.27), "sequence_mean", is_surrogate=True),
    "ppo": Objective(token_ratio, clip(0.2, 0.2), "token_mean", is_surrogate=True),
    "gmpo": Objective(gmpo, {"eps_low": 0.4, "eps_high": 0.4}, "sequence_mean", window=(-0.4, 0.4)),
    "sapo": Objective(sapo, {"tau_pos": 1.0, "tau_neg": 1.05}, "sequence_mean", window=(-0.5, 0.5)),
    "cispo": Objective(cispo, {"eps_low": 1.0, "eps_high": 4.0}, "token_mean", window=(-0.7, math.log(5))),
    "topr": Objective(topr, {}, "sequence_sum", of_tokens=False, window=(-0.5, 0.5)),
    "topr_token": Objective(topr_token, {}, "token_mean", window=(-0.5, 0.5)),
    "dppo": Objective(
        dppo, {"delta_low": None, "delta_high": None, "max_ratio": 10.0, "divergence": "tv"}, "token_mean",
        window=(-0.3, 0.3),
    ),
    "dro": Objective(dro, {"penalty": 0.05}, "token_mean", window=(-0.5, 0.5)),
}  # fmt: skip


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
    clipped_low: list[bool]  # by sequence or by token as log_ratio; False where masked or empty
    clipped_high: list[bool]
    loss_size: float  # sum of the absolute terms of the loss
    d_logprobs_size: list[float]  # by token, the absolute parts of dL/dl before they cancel: per error of l
    loss_slope: list[float]  # by token, by how much an error of l changes the loss at most
    margin: float  # how far the nearest decision of the objective is from going the other way


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
    rollout_logprobs: Floats | None = None,
    group_tokens: Floats | None = None,
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
    if opt.aggregation == "group_mean":
        assert group_tokens is not None
        count = math.fsum(len(rows) / g for rows, g in zip(kept, group_tokens, strict=True) if rows)
    if opt.normalizer is not None:
        count = opt.normalizer

    d_logprobs, d_entropy, size, loss_slope = ([0.0] * n_rows for _ in range(4))
    margin = math.inf
    token_log_ratio, sequence_log_ratio = [0.0] * n_rows, [0.0] * len(kept)
    units: list[Unit] = []
    token_clipped, sequence_clipped = [(False, False)] * n_rows, [(False, False)] * len(kept)
    parts: list[float] = []  # summands of the loss
    approx_kl: list[float] = []
    ref_kl: list[float] = []
    bound = opt.max_log_ratio
    for i, rows in enumerate(kept):
        if not rows:
            continue
        share = 1 / (count * len(rows)) if opt.aggregation == "sequence_mean" else 1 / count
        if opt.aggregation == "group_mean":
            assert group_tokens is not None
            share = 1 / (count * group_tokens[i])
        r = [0.0] * len(rows)
        if old_logprobs is not None:
            exact = [logprobs[t] - old_logprobs[t] for _, t in rows]
            r = [x if math.isnan(x) else max(-LARGEST_LOG_RATIO, min(LARGEST_LOG_RATIO, x)) for x in exact]
        weighted = [share * (1.0 if weights is None else weights[i][j]) for j, _ in rows]
        of_sequence = [advantages[i][j] for j, _ in rows]
        now = [logprobs[t] for _, t in rows]
        engine = old_logprobs if rollout_logprobs is None else rollout_logprobs
        sampled = Sampled(r, now, now if engine is None else [engine[t] for _, t in rows], of_sequence, weighted)
        policy = OBJECTIVES[objective].policy(sampled, opt)
        units += policy.units
        margin = min(margin, policy.margin)
        sequence_log_ratio[i] = policy.units[0].log_ratio
        sequence_clipped[i] = policy.units[0].clipped_low, policy.units[0].clipped_high
        if not OBJECTIVES[objective].per_sequence:
            for (_, t), unit in zip(rows, policy.units, strict=True):
                token_clipped[t] = unit.clipped_low, unit.clipped_high
        gradient_size = policy.gradient_size or [abs(slope) for slope in policy.gradient]
        loss_size = policy.loss_size or [abs(slope) for slope in policy.gradient]
        for j, (_, t) in enumerate(rows):
            parts.append(weighted[j] * policy.terms[j])
            d_logprobs[t] += policy.gradient[j]
            size[t] += gradient_size[j]
            loss_slope[t] += loss_size[j]
            x = max(-bound, min(bound, r[j]))
            approx_kl.append(math.expm1(x) - x)
        for (_, t), x in zip(rows, policy.log_ratio_of_token, strict=True):
            token_log_ratio[t] = x
        kls = [(0.0, 0.0) if ref_logprobs is None else kl_and_slope(logprobs[t], ref_logprobs[t], opt) for _, t in rows]
        mean_kl = math.fsum(kl for kl, _ in kls) / len(rows)
        for j, (_, t) in enumerate(rows):
            if ref_logprobs is not None:
                kl, slope = kls[j]
                ratio, of_ratio = 1.0, 0.0  # the ratio, and the derivative of (ratio x KL) by l through the ratio
                if opt.kl_weighting == "ratio":
                    unit = policy.units[0 if OBJECTIVES[objective].per_sequence else j]
                    constant = unit.saturated or (policy.ratio_is_constant or [False] * len(rows))[j]
                    ratio = unit.ratio
                    if not constant:  # of a sequence's ratio, all its tokens have a part
                        of_ratio = ratio * (mean_kl if OBJECTIVES[objective].per_sequence else kl)
                ref_kl.append(ratio * kl)
                parts.append(share * opt.beta * ratio * kl)
                d_logprobs[t] += share * opt.beta * (ratio * slope + of_ratio)
                error = abs(share * opt.beta) * (ratio * (1 + abs(slope)) + 2 * abs(of_ratio))
                size[t] += error
                loss_slope[t] += error
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
    clipped = sequence_clipped if by_sequence else token_clipped
    return Result(
        loss=math.fsum(parts),
        d_logprobs=d_logprobs,
        d_entropy=d_entropy,
        stats=stats,
        log_ratio=sequence_log_ratio if by_sequence else token_log_ratio,
        log_ratio_by_sequence=by_sequence,
        clipped_low=[low for low, _ in clipped],
        clipped_high=[high for _, high in clipped],
        loss_size=math.fsum(abs(x) for x in parts),
        d_logprobs_size=size,
        loss_slope=loss_slope,
        margin=margin,
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
