"""The comparison with peers: that it runs, that its words are true, and that the page has its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .peers.__main__ import main
from .peers.inputs import HARD, HARD_CASE, build, build_hard
from .peers.results import load
from .peers.table import PAGE, fill
from .peers.truth import in_words, solve
from .results import FOLDER

Gradients = tuple[Tensor, ...]


def test_smoke_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    hard = [line.split(" | ") for line in lines if any(line.startswith(f"| {hard.title} |") for hard in HARD.values())]
    assert len(hard) == 2 * len(HARD) - 1, "columns of -inf have no hidden states"
    assert {cells[1] for cells in hard} == {"right", "finite, no gradient from it"}


WRONG: dict[str, tuple[Callable[[Tensor, Gradients], tuple[Tensor, Gradients]], str]] = {
    "nothing": (lambda loss, gradients: (loss, gradients), "right"),
    "a factor": (lambda loss, g: (loss, tuple(0.5 * x for x in g)), "0.5 times the gradient"),
    "a sign": (lambda loss, g: (loss, tuple(-x for x in g)), "gradient off by 200%"),
    "the loss": (lambda loss, g: (loss + 0.25, g), "loss off by"),
    "a NaN": (lambda loss, g: (loss, (g[0].clone().index_fill_(0, torch.tensor(0), math.nan), *g[1:])), "gradient NaN"),
    "an infinity": (lambda loss, g: (loss * math.inf, g), "loss inf"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("start", HARD_CASE)
def test_what_is_wrong_is_said(start: str, what: str) -> None:
    change, words = WRONG[what]
    inputs = build(HARD_CASE[start])
    truth = solve(inputs)
    exact = torch.tensor(truth.loss), tuple(gradient.float() for gradient in truth.gradients)
    assert in_words(inputs, truth, *change(*exact)).startswith(words)


def test_a_gradient_without_its_softmax_is_wrong() -> None:
    """At this vocabulary what is missing is small beside the sampled tokens' columns, and measured apart from them."""
    inputs = build(HARD_CASE["logits"])
    truth = solve(inputs)
    bare = torch.zeros_like(truth.gradients[0])
    at = inputs.token_ids[..., None]
    bare.scatter_(2, at, truth.gradients[0].gather(2, at))
    assert in_words(inputs, truth, torch.tensor(truth.loss), (bare,)) == "gradient off by 100%"


@pytest.mark.parametrize("name", HARD)
def test_the_truth_is_finite(name: str) -> None:
    truth = solve(build_hard(name, "logits"))
    assert math.isfinite(truth.loss)
    assert all(bool(gradient.isfinite().all()) for gradient in truth.gradients)


def test_the_page_has_the_newest_numbers() -> None:
    newest = max(FOLDER.glob("peers-*.json"), key=lambda path: str(load(path)["machine"]["date"]))
    page = PAGE.read_text()
    assert page == fill(page, load(newest)), "python -m benchmarks.peers --write fills in docs/peers.md"
