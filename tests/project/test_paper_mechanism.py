"""The ablations of the staleness study: a loss with exchanged parts has its formula's gradient, and pushes are counted
as by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import GRPO, GSPO, Objective, policy_loss_from_logprobs

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "paper")]

import mechanism  # noqa: E402
from mechanism import Mixed, Pushes  # noqa: E402
from running_sums import EOS, PAD, Part, prompt  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]

LOW, HIGH = 0.2, 0.3
# By response: log-ratios of its tokens, and its advantage. A ratio is in the range from 0.8 to 1.3 or far outside.
RESPONSES = [
    ([0.1, -0.5, 0.2, 0.0], -1.0),  # a token is clipped; the response's ratio is 0.95
    ([0.1, 0.5, -0.3], 2.0),  # a token is clipped; 1.11
    ([-0.5, -0.4, -0.6, 0.1, 0.4], -0.5),  # three tokens; 0.82
    ([-0.9, -0.1, 0.05], -1.5),  # one token; and the response, 0.73
    ([1.4, 0.1], 0.7),  # one token; and the response, 2.12
    ([-0.5, 0.6], 0.0),
]


def weights_by_hand(weight: str, clipped_by: str) -> list[list[float]]:
    found = []
    for logs, advantage in RESPONSES:
        of_tokens, of_response = [math.exp(r) for r in logs], math.exp(sum(logs) / len(logs))

        def outside(ratio: float, sign: float = advantage) -> bool:
            return ratio < 1 - LOW if sign < 0 else ratio > 1 + HIGH

        clipped = {
            "token": [outside(w) for w in of_tokens],
            "any token": [any(map(outside, of_tokens))] * len(logs),
            "sequence": [outside(of_response)] * len(logs),
        }[clipped_by]
        ratios = of_tokens if weight == "token" else [of_response] * len(logs)
        found.append([0.0 if out else ratio for out, ratio in zip(clipped, ratios, strict=True)])
    return found


def gradient(objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """-> of the log-probabilities [S, T], float64; the mask; which tokens are clipped, or which responses"""
    width = max(len(logs) for logs, _ in RESPONSES)
    mask = torch.tensor([[i < len(logs) for i in range(width)] for logs, _ in RESPONSES])
    old = torch.full(mask.shape, -3.0, dtype=torch.float64)
    logs = torch.tensor([r + [9.0] * (width - len(r)) for r, _ in RESPONSES], dtype=torch.float64)
    logprobs = (old + logs).requires_grad_()
    advantages = torch.tensor([advantage for _, advantage in RESPONSES], dtype=torch.float64)
    loss, stats = policy_loss_from_logprobs(logprobs, advantages, old, mask=mask, objective=objective)
    (found,) = torch.autograd.grad(loss, logprobs)
    return found, mask, stats.clipped_low | stats.clipped_high


@pytest.mark.parametrize("weight", ["token", "sequence"])
@pytest.mark.parametrize("clipped_by", ["token", "any token", "sequence"])
def test_the_gradient_is_the_formula_s(weight: str, clipped_by: str) -> None:
    found, mask, clipped = gradient(Mixed(weight, clipped_by, LOW, HIGH))  # type: ignore[arg-type]
    by_hand = weights_by_hand(weight, clipped_by)
    for i, (logs, advantage) in enumerate(RESPONSES):
        expected = [-w * advantage / len(logs) / len(RESPONSES) for w in by_hand[i]]
        assert found[i, mask[i]].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if advantage:
            assert clipped[i, mask[i]].tolist() == [w == 0 for w in by_hand[i]]
    assert not found[~mask].any()
    assert not clipped[~mask].any()


def test_both_parts_of_one_loss_are_that_loss() -> None:
    for kind, objective in (("token", GRPO(LOW, HIGH)), ("sequence", GSPO(LOW, HIGH))):
        mixed, _, _ = gradient(Mixed(kind, kind, LOW, HIGH))  # type: ignore[arg-type]
        torch.testing.assert_close(mixed, gradient(objective)[0], rtol=1e-6, atol=1e-12)


PROBLEM = [3, 4]
ANSWERS = {  # and which of its tokens are right
    (3, 3, 4, 7, EOS): [True] * 5,
    (3, 3, 5, 8, EOS): [True, True, False, True, True],  # a wrong copy; the sum builds on it
    (3, 4, 4, 8, EOS): [True, False, True, True, True],  # a wrong sum; so does the next
    (3, 3, EOS): [True, True, False],
    (3, 3, 4, 7, 2, EOS): [True, True, True, True, False, False],  # too long
}


def part_of(answers: list[tuple[int, ...]], advantages: list[float]) -> Part:
    width = max(map(len, answers))
    responses = torch.tensor([[*answer, *[PAD] * (width - len(answer))] for answer in answers])
    prompts = torch.tensor([prompt(PROBLEM)] * len(answers))
    old = torch.full(responses.shape, -2.0)
    return Part(prompts, responses, responses != PAD, torch.tensor(advantages), old)


def test_right_tokens_go_on_from_the_response_s_own() -> None:
    part = part_of(list(ANSWERS), [0.0] * len(ANSWERS))
    found = mechanism.right_tokens(part.prompts, part.responses) & part.mask
    assert [row[here].tolist() for row, here in zip(found, part.mask, strict=True)] == list(ANSWERS.values())


@pytest.mark.parametrize("name", [mechanism.GRPO_NARROW, mechanism.WHOLE])
def test_pushes_are_counted(name: str) -> None:
    answers = list(ANSWERS)
    part = part_of([answers[0], answers[1], answers[2]], [1.0, -0.5, -0.5])
    log_ratio = torch.zeros(part.responses.shape)
    log_ratio[1, 2] = -1.0  # the wrong token of the second: clipped below 0.8
    log_ratio[1, 3] = 0.2
    log_ratio[2, 0] = -1.0  # a right token of the third; its wrong one is not clipped
    log_ratio[2, 1] = 0.3
    trial = next(trial for trial in mechanism.PLAN.trials() if trial.name == name)
    _, stats = policy_loss_from_logprobs(
        part.old_logprobs + log_ratio, part.advantages, part.old_logprobs, mask=part.mask, objective=trial.objective
    )
    pushes = Pushes(replace(trial, mini_batches=16))
    pushes.see(part, stats, depth=5)
    found = pushes.result()
    assert found["largest"] == pytest.approx(1.0)
    assert all(sum(depths) == depths[2] for depths in found["pushes"].values())
    counts = {key: depths[2] for key, depths in found["pushes"].items()}
    a, b = math.exp(0.2), math.exp(0.3)  # ratios of pushed tokens that are not 1
    expected = {
        "responses": 2, "right": 8, "rewarded": 5, "right_change": 0.2 - 1.0, "wrong_change": 0.3 - 1.0,
        "rewarded_change": 0.0, "up": 5.0,
    }  # fmt: skip
    if name == mechanism.WHOLE:
        expected |= dict.fromkeys(["left", "left_tokens", "push_left", "push", "push_right", "down"], 0.0)
        expected["clipped"] = 2
    else:
        expected |= {"clipped": 1, "left": 1, "left_tokens": 4, "push_left": 3 + a}
        expected |= {"push": 3 + a + 3 + b, "push_right": 3 + a + 3, "down": (3 + a + 3) / 2}
    assert counts == pytest.approx(expected, rel=1e-5, abs=1e-6)
