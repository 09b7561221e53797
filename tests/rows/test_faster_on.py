"""The CUDA kernels are the default on those GPUs where committed results have them ahead of Triton's."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from modes import DEFAULT_MODE

from benchmarks import gpu_page
from benchmarks.gpu import FOLDER, ONE_READ
from gspo_kernels.rows.cuda_rows import FASTER_ON

pytestmark = DEFAULT_MODE

TIMES = {"ours": 2.0, "ours_fresh": 2.1, "ours_cuda": 1.5, "ours_cuda_fresh": 1.4, "copy": 1.2}


def contents(**times: float) -> dict[str, Any]:
    """Of all cases: in the last some contestants take other times, and one of time 0 was not timed."""
    cases = {}
    for name in ONE_READ:
        of_case = TIMES | times if name == ONE_READ[-1] else TIMES
        cases[name] = {"contestants": {key: {"median": time} for key, time in of_case.items() if time}}
    parts = {"one_read": {"status": "ok"}, "one_read-more": {"status": "ok"}}
    return {"one_read": {"cases": cases}, "parts": parts}


def test_the_files_and_the_package_agree() -> None:
    ahead: dict[str, list[bool]] = {}
    for path in FOLDER.glob("gpu-*.json"):
        content = json.loads(path.read_text())
        if content.get("one_read") and content.get("machine"):
            ahead.setdefault(content["machine"]["gpu"], []).append(gpu_page.everywhere(content))
    assert {gpu for gpu, found in ahead.items() if all(found)} == FASTER_ON


def test_ahead_in_every_case() -> None:
    assert gpu_page.everywhere(contents())
    first, *_, last = gpu_page.ratios(contents(ours_cuda=1.6)).values()
    assert (first, last) == pytest.approx((2.0 / 1.5, 2.0 / 1.6))


@pytest.mark.parametrize("times", [{"ours_cuda": 2.0}, {"ours_cuda_fresh": 2.2}, {"ours": 1.4}, {"ours_fresh": 1.3}])
def test_behind_in_one_case(times: dict[str, float]) -> None:
    assert not gpu_page.everywhere(contents(**times))


@pytest.mark.parametrize("name", ["ours", "ours_fresh", "ours_cuda", "ours_cuda_fresh"])
def test_one_was_not_timed(name: str) -> None:
    assert not gpu_page.everywhere(contents(**{name: 0.0}))


def test_the_part_did_not_come_to_its_end() -> None:
    for name, status in itertools.product(("one_read", "one_read-more"), ("failed", "timed out", "running")):
        content = copy.deepcopy(contents())
        content["parts"][name]["status"] = status
        assert not gpu_page.everywhere(content)


def test_the_second_run_is_missing() -> None:
    content = contents()
    del content["parts"]["one_read-more"], content["one_read"]["cases"][ONE_READ[-1]]
    assert not gpu_page.everywhere(content)


def test_nothing_measured() -> None:
    assert not gpu_page.everywhere({})
    assert not gpu_page.everywhere({"one_read": {"cases": {}}, "parts": {"one_read": {"status": "ok"}}})
