"""Correction weights and mismatch of a rollout, against plain Python written from the definitions.

The truth: truncated importance sampling (Ionides 2008), Kish's effective sample size, the k1 and k3 estimators
(http://joschu.net/blog/kl-approx.html), GSPO's clip decision (arXiv 2507.18071). Nothing of the package is in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from batches import from_padded, to_padded
from modes import DEFAULT_MODE, NOT_INTERPRETED, on_device
from test_errors import check_message
from torch import Tensor

import gspo_kernels
from gspo_kernels import policy_loss_from_logprobs, rollout_mismatch, rollout_weights

pytestmark = NOT_INTERPRETED

LEVELS = ["token", "sequence_sum", "sequence_mean"]
LAYOUTS = ["packed", "padded"]
by_layout = pytest.mark.parametrize("layout", LAYOUTS)
BOUNDS: list[tuple[float | None, float | None]] = [(None, 2.0), (0.5, 1.25), (0.9, None), (None, None), (1.0, 1.0)]

Options = dict[str, Any]


# --- the truth --------------------------------------------------------------------------------------------------------


class Case:
    """Log-probabilities of ragged sequences by token, and the mask."""

    def __init__(
        self, new: Sequence[float], rollout: Sequence[float], mask: Sequence[bool], lengths: Sequence[int]
    ) -> None:
        self.new, self.rollout, self.mask, self.lengths = list(new), list(rollout), list(mask), list(lengths)
        ends = [0, *itertools.accumulate(lengths)]
        self.sequences = [[t for t in range(a, b) if mask[t]] for a, b in itertools.pairwise(ends)]
        self.advantages = [(-1.5, 0.5, 0.0, 2.0, -0.25)[i % 5] for i in range(len(lengths))]


def ratio_logs(case: Case, wrong: str) -> dict[int, float]:
    """r_t of the unmasked tokens."""
    tokens = range(len(case.mask)) if wrong == "masked tokens count" else [t for s in case.sequences for t in s]
    found = {}
    for t in tokens:
        a, b = (max(-1e30, min(1e30, x)) for x in (case.new[t], case.rollout[t]))
        found[t] = b - a if wrong == "rollout over trainer" else a - b
    return found


def effective(weights: Sequence[float]) -> float:
    squares = math.fsum(w * w for w in weights)
    return math.fsum(weights) ** 2 / (len(weights) * squares) if squares else 0.0


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def true_weights(
    case: Case,
    level: str,
    mode: str,
    lower: float | None,
    upper: float | None,
    max_log_ratio: float = 20.0,
    wrong: str = "",
) -> tuple[list[float], dict[str, float]]:
    """Weights by token or sequence (0 where masked or empty), and the statistics."""
    r = ratio_logs(case, wrong)
    if level == "token":
        indices, logs = list(r), list(r.values())
    else:
        indices = [i for i, s in enumerate(case.sequences) if s]
        sums = [math.fsum(r[t] for t in case.sequences[i]) for i in indices]
        counts = [
            case.lengths[i] if wrong == "padding in the length" else len(case.sequences[i]) for i in indices
        ]  # fmt: skip
        by_mean = (level == "sequence_mean") != (wrong == "sum for mean")
        logs = [x / n for x, n in zip(sums, counts, strict=True)] if by_mean else sums
    bound = math.inf if wrong == "never saturated" else max_log_ratio
    raw = [math.exp(min(700.0, max(-bound, min(bound, x)))) for x in logs]
    low, high = -math.inf if lower is None else lower, math.inf if upper is None else upper
    if wrong == "only the upper bound":
        low = -math.inf
    if (mode == "mask") != (wrong == "truncate for mask"):
        applied = [w if low <= w <= high else 0.0 for w in raw]
    else:
        applied = [min(max(w, low), high) for w in raw]
    reported = applied if wrong == "statistics after the bounds" else raw
    stats = {
        "weight_mean": mean(reported),
        "weight_min": min(reported, default=0.0),
        "weight_max": max(reported, default=0.0),
        "below_fraction": mean([float(w < low) for w in raw]),
        "above_fraction": mean([float(w > high) for w in raw]),
        "saturated_fraction": mean([float(abs(x) > max_log_ratio) for x in logs]),
        "effective_fraction": effective(reported),
        "applied_mean": mean(applied),
    }
    weights = [0.0] * (len(case.mask) if level == "token" else len(case.sequences))
    for index, w in zip(indices, applied, strict=True):
        weights[index] = w
    return weights, stats


def clips(log_s: float, advantage: float, eps_low: float, eps_high: float) -> bool:
    deviation = math.expm1(log_s)
    return (advantage > 0 and deviation > eps_high) or (advantage < 0 and deviation < -eps_low)


def true_mismatch(
    case: Case,
    *,
    with_advantages: bool = True,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    noise: float | None = None,
    max_log_ratio: float = 20.0,
    wrong: str = "",
) -> dict[str, float]:
    r = ratio_logs(case, wrong)
    within = {t: max(-max_log_ratio, min(max_log_ratio, x)) for t, x in r.items()}
    ratios = [math.exp(x) for x in within.values()]
    if noise is None:
        noise = math.sqrt(mean([x * x for x in within.values()]))
    s, products, clipped, flips = [], [], [], []
    for i, tokens in enumerate(case.sequences):
        if not tokens:
            continue
        total = math.fsum(r[t] for t in tokens)
        log_s, log_w = (max(-max_log_ratio, min(max_log_ratio, x)) for x in (total / len(tokens), total))
        s.append(math.exp(log_s))
        products.append(math.exp(log_s if wrong == "sum for mean" else log_w))
        reach = noise if wrong == "noise not averaged" else noise / math.sqrt(len(tokens))
        if wrong == "noise averaged as a bias":
            reach = noise / len(tokens)
        signs = [case.advantages[i]] if with_advantages else [1.0, -1.0]
        if wrong == "every sign":
            signs = [1.0, -1.0]
        edges = (eps_low, eps_high)
        if wrong == "edges exchanged":
            edges = (eps_high, eps_low)
        clipped.append(any(clips(log_s, a, *edges) for a in signs))
        flips.append(any(clips(log_s - reach, a, *edges) != clips(log_s + reach, a, *edges) for a in signs))
    sign = -1.0 if wrong == "k1 of the other sign" else 1.0
    k3 = [math.expm1(-x) + x if wrong == "k3 of the other ratio" else math.expm1(x) - x for x in within.values()]
    return {
        "kl_k1": -sign * mean(list(within.values())),
        "kl_k3": mean(k3),
        "token_ratio_mean": mean(ratios),
        "token_ratio_min": min(ratios, default=0.0),
        "token_ratio_max": max(ratios, default=0.0),
        "token_effective_fraction": effective(ratios),
        "sequence_ratio_mean": mean(s),
        "sequence_ratio_min": min(s, default=0.0),
        "sequence_ratio_max": max(s, default=0.0),
        "sequence_effective_fraction": effective(products),
        "saturated_fraction": mean([float(abs(x) > max_log_ratio) for x in r.values()]),
        "noise": noise,
        "clip_fraction": mean([float(x) for x in clipped]),
        "flip_fraction": mean([float(x) for x in flips]),
        "num_sequences": float(len(s)),
        "num_tokens": float(len(r)),
    }


# --- batches ----------------------------------------------------------------------------------------------------------


def ragged(seed: int, spread: float, lengths: Sequence[int] = (7, 0, 12, 1, 5, 3, 30, 2), dtype: Any = None) -> Case:
    """Masked tokens, an empty sequence, a fully masked one. The reference gets the inputs as rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    highest = -torch.rand(n, generator=generator, dtype=torch.float64) * 4 - 1e-3  # of the two
    apart = spread * torch.randn(n, generator=generator, dtype=torch.float64)
    new, rollout = highest + apart.clamp(max=0.0), highest - apart.clamp(min=0.0)
    mask = torch.rand(n, generator=generator) < 0.75
    mask[: lengths[0]], mask[-1] = True, True
    last = n - sum(lengths[-4:])
    mask[last : last + lengths[-4]] = False  # of these nothing counts
    new, rollout = (x.to(dtype or torch.float32).double() for x in (new, rollout))
    return Case(new.tolist(), rollout.tolist(), mask.tolist(), lengths)


