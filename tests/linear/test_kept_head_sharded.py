"""Kept columns from hidden states whose head or tokens are sharded over ranks, against one process in float64."""

from __future__ import annotations

from typing import Any

import linear_sharding
import pytest
import ranks
import torch
from linear_sharding import HeadGrid, complaints
from sharding import Case
from test_linear_sharded import LOW_RANK, name_of, refuse

pytestmark = ranks.mark

KEPT: dict[str, Any] = {"seed": 80, "kept": True}
CASES = [
    Case("gspo", "packed", {**KEPT, "bias": True}, {}, 2),
    Case("ppo", "padded", {**KEPT, "temperature": "token", "softcap": 5.0, "ref": True}, {"beta": 0.05}, 2),
    Case("gspo", "packed", {**KEPT, "on_policy": True}, {"entropy_coef": 0.01}, 2, ("hidden",), -2.5),
    Case("gspo", "padded", {**KEPT, "dtype": torch.bfloat16}, {}, 3),
    Case("grpo", "packed", {**KEPT, "width": 29}, LOW_RANK, 1),
    Case("grpo", "packed", {**KEPT, "lengths": (1, 0)}, {}, 1),  # under cp some ranks have nothing
    Case("gspo", "packed", {**KEPT, "dtype": torch.float64, "bias": True}, {"backend": "reference"}, 2, ("weight",)),
]
GRIDS = [
    HeadGrid(tp=2, vocab="unequal"),
    HeadGrid(tp=4, vocab="loose"),  # the last ranks have no column
    HeadGrid(cp=2),
    HeadGrid(tp=2, cp=2, vocab="dtensor", idle=True),
]


@pytest.mark.parametrize("at", GRIDS, ids=name_of)
def test_parts_of_all_ranks_are_the_loss_of_one(at: HeadGrid) -> None:
    """Most rows keep no column of some rank: all of its logits are -inf."""
    found = ranks.run(at.size, linear_sharding.from_hidden, at, CASES)
    refuse(complaints(found, at, CASES), len(CASES))
