"""What the stats say of themselves, and of nothing, by whichever path they were made."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from batches import OBJECTIVES, SHORT, put_garbage, ragged_batch, run
from linear import Identity
from modes import by_backend, on_device

from gspo_kernels import GRPO, GSPO, Objective, Terms, TokenBatch, policy_loss_from_logprobs
from gspo_kernels.losses.stats import ARRAYS


@pytest.mark.parametrize("objective", OBJECTIVES)
@by_backend
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
def test_stats_tell_what_a_unit_is(objective: str, backend: str, on_policy: bool, hidden: bool) -> None:
    """Ranks whose stats are put together (`Stats.over`) count as much as they have units."""
    batch = ragged_batch(objective, seed=20, lengths=SHORT, on_policy=on_policy)
    outcome = run(batch, "packed", objective, backend=backend, function=Identity(objective) if hidden else None)
    by_sequence = oracle.OBJECTIVES[objective].per_sequence
    assert outcome.stats.ratio_of == ("sequence" if by_sequence else "token")
    assert outcome.stats.log_ratio.shape == ((len(batch.lengths),) if by_sequence else (len(batch.mask),))
    for clipped in (outcome.stats.clipped_low, outcome.stats.clipped_high):
        assert clipped.dtype == torch.bool and clipped.shape == outcome.stats.log_ratio.shape
    assert not outcome.stats.as_dict().keys() & set(ARRAYS)


@pytest.mark.parametrize("objective", OBJECTIVES)
@by_backend
@pytest.mark.parametrize("on_policy", [False, True], ids=["off-policy", "on-policy"])
@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
def test_of_nothing_everything_is_zero(objective: str, backend: str, on_policy: bool, hidden: bool) -> None:
    """Also where no rank and no micro-batch has anything that counts: `global_count` is 0 then."""
    batch = ragged_batch(objective, seed=21, lengths=SHORT, on_policy=on_policy, ref=not on_policy)
    batch.mask[:] = False
    put_garbage(batch)
    count = on_device(torch.zeros((), dtype=torch.float64))
    options: dict[str, Any] = {} if on_policy else {"beta": 0.1, "entropy_coef": 0.01}
    function = Identity(objective) if hidden else None
    outcome = run(batch, "packed", objective, backend=backend, function=function, normalizer=count, **options)
    assert float(outcome.loss) == 0.0 and bool((outcome.gradient == 0).all())
    assert {float(x) for name, x in outcome.stats.as_dict().items() if not name.startswith("head_")} == {0.0}
    assert not bool(outcome.clipped.any())


@pytest.mark.parametrize("objective", [GSPO(0.1, 0.1), GRPO(0.1, 0.1)], ids=["sequences", "tokens"])
def test_fractions_are_rounded_once(objective: Objective) -> None:
    """They are equal on every device, and to what a reader computes from counts."""
    units = 7
    new, advantages = (on_device(torch.full(shape, 1.0)) for shape in ((units, 1), (units,)))
    for clipped in (1, 3, 6):
        old = on_device((torch.arange(units) >= clipped).float()[:, None])
        stats = policy_loss_from_logprobs(-new, advantages, old - 2.0, objective=objective).stats
        assert float(stats.clip_fraction) == float(torch.tensor(clipped / units)), clipped


class AlwaysClipped(Objective):
    """Says of every token, masked ones included, that it is held at both bounds."""

    def terms(self, tokens: TokenBatch) -> Terms:
        everywhere = torch.ones_like(tokens.log_ratio, dtype=torch.bool)
        return Terms(-tokens.log_ratio * tokens.advantages, tokens.log_ratio, everywhere, everywhere)


def test_what_an_objective_of_your_own_says_counts_where_tokens_do() -> None:
    mask = on_device(torch.tensor([[True, False, True], [False, False, False]]))
    new, advantages = on_device(torch.zeros(2, 3)), on_device(torch.ones(2))
    stats = policy_loss_from_logprobs(new, advantages, objective=AlwaysClipped(), mask=mask).stats
    assert torch.equal(stats.clipped_low, mask) and torch.equal(stats.clipped_high, mask)
    assert float(stats.clip_fraction_low) == float(stats.clip_fraction_high) == 1.0