def given(case: Case, layout: str, dtype: torch.dtype = torch.float32, garbage: bool = True) -> tuple[Any, Options]:
    """(logprobs, rollout_logprobs), the mask, and cu_seqlens if packed; garbage where masked."""
    mask = torch.tensor(case.mask, dtype=torch.bool)
    arrays = [torch.tensor(x, dtype=dtype) for x in (case.new, case.rollout)]
    if garbage:
        for values, rubbish in zip(arrays, ((math.nan, math.inf), (-math.inf, 1e38)), strict=True):
            indices = (~mask).nonzero()[:, 0]
            values[indices] = torch.tensor([rubbish[k % 2] for k in range(len(indices))], dtype=dtype)
    keywords: Options = {}
    if layout == "padded":
        arrays = [to_padded(x, case.lengths, math.nan) for x in arrays]
        mask = to_padded(mask, case.lengths, False)
    else:
        keywords["cu_seqlens"] = on_device(torch.tensor([0, *itertools.accumulate(case.lengths)]))
    return [on_device(x) for x in arrays], {"mask": on_device(mask), **keywords}


def flat(values: Tensor, case: Case, layout: str) -> Tensor:
    """Token values as [N]."""
    if layout == "packed":
        return values.cpu()
    return from_padded(values.cpu(), case.lengths)[0]


