"""Inputs of a loss: group advantages, and targets rolled left by one."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import NOT_INTERPRETED, on_device
from test_errors import check_message
from torch import Tensor

import gspo_kernels
from gspo_kernels import next_token_targets
from gspo_kernels.rollout import advantages

pytestmark = NOT_INTERPRETED

rewards_and_groups = st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(0, 4)), min_size=0, max_size=30)


def group_advantages(rewards: Tensor, group_ids: Tensor | None = None, **options: Any) -> Tensor:
    """Computed on the device, returned on the CPU."""
    ids = None if group_ids is None else on_device(group_ids)
    return gspo_kernels.group_advantages(on_device(rewards), group_ids=ids, **options).cpu()


@given(rewards_and_groups, st.sampled_from(["std", "none"]))
@settings(deadline=None, max_examples=80)
def test_against_the_oracle(pairs: list[tuple[float, int]], normalize: str) -> None:
    rewards = torch.tensor([x for x, _ in pairs], dtype=torch.float32)
    groups = torch.tensor([g for _, g in pairs], dtype=torch.int64)
    expected = torch.tensor(oracle.group_advantages(rewards.tolist(), groups.tolist(), normalize))
    actual = group_advantages(rewards, group_ids=groups, normalize=normalize)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64, torch.int64], ids=str)
def test_group_size_is_neighbours_together(dtype: torch.dtype) -> None:
    rewards = torch.tensor([1, 0, 0, 1, 5, 5, 5, 5, 0, 0, 0, 1]).to(dtype)
    by_size = group_advantages(rewards, group_size=4)
    by_id = group_advantages(rewards, group_ids=torch.tensor([7] * 4 + [-3] * 4 + [100] * 4))
    assert torch.equal(by_size, by_id) and by_size.dtype == torch.float32
    expected = oracle.group_advantages(rewards.tolist(), [0] * 4 + [1] * 4 + [2] * 4)
    torch.testing.assert_close(by_size, torch.tensor(expected).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e8, -7.3, 1e-30])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_equal_rewards_have_exactly_no_advantage(value: float, size: int, normalize: str) -> None:
    """A mean that is wrong by one bit, divided by a deviation near 0, would give a large advantage."""
    rewards = torch.full((size,), value)
    assert torch.equal(group_advantages(rewards, group_size=size, normalize=normalize), torch.zeros(size))


def test_a_large_mean_does_not_cost_the_digits() -> None:
    rewards = torch.tensor([1e6 + 1, 1e6 + 2, 1e6 + 4, 1e6 + 3])
    expected = oracle.group_advantages(rewards.tolist(), [0] * 4)
    torch.testing.assert_close(
        group_advantages(rewards, group_size=4), torch.tensor(expected).float(), rtol=1e-6, atol=0
    )


def test_eps_is_added_to_the_deviation() -> None:
    rewards = torch.tensor([0.0, 2e-3])
    deviation = float(torch.std(rewards.double()))
    actual = group_advantages(rewards, group_size=2, eps=1e-3)
    assert actual.tolist() == pytest.approx([-1e-3 / (deviation + 1e-3), 1e-3 / (deviation + 1e-3)], rel=1e-6)


ESTIMATORS = [
    (b, n) for b in advantages.BASELINES for n in advantages.NORMALIZATIONS if (b, n) != ("batch_mean", "std")
]  # which is refused
some_rewards = st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0, math.nan]))


@given(st.lists(st.tuples(some_rewards, st.integers(-2, 3)), max_size=24), st.sampled_from(ESTIMATORS))
@settings(deadline=None, max_examples=200)
def test_estimators_against_the_oracle(pairs: list[tuple[float, int]], estimator: tuple[str, str]) -> None:
    """With rewards that are missing (NaN), groups that are missing whole, groups of one, and equal rewards."""
    baseline, normalize = estimator
    rewards, groups = [x for x, _ in pairs], [g for _, g in pairs]
    expected = oracle.response_advantages(rewards, groups, baseline, normalize)
    actual = group_advantages(
        torch.tensor(rewards), torch.tensor(groups, dtype=torch.int64), baseline=baseline, normalize=normalize
    )
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_estimators_by_hand() -> None:
    """Rewards 1, 2, 6 and, of another prompt, 0, 0: means 3 and 0; the mean of all is 1.8."""
    rewards = torch.tensor([1.0, 2, 6, 0, 0])
    groups = torch.tensor([4, 4, 4, 9, 9])

    def of(baseline: str, normalize: str = "none") -> list[float]:
        return group_advantages(rewards, groups, baseline=baseline, normalize=normalize, eps=0).tolist()

    assert of("mean") == [-2, -1, 3, 0, 0]
    assert of("leave_one_out") == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0]
    assert of("leave_one_out_max") == [0, 0, 6 - 2, 0, 0]
    assert of("batch_mean") == pytest.approx([-0.8, 0.2, 4.2, -1.8, -1.8])
    assert of("mean", "batch_std") == pytest.approx([x / math.sqrt(14 / 4) for x in (-2, -1, 3, 0, 0)])
    without_groups = gspo_kernels.group_advantages(on_device(rewards), baseline="batch_mean", normalize="batch_std")
    deviation = float(rewards.double().std())
    assert without_groups.tolist() == pytest.approx([(x - 1.8) / deviation for x in rewards.tolist()], rel=1e-5)


@pytest.mark.parametrize(("baseline", "normalize"), ESTIMATORS)
def test_a_nan_reward_is_left_out(baseline: str, normalize: str) -> None:
    """The others' advantages are those without it."""
    rewards = torch.tensor([1.0, math.nan, 0.25, 0.5, math.nan, 3.0, 1.0, math.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    there = ~rewards.isnan()
    found = group_advantages(rewards, groups, baseline=baseline, normalize=normalize)
    without = group_advantages(rewards[there], groups[there], baseline=baseline, normalize=normalize)
    assert torch.equal(found[there], without) and bool((found[~there] == 0).all())


def test_two_best_responses_have_no_advantage() -> None:
    found = group_advantages(torch.tensor([1.0, 1.0, 0.0]), group_size=3, baseline="leave_one_out_max")
    assert found.tolist() == [0, 0, 0]


def test_whitened_against_the_oracle() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1e4 + torch.randn(7, 11, generator=generator, dtype=torch.float64)
    mask = torch.rand(7, 11, generator=generator) < 0.6
    expected = torch.zeros_like(values)
    expected[mask] = torch.tensor(oracle.whitened(values[mask].tolist(), eps=1e-8), dtype=torch.float64)
    given = torch.where(mask, values, torch.tensor([math.nan, math.inf, -1e30] * 26)[:77].view(7, 11))
    found = gspo_kernels.whiten_advantages(on_device(given), mask=on_device(mask)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    packed = gspo_kernels.whiten_advantages(on_device(values[mask].float()))
    torch.testing.assert_close(packed.cpu(), expected[mask].float(), rtol=0, atol=2e-3)  # 1e4 in float32


@pytest.mark.parametrize("values", [[], [0.1], [0.1] * 5])
def test_equal_advantages_are_whitened_to_zero(values: list[float]) -> None:
    assert gspo_kernels.whiten_advantages(on_device(torch.tensor(values))).tolist() == [0.0] * len(values)


def test_over_ranks_as_in_one_batch(group_of_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks, the last without a response: each sees the moments of all, as `gather` returns them."""
    if group_of_one is None:
        pytest.skip("no process group here")
    generator = torch.Generator().manual_seed(1)
    rewards = 1e3 + torch.rand(12, generator=generator)
    parts = [on_device(x) for x in (rewards[:8], rewards[8:], rewards[:0])]
    sent: list[Tensor] = []
    monkeypatch.setattr(advantages, "gather", lambda mine, ranks: sent.append(mine) or mine[None])
    options: dict[str, Any] = {"group_size": 4, "baseline": "batch_mean", "normalize": "none", "group": group_of_one}
    for part in parts:
        gspo_kernels.group_advantages(part, **options)
    monkeypatch.setattr(advantages, "gather", lambda mine, ranks: torch.stack(sent))
    found = torch.cat([gspo_kernels.group_advantages(part, **options) for part in parts]).cpu()
    assert torch.equal(found, group_advantages(rewards, group_size=4, baseline="batch_mean", normalize="none"))


def on_rank(rank: int, rewards: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Eight responses on the first rank, four on the second, and their advantages as tokens."""
    mine = rewards[:8] if rank == 0 else rewards[8:]
    found = gspo_kernels.group_advantages(mine, group=dist.group.WORLD, **options)
    return found, gspo_kernels.whiten_advantages(mine[:, None], group=dist.group.WORLD)


class TestTwoRanks:
    pytestmark = ranks.mark

    @pytest.mark.parametrize("baseline", ["mean", "batch_mean"])
    def test_as_one_process(self, baseline: str) -> None:
        rewards = 1e3 + torch.rand(12, generator=torch.Generator().manual_seed(2))
        options = {"group_size": 4, "baseline": baseline, "normalize": "batch_std"}
        parts = ranks.run(2, on_rank, rewards, options)
        expected = gspo_kernels.group_advantages(rewards, **options)
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), expected, rtol=1e-6, atol=1e-6)
        whitened = gspo_kernels.whiten_advantages(rewards[:, None])
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), whitened, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("baseline", "normalize"), [("mean", "batch_std"), ("batch_mean", "batch_std")])
def test_a_group_of_one_rank(group_of_one: Any, baseline: str, normalize: str) -> None:
    rewards = torch.tensor([1.0, 2, 6, 0, 0, 5])
    options: dict[str, Any] = {"group_size": 3, "baseline": baseline, "normalize": normalize}
    found = group_advantages(rewards, **options, group=group_of_one)
    assert torch.equal(found, group_advantages(rewards, **options))
    tokens = torch.stack([rewards, 2 * rewards])
    expected = gspo_kernels.whiten_advantages(on_device(tokens))
    assert torch.equal(gspo_kernels.whiten_advantages(on_device(tokens), group=group_of_one), expected)


