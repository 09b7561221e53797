"""Losses that trainers know by a name of their own, as docs/objectives.md makes them from an objective, an aggregation
and a normalizer: value and gradient against the formula in plain torch, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import (
    CISPO,
    DPPO,
    DRO,
    GRPO,
    GSPO,
    LossOutput,
    Objective,
    global_count,
    group_advantages,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logprobs,
    rollout_weights,
    token_logprobs,
)

pytestmark = DEFAULT_MODE

GROUP, RESPONSES, LENGTH, VOCABULARY, WIDTH = 3, 9, 7, 13, 5
GENERATOR = torch.Generator().manual_seed(21)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


HIDDEN, HEAD = random(RESPONSES, LENGTH, WIDTH), random(VOCABULARY, WIDTH)
LOGITS = HIDDEN @ HEAD.T
IDS = torch.randint(VOCABULARY, (RESPONSES, LENGTH), generator=GENERATOR)
MASK = torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 6, 2, 7, 4, 4])[:, None]
NOW = token_logprobs(LOGITS, IDS).logprobs
OLD = (NOW + 0.3 * random(RESPONSES, LENGTH)).clamp(max=-1e-3)
ENGINE = (OLD + 0.2 * random(RESPONSES, LENGTH)).clamp(max=-1e-3)
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)  # the last group: all wrong
ADVANTAGES = group_advantages(REWARDS, group_size=GROUP).double()
A = ADVANTAGES[:, None]
GROUP_TOKENS = MASK.sum(1).reshape(-1, GROUP).sum(1).repeat_interleave(GROUP)


def ours(objective: Objective, old: Tensor | None = OLD, advantages: Tensor = ADVANTAGES, **options: Any) -> Tensor:
    """Loss and gradient, from padded and from packed logits, which have to agree."""
    found = []
    for packed in (False, True):
        logits = LOGITS.clone().requires_grad_()
        arrays = {"old_logprobs": old, **options}
        given, ids = logits, IDS
        if packed:
            given, ids = logits[MASK], IDS[MASK]
            per_token = {name for name, x in arrays.items() if isinstance(x, Tensor) and x.shape == MASK.shape}
            arrays |= {name: arrays[name][MASK] for name in per_token}
            boundaries = torch.nn.functional.pad(MASK.sum(1).cumsum(0), (1, 0))
            arrays["cu_seqlens"] = boundaries
        else:
            arrays["mask"] = MASK
        loss, _ = policy_loss(given, ids, advantages, objective=objective, **arrays)
        loss.backward()
        assert logits.grad is not None
        found.append(torch.cat([loss.detach()[None], logits.grad.flatten()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)
    return found[0]


def plain(formula: Callable[[Tensor], Tensor]) -> Tensor:
    """Loss and gradient of a formula of the log-probabilities."""
    logits = LOGITS.clone().requires_grad_()
    loss = formula(logits.log_softmax(-1).gather(-1, IDS[..., None])[..., 0])
    loss.backward()
    assert logits.grad is not None
    return torch.cat([loss.detach()[None], logits.grad.flatten()])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def over_tokens(terms: Tensor, mask: Tensor = MASK) -> Tensor:
    return terms[mask].sum()


# --- by name ----------------------------------------------------------------------------------------------------------


def test_luspo_is_gspo_with_the_sum_over_a_sequence() -> None:
    def luspo(logprobs: Tensor) -> Tensor:
        lengths = MASK.sum(1)
        ratio = (((logprobs - OLD) * MASK).sum(1) / lengths).exp()
        return (lengths * clipped(ratio, ADVANTAGES, 0.05, 0.06)).mean()

    found = ours(GSPO(0.05, 0.06), aggregation="sequence_sum")
    assert_equal(found, plain(luspo))
    assert not torch.allclose(found, ours(GSPO(0.05, 0.06)))


def test_dapo_is_grpo_with_a_higher_upper_bound_and_the_mean_over_all_tokens() -> None:
    def dapo(logprobs: Tensor) -> Tensor:
        return over_tokens(clipped((logprobs - OLD).exp(), A, 0.2, 0.28)) / MASK.sum()

    assert_equal(ours(GRPO(0.2, 0.28), aggregation="token_mean"), plain(dapo))
    count = global_count(MASK, aggregation="token_mean")
    assert_equal(in_micro_batches(GRPO(0.2, 0.28), aggregation="token_mean", normalizer=count), plain(dapo))


def test_dr_grpo_divides_by_a_constant_length() -> None:
    longest = 32  # the generation budget
    centred = (REWARDS.reshape(-1, GROUP) - REWARDS.reshape(-1, GROUP).mean(1, keepdim=True)).reshape(-1)

    def dr_grpo(logprobs: Tensor) -> Tensor:
        terms = clipped((logprobs - OLD).exp(), centred[:, None], 0.2, 0.2)
        return torch.where(MASK, terms, 0.0).sum(1).div(longest).mean()

    advantages = group_advantages(REWARDS, group_size=GROUP, normalize="none")
    torch.testing.assert_close(advantages.double(), centred, rtol=1e-6, atol=0)
    options: dict[str, Any] = {"aggregation": "sequence_sum", "normalizer": RESPONSES * longest}
    assert_equal(ours(GRPO(0.2, 0.2), advantages=centred, **options), plain(dr_grpo))


def test_bnpo_divides_each_micro_batch_by_its_own_tokens() -> None:
    parts = (slice(0, 3), slice(3, 9))

    def bnpo(logprobs: Tensor) -> Tensor:
        terms = clipped((logprobs - OLD).exp(), A, 0.2, 0.2)
        return torch.stack([over_tokens(terms[part], MASK[part]) / MASK[part].sum() for part in parts]).mean()

    assert_equal(in_micro_batches(GRPO(0.2, 0.2), aggregation="token_mean") / len(parts), plain(bnpo))


def in_micro_batches(objective: Objective, **options: Any) -> Tensor:
    """The sum of the losses of two parts of the batch, and its gradient."""
    logits = LOGITS.clone().requires_grad_()
    loss = LOGITS.new_zeros(())
    for part in (slice(0, 3), slice(3, 9)):
        of_part = {name: x[part] if isinstance(x, Tensor) and x.ndim else x for name, x in options.items()}
        loss = (
            loss
            + policy_loss(
                logits[part], IDS[part], ADVANTAGES[part], OLD[part], mask=MASK[part], objective=objective, **of_part
            ).loss
        )
    loss.backward()
    assert logits.grad is not None
    return torch.cat([loss.detach()[None], logits.grad.flatten()])


def test_prime_rl_is_dppo_without_truncation_and_a_squared_log_ratio() -> None:
    tau, delta = 1e-3, 0.05

    def dropped(logprobs: Tensor) -> Tensor:
        moved = logprobs.detach().exp() - ENGINE.exp()
        return torch.where(A > 0, moved > delta, moved < -delta)

    def penalized(logprobs: Tensor, terms: Tensor) -> Tensor:
        terms = torch.where(dropped(logprobs), 0.0, terms) + tau * (logprobs - ENGINE).square()
        return over_tokens(terms) / MASK.sum()

    def with_its_gradient(logprobs: Tensor) -> Tensor:
        return penalized(logprobs, -(logprobs - ENGINE).exp() * A)

    def with_our_value(logprobs: Tensor) -> Tensor:
        return penalized(logprobs, -(logprobs - ENGINE).detach().exp() * A * logprobs)

    found = ours(DPPO(delta, delta, max_ratio=None), ENGINE, ref_logprobs=ENGINE, beta=2 * tau, kl_estimator="k2")
    assert bool(dropped(NOW)[MASK].any()) and not bool(dropped(NOW)[MASK].all())
    assert_equal(found, plain(with_our_value))
    assert_equal(found[1:], plain(with_its_gradient)[1:])


def test_scale_rl_is_cispo_with_a_mean_over_prompts() -> None:
    def scale_rl(logprobs: Tensor) -> Tensor:
        terms = -(logprobs - OLD).exp().clamp(max=1.2).detach() * A * logprobs
        of_prompts = torch.where(MASK, terms, 0.0).reshape(-1, GROUP * LENGTH).sum(1)
        return (of_prompts / MASK.reshape(-1, GROUP * LENGTH).sum(1)).mean()

    objective = CISPO(eps_low=1.0, eps_high=0.2)  # by default 4: a weight of at most 5
    assert_equal(ours(objective, aggregation="group_mean", group_tokens=GROUP_TOKENS), plain(scale_rl))
    count = global_count(MASK, aggregation="group_mean", group_tokens=GROUP_TOKENS)
    assert float(count) == pytest.approx(RESPONSES / GROUP, rel=1e-12)
    split = in_micro_batches(objective, aggregation="group_mean", group_tokens=GROUP_TOKENS, normalizer=count)
    assert_equal(split, plain(scale_rl))


@pytest.mark.parametrize("old", [None, OLD], ids=["on_policy", "off_policy"])
def test_reinforce_and_gpg_are_dro_without_a_penalty(old: Tensor | None) -> None:
    def reinforce(logprobs: Tensor) -> Tensor:
        return over_tokens(-A * logprobs) / MASK.sum()

    assert_equal(ours(DRO(penalty=0.0), old), plain(reinforce))


def test_reinforce_with_importance_weights_is_cispo_without_a_bound() -> None:
    def weighted(logprobs: Tensor) -> Tensor:
        return over_tokens(-(logprobs - OLD).exp().detach() * A * logprobs) / MASK.sum()

    assert_equal(ours(CISPO(1.0, math.inf)), plain(weighted))


@pytest.mark.parametrize(("low", "high"), [(0.2, math.inf), (math.inf, 0.2)])
def test_one_sided_clipping(low: float, high: float) -> None:
    def one_sided(logprobs: Tensor) -> Tensor:
        terms = clipped((logprobs - OLD).exp(), A, low, high)
        return (torch.where(MASK, terms, 0.0).sum(1) / MASK.sum(1)).mean()

    assert_equal(ours(GRPO(low, high)), plain(one_sided))


def test_truncated_weights_of_the_engine_multiply_the_policy_term() -> None:
    def truncated(logprobs: Tensor) -> Tensor:
        weights = (OLD - ENGINE).exp().clamp(max=1.1)
        terms = weights * clipped((logprobs - OLD).exp(), A, 0.2, 0.27)
        return (torch.where(MASK, terms, 0.0).sum(1) / MASK.sum(1)).mean()

    weights, _ = rollout_weights(OLD, ENGINE, mask=MASK, upper=1.1)
    torch.testing.assert_close(weights.double()[MASK], (OLD - ENGINE).exp().clamp(max=1.1)[MASK], rtol=1e-6, atol=0)
    exact = torch.where(MASK, (OLD - ENGINE).exp().clamp(max=1.1), 0.0)
    assert_equal(ours(GRPO(), importance_weights=exact), plain(truncated))


# --- groups without an advantage --------------------------------------------------------------------------------------


def from_logits(**options: Any) -> LossOutput:
    return policy_loss(LOGITS, IDS, ADVANTAGES, OLD, mask=MASK, **options)


def from_hidden(**options: Any) -> LossOutput:
    return linear_policy_loss(HIDDEN, HEAD, IDS, ADVANTAGES, OLD, mask=MASK, **options)


def from_logprobs(**options: Any) -> LossOutput:
    return policy_loss_from_logprobs(NOW, ADVANTAGES, OLD, mask=MASK, **options)


PATHS: dict[str, Callable[..., LossOutput]] = {
    "logits": from_logits,
    "hidden": from_hidden,
    "hidden_without_their_work": lambda **options: from_hidden(skip_zero_advantage=True, **options),
    "logprobs": from_logprobs,
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum", "group_mean"])
def test_groups_of_equal_rewards_are_left_out_of_the_denominator(aggregation: str, path: str) -> None:
    """As if the batch were without them; and skip_zero_advantage, which is about work, changes nothing."""
    some = slice(0, RESPONSES - GROUP)
    options: dict[str, Any] = {"objective": GRPO(), "aggregation": aggregation}
    groups: dict[str, Any] = {"group_tokens": GROUP_TOKENS} if aggregation == "group_mean" else {}
    groups_of_some = {name: x[some] for name, x in groups.items()}
    without = policy_loss(
        LOGITS[some], IDS[some], ADVANTAGES[some], OLD[some], mask=MASK[some], **options, **groups_of_some
    )
    count = global_count(MASK, aggregation=aggregation, advantages=ADVANTAGES, **groups)
    found = PATHS[path](normalizer=count, **options, **groups)
    torch.testing.assert_close(found.loss, without.loss, rtol=1e-10, atol=0.0)
    diluted = PATHS[path](**options, **groups).loss
    assert not torch.allclose(diluted, without.loss, rtol=0.05)


@pytest.mark.parametrize("options", [{"logit_scale": 0.5}, {"logit_scale": 0.5, "softcap": 2.0}], ids=str)
def test_skipped_work_with_scaled_or_capped_logits(options: dict[str, float]) -> None:
    expected = from_logits(objective=GRPO(), **options).loss
    plain = from_logits(objective=GRPO()).loss
    found = from_hidden(objective=GRPO(), skip_zero_advantage=True, **options).loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    assert not torch.allclose(found, plain, rtol=1e-3)