def differences(actual: dict[str, Any], expected: dict[str, float], tolerance: float = 1e-6) -> list[str]:
    """Tolerance of float32 statistics; differences of logarithms near 0 have an absolute one of 1e-9 nats."""
    assert set(actual) == set(expected)
    assert all(x.dtype == torch.float32 and x.ndim == 0 and not x.requires_grad for x in actual.values())
    return [
        f"{name}: expected {x:.9g}, got {float(actual[name]):.9g}"
        for name, x in expected.items()
        if not abs(float(actual[name]) - x) <= tolerance * abs(x) + 1e-9
    ]


def weight_differences(
    case: Case, layout: str, options: Options, wrong: str = "", dtype: Any = torch.float32
) -> list[str]:
    expected, stats = true_weights(case, **options, wrong=wrong)
    arrays, keywords = given(case, layout, dtype)
    found = rollout_weights(*arrays, **keywords, **options)
    by_token = options["level"] == "token"
    assert found.weights.dtype == dtype and not found.weights.requires_grad
    assert found.weights.shape == (arrays[0].shape if by_token else (len(case.lengths),))
    actual = flat(found.weights, case, layout) if by_token else found.weights.cpu()
    said = differences(found.stats.as_dict(), stats)
    off = (actual.double() - torch.tensor(expected).double()).abs() > 1e-6 * torch.tensor(expected).double().abs()
    return said + [f"weights: expected {expected}, got {actual.tolist()}"] * bool(off.any())


def mismatch_differences(case: Case, layout: str, options: Options, wrong: str = "") -> list[str]:
    options = dict(options)
    expected = true_mismatch(case, **options, wrong=wrong)
    arrays, keywords = given(case, layout)
    if options.pop("with_advantages", True):
        keywords["advantages"] = on_device(torch.tensor(case.advantages))
        for i, tokens in enumerate(case.sequences):
            if not tokens:
                keywords["advantages"][i] = math.nan
    return differences(rollout_mismatch(*arrays, **keywords, **options).as_dict(), expected)


# --- weights ----------------------------------------------------------------------------------------------------------


