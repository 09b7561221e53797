"""Any batch at all, ragged, empty, all masked, with absurd log-ratios and -inf logits: the loss is finite and right."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from batches import CLASSES, LAYOUTS, OBJECTIVES, PUBLIC, Batch, arguments, put_garbage, run
from checks import check_outcome
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from modes import WHOLE, by_backend, sized

EXTREMES = [1e30, -1e30, math.inf, -math.inf]
ORDINARY = [0.0, 1e-4, 2.9e-4, -2.9e-4, 3.1e-4, -3.1e-4, 4.1e-4, 0.1, -0.19, 0.21, -0.22, 0.26, 0.28, 1.0, -1.0]
LARGE = [5.0, -5.0, 19.0, 21.0, -21.0, 80.0, -80.0]


@pytest.fixture(autouse=True)
def unread_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where positive ones are not looked for: there too the loss is finite."""
    monkeypatch.setattr("gspo_kernels.base.checks.may_read", lambda tensor: False)


@st.composite
def batches(draw: st.DrawFn, objective: str, layout: str) -> tuple[Batch, dict[str, Any]]:
    lengths = draw(st.lists(st.integers(0, 4), max_size=5))
    n, s = sum(lengths), len(lengths)
    vocab = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def numbers(size: int, values: list[float]) -> torch.Tensor:
        return torch.tensor(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)), dtype=torch.float32)

    logits = torch.tensor(
        draw(st.lists(st.floats(-30, 30, width=16), min_size=n * vocab, max_size=n * vocab)), dtype=torch.float32
    ).view(n, vocab)
    token_ids = torch.tensor([draw(st.integers(0, vocab - 1)) for _ in range(n)], dtype=torch.int64)
    if draw(st.booleans()):  # -inf anywhere but at the target
        dead = torch.tensor([draw(st.booleans()) for _ in range(n * vocab)], dtype=torch.bool).view(n, vocab)
        dead = dead.scatter(1, token_ids[:, None], False)
        logits = logits.masked_fill(dead, -math.inf)
    mask = torch.tensor([draw(st.booleans()) for _ in range(n)], dtype=torch.bool)
    if draw(st.integers(0, 4)) == 0:
        mask[:] = draw(st.booleans())
    ambiguous = layout == "packed" and s == n  # [S] and [N] cannot be told apart: read as one per sequence
    by_token = CLASSES[objective].advantages_per_token and not ambiguous and draw(st.booleans())
    magnitudes = [-3.0, -1.0, -1e-3, 0.0, 1e-3, 0.7, 2.0]
    batch = Batch(logits.to(dtype), token_ids, mask, lengths, numbers(n if by_token else s, magnitudes))
    batch.by_token = by_token
    batch.temperature = draw(st.sampled_from([1.0, 0.5, 1.7]))
    if draw(st.booleans()):
        sets = [draw(st.none() | st.permutations(range(vocab))) for _ in range(n)]
        batch.kept = [
            None if ids is None else list({*ids[: draw(st.integers(0, vocab))], int(token_ids[t])})
            for t, ids in enumerate(sets)
        ]
    logprobs = torch.tensor([row.logprob for row in batch.rows], dtype=torch.float64)

    if draw(st.integers(0, 5)):
        wanted = numbers(n, ORDINARY + (LARGE if draw(st.booleans()) else [])).double()
        for rows in batch.sequences:  # extremes of one sign a sequence: the order of a sum decides 1e30 - 1e30 + 0.1
            extreme = draw(st.sampled_from([0.0, 0.0, *EXTREMES]))
            for t in rows:
                if extreme and draw(st.booleans()):
                    wanted[t] = extreme
        batch.old_logprobs = (logprobs - wanted).float()
    options: dict[str, Any] = {"aggregation": draw(st.sampled_from(["sequence_mean", "token_mean", "sequence_sum"]))}
    if draw(st.booleans()):
        batch.ref_logprobs = (logprobs + numbers(n, [0.0, 0.1, -0.3, 2.0, 100.0, -100.0, math.inf, -math.inf])).float()
        options["beta"] = draw(st.sampled_from([0.0, 0.1]))
        options["kl_estimator"] = draw(st.sampled_from(["k1", "k2", "k3"]))
    if draw(st.booleans()):
        batch.weights_by_token = not ambiguous and draw(st.booleans())
        batch.weights = numbers(n if batch.weights_by_token else s, [0.0, 0.5, 1.0, 2.0])
    if draw(st.booleans()):
        options["entropy_coef"] = 0.01
    if draw(st.booleans()):
        options["dual_clip"] = 3.0
    if draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([1, 2.5, 100]))
    assume(not close_to_a_kink(batch, objective, options))
    put_garbage(batch)
    return batch, options


