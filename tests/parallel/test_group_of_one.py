"""Sharded losses over a group of one process: every kernel and the collectives, in every mode, against the oracle.

What several ranks do to each other is in test_sharded.py, on the CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import LAYOUTS, OBJECTIVES, PUBLIC, SHORT, ragged_batch, run
from checks import check_outcome
from linear import Identity
from modes import DTYPES, INTERPRETED
from modes import KERNELS as BEST

from gspo_kernels import token_logprobs

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off-policy": ({}, {}),
    "on-policy": ({"on_policy": True}, {}),
    "all": (
        {"ref": True, "weights": "token", "temperature": "token", "softcap": 5.0},
        {"beta": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0, "aggregation": "token_mean"},
    ),
}
GROUPS = ["tp_group", "cp_group"]


def groups(group: dist.ProcessGroup | None, *names: str) -> dict[str, Any]:
    if group is None:
        pytest.skip("needs torch with gloo, or with NCCL on a GPU")
    return dict.fromkeys(names, group)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_logits(
    objective: str, layout: str, name: str, case: str, dtype: torch.dtype, group_of_one: dist.ProcessGroup | None
) -> None:
    build, options = CASES[case]
    batch = ragged_batch(objective, seed=50, dtype=dtype, **build)
    function = partial(PUBLIC[objective], **groups(group_of_one, name))
    outcome = run(batch, layout, objective, function=function, upstream=-0.75, backend=BEST, **options)
    check_outcome(outcome, batch, objective, upstream=-0.75, roundings=2, **options)  # in one pass it is scaled later


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("rows", [2, None], ids=["chunks of 2", "one chunk"])
def test_from_hidden_states(
    objective: str, layout: str, name: str, rows: int | None, group_of_one: dist.ProcessGroup | None
) -> None:
    batch = ragged_batch(objective, seed=51, lengths=SHORT)
    identity = Identity(objective, rows)
    outcome = run(batch, layout, objective, function=partial(identity, **groups(group_of_one, name)))
    check_outcome(outcome, batch, objective)
    identity.check_gradients(outcome, batch)


def test_the_kernels_that_run_are_those_of_this_mode(group_of_one: dist.ProcessGroup | None) -> None:
    """A rank's shard goes through the same kernels as whole rows do."""
    given = groups(group_of_one, "tp_group")
    logits = torch.zeros(1, 4, dtype=torch.float64)
    if INTERPRETED:
        with pytest.raises(ValueError, match=r"backend: .*triton"):
            token_logprobs(logits, torch.tensor([0]), backend="triton", **given)