@by_layout
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("spread", [1e-3, 0.5, 30.0])
def test_weights(layout: str, level: str, mode: str, bounds: tuple[Any, Any], spread: float) -> None:
    options = {"level": level, "mode": mode, "lower": bounds[0], "upper": bounds[1]}
    for seed in range(3):
        assert not weight_differences(ragged(seed, spread), layout, options)


@by_layout
def test_weights_in_float64(layout: str) -> None:
    case = ragged(7, 0.3, dtype=torch.float64)
    options = {"level": "sequence_mean", "mode": "truncate", "lower": 0.5, "upper": 1.1}
    assert not weight_differences(case, layout, options, dtype=torch.float64)


WEIGHT_MUTANTS = [
    "rollout over trainer", "sum for mean", "padding in the length", "never saturated", "only the upper bound",
    "truncate for mask", "statistics after the bounds", "masked tokens count",
]  # fmt: skip


@pytest.mark.parametrize("wrong", WEIGHT_MUTANTS)
def test_wrong_weights_are_found(wrong: str) -> None:
    found = []
    for level, mode, spread in itertools.product(LEVELS, ["truncate", "mask"], [0.5, 30.0]):
        options = {"level": level, "mode": mode, "lower": 0.5, "upper": 2.0}
        found += weight_differences(ragged(1, spread), "packed", options, wrong=wrong)
    assert found


@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_a_weight_on_a_bound_is_within_it(mode: str) -> None:
    case = Case([0.0, 0.0, -1.0, -1.0], [-math.log(2), -math.log(2), -1.0, 0.0], [True] * 4, [4])
    arrays, keywords = given(case, "packed", torch.float64)
    up = math.exp(math.log(2))
    found = rollout_weights(*arrays, **keywords, mode=mode, lower=math.exp(-1.0), upper=up)
    assert found.weights.tolist() == [up, up, 1.0, math.exp(-1.0)]
    assert float(found.stats.below_fraction) == float(found.stats.above_fraction) == 0.0