@pytest.mark.parametrize(
    ("options", "argument", "came"),
    [
        ({"group_size": 2, "baseline": "max"}, "baseline", "'max'"),
        ({"group_size": 2, "normalize": "batch"}, "normalize", "'batch'"),
        ({"baseline": "leave_one_out"}, "group_size", "neither"),
        ({"group_size": 2, "baseline": "batch_mean"}, "normalize", "'std'"),
        ({"group_size": 2, "group": "world"}, "group", "world"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], argument: str, came: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        group_advantages(torch.zeros(4), **options)
    check_message(caught.value, argument, came)


@pytest.mark.parametrize("normalize", ["std", "batch_std"])
def test_equal_rewards_without_eps(normalize: str) -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 3]) if normalize == "std" else torch.ones(6)
    found = group_advantages(rewards, group_size=3, normalize=normalize, eps=0.0)
    assert (found[:3] == 0).all() and not found.isnan().any()


def test_no_rewards() -> None:
    assert group_advantages(torch.zeros(0), group_size=4).shape == (0,)


def test_next_token_targets() -> None:
    ids = on_device(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    mask = on_device(torch.tensor([[False, True, True, False], [False, False, True, True]]))
    before = ids.clone(), mask.clone()
    targets, target_mask = next_token_targets(ids, mask)
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    assert target_mask.tolist() == [[True, True, False, False], [False, True, True, False]]
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1]), "the inputs are the caller's"
    targets.zero_(), target_mask.zero_()
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1]), "new tensors, not views"


