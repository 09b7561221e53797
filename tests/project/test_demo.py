"""The demo trains with every objective that the package exports, and with a value model."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from batches import CLASSES
from modes import DEFAULT_MODE

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import arithmetic  # noqa: E402
import train_arithmetic  # noqa: E402
from critic import Critic  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]

BRIEF = replace(arithmetic.QUICK, steps=1, groups=4, samples=4, held_out=2, evaluations=1, max_response=5)


def train(
    name: str, with_critic: bool, clip_share: float | None = None, steps: int = 1
) -> tuple[train_arithmetic.History, list[torch.Tensor], Critic | None]:
    """One step from a random model; how far each of its parameters moved."""
    torch.manual_seed(0)
    problems = arithmetic.Problems(random.Random(0), BRIEF.digits, BRIEF.held_out)
    tokenizer = arithmetic.build_tokenizer()
    model = arithmetic.build_model(tokenizer)
    before = [x.detach().clone() for x in model.parameters()]
    critic = Critic(model, lam=0.95) if with_critic else None
    objective = arithmetic.OBJECTIVES[name]()
    settings = replace(BRIEF, steps=steps)
    history = train_arithmetic.reinforce(model, tokenizer, problems, settings, objective, critic, clip_share)
    return history, [(x.detach() - y).abs().amax() for x, y in zip(model.parameters(), before, strict=True)], critic


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)  # as the demo does: threads that wait for each other take most of the time


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some for each problem: a random model answers nothing right."""
    monkeypatch.setattr(arithmetic, "grade", lambda problems, responses: (torch.arange(len(problems)) % 4).float())


def test_objectives_are_those_of_the_package() -> None:
    assert arithmetic.OBJECTIVES == CLASSES and "gspo_token" in CLASSES


@pytest.mark.parametrize("name", arithmetic.OBJECTIVES)
def test_every_objective_trains(name: str) -> None:
    history, moved, _ = train(name, with_critic=False)
    assert len(history.reward) == 1 and len(history.held_out_accuracy) == 2 and not history.explained_variance
    assert all(0 < float(x) < 0.1 for x in moved)


def test_a_critic_trains() -> None:
    history, moved, critic = train("ppo", with_critic=True)
    assert critic is not None and float(critic.head.weight.detach().abs().amax()) > 0
    assert len(history.explained_variance) == 1 and all(0 < float(x) < 0.1 for x in moved)


@pytest.mark.filterwarnings("ignore:advantages. expected at least")  # a step has 16 responses
@pytest.mark.parametrize("name", ["gspo", "grpo", "ppo"])
def test_the_clip_range_is_fitted_after_each_rollout(name: str) -> None:
    constant, _, _ = train(name, with_critic=name == "ppo")
    assert constant.clip_range == [] and constant.clip_fit is not None
    history, _, _ = train(name, with_critic=name == "ppo", clip_share=0.3, steps=2)
    own = arithmetic.OBJECTIVES[name]()
    first, second = history.clip_range
    assert first == [own.eps_low, own.eps_high] and second != first and all(0 < x < 1 for x in second)
    fit = history.clip_fit
    assert fit is not None and [fit.eps_low, fit.eps_high] == second
    assert (fit.share, fit.updates) == (0.3, 8)
    if name == "gspo":  # of which each response has a ratio, and here an advantage
        assert fit.clipped == pytest.approx(sum(history.clip_fraction) / 2, rel=1e-6) and fit.clipped > 0
    assert (constant.clip_fit.share, constant.clip_fit.updates) == (0.15, 4)
    suggested = [f"eps_low {fit.suggested_low:.2g}", f"eps_high {fit.suggested_high:.2g}"]
    assert all(text in fit.lines() for text in (*suggested, "for 30%", "the last 8 updates"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--loss", "cispo", "--clip-share", "0.2"], "--clip-share: only for gspo, gspo_token, grpo and ppo, which"),
        (["--clip-share", "15"], "--clip-share: expected a share above 0 and below 1, such as 0.15, got 15"),
        (
            ["--loss", "gspo", "--critic"],
            "--critic: makes an advantage for each token, and gspo has one for a response",
        ),
        (["--loss", "dro", "--eps-low", "0.1"], "--eps-low: dro has no such clip range"),
    ],
)
def test_impossible_combinations_end_the_program(
    line: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_arithmetic.py", *line])
    with pytest.raises(SystemExit):
        train_arithmetic.main()
    assert message in capsys.readouterr().err