@by_layout
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_any_log_probability_but_nan_is_a_finite_weight(
    layout: str, level: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive log-probabilities, too, which are not checked on a GPU."""
    monkeypatch.setattr("gspo_kernels.base.checks.may_read", lambda tensor: False)
    extremes = [math.inf, -math.inf, 3e38, -3e38, 0.0, -9999.0]
    pairs = list(itertools.product(extremes, extremes))
    case = Case([a for a, _ in pairs], [b for _, b in pairs], [True] * 36, [1] * 12 + [12, 6, 6])
    arrays, keywords = given(case, layout)
    found = rollout_weights(*arrays, **keywords, level=level, mode=mode, lower=0.5, upper=None)
    assert bool(found.weights.isfinite().all())
    assert all(bool(x.isfinite()) for x in found.stats.as_dict().values())
    assert float(found.weights.max()) <= math.exp(20) * (1 + 1e-6)
    assert all(bool(x.isfinite()) for x in rollout_mismatch(*arrays, **keywords).as_dict().values())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_nan_is_not_hidden_and_stays_in_its_sequence(level: str, mode: str) -> None:
    """A weight of 0 instead of NaN would hide a broken rollout."""
    case = Case([-1.0, math.nan, -1.0, -1.0], [-1.0] * 4, [True] * 4, [2, 2])
    arrays, keywords = given(case, "packed")
    weights, stats = rollout_weights(*arrays, **keywords, level=level, mode=mode, lower=0.5)
    assert weights.isnan().tolist() == ([False, True, False, False] if level == "token" else [True, False])
    assert bool(stats.weight_mean.isnan()) and bool(rollout_mismatch(*arrays, **keywords).kl_k1.isnan())


@by_layout
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [3, 0]], ids=str)
def test_nothing_counts(layout: str, lengths: list[int]) -> None:
    n = sum(lengths)
    case = Case([0.0] * n, [0.0] * n, [False] * n, lengths)
    for level in LEVELS:
        options = {"level": level, "mode": "mask", "lower": 0.5, "upper": 2.0}
        assert not weight_differences(case, layout, options)
    assert not mismatch_differences(case, layout, {})
    assert not mismatch_differences(case, layout, {"with_advantages": False})


def test_without_a_mask_all_count() -> None:
    case = Case([-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0], [True] * 3, [2, 1])
    arrays, keywords = given(case, "packed")
    found = rollout_weights(*arrays, cu_seqlens=keywords["cu_seqlens"])
    assert torch.equal(found.weights, rollout_weights(*arrays, **keywords).weights)
    assert found.weights.tolist() == pytest.approx([math.exp(0.5), 1.0, math.exp(-1.0)])


def test_weights_are_constants() -> None:
    case = ragged(3, 0.2)
    (new, rollout), keywords = given(case, "packed", garbage=False)
    new.requires_grad_(), rollout.requires_grad_()
    found = rollout_weights(new, rollout, **keywords)
    mismatch = rollout_mismatch(new, rollout, **keywords)
    every = [found.weights, *found.stats.as_dict().values(), *mismatch.as_dict().values()]
    assert not any(x.requires_grad for x in every)


@by_layout
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", [gspo_kernels.GSPO(0.5, 0.5), gspo_kernels.PPO()], ids=str)
def test_a_loss_takes_them(layout: str, level: str, objective: gspo_kernels.Objective) -> None:
    """The weighted loss is the mean of weight times the term that each token or sequence has without weights."""
    case = ragged(5, 0.05)
    (new, rollout), keywords = given(case, layout)
    weights, _ = rollout_weights(new, rollout, **keywords, level=level, lower=0.99, upper=1.01)
    advantages = on_device(torch.tensor(case.advantages))
    leaf = new.clone().requires_grad_()
    loss, _ = policy_loss_from_logprobs(
        leaf, advantages, new, objective=objective, importance_weights=weights, **keywords
    )
    loss.backward()
    by_token = true_weights(case, level, "truncate", 0.99, 1.01)[0]
    if level != "token":
        by_token = [w for w, n in zip(by_token, case.lengths, strict=True) for _ in range(n)]
    counted = [s for s in case.sequences if s]
    tokens = sum(map(len, counted))
    expected = 0.0
    for advantage, s in zip(case.advantages, case.sequences, strict=True):
        share = 1 / tokens if isinstance(objective, gspo_kernels.PPO) else 1 / (len(counted) * max(1, len(s)))
        expected -= math.fsum(share * advantage * by_token[t] for t in s)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())


# --- mismatch ---------------------------------------------------------------------------------------------------------

MISMATCH_OPTIONS: list[Options] = [
    {},
    {"with_advantages": False},
    {"noise": 2e-3},
    {"noise": 0.0},
    {"noise": 0.3, "eps_low": 0.1, "eps_high": 0.2, "with_advantages": False},
    {"eps_low": 2.0, "eps_high": 0.0, "max_log_ratio": 0.01},
]


@by_layout
@pytest.mark.parametrize("options", MISMATCH_OPTIONS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 5e-4, 3e-3, 0.3, 30.0])
def test_mismatch(layout: str, options: Options, spread: float) -> None:
    for seed in range(3):
        assert not mismatch_differences(ragged(seed, spread), layout, options)


MISMATCH_MUTANTS = [
    "rollout over trainer", "sum for mean", "noise not averaged", "noise averaged as a bias", "every sign",
    "edges exchanged", "k1 of the other sign", "k3 of the other ratio", "masked tokens count",
]  # fmt: skip


@pytest.mark.parametrize("wrong", MISMATCH_MUTANTS)
def test_a_wrong_mismatch_is_found(wrong: str) -> None:
    cases = [ragged(seed, spread) for seed in range(4) for spread in (1e-3, 0.3)]
    cases.append(edge_case())
    options = [{}, {"noise": 1e-3}]
    assert any(mismatch_differences(case, "packed", o, wrong) for case in cases for o in options)


def edge_case() -> Case:
    """Four tokens per sequence, R at the given distance from an edge; advantages are -1.5, 0.5, 0, 2, -0.25."""
    low, high = math.log1p(-3e-4), math.log1p(4e-4)
    means = [low + 4e-4, high + 4e-4, high, high - 6e-4, low - 6e-4, low - 4e-4, 0.0, low, high]
    new = [x - 1.0 for x in means for _ in range(4)]
    return Case([float(torch.tensor(x)) for x in new], [-1.0] * len(new), [True] * len(new), [4] * len(means))


def test_flips_are_those_within_the_noise_of_the_edge_that_counts() -> None:
    """noise 1e-3 over four tokens is 5e-4 of R: sequences 0, 1 and 5 are nearer to their edge, and 8 (A > 0) is at it.

    2 has no advantage, 3 and 4 are farther away, 6 is 4e-4 from the edge above (A = 0.5), 7 has none.
    """
    case = edge_case()
    assert [case.advantages[i] for i in (0, 1, 5, 6, 7, 8)] == [-1.5, 0.5, -1.5, 0.5, 0.0, 2.0]
    arrays, keywords = given(case, "packed")
    advantages = on_device(torch.tensor(case.advantages))
    found = rollout_mismatch(*arrays, advantages, **keywords, noise=1e-3)
    assert float(found.flip_fraction) == pytest.approx(5 / 9)
    assert float(rollout_mismatch(*arrays, advantages, **keywords, noise=0.0).flip_fraction) == 0.0


def test_equal_policies_have_no_mismatch() -> None:
    case = ragged(0, 0.0)
    arrays, keywords = given(case, "packed")
    found = {name: float(x) for name, x in rollout_mismatch(*arrays, **keywords).as_dict("rollout/").items()}
    zeros = ("kl_k1", "kl_k3", "saturated_fraction", "noise", "clip_fraction", "flip_fraction")
    assert all(found[f"rollout/{name}"] == 0.0 for name in zeros)
    ones = [x for name, x in found.items() if "ratio" in name or "effective" in name]
    assert len(ones) == 8 and all(x == 1.0 for x in ones)


def test_noise_alone_flips_what_it_is_said_to_flip() -> None:
    """Two decisions with independent errors of this size differ about as often as predicted.

    A decision at distance d from the edge differs with probability 2 p (1 - p), p = Phi(-d / u); `flip_fraction` counts
    those with d < u, about twice as many, and no fewer.
    """
    generator = torch.Generator().manual_seed(0)
    sequences, length, noise = 4000, 64, 5e-3
    exact = 4e-4 + 2e-3 * torch.randn(sequences, 1, generator=generator, dtype=torch.float64)
    first, second = (
        exact + noise * torch.randn(sequences, length, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    advantages, base = on_device(torch.ones(sequences)), torch.full((sequences, length), -1.0, dtype=torch.float64)
    found = rollout_mismatch(on_device(base + first), on_device(base), advantages, noise=noise)
    decided = [x.mean(1) > math.log1p(4e-4) for x in (first, second)]
    differ = float((decided[0] != decided[1]).double().mean())
    assert 0.05 < differ < float(found.flip_fraction) < 2.5 * differ


# --- compiled, sharded ------------------------------------------------------------------------------------------------


@DEFAULT_MODE
def test_compiles_without_a_break() -> None:
    case = ragged(2, 0.3)
    arrays, keywords = given(case, "packed")
    advantages = torch.tensor(case.advantages)

    def both(new: Tensor, rollout: Tensor, advantages: Tensor, upper: float, **keywords: Tensor) -> Any:
        weights, stats = rollout_weights(new, rollout, **keywords, level="sequence_mean", upper=upper)
        mismatch = rollout_mismatch(new, rollout, advantages, **keywords)
        return weights, stats.as_dict(), mismatch.as_dict()

    for upper in (1.5, 3.0):
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(*arrays, advantages, upper, **keywords)
        plain = both(*arrays, advantages, upper, **keywords)
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-9)


def split(case: Case, rank: int, size: int) -> tuple[list[int], list[int]]:
    """A rank's tokens and lengths: every size-th token, except sequence 2, which rank 0 has alone."""
    ends = [0, *itertools.accumulate(case.lengths)]
    mine = [
        [t for t in range(a, b) if (rank == 0 if i == 2 else t % size == rank)]
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    return [t for s in mine for t in s], [len(s) for s in mine]


def sharded(rank: int, seed: int, spread: float) -> Any:
    """In a rank: weights of every level with their tokens, the statistics, and the mismatch."""
    group = dist.group.WORLD
    case = ragged(seed, spread)
    tokens, lengths = split(case, rank, dist.get_world_size())
    part = Case(*([x[t] for t in tokens] for x in (case.new, case.rollout, case.mask)), lengths)
    arrays, keywords = given(part, "packed")
    advantages = torch.tensor(case.advantages)
    advantages[2] = case.advantages[2] if rank == 0 else math.nan  # of a sequence without tokens here: anything
    found: dict[str, Any] = {"tokens": tokens}
    for level in LEVELS:
        weights, stats = rollout_weights(*arrays, **keywords, level=level, lower=0.7, upper=1.5, cp_group=group)
        found[level] = weights, stats.as_dict()
    for name, noise in (("mismatch", None), ("with noise", 1e-3)):
        found[name] = rollout_mismatch(*arrays, advantages, **keywords, noise=noise, cp_group=group).as_dict()
    return found


def refusals(rank: int) -> list[ranks.Refused | None]:
    """In a rank: errors of one rank alone, and arguments that differ between ranks."""
    group = dist.group.WORLD
    values, other = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    calls: list[Callable[[], object]] = [
        lambda: rollout_weights(values, other if rank else other[:, :2], cp_group=group),
        lambda: rollout_weights(values, other, upper=2.0 + rank, cp_group=group),
        lambda: rollout_weights(values, other, level=LEVELS[rank], cp_group=group),
        lambda: rollout_mismatch(values, other, noise=None if rank else 1e-3, cp_group=group),
        lambda: rollout_mismatch(values, other, torch.ones(2) if rank else None, cp_group=group),
        lambda: rollout_weights(values, other, cp_group=group),
    ]
    return [ranks.refused(call) for call in calls]


class TestOverContext:
    pytestmark = ranks.mark

    @pytest.mark.parametrize(("seed", "spread"), [(4, 1e-3), (5, 0.5), (6, 0.5), (8, 30.0)])
    def test_ranks_say_what_one_process_says(self, seed: int, spread: float) -> None:
        case = ragged(seed, spread)
        found = ranks.run(2, sharded, seed, spread)
        for level in LEVELS:
            expected, stats = true_weights(case, level, "truncate", 0.7, 1.5)
            for rank in found:
                weights, said = rank[level]
                indices = rank["tokens"] if level == "token" else range(len(case.lengths))
                for index, w in zip(indices, weights.tolist(), strict=True):
                    has = level == "token" or any(case.mask[t] and t in rank["tokens"] for t in case.sequences[index])
                    assert not has or w == pytest.approx(expected[index], rel=1e-6)
                assert not differences(said, stats)
            assert found[0][level][1] == found[1][level][1], "the same bits on every rank"
        for name, noise in (("mismatch", None), ("with noise", 1e-3)):
            for rank in found:
                assert not differences(rank[name], true_mismatch(case, noise=noise))

    def test_ranks_refuse_together(self) -> None:
        first, second = ranks.run(2, refusals)
        assert first[0].type == "ValueError" and "rollout_logprobs" in first[0].message
        assert second[0].type == "ValueError" and "refused by" in second[0].message
        for a, b, name in zip(first[1:5], second[1:5], ["upper", "level", "noise", "advantages"], strict=True):
            assert a.type == b.type == "ValueError" and name in a.message and name in b.message
        assert first[5] is None and second[5] is None


def test_a_group_of_one(group_of_one: dist.ProcessGroup | None) -> None:
    if group_of_one is None:
        pytest.skip("needs torch with gloo, or with NCCL on a GPU")
    case = ragged(6, 0.4)
    arrays, keywords = given(case, "packed")
    for level in LEVELS:
        with_group, plain = (
            rollout_weights(*arrays, **keywords, level=level, **group) for group in ({"cp_group": group_of_one}, {})
        )
        torch.testing.assert_close(with_group.weights, plain.weights, rtol=1e-6, atol=0)
        torch.testing.assert_close(with_group.stats.as_dict(), plain.stats.as_dict(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        rollout_mismatch(*arrays, **keywords, cp_group=group_of_one).as_dict(),
        rollout_mismatch(*arrays, **keywords).as_dict(),
        rtol=1e-6,
        atol=0,
    )


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Options, type[Exception], str, str]] = [
    ({"logprobs": [1.0]}, TypeError, "logprobs", "list"),
    ({"logprobs": torch.zeros(2, 3, 4)}, ValueError, "logprobs", "2, 3, 4"),
    ({"logprobs": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, "logprobs", "bfloat16"),
    ({"rollout_logprobs": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "rollout_logprobs", "float16"),
    ({"rollout_logprobs": torch.zeros(2, 2)}, ValueError, "rollout_logprobs", "2, 2"),
    ({"rollout_logprobs": None}, TypeError, "rollout_logprobs", "None"),
    ({"mask": torch.ones(3, 2)}, ValueError, "mask", "3, 2"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens", "2, 3"),
    ({"max_log_ratio": 0.0}, ValueError, "max_log_ratio", "0"),
    ({"max_log_ratio": 100.0}, ValueError, "max_log_ratio", "100"),
    ({"cp_group": "ranks"}, (ValueError, TypeError), "cp_group", "ranks"),  # type: ignore[list-item]
]
WRONG_WEIGHTS: list[tuple[Options, type[Exception], str, str]] = [
    ({"level": "sequence"}, ValueError, "level", "sequence"),
    ({"mode": "clip"}, ValueError, "mode", "clip"),
    ({"upper": 0.2}, ValueError, "upper", "0.2"),
    ({"upper": math.inf}, ValueError, "upper", "inf"),
    ({"upper": "2"}, TypeError, "upper", "2"),
    ({"lower": -0.5}, ValueError, "lower", "-0.5"),
    ({"lower": 1.5}, ValueError, "lower", "1.5"),
]
WRONG_MISMATCH: list[tuple[Options, type[Exception], str, str]] = [
    ({"eps_low": -1.0}, ValueError, "eps_low", "-1"),
    ({"eps_high": None}, TypeError, "eps_high", "None"),
    ({"noise": -1e-3}, ValueError, "noise", "-0.001"),
    ({"advantages": torch.zeros(2, 3)}, ValueError, "advantages", "2, 3"),
    ({"advantages": 1.0}, TypeError, "advantages", "float"),
]
CALLS = [(rollout_weights, *x) for x in WRONG + WRONG_WEIGHTS] + [
    (rollout_mismatch, *x) for x in WRONG + WRONG_MISMATCH
]


@DEFAULT_MODE
@pytest.mark.parametrize(("function", "change", "kind", "argument", "came"), CALLS)
def test_refused_by_name(function: Any, change: Options, kind: type[Exception], argument: str, came: str) -> None:
    base: Options = {"logprobs": torch.full((2, 3), -1.0), "rollout_logprobs": torch.full((2, 3), -1.0)}
    with pytest.raises(kind) as error:
        function(**{**base, **change})
    check_message(error.value, argument, came)