def test_next_token_targets_without_a_mask() -> None:
    _, mask = next_token_targets(on_device(torch.arange(8).view(2, 4)), None)
    assert mask.tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize("shape", [(0, 4), (2, 1)])
def test_next_token_targets_of_next_to_nothing(shape: tuple[int, int]) -> None:
    targets, mask = next_token_targets(torch.zeros(shape, dtype=torch.int64), None)
    assert targets.shape == mask.shape == shape and not mask[:, -1:].any()


# --- tokens of a group ------------------------------------------------------------------------------------------------


def test_tokens_of_groups() -> None:
    mask = on_device(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool))
    expected = [3.0, 3.0, 3.0, 3.0]
    assert gspo_kernels.group_token_counts(mask, group_size=2).tolist() == expected
    assert gspo_kernels.group_token_counts(mask, group_ids=on_device(torch.tensor([7, -1, 7, 7]))).tolist() == [
        5.0, 1.0, 5.0, 5.0,
    ]  # fmt: skip
    boundaries = on_device(torch.tensor([0, 3, 6, 9, 12]))
    assert gspo_kernels.group_token_counts(mask.view(-1), boundaries, group_size=2).tolist() == expected
    with pytest.raises(ValueError, match=r"^group_size: expected a divisor of the number of responses, 4; got 3"):
        gspo_kernels.group_token_counts(mask, group_size=3)