def close_to_a_kink(batch: Batch, objective: str, options: dict[str, Any]) -> bool:
    """Where rounding decides which side a unit falls on, two right answers differ."""
    opt = oracle.OBJECTIVES[objective].options(**options)
    if batch.expected(objective, **options).margin < 5e-5:
        return True
    gaps = [] if batch.ref_logprobs is None else batch.ref_logprobs.tolist()
    return any(abs(abs(x - row.logprob) - opt.max_log_ratio) < 5e-5 for x, row in zip(gaps, batch.rows, strict=False))


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@by_backend
def test_any_batch(objective: str, layout: str, backend: str) -> None:
    @given(batches(objective, layout))
    @settings(
        deadline=None,
        max_examples=120 if WHOLE else sized(30, 3),
        phases=sized(tuple(Phase), (Phase.explicit, Phase.generate)),  # interpreted, shrinking takes half an hour
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        database=None,
        derandomize=True,
    )
    def check(drawn: tuple[Batch, dict[str, Any]]) -> None:
        batch, options = drawn
        expected = batch.expected(objective, **options)
        assert all(math.isfinite(x) for x in (expected.loss, *expected.d_logprobs, *expected.stats.values()))
        outcome = run(batch, layout, objective, backend=backend, **options)
        check_outcome(outcome, batch, objective, **options)

    check()


def small(objective: str, log_ratios: list[float], advantage: float, on: int = 1) -> Batch:
    """Sequences of one token each, all with one advantage."""
    n = len(log_ratios)
    logits = torch.tensor([[0.5, 2.0, -1.0, 0.0]]).repeat(n, 1)
    batch = Batch(logits, torch.full((n,), on), torch.ones(n, dtype=torch.bool), [1] * n, torch.full((n,), advantage))
    batch.old_logprobs = (torch.tensor([row.logprob for row in batch.rows]).double() - torch.tensor(log_ratios)).float()
    return batch


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@by_backend
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_absurd_log_ratios(
    objective: str, layout: str, backend: str, advantage: float, dual_clip: float | None
) -> None:
    """A clipped or zero-advantage row must be selected away: inf * 0 is NaN (old_logprob = -300 does it at A > 0)."""
    log_ratios = [300.0, -300.0, 80.0, 88.8, -104.0, 709.8, 1e30, -1e30, math.inf, -math.inf, 19.9, 20.1]
    batch = small(objective, log_ratios, advantage)
    options: dict[str, Any] = {} if dual_clip is None else {"dual_clip": dual_clip}
    outcome = run(batch, layout, objective, backend=backend, **options)
    check_outcome(outcome, batch, objective, **options)
    expected = batch.expected(objective, **options)
    inert = torch.tensor([g == 0 for g in expected.d_logprobs])
    assert expected.stats["saturated_fraction"] in (0.0, 7 / 12) and bool((outcome.gradient[inert] == 0).all())


@pytest.mark.parametrize("objective", OBJECTIVES)
@by_backend
def test_just_beyond_the_dual_clip(objective: str, backend: str) -> None:
    """The bound is one of the ratio, not of its deviation from 1."""
    batch = small(objective, [math.log(x) for x in (2.9, 3.1, 3.9, 4.1)], -1.0)
    outcome = run(batch, "packed", objective, backend=backend, dual_clip=3.0)
    check_outcome(outcome, batch, objective, dual_clip=3.0)


