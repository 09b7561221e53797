"""Inputs of a loss: group advantages, and targets rolled left by one."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import NOT_INTERPRETED, on_device
from torch import Tensor

import gspo_kernels
from gspo_kernels import next_token_targets

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


def test_a_nan_reward_stays_in_its_group() -> None:
    actual = group_advantages(torch.tensor([1.0, float("nan"), 1.0, 0.0]), group_size=2)
    assert bool(actual[:2].isnan().all()) and bool(actual[2:].isfinite().all())


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
