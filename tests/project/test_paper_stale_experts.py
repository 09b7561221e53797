"""examples/paper/stale_experts.py and the experts of running_sums.py: what is replayed, and what is measured."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels import GRPO, GSPO, policy_loss

NEEDED = ("transformers", "tokenizers", "matplotlib", "tqdm")
HERE = all(find_spec(name) for name in NEEDED) and int(version("transformers").split(".")[0]) >= 5
pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(not HERE, reason="needs the demo's packages, with transformers 5: make demo"),
]


def stale_experts() -> Any:
    """Imported by the first test that runs, because it takes seconds."""
    folder = str(Path(__file__).parents[2] / "examples" / "paper")
    if folder not in sys.path:
        sys.path.append(folder)
    return import_module("stale_experts")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Products this small gain nothing from a second thread."""
    torch.set_num_threads(1)


def rolled_out(replay: bool) -> tuple[Any, Any]:
    """-> a model, and a mini-batch of its responses; both the same with and without replay"""
    study = stale_experts()
    trial = study.Trial(study.TINY, 0, "GRPO 0.2", GRPO(), 4e-4, 1, experts=study.EXPERTS, replay=replay)
    torch.manual_seed(0)
    model = import_module("running_sums").build(study.EXPERTS)
    parts, _ = study.roll_out(model, trial, random.Random(0))
    return model, replace(parts[0], advantages=torch.linspace(-1, 1, 8))


def updated(model: Any, part: Any) -> Any:
    """The stats and routers' gradients of the mini-batch, after the weights have moved far."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return loss_of(model, part)


def loss_of(model: Any, part: Any, objective: Any = None) -> Any:
    with part.routed(model):
        logits = stale_experts().logits_of(model, part.prompts, part.responses)
    objective = objective or GRPO()
    return policy_loss(logits, part.responses, part.advantages, part.old_logprobs, objective=objective, mask=part.mask)


def test_a_rollouts_first_update_is_on_policy() -> None:
    for replay in (False, True):
        model, part = rolled_out(replay)
        _, stats = loss_of(model, part)
        assert (stats.logprobs - part.old_logprobs)[part.mask].abs().max() < 1e-6
        sums = stale_experts().routed_sums(part, stats, part.choices)
        assert sums["rerouted"] == 0 < sums["other"] == part.mask.sum()


def test_an_update_uses_the_old_experts_only_with_replay() -> None:
    """What the experts are called with; the choices that are recorded are the routers' own in both cases."""
    for replay in (False, True):
        model, part = rolled_out(replay)
        used: list[Any] = []
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args, used=used: used.append(args[1]))
        loss, _ = updated(model, part)
        moved = stale_experts().changed(torch.stack(used, 1), part.experts.flatten(0, 1))
        assert moved.any() != replay
        assert stale_experts().changed(torch.stack(part.choices, 1), part.experts.flatten(0, 1)).any()
        loss.backward()
        assert all(layer.mlp.gate.weight.grad.abs().sum() > 0 for layer in model.model.layers)


def test_routed_sums_count_tokens_and_responses() -> None:
    """Against loops over tokens."""
    study = stale_experts()
    for objective in (GRPO(), GSPO(eps_low=0.03, eps_high=0.04)):
        model, part = rolled_out(False)
        updated(model, part)
        _, stats = loss_of(model, part, objective)
        found = study.routed_sums(part, stats, part.choices)
        clipped = stats.clipped_low | stats.clipped_high
        assert clipped.any()
        expected = dict.fromkeys(found, 0.0)
        length = part.prompts.shape[1] + part.responses.shape[1] - 1
        for row, mask in enumerate(part.mask.tolist()):
            of_row = []
            for t in (t for t, inside in enumerate(mask) if inside):  # an untrained model may sample padding
                place = part.prompts.shape[1] - 1 + t
                news = [set(layer[row * length + place].tolist()) for layer in part.choices]
                same = news == [set(old.tolist()) for old in part.experts[row, place]]
                size = (stats.logprobs[row, t] - part.old_logprobs[row, t]).item()
                is_clipped = bool(clipped[row] if clipped.ndim == 1 else clipped[row, t])
                of_row.append((size, is_clipped))
                group = "other" if same else "rerouted"
                expected[group] += 1
                expected[f"{group}_squares"] += size**2
                expected[f"{group}_clipped"] += is_clipped
            expected["sequences"] += 1
            expected["sequences_squares"] += (sum(size for size, _ in of_row) / len(of_row)) ** 2
            expected["sequences_clipped"] += any(is_clipped for _, is_clipped in of_row)
        assert expected["rerouted"] > 0 < expected["other"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_look_compares_own_and_old_experts_of_the_same_tokens(tmp_path: Path) -> None:
    """Both measurements are grouped by the choices without replay."""
    study = stale_experts()
    trial = study.Trial(study.TINY, 0, "GRPO 0.2", GRPO(), 2e-2, 8, updates=8, experts=study.EXPERTS)
    torch.save(import_module("running_sums").build(study.EXPERTS).state_dict(), tmp_path / "warm-7-20-0-8.pt")
    found = study.look(trial, tmp_path)
    own, replayed = study.total(found["own"]), study.total(found["replayed"])
    assert len(found["own"]) == 4  # after 0, 1, 2 to 3, 4 to 7 updates
    assert all(own[name] == replayed[name] for name in ("rerouted", "other", "sequences"))
    assert found["own"][0]["other_squares"] < 1e-10
    assert study.rms(replayed, "rerouted") < study.rms(own, "rerouted")
