"""GAE, the estimators of advantages and the value loss against verl's own functions, in float64.

They differ where a test here says so: verl gives a group of one its raw reward, hands on NaN rewards, adds 1e-8 to a
variance where we add `eps` to a deviation, and whitens over tokens, where `group_advantages` counts responses.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import gae, group_advantages, value_loss, whiten_advantages

pytestmark = DEFAULT_MODE
CLOSE = {"rtol": 1e-7, "atol": 1e-7}  # 1e-8 in a variance, 1e-6 in a deviation


@pytest.fixture(scope="module")
def algorithms() -> ModuleType:
    from verl.trainer.ppo import core_algos

    return core_algos  # type: ignore[no-any-return]


GROUPS = torch.tensor([0, 1, 0, 1, 2, 2, 0, 1, 2])
REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.5, 3.0, -1.0, 0.25, 0.5, 2.0], dtype=torch.float64)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and the mask, [9, 6]: prompts and padding are masked, and a gap in the middle."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 9, 6, generator=generator, dtype=torch.float64)
    mask = torch.ones(9, 6)
    mask[::2, -2:] = mask[1::3, 2] = mask[:4, 0] = 0
    return rewards, values, mask


def outcome(rewards: Tensor, mask: Tensor, at: int = 3) -> Tensor:
    """As verl has it: at one token of each response."""
    found = torch.zeros(mask.shape, dtype=torch.float64)
    found[:, at] = rewards
    return found * mask


def ours(rewards: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return group_advantages(rewards, group_ids=GROUPS, **options).double()[:, None] * mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0)])
def test_gae(algorithms: ModuleType, gamma: float, lam: float) -> None:
    rewards, values, mask = tokens()
    whitened, returns = algorithms.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    found = gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    torch.testing.assert_close(found.returns, returns * mask, **CLOSE)
    torch.testing.assert_close(whiten_advantages(found.advantages, mask=mask, eps=0.0), whitened * mask, **CLOSE)


@pytest.mark.parametrize("by_std", [True, False])
def test_group_advantages(algorithms: ModuleType, by_std: bool) -> None:
    _, _, mask = tokens()
    normalize, config = "std" if by_std else "none", {"norm_adv_by_std_in_grpo": by_std}
    index, given = GROUPS.numpy(), outcome(REWARDS, mask)
    found, _ = algorithms.compute_grpo_outcome_advantage(given, mask, index, norm_adv_by_std_in_grpo=by_std)
    torch.testing.assert_close(ours(REWARDS, mask, normalize=normalize), found, rtol=1e-6, atol=1e-7)
    best, _ = algorithms.compute_grpo_passk_outcome_advantage(given, mask, index, config=config)
    torch.testing.assert_close(
        ours(REWARDS, mask, baseline="leave_one_out_max", normalize=normalize), best, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ["compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage"])
def test_leave_one_out(algorithms: ModuleType, name: str) -> None:
    _, _, mask = tokens()
    found, _ = getattr(algorithms, name)(outcome(REWARDS, mask), mask, GROUPS.numpy())
    expected = ours(REWARDS, mask, baseline="leave_one_out", normalize="none")
    torch.testing.assert_close(expected, found.double(), rtol=1e-6, atol=1e-7)


def test_reinforce_plus_plus_over_tokens(algorithms: ModuleType) -> None:
    """verl counts a response as often as it has tokens: so does `whiten_advantages`."""
    _, _, mask = tokens()
    given = outcome(REWARDS, mask)
    found, _ = algorithms.compute_reinforce_plus_plus_baseline_outcome_advantage(given, mask, GROUPS.numpy())
    centred = group_advantages(REWARDS, group_ids=GROUPS, normalize="none").double()[:, None].expand(mask.shape)
    torch.testing.assert_close(whiten_advantages(centred, mask=mask), found, rtol=1e-6, atol=1e-6)

    rewards, _, _ = tokens()
    config = type("Config", (), {"gamma": 0.9})
    found, returns = algorithms.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config)
    without_values = gae(rewards, torch.zeros_like(rewards), gamma=0.9, lam=1.0, mask=mask)
    torch.testing.assert_close(without_values.returns, returns, **CLOSE)
    torch.testing.assert_close(whiten_advantages(without_values.returns, mask=mask), found, rtol=1e-6, atol=1e-7)


def test_reinforce_plus_plus_over_responses(algorithms: ModuleType) -> None:
    """`group_advantages` counts each once. With equal lengths that is verl's but for n - 1, of tokens there."""
    mask, length, count = torch.ones(9, 6), 6, 9
    given, factor = outcome(REWARDS, mask, -1), math.sqrt(length * (count - 1) / (length * count - 1))
    config = type("Config", (), {"gamma": 1.0})
    found, _ = algorithms.compute_reinforce_plus_plus_outcome_advantage(given, mask, config)
    expected = ours(REWARDS, mask, baseline="batch_mean", normalize="batch_std", eps=0.0)
    torch.testing.assert_close(expected, found * factor, rtol=1e-6, atol=1e-6)
    found, _ = algorithms.compute_reinforce_plus_plus_baseline_outcome_advantage(given, mask, GROUPS.numpy())
    expected = ours(REWARDS, mask, baseline="mean", normalize="batch_std", eps=0.0)
    torch.testing.assert_close(expected, found * factor, rtol=1e-6, atol=1e-6)


