"""The contract of the hidden-state path's operators with torch: schema, fakes, autograd, dynamic shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE, on_device
from torch import Tensor

from gspo_kernels import DPPO, GSPO
from gspo_kernels.base.layout import batch_shape
from gspo_kernels.base.operators import Operator, _flatten
from gspo_kernels.base.scalars import run_time_list
from gspo_kernels.linear.both_heads import both_heads_operator
from gspo_kernels.linear.operators import (
    linear_logits_operator,
    linear_loss_operator,
    linear_row_gradient_operator,
    linear_row_stats_operator,
)
from gspo_kernels.linear.sparse_head import kept_gradient_operator, kept_logits_operator
from gspo_kernels.linear.types import HeadArguments, KeptColumns, NeedsGrad
from gspo_kernels.losses.token_stage import TokenInputs, token_inputs
from gspo_kernels.rows.types import RowStats, Upstream

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]

OPTIONS: dict[str, Any] = {
    "ref_logprobs": None, "beta": 0.0, "kl_estimator": "k3", "entropy_coef": 0.0, "importance_weights": None,
    "aggregation": None, "normalizer": None, "max_log_ratio": 20.0, "kl_weighting": "none", "rollout_logprobs": None,
    "group_tokens": None,
}  # fmt: skip
MASK = torch.tensor([[True, True, False], [True, True, True]])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return on_device(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def head() -> HeadArguments:
    """All operands need a gradient; padding in the head; a mask, and a temperature for each row."""
    return HeadArguments(
        hidden=numbers(2, 3, 5).requires_grad_(),
        weight=numbers(17, 5).requires_grad_(),
        bias=numbers(17).requires_grad_(),
        low_rank_hidden=numbers(2, 3, 2).requires_grad_(),
        low_rank_weight=numbers(17, 2).requires_grad_(),
        token_ids=on_device(torch.tensor([[0, 3, 14], [7, 1, 2]])),
        mask=on_device(MASK),
        temperature=numbers(2, 3).abs() + 0.5,
        tanh_scale=torch.tensor(0.5, dtype=torch.float64),
        vocab_size=15,
        dtype=torch.float32,
        chunk_bytes=4 * 17 * 4,
        backend=None,
        shard=None,
    )


def frozen_head() -> HeadArguments:
    """Only the hidden states need a gradient; nothing is optional."""
    of_all = torch.ones((), dtype=torch.float64)
    return replace(
        head(), weight=numbers(17, 5), bias=None, low_rank_hidden=None, low_rank_weight=None, mask=None,
        temperature=of_all, tanh_scale=None, vocab_size=17,
    )  # fmt: skip


def inputs(arguments: HeadArguments, everything: bool) -> TokenInputs:
    batch = batch_shape(arguments.token_ids.shape, arguments.mask, None, arguments.hidden.device)
    if not everything:
        return token_inputs(batch, GSPO(), numbers(2), None, **OPTIONS)
    logprobs = -numbers(2, 3).abs()
    given = {"ref_logprobs": logprobs, "beta": 0.1, "entropy_coef": 0.01, "importance_weights": numbers(2, 3)}
    given |= {
        "normalizer": on_device(torch.tensor(4.0)),
        "kl_weighting": "ratio",
        "rollout_logprobs": -numbers(2, 3).abs(),
    }
    given |= {"aggregation": "group_mean", "group_tokens": on_device(torch.tensor([5.0, 5.0]))}
    return token_inputs(batch, DPPO(), numbers(2, 3), logprobs, **{**OPTIONS, **given})


def detached(arguments: HeadArguments) -> HeadArguments:
    operands = arguments.operands()._asdict()
    return replace(arguments, **{name: None if x is None else x.detach() for name, x in operands.items()})


def samples(operator: str, everything: bool) -> tuple[Operator[Any], tuple[Any, ...]]:
    """An operator and the values that it takes."""
    arguments = head() if everything else frozen_head()
    needs_grad = NeedsGrad(True, everything, everything, everything, everything)
    if operator == "loss":
        return linear_loss_operator, (arguments, needs_grad, inputs(arguments, everything))
    if operator == "row_stats":
        return linear_row_stats_operator, (arguments, needs_grad)
    if operator == "logits":
        return linear_logits_operator, (detached(arguments).operands(), 15, torch.float32)
    if operator.startswith("kept"):
        return kept_samples(operator, arguments, needs_grad)
    stats = RowStats(-numbers(2, 3).abs(), numbers(2, 3).abs(), numbers(2, 3).double())
    g = numbers(2, 3, seed=1)
    return linear_row_gradient_operator, (
        detached(arguments),
        needs_grad,
        stats,
        Upstream(g, g, g) if everything else Upstream(g),
    )


def kept_samples(operator: str, arguments: HeadArguments, needs_grad: NeedsGrad) -> tuple[Operator[Any], Any]:
    """One row keeps its token alone, one all columns; the row that is masked keeps other ids than its token."""
    rows = [[4, 0], [3], [1, 2], [7, 8, 9], [], [0, 2, 14]]
    ids = torch.tensor([v for row in rows for v in row], dtype=torch.int32)
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    if arguments.mask is None:  # the third row is not masked then, and has to keep its token
        ids[3] = 14
    kept = KeptColumns(on_device(ids), on_device(ends), "reference", False)
    if operator == "kept_logits":
        return kept_logits_operator, (arguments, kept, needs_grad)
    if operator == "kept_gradient":
        return kept_gradient_operator, (detached(arguments), kept, needs_grad, numbers(len(ids)))
    return both_heads_operator, (
        arguments,
        kept,
        on_device(torch.tensor([[False] * 3, [False, True, False]])),
        needs_grad,
    )


@pytest.mark.parametrize(
    "operator", ["loss", "logits", "row_stats", "row_gradient", "kept_logits", "kept_gradient", "kept_and_full"]
)
@pytest.mark.parametrize("everything", [True, False], ids=["every argument", "few"])
def test_operators_keep_their_contract(operator: str, everything: bool) -> None:
    """Nothing is aliased or mutated without a declaration; fake tensors, autograd, and dynamic shapes under AOT."""
    declared, values = samples(operator, everything)
    given, floats = _flatten(declared._steps, values)
    if declared._has_numbers:
        given.append(run_time_list(floats))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if declared is linear_loss_operator:
        tests.pop()  # it compares every output, but the backward has overwritten the gradients among them
    torch.library.opcheck(declared.operator._opoverload, tuple(given), test_utils=tests)


def test_the_arguments_have_the_names_of_the_fields() -> None:
    """A field that is added to a value becomes an argument of this name."""
    names = [argument.name for argument in linear_loss_operator.operator._opoverload._schema.arguments]
    for name in (
        "hidden",
        "weight",
        "bias",
        "low_rank_weight",
        "chunk_bytes",
        "needs_grad_weight",
        "old_logprobs",
        "aggregation",
    ):
        assert name in names
