"""The first ten steps on the trainers' pages are those that docs/scripts/first_steps.py committed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from modes import DEFAULT_MODE

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(find_spec("transformers") is None, reason="the demo's packages: pip install gspo-kernels[demo]"),
]


def test_pages_have_the_results() -> None:
    import first_steps

    results = json.loads(first_steps.RESULTS.read_text())
    assert set(results) == {path.stem for path in (first_steps.DOCS / "scripts" / "drivers").glob("[a-z]*.py")}
    for trainer, found in results.items():
        text = first_steps.page_of(trainer).read_text()
        assert first_steps.with_table(text, found["steps"]) == text, f"run docs/scripts/first_steps.py {trainer}"


def test_the_first_step_of_a_rollout_is_on_policy() -> None:
    """What the pages say: nothing is clipped there, and some responses are in every other step."""
    import first_steps

    for trainer, found in json.loads(first_steps.RESULTS.read_text()).items():
        clipped = [sum(x for name, x in step.items() if "clip" in name or "masked" in name) for step in found["steps"]]
        on_policy = [step % first_steps.MINI_BATCHES == 0 for step in range(first_steps.STEPS)]
        assert [share == 0 for share in clipped] == on_policy, trainer
