"""prime-rl's custom loss, called as its `compute_loss` calls it, against a restatement of prime-rl's default loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import stand_ins
import torch
import trainer_oracle
from checks import check_close, check_number
from modes import DEFAULT_MODE
from ragged_responses import Responses, make_responses
from torch import Tensor

from gspo_kernels import GSPO, policy_loss_from_logprobs
from gspo_kernels.integrations import prime_rl

pytestmark = DEFAULT_MODE

BATCH = make_responses()
TOKENS, RESPONSES = int(BATCH.mask.sum()), int(BATCH.mask.any(1).sum())
DEFAULT = {"objective": "dppo", "delta_low": 0.2, "delta_high": 0.2, "max_ratio": float("inf"), "kl_tau": 1e-3}


@pytest.fixture(autouse=True)
def prime_rl_module() -> Iterator[None]:
    """The one module of prime-rl that the loss imports."""
    with stand_ins.with_prime_rl():
        yield


def ours(batch: Responses, weights: Tensor | None = None, rows: range | None = None, **kwargs: Any) -> Any:
    """(loss, gradient, metrics of the samples) of some samples, divided as `compute_loss` divides."""
    logprobs = batch.logprobs.clone().requires_grad_()
    found = [
        prime_rl.policy_loss(
            stand_ins.LossInputs(
                logprobs[i], batch.old_logprobs[i], None, batch.token_advantages[i], batch.mask[i],
                None if weights is None else weights[i],
            ),
            **kwargs,
        )
        for i in rows or range(len(logprobs))
    ]  # fmt: skip
    loss = trainer_oracle.prime_rl_step([x.loss for x in found], TOKENS)
    loss.backward()
    return loss.detach(), logprobs.grad, [x.metrics for x in found]


def default(batch: Responses, weights: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    logprobs = batch.without_garbage().logprobs.requires_grad_()
    losses = [
        trainer_oracle.prime_rl_default(
            logprobs[i], batch.old_logprobs[i], batch.token_advantages[i], batch.mask[i],
            None if weights is None else weights[i], **options,
        )
        for i in range(len(logprobs))
    ]  # fmt: skip
    loss = trainer_oracle.prime_rl_step(losses, TOKENS)
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad


@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_loss(weighted: bool) -> None:
    """The gradients are equal. The value of the policy term is -ratio A there, and -sg[ratio] A logprob in DPPO."""
    weights = torch.rand(BATCH.mask.shape, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    _, gradient = default(BATCH, weights, low=0.1, high=0.15, adv_tau=0.5, kl_tau=0.01)
    options = DEFAULT | {"delta_low": 0.1, "delta_high": 0.15, "adv_tau": 0.5, "kl_tau": 0.01}
    found = ours(BATCH, weights, **options)
    check_close("gradient", found[1], gradient, 1e-13 * (gradient.abs() + 1))
    assert bool((gradient == 0).any()) and float(gradient.abs().max()) * TOKENS > 0.02
    penalty, _ = default(BATCH, weights, adv_tau=0.0, kl_tau=0.01)
    without, *_ = ours(BATCH, weights, **options | {"kl_tau": 0.0})
    check_number("penalty", float(found[0] - without), float(penalty), 1e-13)


@pytest.mark.parametrize("objective", ["gspo", "grpo", "cispo"])
def test_each_token_or_each_sample_counts_once(objective: str) -> None:
    """A sum that is divided by the step's tokens is token_mean; with `tokens_per_response`, a multiple of the mean over
    responses. Empty samples count neither as tokens nor as responses."""
    options = {"eps_low": 3e-4, "eps_high": 4e-4} if objective == "gspo" else {}
    of_ours = prime_rl.objective_of(objective, **options)
    for each, aggregation in ((None, "token_mean"), (7.5, "sequence_mean")):
        logprobs = BATCH.logprobs.clone().requires_grad_()
        expected, _ = policy_loss_from_logprobs(
            logprobs, BATCH.token_advantages, BATCH.old_logprobs, objective=of_ours, mask=BATCH.mask,
            aggregation=aggregation,
        )  # fmt: skip
        expected.backward()
        factor = 1.0 if each is None else each * RESPONSES / TOKENS
        loss, gradient, _ = ours(BATCH, objective=objective, tokens_per_response=each, **options)
        check_number("loss", float(loss), factor * float(expected.detach()), 1e-13)
        assert logprobs.grad is not None
        check_close("gradient", gradient, factor * logprobs.grad, 1e-13 * logprobs.grad.abs() + 1e-16)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_squared_log_ratio_counts_as_the_policy_term_does(weighted: bool) -> None:
    """With `tokens_per_response`, each sample's penalty is that many times its mean over tokens."""
    weights = torch.rand(BATCH.mask.shape, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    squares = torch.where(BATCH.mask, BATCH.logprobs - BATCH.old_logprobs, 0.0) ** 2
    squares = squares if weights is None else squares * weights
    means = squares.sum(1) / BATCH.mask.sum(1).clamp(min=1)
    found, without = (ours(BATCH, weights, tokens_per_response=7.5, kl_tau=kl_tau)[0] for kl_tau in (0.3, 0.0))
    check_number("penalty", float(found - without), float(0.3 * 7.5 * means.sum()) / TOKENS, 1e-13)


def test_micro_batches_and_ranks_add_up() -> None:
    loss, gradient, _ = ours(BATCH, tokens_per_response=8.0)
    parts = [ours(BATCH, rows=rows, tokens_per_response=8.0) for rows in (range(3), range(3, 4), range(4, 8))]
    check_number("loss", sum(float(part[0]) for part in parts), float(loss), 1e-14)
    check_close("gradient", sum(part[1] for part in parts), gradient, 1e-14 * gradient.abs())


def test_metrics_are_the_decisions_of_the_objective() -> None:
    *_, metrics = ours(BATCH)
    counted = [found for found, some in zip(metrics, BATCH.mask.any(1), strict=True) if some]
    _, stats = policy_loss_from_logprobs(
        BATCH.logprobs, BATCH.advantages, BATCH.old_logprobs, objective=GSPO(), mask=BATCH.mask
    )
    for name, expected in (
        ("is_masked", stats.clip_fraction), ("is_masked_low", stats.clip_fraction_low),
        ("is_masked_high", stats.clip_fraction_high),
    ):  # fmt: skip
        assert all(found[name].shape == () for found in metrics)
        check_number(name, float(torch.stack([found[name] for found in counted]).mean()), float(expected), 1e-6)
        assert 0 < float(expected) < 1


def test_garbage_at_masked_positions_has_no_effect() -> None:
    """prime-rl multiplies by the mask: its own loss would be NaN."""
    clean = ours(BATCH.without_garbage(), kl_tau=0.01)
    found = ours(BATCH, kl_tau=0.01)
    assert float(found[0]) == float(clean[0]) and torch.equal(found[1], clean[1])
    assert bool((found[1][~BATCH.mask] == 0).all())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": "ipo"}, "objective: expected one of 'gspo'"),
        ({"epsilon": 0.2}, 'epsilon: expected a parameter of objective "gspo", which has eps_low'),
        ({"tokens_per_response": 0}, "tokens_per_response: expected the tokens that a sample counts as"),
        ({"kl_tau": -1.0}, "kl_tau: expected the weight of the squared log-ratio"),
    ],
)
def test_errors_name_the_argument(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(BATCH, **kwargs)