def test_a_group_of_one_has_no_advantage_here_and_its_reward_in_verl(algorithms: ModuleType) -> None:
    mask, groups = torch.ones(1, 6), torch.zeros(1, dtype=torch.int64)
    given = outcome(REWARDS[:1], mask)
    for name, baseline in (("grpo", "mean"), ("rloo", "leave_one_out")):
        found, _ = getattr(algorithms, f"compute_{name}_outcome_advantage")(given.clone(), mask, groups.numpy())
        assert float(found[0, 0]) == pytest.approx(1.0, abs=1e-5)
        assert group_advantages(REWARDS[:1], group_ids=groups, baseline=baseline).tolist() == [0.0]
    with pytest.raises(ValueError, match="at least 2 samples"):
        algorithms.compute_grpo_passk_outcome_advantage(given, mask, groups.numpy(), config={})
    assert group_advantages(REWARDS[:1], group_ids=groups, baseline="leave_one_out_max").tolist() == [0.0]


def test_a_nan_reward_is_left_out_here_and_handed_on_in_verl(algorithms: ModuleType) -> None:
    mask, rewards = torch.ones(9, 6), REWARDS.clone()
    rewards[0] = math.nan
    found, _ = algorithms.compute_grpo_outcome_advantage(outcome(rewards, mask), mask, GROUPS.numpy())
    assert bool(found[GROUPS == 0].isnan().all())
    expected = ours(rewards, mask)
    assert bool(expected.isfinite().all()) and float(expected[6, 0]) != 0


@pytest.mark.parametrize(
    ("aggregation", "theirs"),
    [("token_mean", "token-mean"), ("sequence_mean", "seq-mean-token-mean"), ("sequence_sum", "seq-mean-token-sum")],
)
def test_value_loss(algorithms: ModuleType, aggregation: str, theirs: str) -> None:
    old, values, mask = tokens()
    returns = old + 0.3 * torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = old + 0.4 * (values - old).sign() * torch.linspace(0, 1, 54, dtype=torch.float64).view(9, 6)
    results = []
    for mine in (True, False):
        leaf = values.clone().requires_grad_()
        if mine:
            loss, stats = value_loss(leaf, returns, old, clip_range=0.2, mask=mask, aggregation=aggregation)
            fraction = stats.clip_fraction
        else:
            loss, fraction = algorithms.compute_value_loss(leaf, returns, old, mask, 0.2, loss_agg_mode=theirs)
        loss.backward()
        results.append((loss.detach(), fraction.double(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)
    assert 0.1 < float(results[0][1]) < 0.9