def test_a_mean_over_groups_that_are_split() -> None:
    """By the counts of whole groups, parts of groups add up to the loss and the gradient of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    logprobs = on_device(-3.0 * torch.rand(4, 5, generator=generator).double())
    old = on_device(-3.0 * torch.rand(4, 5, generator=generator).double())
    mask = on_device(torch.rand(4, 5, generator=generator) < 0.7)
    advantages = on_device(torch.tensor([1.0, -1.0, 0.5, 2.0]))
    counts = gspo_kernels.group_token_counts(mask, group_size=2)
    options: dict[str, Any] = {"objective": gspo_kernels.GRPO(0.2, 5.0), "aggregation": "group_mean", "beta": 0.1}

    def part(rows: slice, **more: Any) -> tuple[Tensor, Tensor]:
        leaf = logprobs[rows].clone().requires_grad_()
        loss, _ = gspo_kernels.policy_loss_from_logprobs(
            leaf, advantages[rows], old[rows], mask=mask[rows], ref_logprobs=old[rows] - 0.1,
            group_tokens=counts[rows], **options, **more,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    whole, gradient = part(slice(None))
    ratio = (logprobs - old).exp()
    clipped = torch.where(advantages[:, None] > 0, ratio.clamp(max=6.0), ratio.clamp(min=0.8))
    d = old - 0.1 - logprobs
    term = torch.where(mask, 0.1 * (d.exp() - d - 1.0) - clipped * advantages[:, None], 0.0)
    expected = sum(term[i : i + 2].sum() / mask[i : i + 2].sum() for i in (0, 2)) / 2
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0.0)
    groups = gspo_kernels.global_count(mask, aggregation="group_mean", group_tokens=counts)
    assert float(groups) == pytest.approx(2.0, rel=1e-15)
    parts = [part(rows, normalizer=groups) for rows in (slice(0, 1), slice(1, 3), slice(3, 4))]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-12, atol=0.0)


def test_sequences_without_an_advantage_are_not_counted() -> None:
    mask = on_device(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool))
    advantages = on_device(torch.tensor([0.0, 1.0, 1.0, -1.0]))
    counts = gspo_kernels.group_token_counts(mask, group_size=2)
    by = {"sequence_mean": 2.0, "sequence_sum": 2.0, "token_mean": 4.0, "group_mean": 1.0 / 3.0 + 1.0}
    for aggregation, expected in by.items():
        given: dict[str, Any] = {"aggregation": aggregation}
        if aggregation == "group_mean":
            given["group_tokens"] = counts
        per_token = on_device(torch.ones(4, 3)) * advantages[:, None]
        per_token[1, 1:] = math.nan  # masked
        for given_advantages in (advantages, per_token):
            found = gspo_kernels.global_count(mask, **given, advantages=given_advantages)
            assert float(found) == pytest.approx(expected, rel=1e-15), aggregation
        assert float(gspo_kernels.global_count(mask, **given, advantages=0.0 * advantages)) == 1.0


def test_groups_without_an_advantage_are_not_counted() -> None:
    """A response of advantage 0 counts if another one of its group has an advantage."""
    mask = on_device(torch.ones(6, 2, dtype=torch.bool))
    advantages = on_device(torch.tensor([1.0, 0.0, -1.0, 0.0, 0.0, 0.0]))
    assert float(gspo_kernels.global_count(mask, advantages=advantages)) == 2.0
    assert float(gspo_kernels.global_count(mask, advantages=advantages, group_size=3)) == 3.0
    ids = on_device(torch.tensor([5, 5, 5, 7, 7, 5]))
    found = gspo_kernels.global_count(mask, advantages=advantages, group_ids=ids, aggregation="token_mean")
    assert float(found) == 8.0
    with pytest.raises(ValueError, match=r"^group_size: expected None without advantages"):
        gspo_kernels.global_count(mask, group_size=3)
