"""open-instruct's micro-batches, packed as it packs them: against a restatement of its loss, and GSPO in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_oracle
from checks import check_close, check_number
from modes import DEFAULT_MODE
from ragged_responses import LENGTHS, make_responses
from torch import Tensor

from gspo_kernels import GSPO, policy_loss_from_logprobs
from gspo_kernels.integrations.open_instruct import Loss, policy_loss

pytestmark = DEFAULT_MODE

BATCH = make_responses()
TOKENS, RESPONSES = int(BATCH.mask.sum()), int(BATCH.mask.any(1).sum())
Chosen = tuple[tuple[int, ...], ...]
ROWS: Chosen = ((0, 1, 2), (3, 4), (5, 6, 7))  # the responses of each packed row
INVALID = 1.0  # open-instruct's log-probability of a token that does not count
RHO = 0.5 + torch.rand(BATCH.mask.shape, generator=torch.Generator().manual_seed(2)).double()
RHO[:, 4] = 0.0  # tokens that the correction drops
WIDTH = max(sum(2 + LENGTHS[i] for i in row) for row in ROWS)


def args(**changes: Any) -> SimpleNamespace:
    """GRPOExperimentConfig's defaults."""
    found = {
        "beta": 0.05, "clip_lower": 0.2, "clip_higher": 0.272, "kl_estimator": 2, "loss_denominator": "token",
        "sequence_parallel_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**found | changes)


def packed(values: Tensor, fill: float, chosen: Chosen = ROWS) -> Tensor:
    """[rows, T]: two tokens of a prompt before each response, and padding behind the last one of a row."""
    rows = []
    for row in chosen:
        parts = [torch.cat([values.new_full((2,), fill), values[i, : LENGTHS[i]]]) for i in row]
        joined = torch.cat(parts)
        rows.append(torch.cat([joined, values.new_full((WIDTH - len(joined),), fill)]))
    return torch.stack(rows)


def numbers(chosen: Chosen) -> Tensor:
    """open-instruct's attention mask: 1, 2, ... in a row, 0 in its padding."""
    rows = []
    for row in chosen:
        joined = torch.cat([torch.full((2 + LENGTHS[i],), k + 1) for k, i in enumerate(row)])
        rows.append(torch.nn.functional.pad(joined, (0, WIDTH - len(joined))))
    return torch.stack(rows)


def arrays(chosen: Chosen = ROWS) -> dict[str, Tensor]:
    clean = BATCH.without_garbage()
    mask = packed(BATCH.mask, False, chosen)
    found = {name: packed(getattr(clean, f"{name}_logprobs"), INVALID, chosen) for name in ("old", "ref")}
    new = packed(clean.logprobs, INVALID, chosen)
    return {
        "new": torch.where(mask, new, INVALID), "mask": mask, "rho": packed(RHO, 0.0, chosen),
        "advantages": torch.where(mask, packed(BATCH.token_advantages, 0.0, chosen), 0.0),
        **{name: torch.where(mask, x, INVALID) for name, x in found.items()},
    }  # fmt: skip


def ours(
    denominator: float,
    chosen: Chosen = ROWS,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Loss, Tensor]:
    batch = arrays(chosen)
    new = batch["new"].clone().requires_grad_()
    found = policy_loss(
        args(**changes or {}), new, batch["old"], batch["advantages"], batch["mask"], numbers(chosen), batch["ref"],
        batch["rho"], denominator, **options,
    )  # fmt: skip
    found.loss.backward()
    assert new.grad is not None
    return found._replace(loss=found.loss.detach()), new.grad


@pytest.mark.parametrize("kl_estimator", [0, 1, 2, 3])
@pytest.mark.parametrize(("loss_fn", "objective"), [("dapo", "ppo"), ("cispo", "cispo")])
def test_open_instructs_losses(loss_fn: str, objective: str, kl_estimator: int) -> None:
    batch = arrays()
    new = batch["new"].clone().requires_grad_()
    changes = {"clip_lower": 0.1, "clip_higher": 0.15, "beta": 0.3, "kl_estimator": kl_estimator}
    expected = trainer_oracle.open_instruct_loss(
        new, batch["old"], batch["ref"], batch["advantages"], batch["mask"], batch["rho"], TOKENS, loss_fn=loss_fn,
        **changes,
    )  # fmt: skip
    expected.backward()
    found, gradient = ours(TOKENS, changes=changes, objective=objective, aggregation="token_mean")
    assert new.grad is not None
    check_number("loss", float(found.loss), float(expected.detach()), 1e-13)
    check_close("gradient", gradient, new.grad, 1e-13 * (new.grad.abs() + 1 / TOKENS))
    ratio = (batch["new"] - batch["old"]).exp()
    check_close("ratio", found.ratio_BT[batch["mask"]].double(), ratio[batch["mask"]], 1e-6 * ratio[batch["mask"]])
    clipped = (ratio > 1.15) & batch["mask"] & (batch["advantages"] > 0)
    if objective == "ppo":
        clipped |= (ratio < 0.9) & batch["mask"] & (batch["advantages"] < 0)
    else:
        clipped |= (ratio > 1.15) & batch["mask"] & (batch["advantages"] < 0)
    assert bool(clipped.any()) and torch.equal(found.clipfrac_BT.bool(), clipped & (batch["rho"] != 0))


def test_gspo_is_that_of_the_responses() -> None:
    """In packed rows as in padded ones; the gradient of a masked token is 0."""
    logprobs = BATCH.logprobs.clone().requires_grad_()
    expected, stats = policy_loss_from_logprobs(
        logprobs, BATCH.advantages, BATCH.old_logprobs, objective=GSPO(), mask=BATCH.mask,
        normalizer=float(len(LENGTHS)),
    )  # fmt: skip
    expected.backward()
    changes = {"loss_denominator": str(len(LENGTHS)), "beta": 0.0}
    batch = arrays()
    new = batch["new"].clone().requires_grad_()
    found = policy_loss(
        args(**changes), new, batch["old"], batch["advantages"], batch["mask"], numbers(ROWS), None,
        torch.ones_like(new), float(len(LENGTHS)),
    )  # fmt: skip
    found.loss.backward()
    assert logprobs.grad is not None and new.grad is not None
    check_number("loss", float(found.loss.detach()), float(expected.detach()), 1e-14)
    wanted = packed(logprobs.grad, 0.0)
    check_close("gradient", new.grad, wanted, 1e-13 * wanted.abs() + 1e-17)
    policy = float(expected.detach()) * len(LENGTHS) / RESPONSES
    check_number("policy term", float(found.pg_loss_BT.double()[0, 0]), policy, 1e-6)
    assert 0 < float(stats.clip_fraction) < 1


def test_rows_without_padding() -> None:
    """Where every row is full and has one response, the numbers do not change from row to row: rows never join."""
    generator = torch.Generator().manual_seed(5)
    old = -torch.rand(3, 6, generator=generator, dtype=torch.float64) - 0.1
    new = (old + 0.02 * torch.randn(3, 6, generator=generator, dtype=torch.float64)).clamp(max=0)
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    expected, _ = policy_loss_from_logprobs(new, advantages, old, objective=GSPO(), normalizer=3.0)
    found = policy_loss(
        args(loss_denominator="3", beta=0.0), new, old, advantages[:, None].expand(3, 6),
        torch.ones(3, 6, dtype=torch.bool), torch.ones(3, 6, dtype=torch.int64), None, torch.ones(3, 6), 3.0,
    )  # fmt: skip
    check_number("loss", float(found.loss), float(expected), 1e-14)


@pytest.mark.parametrize("denominator", [0.0, -1.0])
def test_a_denominator_that_counts_nothing(denominator: float) -> None:
    with pytest.raises(ValueError, match="loss_denominator: expected"):
        ours(denominator, aggregation="token_mean")


def test_micro_batches_and_ranks_add_up() -> None:
    """grpo_fast.py multiplies by the number of ranks, because DeepSpeed averages."""
    changes = {"loss_denominator": "8", "beta": 0.3}
    whole, gradient = ours(8.0, changes=changes)
    parts = [ours(8.0, (row,), changes) for row in ROWS]
    check_number("loss", sum(float(part.loss) for part, _ in parts), float(whole.loss), 1e-14)
    check_close("gradient", torch.cat([x for _, x in parts]), gradient, 1e-13 * gradient.abs())
    nothing, zeros = ours(0.0, ((3,),), changes | {"loss_denominator": "token"}, aggregation="token_mean")
    assert float(nothing.loss) == 0.0 and bool((zeros == 0).all())


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (NotImplementedError, {"sequence_parallel_size": 2}, "sequence_parallel_size: expected 1"),
        (ValueError, {}, "loss_denominator: expected the number of responses of an optimizer step"),
    ],
)
def test_errors_name_the_option(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        ours(8.0, changes=changes)
