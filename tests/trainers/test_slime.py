"""slime's hook over Megatron-Core's own `mpu`, against plain float64 and, where slime is installed, slime's own loss.

slime has no wheel. With a checkout of it on the path the second test runs too: PYTHONPATH=/path/to/slime pytest ...
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import ranks
import torch
from checks import check_number
from megatron_ranks import GRIDS, WORLD
from slime_ranks import CASES, check_shares, shares_over_megatron

ranks.PRELOADED += ["megatron.core", "slime_ranks"]
pytestmark = ranks.mark


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return ranks.run(WORLD, shares_over_megatron, list(CASES.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tp", "cp"), GRIDS)
def test_shares_over_megatrons_groups_are_the_whole(found: list[Any], tp: int, cp: int, case: str) -> None:
    k = list(CASES).index(case)
    check_shares([one[tp, cp][k][0] for one in found[: tp * cp]], tp, cp, CASES[case])


@pytest.mark.skipif(find_spec("slime") is None, reason="slime has no wheel: it is compared where its source is")
@pytest.mark.parametrize("case", [name for name in CASES if "advantages per token" not in name])
@pytest.mark.parametrize(("tp", "cp"), GRIDS)
def test_slimes_own_loss_is_the_same(found: list[Any], tp: int, cp: int, case: str) -> None:
    """In float32, whose rounding in slime's ratios is the larger one. It has another gradient for GSPO-token."""
    for rank in range(tp * cp):
        ours, theirs = found[rank][tp, cp][list(CASES).index(case)]
        assert ours["log"].keys() <= theirs["log"].keys()
        for name, x in ours["log"].items():
            size = max(1.0, abs(float(theirs["log"][name])))
            check_number(f"{name} of rank {rank}", float(x), float(theirs["log"][name]), 5e-6 * size)
        largest = float(theirs["gradient"].abs().max())
        assert torch.allclose(ours["gradient"], theirs["gradient"], rtol=0, atol=5e-6 * largest), f"rank {rank}"


def test_the_pages_first_steps_have_the_papers_loss(found: list[Any]) -> None:
    (loss, stats, gradient), (theirs, log, of_driver) = found[0]["driver"]["ours"], found[0]["driver"]["driver"]
    assert float(theirs) == pytest.approx(float(loss), rel=1e-6) and torch.allclose(of_driver, gradient, atol=1e-7)
    assert log["train/loss"] == log["train/pg_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert log["train/pg_clipfrac"] == pytest.approx(stats["clip_fraction"], rel=1e-6) and log["train/pg_clipfrac"] > 0
