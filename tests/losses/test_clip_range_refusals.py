"""What `suggest_clip_range` refuses, and what its messages say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from modes import NOT_INTERPRETED, on_device
from test_clip_range import KINDS, suggest
from test_errors import check_message
from torch import Tensor

import gspo_kernels
from gspo_kernels.base import layout

pytestmark = NOT_INTERPRETED


ROWS, ONES = torch.linspace(-0.1, 0.1, 24).view(8, 3), torch.tensor([1.0, -1.0]).repeat(4)
CU = torch.tensor([0, 8, 24])
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # changed arguments, which is named, what came
    "percent": ({"share": 15}, "share", "15% is 0.15"),
    "a share of 1": ({"share": 1.0}, "share", "1.0"),
    "no updates": ({"log_ratio": [], "advantages": []}, "log_ratio", "empty list"),
    "stats": ({"log_ratio": gspo_kernels.RolloutMismatch}, "log_ratio", "RolloutMismatch"),
    "half precision": ({"log_ratio": ROWS.bfloat16()}, "log_ratio", "bfloat16"),
    "three dimensions": ({"log_ratio": ROWS[None]}, "log_ratio", "[1, 8, 3]"),
    "a list and a tensor": ({"log_ratio": [ROWS]}, "advantages", "a tensor of shape [8]"),
    "fewer advantages": ({"log_ratio": [ROWS, ROWS], "advantages": [ONES]}, "advantages", "got 1"),
    "which update": ({"log_ratio": [ROWS, ROWS], "advantages": [ONES, ONES[1:]]}, "advantages", "(update 2 of 2)"),
    "kinds": ({"log_ratio": [ROWS, ROWS[:, 0]], "advantages": [ONES, ONES]}, "log_ratio", "one per sequence"),
    "tokens of sequences": ({"log_ratio": ROWS[:, 0], "ratio_of": "token"}, "log_ratio", "[8]"),
    "sequences for GRPO": ({"log_ratio": ROWS[:, 0], "current": gspo_kernels.GRPO()}, "log_ratio", "[8]"),
    "tokens for GSPO": ({"ratio_of": "token", "current": gspo_kernels.GSPO()}, "ratio_of", "'token'"),
    "a generator": ({"log_ratio": (x for x in (ROWS, ROWS))}, "log_ratio", "list of one per update; got generator"),
    "a list beside a tensor": ({"advantages": [ONES, ONES]}, "advantages", "a list of 2"),
    "a class": ({"current": gspo_kernels.GSPO}, "current", "GSPO"),
    "advantages of tokens": ({"log_ratio": ROWS[:, 0], "advantages": ROWS}, "advantages", "[8, 3]. If all tokens"),
    "kind": ({"ratio_of": "response"}, "ratio_of", "'response'"),
    "packed without boundaries": ({"log_ratio": ROWS.view(-1)}, "advantages", "pass cu_seqlens"),
    "packed": ({"log_ratio": ROWS.view(-1), "cu_seqlens": CU}, "advantages", "[8]"),
    "which are N": (
        {"log_ratio": ROWS[:2, 0], "advantages": ONES[:2], "cu_seqlens": torch.tensor([0, 0, 2])}, "log_ratio", "[2]",
    ),
    "wrong boundaries": ({"log_ratio": ROWS[:, 0], "cu_seqlens": torch.tensor([0, 4, 2])}, "cu_seqlens", "[0, 4, 2]"),
    "other boundaries": ({"log_ratio": ROWS[:, 0], "cu_seqlens": CU}, "cu_seqlens", "[0, 8, 24]"),
    "other mask": ({"log_ratio": ROWS[:, 0], "mask": ROWS[:5] < 9}, "log_ratio", "[8]"),
    "NaN": ({"log_ratio": torch.where(ROWS > 0.09, math.nan, ROWS)}, "log_ratio", "NaN in response 7"),
    "NaN of an update": (
        {"log_ratio": [ROWS, ROWS.log()], "advantages": [ONES, ONES]}, "log_ratio", "response 0 of update 2 of 2",
    ),
    "NaN advantage": ({"advantages": torch.where(ONES > 0, math.nan, ONES)}, "advantages", "NaN in response 0"),
    "GMPO": ({"current": gspo_kernels.GMPO()}, "current", "one of the log-ratio"),
    "CISPO": ({"current": gspo_kernels.CISPO()}, "current", "either sign"),
    "SAPO": ({"current": gspo_kernels.SAPO()}, "current", "SAPO"),
    "a negative bound": ({"current": (-0.1, 0.1)}, "eps_low", "-0.1"),
    "no lengths": ({"log_ratio": ROWS[:, 0], "noise": 0.1}, "mask", "None"),
    "a mismatch": ({"noise": type("Mismatch", (), {"noise": torch.tensor(0.1)})()}, "noise", "pass its noise"),
    "negative noise": ({"noise": torch.tensor(-0.1)}, "noise", "-0.1"),
    "two noises": ({"noise": torch.ones(2)}, "noise", "[2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")  # a GPU's boundaries are not read otherwise
    change, argument, came = REFUSED[case]
    given = {"log_ratio": ROWS, "advantages": ONES, **change}
    if isinstance(given.get("noise"), Tensor):
        given["noise"] = on_device(given["noise"])
    with pytest.raises((TypeError, ValueError)) as caught:
        suggest(**given)
    check_message(caught.value, argument, came)


def test_updates_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^log_ratio: expected a tensor on cpu, .* meta \(update 2 of 2\)"):
        gspo_kernels.suggest_clip_range([ROWS, ROWS.to("meta")], [ONES, ONES.to("meta")])


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_boundaries_that_are_not_read_at_first_are_refused_at_the_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(layout, "may_read", lambda boundaries: False)
    log_ratio = ROWS.view(-1) if kind == "token" else ROWS[0]
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected boundaries that start at 0"):
        suggest(log_ratio, ONES[:3], cu_seqlens=torch.tensor([0, 9, 8, 24]))


# --- ranks ------------------------------------------------------------------------------------------------------------
