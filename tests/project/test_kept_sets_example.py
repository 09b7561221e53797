"""examples/kept_sets.py: the engine's filters, the exact gradient, clip fractions, and the page that shows them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels import KeptTokens

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import arithmetic  # noqa: E402
import kept_sets  # noqa: E402
from kept_sets import lab  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]
BRIEF = replace(kept_sets.SMOKE, groups=8, max_response=6)


@pytest.fixture(autouse=True)
def seeded(threads: None) -> None:
    torch.set_num_threads(1)  # products this small gain nothing from a second one
    torch.manual_seed(0)


@pytest.fixture
def learner() -> lab.Learner:
    """Not trained, but with logits large enough for a filter to drop some columns."""
    tokenizer = arithmetic.build_tokenizer()
    model = arithmetic.build_model(tokenizer, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return lab.Learner(model, tokenizer, lab.Problems(lab.random.Random(0), digits=2, held_out=2))


@pytest.mark.parametrize("chosen", kept_sets.FILTERS, ids=lambda each: each.name)
def test_the_filters_are_those_of_the_package(chosen: kept_sets.Filter) -> None:
    logits = 3 * torch.randn(200, 16)
    expected = KeptTokens.from_logits(logits, top_p=chosen.top_p, top_k=chosen.top_k, min_p=chosen.min_p)
    assert KeptTokens.from_mask(chosen.keeps(logits)).to_lists() == expected.to_lists()


def test_only_kept_sets_give_the_exact_gradient(learner: lab.Learner) -> None:
    chosen = kept_sets.FILTERS[0], kept_sets.TRAINED
    found = kept_sets.bias(learner, chosen, kept_sets.ENUMERATED[1:2])
    unfiltered, filtered = (found[each.name] for each in chosen)
    assert all(each["error"] < 1e-5 for each in (*unfiltered.values(), filtered["kept"]))
    assert all(filtered[way]["error"] > 0.02 for way in ("engine", "recomputed"))


def test_every_response_is_enumerated_once(learner: lab.Learner) -> None:
    found = kept_sets.enumerated(learner, kept_sets.ENUMERATED[:2], kept_sets.TRAINED)
    logprobs = kept_sets.among(found.logits, found.keep).gather(-1, found.token_ids[..., None])
    total = torch.zeros(2).index_add(0, found.problem, logprobs[..., 0].sum(1).exp())
    torch.testing.assert_close(total, torch.ones(2))
    responses = torch.cat([found.problem[:, None], found.token_ids], 1)
    assert len(responses) == len(responses.unique(dim=0)) > 20


def test_nothing_is_clipped_before_anything_was_learned(learner: lab.Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sets, "grade", lambda problems, responses: (torch.arange(len(problems)) % 4 > 0).float())
    found = kept_sets.clipping(learner, kept_sets.TRAINED, BRIEF)
    assert found["kept"]["clipped"] == 0 and found["kept"]["largest"] < 1e-5
    assert found["engine"]["clipped"] == 0.25 and found["engine"]["penalized"] == 1
    assert found["mass"] < 0.95 and 1 < found["columns"] < 15


@pytest.mark.parametrize("name", kept_sets.TRAININGS)
def test_a_training_clips_at_once_without_kept_sets_alone(
    name: str, learner: lab.Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_sets, "grade", lambda problems, responses: (torch.arange(len(problems)) % 4 > 0).float())
    chosen, way, _ = kept_sets.TRAININGS[name]
    before = [x.detach().clone() for x in learner.model.parameters()]
    history = kept_sets.train(learner, chosen, way, replace(BRIEF, mini_batches=1))
    assert history["clipped"] == ([0.25] if name == "engine" else [0])
    assert history["mass"][0] == pytest.approx(1) if name == "unfiltered" else history["mass"][0] < 0.95
    assert all(bool((x != y).any()) for x, y in zip(learner.model.parameters(), before, strict=True))


def test_the_page_shows_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "write", lambda figure, arguments: lab.plt.close(figure))
    record = json.loads((ROOT / "docs" / "kept-sets.json").read_text())
    page = (ROOT / "docs" / "kept-sets.md").read_text()
    assert kept_sets.fill(page, record) == page, "python examples/kept_sets.py --redraw --output docs"
    assert all(text in page for text in kept_sets.tables(record).values())
    kept_sets.draw(record, SimpleNamespace(name="kept-sets", output=None))