@by_backend
@pytest.mark.parametrize("sign", [1, -1])
def test_a_masked_token_is_no_extreme(sign: int, backend: str) -> None:
    batch = small("grpo", [0.1 * sign, 0.2 * sign, 0.15 * sign], 1.0)
    batch = replace(batch, mask=torch.tensor([True, False, True]))
    check_outcome(run(batch, "packed", "grpo", backend=backend), batch, "grpo")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@by_backend
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_nan_logit_shows_in_the_loss(objective: str, layout: str, backend: str, on_policy: bool, grad: bool) -> None:
    """On-policy the coefficients need no logit; the loss must not look sound on that account."""
    batch = small(objective, [1e-4, 1e-4, 1e-4], 1.0)
    batch.logits[1, 2] = math.nan
    if on_policy:
        batch.old_logprobs = None
    args = arguments(batch, layout)
    with torch.set_grad_enabled(grad):
        loss, stats = PUBLIC[objective](args.logits, *args.rest, **args.keywords, backend=backend)
    assert math.isnan(float(loss.detach()))
    assert int(stats.logprobs.isnan().sum()) == 1


@pytest.mark.each_objective
@pytest.mark.parametrize("objective", OBJECTIVES)
@by_backend
def test_infinities_of_both_signs_in_one_sequence(objective: str, backend: str) -> None:
    """inf - inf is NaN: the tokens' log-ratios are bounded before they are summed."""
    batch = small(objective, [math.inf, -math.inf, 1e30, -1e30], 1.0)
    batch.lengths = [4]
    batch.advantages = torch.ones(1)
    outcome = run(batch, "packed", objective, backend=backend)
    for x in (outcome.loss, outcome.gradient, outcome.log_ratio, *outcome.stats.as_dict("").values()):
        assert bool(x.isfinite().all()), outcome
    assert float(outcome.stats.num_tokens) == 4


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_old_logprob_is_not_hidden(objective: str, layout: str) -> None:
    batch = small(objective, [0.0, math.nan], 1.0)
    assert math.isnan(float(run(batch, layout, objective).loss))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@by_backend
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (3,), (2, 0), (1, 1), (0, 2, 1), (1,)], ids=str)
@pytest.mark.parametrize("unmasked", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 5])
def test_next_to_nothing(
    objective: str, layout: str, backend: str, lengths: tuple[int, ...], unmasked: bool, padding: int
) -> None:
    """No sequence, empty ones, no unmasked token; as many sequences as tokens; no padding at all, or mostly padding."""
    n = sum(lengths)
    logits = torch.arange(n * 6).view(n, 6) % 5.0
    advantages = torch.tensor([1.0, -0.5, 2.0][: len(lengths)])
    batch = Batch(logits, torch.arange(n) % 6, torch.full((n,), unmasked), list(lengths), advantages, padding=padding)
    batch.old_logprobs = torch.tensor([row.logprob for row in batch.rows], dtype=torch.float32) - 1e-4
    put_garbage(batch)
    outcome = run(batch, layout, objective, backend=backend)
    check_outcome(outcome, batch, objective)
    batch.old_logprobs = None
    check_outcome(run(batch, layout, objective, backend=backend), batch, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_sequence_may_have_any_advantage(objective: str, layout: str) -> None:
    """A group whose responses are all masked has 0 / 0 for an advantage; it is not counted, so it must not matter."""
    batch = small(objective, [1e-4, 1e-4, 1e-4], 1.0)
    batch = replace(batch, mask=torch.tensor([True, False, True]))
    batch.advantages[1] = math.nan
    batch.weights = torch.tensor([1.0, math.inf, 1.0])
    put_garbage(batch)
    check_outcome(run(batch, layout, objective), batch, objective)
