"""The contract of the fused operators with torch: schema, fakes, autograd, dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modes import KERNELS, on_device
from torch import Tensor

from gspo_kernels import DPPO, GSPO, policy_loss_from_logprobs
from gspo_kernels.base.layout import batch_shape
from gspo_kernels.base.operators import _flatten
from gspo_kernels.base.scalars import run_time_list
from gspo_kernels.losses.fused_loss import fused_loss, fused_stage
from gspo_kernels.losses.token_stage import TokenInputs, token_inputs
from gspo_kernels.rows.types import RowOptions, Rows

pytestmark = [
    pytest.mark.plain_memory,
    pytest.mark.skipif(KERNELS != "triton", reason="Triton kernels alone: TRITON_INTERPRET=1, or a GPU"),
]

OPTIONS: dict[str, Any] = {
    "ref_logprobs": None, "beta": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0, "importance_weights": None,
    "aggregation": None, "normalizer": None, "max_log_ratio": 20.0, "kl_weighting": "none", "rollout_logprobs": None,
    "group_tokens": None,
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return on_device(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5)


def inputs(everything: bool) -> TokenInputs:
    mask = on_device(torch.tensor([[True, True, False], [True, True, True]]))
    batch = batch_shape(torch.Size([2, 3]), mask if everything else None, None, mask.device)
    if not everything:
        return token_inputs(batch, GSPO(), numbers(2), None, **OPTIONS)
    given = {"ref_logprobs": -numbers(2, 3), "beta": 0.1, "entropy_coef": 0.01, "importance_weights": numbers(2, 3)}
    given |= {"normalizer": on_device(torch.tensor(4.0)), "kl_weighting": "ratio", "rollout_logprobs": -numbers(2, 3)}
    given |= {"aggregation": "group_mean", "group_tokens": on_device(torch.tensor([5.0, 5.0]))}
    return token_inputs(batch, DPPO(), numbers(2, 3), -numbers(2, 3), **{**OPTIONS, **given})


def rows(everything: bool) -> Rows:
    ids = on_device(torch.tensor([[0, 3, 14], [7, 1, 2]]))
    one = torch.ones((), dtype=torch.float64)
    return Rows(
        numbers(2, 3, 17).requires_grad_(), ids, inputs(everything).batch.mask,
        numbers(2, 3) if everything else one, 15 if everything else 17,
    )  # fmt: skip


@pytest.mark.parametrize("operator", ["loss", "stage"])
@pytest.mark.parametrize("everything", [True, False], ids=["every argument", "few"])
def test_operators_keep_their_contract(operator: str, everything: bool) -> None:
    """Nothing is aliased or mutated without a declaration; fake tensors, autograd, and dynamic shapes under AOT."""
    declared: Any = {"loss": fused_loss, "stage": fused_stage}[operator]
    values: tuple[Any, ...] = (rows(everything), inputs(everything), RowOptions(False, "triton"))
    if operator == "stage":
        entropy = numbers(2, 3).requires_grad_() if everything else None
        values = ((-numbers(2, 3)).requires_grad_(), entropy, inputs(everything))
    given, floats = _flatten(declared._steps, values)
    given.append(run_time_list(floats))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(declared.operator._opoverload, tuple(given), test_utils=tests)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3, dtype=torch.bool)], ids=["no mask", "mask"])
def test_stats_keep_their_logprobs(mask: Tensor | None) -> None:
    """Whatever the caller writes to the log-probabilities afterwards."""
    logprobs = -numbers(2, 3)
    before = logprobs.clone()
    _, stats = policy_loss_from_logprobs(logprobs, numbers(2), mask=None if mask is None else on_device(mask))
    logprobs.fill_(-1.0)
    assert torch.equal(stats.logprobs, before)
